"""Make a tiny reranker, and the scores that transformers gives with it, for check_cohere.py."""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from ..engine.models import COMMON
from ..server.fakes import VOCAB_SIZE, byte_tokenizer


def main(folder: str) -> None:
    """Save the model and its tokenizer; print the score of each document for a query.

    Standard input is {"query": …, "documents": […]}. The tokenizer joins a pair by concatenation.
    """
    asked = json.load(sys.stdin)
    fields = COMMON | {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 1024}
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_config(
        LlamaConfig(**fields, num_labels=1), attn_implementation="eager"
    )
    model.eval().save_pretrained(folder)
    byte_tokenizer()._hf.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    with torch.no_grad():
        for document in asked["documents"]:
            token_ids = tokenizer(asked["query"], document).input_ids
            scores.append(float(torch.sigmoid(model(torch.tensor([token_ids])).logits[0, 0])))
    print(json.dumps(scores))
