from __future__ import annotations

from typing import Any

import httpx
import pytest

from .conftest import MODEL, MakeClient
from .test_faults import assert_shape

PATH = "/v1/embeddings"


@pytest.mark.parametrize("value", ["a", ["a", "b"], [0, 1], [[0], [1, 2]]])
async def test_a_good_request_is_told_what_the_model_is_for(
    client: httpx.AsyncClient, value: Any
) -> None:
    fields = {"model": MODEL, "input": value, "encoding_format": "base64", "dimensions": 8}
    response = await client.post(PATH, json=fields)
    assert_shape(response, 400, "invalid_value", "model")
    assert "served for generation" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[1], []]}, "input"),
        ({"input": 3}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": True}, "dimensions"),
        ({"user": ""}, "user"),
    ],
)
async def test_bad_fields_are_named(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    response = await client.post(PATH, json={"model": MODEL, "input": "a", **fields})
    assert_shape(response, 400, "invalid_value", param)


async def test_the_rest_of_the_rules_hold(make_client: MakeClient) -> None:
    fields = {"model": "other", "input": "a"}
    assert_shape(await make_client().post(PATH, json=fields), 404, "model_not_found", "model")
    strict = make_client(strict=True)
    response = await strict.post(PATH, json={"model": MODEL, "input": "a", "mood": 1})
    assert_shape(response, 400, "invalid_value", "mood")
