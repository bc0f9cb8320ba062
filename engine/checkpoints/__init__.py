"""Checkpoints: where a model's files are, and readers of formats other than plain safetensors.

Read in this order:

    source.py           finds a model's files: a folder, a hub id, a GGUF file, a known name
    hub.py              whether a folder or hub repository is there, asked once, within seconds
    checkpoint.py       the protocol of a reader, the table of formats, what is said of the weights
    gguf_header.py      GGUF's metadata and tensor table, read within bounds and checked
    gguf_config.py      a transformers configuration from that metadata
    gguf_tokenizer.py   a folder with the tokenizer of a GGUF file, made once and kept
    gguf_blocks.py      GGML's blocks as grouped weights or dense tensors
    gguf_checkpoint.py  the reader: a GGUF file's tensors under the names of the model's parameters
    content_hash.py     tells one model's files from another's, to continue only what it began

    quantized_config.py      which methods of quantised safetensors are read, and which refused
    tensor_files.py          safetensors files: shapes from their headers, numbers when asked for
    quantized_layers.py      the layouts of quantised layers as grouped weights or dense tensors
    quantized_checkpoint.py  the reader: quantised safetensors under the names of parameters

The HTTP process uses those of these files that import no torch: source.py, hub.py, gguf_header.py,
gguf_config.py, gguf_tokenizer.py and quantized_config.py.

May import: body, the engine's words.
"""
