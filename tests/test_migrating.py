"""Compare docs/migrating.md with the code, and the explanations of other servers' flags with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from fastapi.routing import APIRoute
from prometheus_client.parser import text_string_to_metric_families

from quire.engine.errors import ConfigurationError
from quire.server import cli, flags_table
from quire.server.foreign_flags import FOREIGN_FLAGS, Answer, Server, explain
from quire.server.metrics.metrics import Metrics
from quire.server.requests.protocol import ChatBody, CompletionBody
from quire.server.requests.unsupported import _ASKS_FOR_NOTHING as REFUSED
from quire.server.settings import Settings, load_settings

from .documents import ROOT, code, tables
from .server.test_metrics import INFO
from .test_api_docs import _app, _routes

TEXT = (ROOT / "docs/migrating.md").read_text(encoding="utf-8")
TABLES = list(tables(TEXT))
(COMMANDS,) = (
    action.choices for action in cli.build_parser()._actions if isinstance(action.choices, dict)
)
OPTIONS = set(COMMANDS["serve"]._option_string_actions)
PARAMETERS = ChatBody.model_fields.keys() | CompletionBody.model_fields.keys()


def _rows(kind: str) -> Iterator[tuple[str, str, str]]:
    """Yield each row of the tables of a kind of thing: its name, the answer and the text."""
    for rows in TABLES:
        first, *others = rows[0]
        if first.startswith(f"{kind} of "):
            for row in rows:
                yield code(row[first]), row["here"], row[""]


def _endpoints() -> set[str]:
    return {
        f"{method} {route.path}"
        for route in _routes(_app().routes)
        for method in route.methods or ()
        if isinstance(route, APIRoute)
    }


def test_the_tables_of_flags_are_up_to_date() -> None:
    assert flags_table.updated(TEXT) == TEXT, "run `make docs`"
    listed = [name for name, _, _ in _rows("flag")]
    assert sorted(listed) == sorted(flag.flag for flag in FOREIGN_FLAGS)
    for server in get_args(Server):
        flags = [each.flag for each in FOREIGN_FLAGS if each.server == server]
        assert len(flags) == len(set(flags)), server


@pytest.mark.parametrize("foreign", FOREIGN_FLAGS, ids=lambda each: f"{each.server}{each.flag}")
def test_a_flag_is_known_here_if_the_table_says_so(foreign: object) -> None:
    server, flag, answer, advice = foreign  # type: ignore[misc]
    assert (flag in OPTIONS) == (answer == "same"), "the table says otherwise"
    named = re.findall(r"--[a-z][a-z0-9-]+", advice)
    assert set(named) <= OPTIONS
    if answer == "other name":
        assert named or re.search(r"quire serve MODEL|[A-Z]+_[A-Z]+", advice)
    assert advice or answer == "same"


_COMMON = """
    --model --tokenizer --revision --tokenizer-mode --trust-remote-code --download-dir
    --load-format --dtype --kv-cache-dtype --max-model-len --guided-decoding-backend
    --pipeline-parallel-size --tensor-parallel-size --data-parallel-size
    --enable-expert-parallel --block-size --seed --enable-prefix-caching --swap-space
    --cpu-offload-gb --gpu-memory-utilization --num-gpu-blocks-override --max-num-batched-tokens
    --max-num-seqs --max-logprobs --disable-log-stats --quantization --rope-scaling
    --enforce-eager --max-seq-len-to-capture --enable-lora --lora-modules --speculative-config
    --limit-mm-per-prompt --enable-chunked-prefill --served-model-name --otlp-traces-endpoint
    --scheduling-policy --override-generation-config --generation-config --enable-sleep-mode
    --compilation-config --kv-transfer-config --disable-log-requests --enable-log-requests
    --host --port --uvicorn-log-level --api-key --allowed-origins --allow-credentials
    --allowed-methods --allowed-headers --chat-template --ssl-keyfile --ssl-certfile --root-path
    --enable-auto-tool-choice --tool-call-parser --reasoning-parser
    --enable-prompt-tokens-details --hf-overrides --task --runner --api-server-count
    --async-scheduling --attention-backend --hf-token --uds
"""


@pytest.mark.parametrize("flag", _COMMON.split())
def test_each_common_flag_of_vllm_has_an_answer(flag: str) -> None:
    (answer,) = (
        each.answer for each in FOREIGN_FLAGS if (each.server, each.flag) == ("vLLM", flag)
    )
    assert answer in get_args(Answer)


def test_endpoints_exist_if_the_tables_say_so() -> None:
    served = _endpoints()
    rows = list(_rows("endpoint"))
    assert len(rows) > 40
    for name, answer, text in rows:
        assert (name in served) == (answer == "same"), name
        mentioned = re.findall(r"`((?:GET|POST) [^`]*)`", text)
        assert set(mentioned) <= served, text
        assert mentioned or answer != "other name", name


def test_parameters_exist_if_the_tables_say_so() -> None:
    rows = list(_rows("parameter"))
    assert len(rows) > 50
    for name, answer, text in rows:
        assert (name in PARAMETERS) == (answer == "same"), name
        assert (name in REFUSED) == (answer == "refused"), name
        if answer == "other name" and "body" not in text:
            mentioned = set(re.findall(r"`([a-z_-]+)`", text))
            assert mentioned & (PARAMETERS | OPTIONS), name


def test_variables_and_answers_exist() -> None:
    for _, _, text in _rows("variable"):
        names = re.findall(r"`QUIRE_(\w+)`", text)
        assert {name.lower() for name in names} <= Settings.model_fields.keys()
    for kind in ("flag", "endpoint", "parameter", "variable"):
        assert {answer for _, answer, _ in _rows(kind)} <= set(get_args(Answer))


def test_the_listed_metrics_are_those_with_the_prefix_vllm() -> None:
    (rows,) = (rows for rows in TABLES if tuple(rows[0]) == ("metric", "kind"))
    listed = {code(row["metric"]): row["kind"] for row in rows}
    metrics = Metrics("m", "vllm")
    metrics.engine_ready(INFO)
    found = {
        f"{family.name}_total" if family.type == "counter" else family.name: family.type
        for family in text_string_to_metric_families(metrics.render()[0].decode())
    }
    own = {"kv_blocks_copied", "kv_blocks_shared", "engine_restarts", "http_worker_restarts"}
    ours = {f"vllm:{name}_total" for name in (*own, "admission_rejections")}
    ours.add("vllm:engine_ready")
    assert listed == {name: kind for name, kind in found.items() if name not in ours}


@pytest.mark.parametrize(
    ("flag", "advice"),
    [
        ("--swap-space=4", "--swap-space of vLLM: use instead: --kv-offloading-size"),
        ("--max-log-len=9", "--max-log-len of vLLM: not needed, since prompts are never"),
        ("--max_model_len", "--max_model_len: did you mean --max-model-len?"),
        (
            "--speculative-config.model=x",
            "--speculative-config.model=x: did you mean --speculative-config?",
        ),
        ("--ctx-size", "--ctx-size of llama.cpp: use instead: --max-model-len"),
        ("--max-num-seq", "--max-num-seq: did you mean --max-num-seqs?"),
        ("--nope", "--nope: `quire serve --help` lists all flags"),
    ],
)
def test_unknown_flags_are_explained(
    flag: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(flag, OPTIONS).startswith(advice)
    with pytest.raises(SystemExit) as exit:
        cli.main(["serve", "model", "--port", "0", flag, "4"])
    assert exit.value.code == 2
    assert f"\n  {advice}" in capsys.readouterr().err


def test_unknown_settings_of_a_file_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "quire.yaml"
    path.write_text("swap_space: 4\n")
    with pytest.raises(ConfigurationError, match="swap_space: there is no such setting; --swap-sp"):
        load_settings(config=path)
