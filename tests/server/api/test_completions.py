from __future__ import annotations

from typing import Any

import httpx
import pytest

from ..fakes import IM_END, FakeEngineClient, Script, ids, say
from ..openai_http import HI, PROMPT, stream


async def complete(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json={"model": "tiny", **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_a_whole_answer_has_text_finish_reason_and_usage(client: httpx.AsyncClient) -> None:
    answer = await complete(client, prompt="abc", max_tokens=100)
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert answer["id"].startswith("cmpl-")
    assert answer["system_fingerprint"].startswith("fp_")
    [choice] = answer["choices"]
    assert choice["text"] == "Hello, world"
    assert choice["finish_reason"] == "stop"
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 13,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


async def test_max_tokens_defaults_to_16(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.scripts = say("x" * 40)
    answer = await complete(client, prompt="abc")
    assert answer["choices"][0]["text"] == "x" * 16
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_choices_of_several_prompts_are_indexed_in_order(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.scripts = lambda request, choice: Script(
        ids(f"{len(request.prompt_token_ids)}{choice}"), delay=0.001 * (3 - choice)
    )
    prompts = [[1], [1, 2], [1, 2, 3]]
    answer = await complete(client, prompt=prompts, n=2)
    assert [choice["text"] for choice in answer["choices"]] == ["10", "11", "20", "21", "30", "31"]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    chunks = await stream(client, "/v1/completions", prompt=prompts, n=2)
    texts = [""] * 6
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == ["10", "11", "20", "21", "30", "31"]
    ends = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert sorted(choice["index"] for choice in ends) == list(range(6))


@pytest.mark.parametrize("chunk", [1, 3, 50])
@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_ends_the_text_and_aborts_the_choice(
    client: httpx.AsyncClient, engine: FakeEngineClient, chunk: int, include: bool
) -> None:
    engine.scripts = say("one STOP two, and more to come", chunk=chunk, delay=0.001)
    stops = ["ST0P", "STOP", *(f"{number} stops" for number in range(14))]
    fields = {"prompt": "p", "max_tokens": 99, "stop": stops}
    fields["include_stop_str_in_output"] = include
    answer = await complete(client, **fields)
    [choice] = answer["choices"]
    expected = "one STOP" if include else "one "
    assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
    assert choice["stop_reason"] == "STOP"
    assert answer["usage"]["completion_tokens"] == 8
    chunks = await stream(client, "/v1/completions", **fields)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
    if chunk < 50:
        assert [number for _, number in engine.aborted if number is not None] == [0, 0]


async def test_echo_with_logprobs_and_no_new_token(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.scripts = lambda request, choice: Script([], finish="length")
    answer = await complete(client, prompt="héy", echo=True, logprobs=1, max_tokens=0)
    [choice] = answer["choices"]
    assert choice["text"] == "héy"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["h", "bytes:\\xc3", "bytes:\\xa9", "y"]
    assert logprobs["token_logprobs"] == [None, -1.0, -1.0, -1.0]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][3] == {"y": -1.0}
    assert logprobs["text_offset"] == [0, 1, 1, 2]
    assert engine.requests[0].sampling_params.max_tokens == 0


@pytest.mark.parametrize("max_tokens", [0, 9])
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("as_ids", [False, True])
async def test_echo_with_logprobs_is_the_same_in_a_stream(
    client: httpx.AsyncClient, engine: FakeEngineClient, max_tokens: int, chunk: int, as_ids: bool
) -> None:
    engine.scripts = lambda request, choice: (
        Script(ids(f" é{choice} wörld")[:max_tokens], chunk=chunk, logprob=-choice - 0.25)
        if max_tokens
        else Script([], finish="length")
    )
    fields = {
        "prompt": ["héy", "two prompts"],
        "n": 2,
        "echo": True,
        "logprobs": 2,
        "max_tokens": max_tokens,
        "return_token_ids": True,
        "return_tokens_as_token_ids": as_ids,
    }
    whole = (await complete(client, **fields))["choices"]
    assert len(whole) == 4 and whole[1]["text"].startswith("héy")
    added: list[dict[str, Any]] = [{} for _ in whole]
    for chunk_ in await stream(client, "/v1/completions", **fields):
        [choice] = chunk_["choices"]
        so_far = added[choice["index"]]
        if not so_far:
            so_far.update(choice)
            continue
        so_far["text"] += choice["text"]
        so_far["token_ids"] += choice["token_ids"]
        for name, values in choice["logprobs"].items():
            so_far["logprobs"][name] += values
        so_far["finish_reason"] = choice["finish_reason"]
    expected = [{**choice} for choice in whole]
    for choice in expected:
        assert choice.pop("prompt_logprobs") is None  # whole answers have vLLM's fields as null
    assert added == expected


async def test_best_of_ranks_by_mean_logprob(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    means = [-3.0, -1.0, -2.0]
    engine.scripts = lambda request, choice: Script(ids(f"c{choice}"), logprob=means[choice])
    answer = await complete(client, prompt="p", n=2, best_of=3)
    assert [choice["text"] for choice in answer["choices"]] == ["c1", "c2"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["choices"][0]["logprobs"] is None
    assert engine.requests[0].sampling_params.n == 3
    assert engine.requests[0].sampling_params.logprobs == 0


async def test_the_usage_chunk_comes_last_and_has_no_choices(client: httpx.AsyncClient) -> None:
    chunks = await stream(
        client, "/v1/completions", prompt="p", stream_options={"include_usage": True}
    )
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 13
    chunks = await stream(
        client,
        "/v1/completions",
        prompt="p",
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 1


async def test_token_ids_are_returned_whole_and_streamed(client: httpx.AsyncClient) -> None:
    answer = await complete(client, prompt=[7, 8], return_token_ids=True)
    [choice] = answer["choices"]
    assert choice["prompt_token_ids"] == [7, 8]
    assert choice["token_ids"] == [*ids("Hello, world"), IM_END]
    chunks = await stream(client, "/v1/completions", prompt=[7, 8], return_token_ids=True)
    assert chunks[0]["choices"][0]["prompt_token_ids"] == [7, 8]
    streamed = [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]
    assert streamed == choice["token_ids"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_whole_answers_have_the_fields_of_vllm_as_null(
    client: httpx.AsyncClient, path: str
) -> None:
    """Clients written for vLLM read them without asking whether they are there."""
    answer = (await client.post(path, json={**PROMPT, **HI})).json()
    [choice] = answer["choices"]
    assert choice["token_ids"] is choice["stop_reason"] is choice["logprobs"] is None
    of_prompt = answer if "chat" in path else choice
    assert of_prompt["prompt_token_ids"] is of_prompt["prompt_logprobs"] is None


@pytest.mark.parametrize("stream_", [False, True])
@pytest.mark.parametrize("top", [0, 1, 2])
async def test_named_tokens_follow_the_best_ones(
    client: httpx.AsyncClient, engine: FakeEngineClient, stream_: bool, top: int
) -> None:
    engine.scripts = say("ab")
    first = ids("a")[0]
    named = [7, first, 9, 7]
    fields = {"logprob_token_ids": named, "return_tokens_as_token_ids": True, "max_tokens": 2}
    chat = {**fields, "logprobs": True, "top_logprobs": top, **HI}
    text = {**fields, "logprobs": top, **PROMPT}
    if stream_:
        contents = [
            entry
            for chunk in await stream(client, "/v1/chat/completions", **chat)
            for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
        ]
        tops = [
            entry
            for chunk in await stream(client, "/v1/completions", **text)
            for entry in chunk["choices"][0]["logprobs"]["top_logprobs"]
        ]
    else:
        answer = (await client.post("/v1/chat/completions", json=chat)).json()
        contents = answer["choices"][0]["logprobs"]["content"]
        tops = (await complete(client, **text))["choices"][0]["logprobs"]["top_logprobs"]
    # The fake's best alternatives are the token itself and the one after it.
    best = {f"token_id:{first}": -0.5, f"token_id:{first + 1}": -9999.0}
    alternatives = {name: best[name] for name in list(best)[:top]}
    for token_id in named:
        alternatives.setdefault(f"token_id:{token_id}", -float(token_id))
    got = [(entry["token"], entry["logprob"]) for entry in contents[0]["top_logprobs"]]
    assert got == list(alternatives.items())
    assert tops[0] == {**alternatives, f"token_id:{first}": -0.5}
    assert engine.requests[0].sampling_params.logprob_token_ids == tuple(named)


async def test_the_prompt_is_cut_at_the_side_that_is_asked_for(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    for fields, kept in (
        ({"truncate_prompt_tokens": 2}, "ef"),
        ({"truncate_prompt_tokens": 2, "truncation_side": "left"}, "ef"),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, "ab"),
        ({"truncate_prompt_tokens": 9, "truncation_side": "right"}, "abcdef"),
        ({"truncation_side": "right"}, "abcdef"),
    ):
        await complete(client, prompt="abcdef", **fields)
        assert engine.requests[-1].prompt_token_ids == tuple(ids(kept)), fields
    await complete(
        client,
        prompt="x" + "y" * 600,
        max_tokens=1,
        truncate_prompt_tokens=-1,
        truncation_side="right",
    )
    assert engine.requests[-1].prompt_token_ids == tuple(ids("x" + "y" * 510))


async def test_a_chat_stream_opens_with_no_token_counted_and_the_prompts_ids(
    client: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    usage = {"include_usage": True, "continuous_usage_stats": True}
    for options in ({"stream_options": usage}, {}):
        chunks = await stream(
            client, "/v1/chat/completions", **HI, n=2, return_token_ids=True, **options
        )
        prompt = list(engine.requests[-1].prompt_token_ids)
        assert [chunk.get("prompt_token_ids") for chunk in chunks[:3]] == [prompt, None, None]
        if options:
            counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
            assert counts[:2] == [0, 0] and counts[2] > 0 and counts[-1] == 26
            assert all(
                chunk["usage"]["total_tokens"]
                == chunk["usage"]["prompt_tokens"] + chunk["usage"]["completion_tokens"]
                for chunk in chunks
            )
