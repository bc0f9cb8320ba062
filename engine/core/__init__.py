"""The engine's loop. Start reading here.

Reading order:

    step_loop      the four verbs of a step: schedule → forward → sample → update
    engine_core    the loop with everything around it: requests in, outputs out
    trials         requests suspected of killing engines, which begin one at a time
    adapters       LoRA adapters, loaded and unloaded while requests run
    snapshot       all blocks and sequences, for those who watch

May import: the engine's words, cache, tiers, scheduling, grammar. Never runner: the loop is given a
worker and knows only its protocol (engine/worker_protocol.py).
"""
