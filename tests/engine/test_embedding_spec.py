"""Test which sizes an embedding may have."""

from __future__ import annotations

from typing import Any

import pytest

from quire.engine.embedding_spec import EmbeddingSpec
from quire.engine.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({}, [None, 32], [31, 33]),
        ({"is_matryoshka": True}, [None, 1, 31, 32], [33]),
        ({"is_matryoshka": True, "matryoshka_dimensions": (8,)}, [None, 8, 32], [7, 31, 64]),
    ],
)
def test_dimensions(fields: dict[str, Any], good: list[int | None], bad: list[int]) -> None:
    spec = EmbeddingSpec(pooling="last", normalize=True, size=32, **fields)
    for dimensions in good:
        spec.check_dimensions(dimensions)
    for dimensions in bad:
        with pytest.raises(InvalidRequestError) as caught:
            spec.check_dimensions(dimensions)
        assert caught.value.param == "dimensions"
