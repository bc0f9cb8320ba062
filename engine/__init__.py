"""Everything between a tokenised request and a sampled token. Needs no HTTP package.

The modules directly in this folder are its words: plain data that all rooms speak, free of torch.
They import only each other and the standard library. From a request inwards:

    errors           the one tree of exceptions, with their codes
    sampling_params  how tokens are drawn
    reasoning        where an answer's reasoning begins and ends, and its budget
    request          a client's request, and whether it can ever run
    lora             LoRA adapters by name
    config           the engine's configuration, and what it reports when it is ready
    main_memory      how much main memory there is to take, and how many CPUs
    embedding_spec   how a model makes embeddings
    classifier_spec  how a model makes scores
    outputs          what the engine reports to its clients
    sequence         one stream of tokens with its blocks; a request forks into n of them
    step             what passes between scheduler and worker in one step
    worker_protocol  the seam between the engine's loop and the device
    client           the engine's interface to the HTTP process

The rooms, in reading order:

    core             START HERE: one step is schedule, forward, sample, update
    scheduling       which sequences run in a step, and how many tokens of each
    speculation      guessed tokens that a step verifies
    cache            which KV blocks they get: sharing, copy-on-write
    grammar          which tokens a constrained sequence may sample
    runner           the worker: a step's inputs, its forward pass, its results
    checkpoints      where a model's files are, and formats other than plain safetensors
    model, body      the loaded transformer, and its layers written out flat
    adapters         LoRA adapters: their files, and what they add to a linear layer
    parallel         one model on several devices
    flags            how the fields of the configuration are declared
    layers           which layers share block tables, and how many blocks a sequence takes
    attention        writing K and V to their blocks, and attending through block tables
    sampling         from logits to one token per row
    devices          what differs between CPU and CUDA
    events           what happens to blocks, and who is told
    process          the engine in its own process, and its clients
    fleet            several engines: which one gets a request
    plan             the capacity planner: engines on a virtual clock
    bench            measuring the engine without HTTP

What each room may import stands in its own docstring; tests/test_rooms.py enforces it.
"""
