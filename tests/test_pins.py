"""Test that each private name of another library that docs/pins.md lists is still there.

Each has a check here that reads it. test_private_names.py tests that the list is complete.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


# -- the list --------------------------------------------------------------------------------


def _rows() -> dict[str, list[Path]]:
    """Return each pinned name of docs/pins.md, with the files that use it."""
    rows = {}
    for line in (ROOT / "docs/pins.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[1].startswith("`"):
            assert all(cells), line
            rows[cells[1].strip("`")] = [ROOT / path for path in re.findall("`([^`]+)`", cells[2])]
    return rows


PINS = _rows()


def test_every_listed_name_is_used_where_the_list_says() -> None:
    for name, files in PINS.items():
        word = name.split('"')[1] if '"' in name else name.rsplit(".", 1)[-1]
        assert files, name
        for path in files:
            assert word in path.read_text(encoding="utf-8"), f"{name} is not used in {path}"


# -- what the libraries still have -----------------------------------------------------------


def _h11_writer() -> None:
    import h11
    from h11._writers import ChunkedWriter

    connection = h11.Connection(h11.SERVER)
    connection.receive_data(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    while not isinstance(connection.next_event(), h11.EndOfMessage):
        pass
    connection.send(h11.Response(status_code=200, headers=[("Transfer-Encoding", "chunked")]))
    assert type(connection._writer) is ChunkedWriter
    assert connection.send(h11.Data(data=b"abc")) == b"3\r\nabc\r\n"
    assert connection.our_state is h11.SEND_BODY


async def _uvicorn_protocol() -> None:
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol
    from uvicorn.server import ServerState

    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    made: list[Any] = []

    def make() -> asyncio.Protocol:
        made.append(H11Protocol(uvicorn.Config(app, log_config=None), ServerState(), {}))
        return made[0]  # type: ignore[no-any-return]

    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    _, writer = await asyncio.open_connection(host, port)
    while not made or made[0].transport is None:
        await asyncio.sleep(0.01)
    (protocol,) = made
    assert protocol.conn.our_state is not None and protocol.loop is asyncio.get_running_loop()
    assert protocol.flow.read_paused is False and protocol.cycle is None
    for name in (
        *("connection_made", "connection_lost", "data_received", "eof_received"),
        *("send_400_response", "on_response_complete"),
    ):
        assert callable(getattr(protocol, name)), name
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    while protocol.cycle is None or protocol.cycle.more_body:
        await asyncio.sleep(0.01)
    assert protocol.scope["http_version"] == "1.1"
    assert isinstance(protocol.cycle.response_started, bool)
    assert isinstance(protocol.cycle.response_complete, bool)
    writer.close()
    protocol.transport.close()
    server.close()


def _uvicorn_flow() -> None:
    from uvicorn.protocols.http.flow_control import FlowControl
    from uvicorn.protocols.http.h11_impl import H11Protocol

    calls: list[str] = []

    class Transport:
        def pause_reading(self) -> None:
            calls.append("pause")

        def resume_reading(self) -> None:
            calls.append("resume")

    flow = FlowControl(Transport())  # type: ignore[arg-type]
    flow.resume_reading()
    flow.pause_reading()
    flow.resume_reading()
    assert calls == ["pause", "resume"] and not flow.read_paused
    assert "flow.resume_reading" in inspect.getsource(H11Protocol)


def _uvicorn_signals() -> None:
    import uvicorn

    assert "capture_signals" in vars(uvicorn.Server)


def _model_mapping() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, T5Config

    assert LlamaConfig in AutoModelForCausalLM._model_mapping
    assert T5Config not in AutoModelForCausalLM._model_mapping


def _mapping_names() -> None:
    from transformers.models.auto import modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    assert "llama" in causal and "t5" not in causal and "mistral3" in images


def _is_stateful() -> None:
    from transformers import LlamaForCausalLM, MambaForCausalLM, PreTrainedModel

    assert PreTrainedModel._is_stateful is False and LlamaForCausalLM._is_stateful is False
    assert MambaForCausalLM._is_stateful is True


def _can_set_attention() -> None:
    from transformers import LlamaForCausalLM

    assert LlamaForCausalLM._can_set_attn_implementation() is True


def _rope_functions() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert "longrope" in ROPE_INIT_FUNCTIONS


def _render_jinja_template() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = "{% for m in messages %}{{ m.content is none }}{% endfor %}{{ x }}"
    texts, _ = render_jinja_template(
        conversations=[[{"role": "user", "content": None}]],
        tools=None,
        documents=None,
        chat_template=template,
        continue_final_message=False,
        add_generation_prompt=True,
        x="!",
    )
    assert texts == ["True!"]


def _gguf_tokenizer() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    vocabulary = {"tokenizer_type": "gpt2", "tokens": ["h", "e", "he"], "merges": ["h e"]}
    encoder, settings = convert_gguf_tokenizer("llama", vocabulary)
    assert encoder.encode("he").ids == [2] and settings == {}


def _silu() -> None:
    from transformers.activations import ACT2FN, SiLUActivation

    assert isinstance(ACT2FN["silu"], SiLUActivation)


def _without(module: str, code: str) -> None:
    """Run code in a new process in which a module cannot be imported."""
    code = f"import sys; sys.modules[{module!r}] = None\n{code}"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)


def _experts() -> None:
    from transformers.integrations.moe import ExpertsInterface
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

    assert callable(ExpertsInterface.register)
    sizes = {"hidden_size": 4, "intermediate_size": 4, "moe_intermediate_size": 4}
    names = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
    wanted = {
        Qwen3MoeExperts: (
            Qwen3MoeConfig(**sizes, num_experts=2),
            (True, False, False, True, False),
        ),
        GptOssExperts: (
            GptOssConfig(**sizes, num_local_experts=2),
            (True, True, True, False, False),
        ),
    }
    for kind, (config, values) in wanted.items():
        experts = kind(config)
        assert tuple(getattr(experts, name) for name in names) == values
        assert callable(experts._apply_gate) and experts.num_experts == 2


def _transformers_without_torch() -> None:
    _without(
        "torch",
        "import transformers; from transformers import AutoTokenizer; "
        "from transformers.utils import is_torch_available; assert not is_torch_available()",
    )


def _torch_without_triton() -> None:
    _without("triton", "import torch, torch._dynamo")


def _decode_stream() -> None:
    from tokenizers import Tokenizer, decoders, models
    from tokenizers.decoders import DecodeStream

    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)} | {"you": 257}
    encoder = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    encoder.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    stream = DecodeStream(skip_special_tokens=True)
    # A whole character, a stray byte, a word: the stray byte makes U+FFFD of all three bytes.
    with pytest.raises(Exception, match="(?i)prefix") as caught:
        for token_id in (0xCA + 1, 0x9E + 1, 0xC3 + 1, 257):
            stream.step(encoder, token_id)
    assert type(caught.value) is Exception


def _json_options() -> None:
    stub = Path(str(import_module("llguidance").__file__)).with_name("_lib.pyi")
    options = re.search(r"class JsonCompileOptions.*?(?=^class )", stub.read_text(), re.M | re.S)
    assert options and "whitespace_pattern" in options[0] and "lenient" in options[0]


def _torch_modules() -> None:
    from torch import nn

    model = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    model.register_module("none", None)
    assert list(model._modules) == ["0", "1", "none"]
    model._modules = {"0": nn.Identity()}
    assert [type(module) for module in model.children()] == [nn.Identity]


def _torch_parameters() -> None:
    from torch import nn

    assert list(nn.Linear(2, 2, bias=False)._parameters) == ["weight", "bias"]


def _torch_version() -> None:
    import torch

    tensor = torch.zeros(2)
    before = tensor._version
    tensor.add_(1)
    assert tensor._version == before + 1


def _cgutils() -> None:
    from numba.core import cgutils

    for path in PINS["numba.core.cgutils"]:
        for name in re.findall(r"cgutils\.(\w+)\(", path.read_text(encoding="utf-8")):
            assert callable(getattr(cgutils, name)), name


def _attribute_template() -> None:
    from numba.core.typing.templates import AttributeTemplate

    assert hasattr(AttributeTemplate, "resolve")


def _c_function() -> None:
    from numba import types
    from numba.core.ccallback import CFunc

    function = CFunc(abs, ((types.int64,), types.int64), {}, {})
    assert callable(function.enable_caching) and callable(function.compile)


def _library() -> None:
    from numba import types
    from numba.core.ccallback import CFunc
    from numba.core.compiler_lock import global_compiler_lock

    def double(number: int) -> int:
        return 2 * number

    with global_compiler_lock:
        compiled = CFunc(double, ((types.int64,), types.int64), {}, {})._compile_uncached()
        library = compiled.library
        functions = {function.name for function in library._final_module.functions}
        assert compiled.fndesc.llvm_cfunc_wrapper_name in functions
        optimised: list[str] = []
        library._optimize_final_module = lambda: optimised.append(library.name)
        library.finalize()
    assert optimised == [library.name]


def _make_array() -> None:
    from numba.np.arrayobj import make_array, populate_array

    names = list(inspect.signature(populate_array).parameters)
    assert names[:6] == ["array", "data", "shape", "strides", "itemsize", "meminfo"]
    assert callable(make_array)


def _struct_proxy() -> None:
    from numba import types
    from numba.np.arrayobj import make_array

    proxy = make_array(types.Array(types.float32, 1, "C"))
    assert callable(proxy._getvalue)


def _from_dtype() -> None:
    import numpy as np
    from numba import types
    from numba.np.numpy_support import from_dtype

    assert from_dtype(np.dtype("float32")) == types.float32


def _array_object() -> None:
    import numpy as np

    array = np.zeros((3, 5))
    place = id(array) + object.__basicsize__
    assert ctypes.c_int64.from_address(place).value == array.ctypes.data


def _prometheus_metric() -> None:
    from prometheus_client.metrics_core import Metric

    metric = Metric("name", "documentation", "counter")
    assert (metric.name, metric.type, metric.samples) == ("name", "counter", [])


def _prometheus_sample() -> None:
    from prometheus_client.samples import Sample

    sample = Sample("name", {"label": "value"}, 1.0)
    assert (sample.name, sample.labels, sample.value) == ("name", {"label": "value"}, 1.0)


def _prometheus_float() -> None:
    from prometheus_client.utils import floatToGoString

    assert floatToGoString(0.5) == "0.5"


def _argument_group() -> None:
    import argparse

    group = argparse.ArgumentParser().add_argument_group("title")
    assert type(group) is argparse._ArgumentGroup


def _token_mixers() -> None:
    from inspect import unwrap

    from transformers.activations import ACT2FN
    from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite
    from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

    for module, layer, names in (
        (qwen, qwen.Qwen3_5GatedDeltaNet, {"causal_conv1d_fn", "torch_chunk_gated_delta_rule"}),
        (granite, granite.GraniteMoeHybridMambaLayer, {"causal_conv1d_fn", "mamba2_chunk_scan"}),
    ):
        called = unwrap(layer.forward).__code__.co_names
        assert names <= set(called) & set(vars(module))
    assert "silu" in ACT2FN


def _expand_kv() -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    assert "kv_b_proj" in DeepseekV3Attention.expand_kv.__code__.co_names
    assert "expand_kv" in inspect.unwrap(DeepseekV3Attention.forward).__code__.co_names


CHECKS: dict[str, Callable[[], Any]] = {
    "h11._writers.ChunkedWriter": _h11_writer,
    "h11.Connection._writer": _h11_writer,
    "uvicorn.protocols.http.h11_impl.H11Protocol": _uvicorn_protocol,
    "uvicorn.protocols.http.flow_control.FlowControl": _uvicorn_flow,
    "uvicorn.Server.capture_signals": _uvicorn_signals,
    "transformers.AutoModelForCausalLM._model_mapping": _model_mapping,
    "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": _mapping_names,
    "transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": (
        _mapping_names
    ),
    "transformers.PreTrainedModel._is_stateful": _is_stateful,
    "transformers.PreTrainedModel._can_set_attn_implementation": _can_set_attention,
    "transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS": _rope_functions,
    "transformers.activations.SiLUActivation": _silu,
    "transformers.utils.chat_template_utils.render_jinja_template": _render_jinja_template,
    "transformers.integrations.gguf.gguf_tokenizer_mapping.convert_gguf_tokenizer": _gguf_tokenizer,
    "transformers.integrations.moe.ExpertsInterface": _experts,
    "transformers.integrations.moe.ExpertsInterface._apply_gate": _experts,
    "transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3Attention.expand_kv": (
        _expand_kv
    ),
    "transformers.models.qwen3_5.modeling_qwen3_5.causal_conv1d_fn": _token_mixers,
    "transformers.models.qwen3_5.modeling_qwen3_5.torch_chunk_gated_delta_rule": _token_mixers,
    "transformers.models.granitemoehybrid.modeling_granitemoehybrid.mamba2_chunk_scan": (
        _token_mixers
    ),
    "transformers.activations.ACT2FN": _token_mixers,
    'sys.modules["torch"]': _transformers_without_torch,
    "tokenizers.decoders.DecodeStream.step": _decode_stream,
    "llguidance._lib.JsonCompileOptions": _json_options,
    "torch.nn.Module._modules": _torch_modules,
    "torch.nn.Module._parameters": _torch_parameters,
    "torch.Tensor._version": _torch_version,
    'sys.modules["triton"]': _torch_without_triton,
    "numba.core.cgutils": _cgutils,
    "numba.core.typing.templates.AttributeTemplate": _attribute_template,
    "numba.core.ccallback.CFunc": _c_function,
    "numba.core.ccallback.CFunc._compile_uncached": _library,
    "numba.core.codegen.CPUCodeLibrary._final_module": _library,
    "numba.core.codegen.CPUCodeLibrary._optimize_final_module": _library,
    "numba.np.arrayobj.make_array": _make_array,
    "numba.np.arrayobj.populate_array": _make_array,
    "numba.core.cgutils.create_struct_proxy._getvalue": _struct_proxy,
    "numba.np.numpy_support.from_dtype": _from_dtype,
    "numpy.PyArrayObject": _array_object,
    "prometheus_client.metrics_core.Metric": _prometheus_metric,
    "prometheus_client.samples.Sample": _prometheus_sample,
    "prometheus_client.utils.floatToGoString": _prometheus_float,
    "argparse._ArgumentGroup": _argument_group,
}


def test_every_listed_name_has_a_check() -> None:
    assert CHECKS.keys() == PINS.keys()


@pytest.mark.parametrize("name", CHECKS)
async def test_the_library_still_has(name: str) -> None:
    found = CHECKS[name]()
    if found is not None:
        await found
