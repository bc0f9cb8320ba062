"""The worker: one model on one device, one KV cache, one step at a time.

Reading order:

    worker             loads the model, sizes the KV cache, runs steps
    model_runner       one step: block copies, inputs, forward, sampling
    speculative_runner the same with a draft model beside it
    draft_model        loads the draft model, if it fits
    alone              a step whose tokens are computed one at a time
    state_store        the states of layers that keep one, in slots
    adapter_store      the weights of LoRA adapters, and the slots of those that run
    input_batch        the packed inputs of a step, from rows that persist between steps
    plan_sender        sends each step to the ranks that run it, too
    row_sampling       samples the rows, so that an error in one costs only that one
    pending_results    the results on their way to the host
    prompt_logprobs    log-probabilities of prompt tokens
    pooling            embeddings
    kv_cache           how large the KV cache may be

May import: model, parallel, devices, adapters, body, attention, states, sampling, kernels, and the
engine's words.
"""
