"""Test the shipped demo model: it loads, is small, and has an exact template and tokenizer."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

DEMO = Path(__file__).parents[2] / "configs" / "demo"
WEIGHTS = DEMO / "model.safetensors"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEMO)


def test_the_weights_are_small_and_match_the_card() -> None:
    data = WEIGHTS.read_bytes()
    assert len(data) <= 6_000_000
    card = (DEMO / "README.md").read_text()
    digest = re.search(r"`([0-9a-f]{64})`", card)
    assert digest is not None and digest[1] == hashlib.sha256(data).hexdigest()
    assert "{{" not in card
    assert f"{len(data):,} bytes" in card
    with safe_open(WEIGHTS, "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors} == {torch.float16}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
    parameters = sum(tensor.numel() for tensor in tensors)
    assert 1_000_000 <= parameters <= 2_900_000
    assert f"{parameters:,} parameters" in card


def test_special_tokens_are_single_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    for number, token in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>")):
        assert tokenizer.encode(token, add_special_tokens=False) == [number]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert len(tokenizer) == 1536


@pytest.mark.parametrize(
    "text",
    [
        "",
        " a  b\n\n\tc ",
        "Grüße, 世界 🌍!",
        "naïve café — “quoted”",
        "\x00\x7f",
        "12 + 345",
        "👩‍👩‍👧",
    ],
)
def test_the_tokenizer_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("98765") == list("98765")


def test_the_template_writes_chatml(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "2 + 2"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\n2 + 2<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_template_writes_tools_calls_and_results(tokenizer: PreTrainedTokenizerBase) -> None:
    call = {"name": "get_weather", "arguments": {"city": "Oslo"}}
    quoted = {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    messages = [
        {"role": "user", "content": "Weather in Oslo and Rome?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": call},
                {"id": "2", "type": "function", "function": quoted},
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "rainy"},
        {"role": "tool", "tool_call_id": "2", "content": "sunny"},
    ]
    text = tokenizer.apply_chat_template(
        messages, tools=[TOOL], tokenize=False, add_generation_prompt=True
    )
    head, tail = text.split("<|im_end|>\n", 1)
    assert head.startswith("<|im_start|>system\n# Tools\n")
    assert (
        '<tools>\n{"type": "function", "function": {"name": "get_weather", "parameters": '
        '{"type": "object", "properties": {"city": {"type": "string"}}}}}\n</tools>' in head
    )
    assert tail == (
        "<|im_start|>user\nWeather in Oslo and Rome?<|im_end|>\n"
        "<|im_start|>assistant\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
        "<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nrainy\n</tool_response>\n"
        "<tool_response>\nsunny\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("How do I set an API key?", "--api-key"),
        ("how can i change the port", "--port"),
        ("What is 27 + 58?", "27 + 58 = 85"),
        ("Who are you?", "demo model"),
        ("Tell me a story about a fox", "fox"),
        ("What is the capital of Peru?", "tiny demo model"),
    ],
)
def test_the_model_answers(
    tokenizer: PreTrainedTokenizerBase, question: str, expected: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(
        **inputs, max_new_tokens=160, do_sample=False, temperature=None, top_p=None
    )
    new = out[0, inputs["input_ids"].shape[1] :]
    assert int(new[-1]) == tokenizer.eos_token_id, "the answer must end by itself"
    assert expected in tokenizer.decode(new, skip_special_tokens=True)


def test_a_long_prompt_is_still_answered(tokenizer: PreTrainedTokenizerBase) -> None:
    """A prompt of 6,000 tokens, beyond the length of the training."""
    words = " ".join(f"line {number}" for number in range(1400))
    messages = [
        {"role": "system", "content": words},
        {"role": "user", "content": "What is a block table?"},
    ]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    length = inputs["input_ids"].shape[1]
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    assert 5000 < length < model.config.max_position_embeddings == 16384
    out = model.generate(**inputs, max_new_tokens=16, do_sample=False, temperature=None, top_p=None)
    assert "block" in tokenizer.decode(out[0, length:])
