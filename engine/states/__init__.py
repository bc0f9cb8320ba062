"""Layers that keep a state: linear attention, short convolutions and Mamba-2.

Such a layer knows of a sequence's earlier tokens only what it has kept in a state of a fixed size.
transformers' code of these layers takes one sequence at a time; here it runs over packed rows, by
other functions in the place of those that mix tokens.

Read in this order:

    state_spec.py   which layers keep a state, and of what size, from the configuration
    step_states.py  what such a layer must know of a step, and what a device does for it
    layers.py       the functions that transformers' layers call, and the proof that they compute
                    the same
    model_states.py what does not go with such layers, and how those of a model are prepared

The slots are given by engine/cache/state_slots.py, their numbers are in
engine/runner/state_store.py, and the arithmetic is the device's: engine/devices/cpu/states.py and
engine/devices/cuda/layers/states.py.

May import: the engine's words.
"""
