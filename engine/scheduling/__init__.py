"""Which sequences compute how many tokens in the next step. Torch-free.

Reading order:

    scheduler           takes requests, asks for a step's plan, and is updated from its results
    step_planner        the heart: running sequences first, then waiting ones, under one budget
    roster              the running sequences, and which of them the worker knows
    policy              what fcfs, priority and fair decide: who is admitted, who is preempted
    ranked_queue        fcfs and priority
    fair_queue          fair: the user who was served least goes first
    adapter_table       LoRA adapters: which are loaded, and which have a slot on the device
    tiered_scheduler    the scheduler of an engine that keeps evicted blocks elsewhere
    admission           how a waiting sequence begins: cached prefix, first slots
    step_budget         how large steps may be after some that the device had no memory for
    drafting            drafts of speculative decoding, in a plan and in its results
    request_table       the unfinished requests, and their deadlines
    sequence_outputs    outputs that are more than one token
    beam_search         groups of sequences that fork and end together

May import: the engine's words, cache, tiers and speculation.
"""
