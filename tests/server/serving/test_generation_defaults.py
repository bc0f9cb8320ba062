"""No value of a generation_config.json stops the server."""

from __future__ import annotations

from typing import Any

import pytest
import structlog

from quire.engine.checkpoints.source import PACKAGED_MODELS
from quire.engine.sampling_params import SamplingParams
from quire.server.serving.generation_defaults import load_generation_defaults, read_defaults


@pytest.mark.parametrize(
    ("fields", "expected", "warned"),
    [
        ({}, {}, []),
        ({"temperature": 0.6, "top_k": 50}, {"temperature": 0.6, "top_k": 50}, []),
        # Other fields, and fields that are null, say nothing.
        ({"pad_token_id": 3, "no_such_field": [1], "top_p": None}, {}, []),
        # Values that mean "off".
        ({"top_k": -1}, {}, []),
        ({"top_k": 0}, {}, []),
        ({"repetition_penalty": 0}, {}, []),
        ({"max_new_tokens": -1}, {}, []),
        ({"max_new_tokens": 0}, {}, []),
        # Greedy.
        ({"temperature": 0}, {"temperature": 0}, []),
        ({"do_sample": False}, {"temperature": 0.0}, []),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}, ["do_sample"]),
        ({"do_sample": True, "temperature": 0.7}, {"temperature": 0.7}, []),
        # Out of range: the nearest value.
        ({"temperature": 5.0}, {"temperature": 2.0}, ["temperature"]),
        ({"temperature": -1}, {"temperature": 0.0}, ["temperature"]),
        ({"top_p": 0}, {"top_p": 1e-6}, ["top_p"]),
        ({"top_p": 7}, {"top_p": 1.0}, ["top_p"]),
        ({"min_p": 1.5}, {"min_p": 1.0}, ["min_p"]),
        # Out of range, but the nearest value would be an odd one.
        ({"top_k": -5}, {}, ["top_k"]),
        ({"repetition_penalty": -1}, {}, ["repetition_penalty"]),
        ({"max_new_tokens": -7}, {}, ["max_new_tokens"]),
        # An integer that is written as a float.
        ({"top_k": 50.0}, {"top_k": 50}, []),
        # No number.
        ({"temperature": "hot"}, {}, ["temperature"]),
        ({"top_k": True}, {}, ["top_k"]),
        ({"top_k": 1.5}, {}, ["top_k"]),
        ({"top_p": float("nan")}, {}, ["top_p"]),
        ({"min_p": [0.1]}, {}, ["min_p"]),
    ],
)
def test_each_value_is_used_or_moved_or_left_out(
    fields: dict[str, Any], expected: dict[str, Any], warned: list[str]
) -> None:
    with structlog.testing.capture_logs() as entries:
        defaults = read_defaults(fields)
    assert defaults == expected
    assert [entry["field"] for entry in entries] == warned
    assert all(entry["log_level"] == "warning" for entry in entries)
    max_tokens = defaults.pop("max_new_tokens", 1)
    SamplingParams(max_tokens=max_tokens, **defaults)  # raises if a value is out of its bounds


def test_a_packaged_model_has_the_sampling_that_its_authors_recommend() -> None:
    """The package has no generation_config.json: at temperature 1 a model of 135M rambles."""
    packaged = PACKAGED_MODELS["smollm2"].sampling
    assert load_generation_defaults("auto", None, packaged) == {"temperature": 0.2, "top_p": 0.9}
    assert load_generation_defaults("none", None, packaged) == {}
    assert load_generation_defaults("auto", None) == {}
