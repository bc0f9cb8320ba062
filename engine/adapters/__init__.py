"""LoRA adapters (arXiv 2106.09685): y = W x + s · B A x for chosen linear layers of a model.

Read in this order:

    adapter.py         an adapter's weights, and the linear layers that can have some
    peft_config.py     what an adapter_config.json of PEFT asks for, and what is refused
    peft_files.py      reads an adapter from the folder that PEFT saved
    slots.py           the protocol of a device's slots, which hold the adapters that run
    adapted_linear.py  a linear layer that adds what the adapters of a step's tokens add

Which adapter has which slot is the scheduler's business (engine/scheduling/adapter_table.py).
May import: body, the engine's words.
"""
