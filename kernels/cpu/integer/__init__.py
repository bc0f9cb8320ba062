"""Products in integers: weights of 4 or 8 bits times rows of x in 8 bits.

Read them in this order:

    groups.py     what is computed, and the sums in registers
    dots.py       how a processor multiplies bytes
    quantise.py   rows of x as integers
    fetch.py      rows of an embedding that is such a weight
    products.py   the kernels, and a weight for them

May import: kernels.cpu.
"""
