"""What runs on a GPU in the place of a model's layers, and the kernels that it launches.

Read in this order:

    kernels.py   all kernels, as one value that tests replace by their oracles
    products.py  chooses the products of weights that have 4 or 8 bits
    experts.py   the experts of mixtures, run by one kernel
    states.py    the operations of layers that keep a state
    adapters.py  the slots of LoRA adapters

May import: the rooms that engine.devices may, and kernels.cuda.
"""
