"""Benchmarks of the engine alone, in one process: `python -P -m quire.engine.bench`.

Read in this order:
    __main__   the command line
    arguments  its arguments; those of the engine are made from EngineConfig
    commands   the two benchmarks, and what they print and save
    workload   requests of random prompts, and the loop that times the steps

This room may import engine.core and the engine's words, and engine.runner lazily. It needs no HTTP
and no messaging package.
"""
