"""One model on several devices: ranks that each run a part of it, in lock-step with rank 0.

Rank 0 is the engine process. It alone schedules, samples and knows requests. It sends each step as
numbers to the followers, which run the same forward on their parts of the weights and of the KV
cache. They meet in collectives.

Reading order:

    group            the collectives
    tensor_plan      how each layer is cut, and what is refused
    cut_layers       cuts the layers
    state_cuts       cuts those that keep a state
    adapter_cuts     cuts LoRA adapters like them
    stages           the stages of a pipeline
    step_plan        a step as numbers
    ranks            this rank's place among all, and its ways to the others
    messages         what passes between rank 0 and followers, besides tensors
    leader           rank 0's side: starts followers, and ends with the first that ends
    follower         a follower's side
    launch           how a follower is started
    follower_process the follower's process
    host             the ranks of a host other than 0

May import: devices and its, network; lazily process and runner.
"""
