"""docs/pins.md lists every private name of another library that the code uses; each is still there.

A name is private if a part of it begins with an underscore, or if it stands in a module that is
neither a library's top level nor in PUBLIC_MODULES. Writing to `sys.modules` counts too. Each has a
check here that reads it.
"""

from __future__ import annotations

import ast
import asyncio
import ctypes
import inspect
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCANNED = ("server", "engine", "kernels")
DOCUMENTED = {"_asdict", "_exit", "_fields", "_make", "_replace"}
"""Underscored names of the standard library that its manual documents."""
PUBLIC_MODULES = {
    *("fastapi.exceptions", "fastapi.middleware.cors", "fastapi.responses", "fastapi.security"),
    *("jinja2.meta", "pydantic.config"),
    *("msgspec.json", "numba.extending", "numpy.typing", "prometheus_client.core"),
    *("prometheus_client.exposition", "prometheus_client.registry", "pydantic.fields"),
    *("pydantic.json_schema", "starlette.datastructures", "starlette.exceptions"),
    *("starlette.requests", "starlette.responses", "starlette.types", "structlog.types"),
    *("tokenizers.decoders", "torch.nn.functional", "transformers.utils", "triton.errors"),
    *("triton.language", "triton.language.extra", "zmq.asyncio"),
}
"""Modules below a library's top level that its manual names."""


# -- the list --------------------------------------------------------------------------------


def _rows() -> dict[str, list[Path]]:
    """Each pinned name of docs/pins.md, with the files that use it."""
    rows = {}
    for line in (ROOT / "docs/pins.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[1].startswith("`"):
            assert all(cells), line
            rows[cells[1].strip("`")] = [ROOT / path for path in re.findall("`([^`]+)`", cells[2])]
    return rows


PINS = _rows()


# -- what the code uses ----------------------------------------------------------------------


def _private(name: str) -> bool:
    dunder = name.startswith("__") and name.endswith("__")
    return name.startswith("_") and name != "_" and not dunder and name not in DOCUMENTED


@cache
def _trees() -> dict[Path, ast.Module]:
    paths = [path for folder in SCANNED for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


class _Classes:
    """The names that our classes and modules define, to tell our private names from others'."""

    def __init__(self) -> None:
        self.everywhere: set[str] = set()
        self._members: dict[str, set[str]] = defaultdict(set)
        self._bases: dict[str, set[str]] = defaultdict(set)
        for tree in _trees().values():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    self._members[node.name] |= set(_defined(node))
                    self._bases[node.name] |= {ast.unparse(base) for base in node.bases}
            self.everywhere |= set(_defined(tree))

    def has(self, class_name: str, member: str) -> bool:
        """Whether a class of ours or one of its bases of ours defines a member."""
        if member in self._members.get(class_name, ()):
            return True
        bases = self._bases.get(class_name, set())
        names = (base.split("[")[0].rsplit(".", 1)[-1] for base in bases)
        return any(self.has(name, member) for name in names if name != class_name)


def _defined(scope: ast.AST) -> Iterator[str]:
    """Functions, classes, variables, slots and attributes of `self` that a scope defines."""
    for node in ast.walk(scope):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node.value) in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__":
            yield from ast.literal_eval(node.value)


def _used(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of every private name of another library in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _imported(node.lineno, alias.name, alias.name)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                yield from _imported(node.lineno, node.module, f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "sys.modules":
            if isinstance(node.ctx, ast.Store):
                yield node.lineno, f'sys.modules["{ast.literal_eval(node.slice)}"]'
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if function == "sys.modules.setdefault":
                yield node.lineno, f'sys.modules["{ast.literal_eval(node.args[0])}"]'
            elif function in ("getattr", "setattr", "hasattr", "delattr"):
                name = node.args[1]
                if isinstance(name, ast.Constant) and _private(str(name.value)):
                    yield node.lineno, str(name.value)
    yield from _attributes(tree, "")


def _imported(line: int, module: str, name: str) -> Iterator[tuple[int, str]]:
    root = module.split(".")[0]
    if root in sys.stdlib_module_names or root == "quire":
        return
    public = module == root or module in PUBLIC_MODULES
    if not public or any(map(_private, name.split("."))):
        yield line, name


def _attributes(node: ast.AST, class_name: str) -> Iterator[tuple[int, str]]:
    """Private attributes that no class of ours defines; of `self`, none of its own classes."""
    if isinstance(node, ast.ClassDef):
        class_name = node.name
    if isinstance(node, ast.Attribute) and _private(node.attr):
        if ast.unparse(node.value) in ("self", "cls") and class_name:
            ours = _classes().has(class_name, node.attr)
        else:
            ours = node.attr in _classes().everywhere
        if not ours:
            yield node.lineno, node.attr
    for child in ast.iter_child_nodes(node):
        yield from _attributes(child, class_name)


@cache
def _classes() -> _Classes:
    return _Classes()


def _is_pinned(name: str, path: Path) -> bool:
    """An attribute is found without its owner, so only the last part of a pin's name counts."""
    return any(
        path in files and name in (pin, pin.rsplit(".", 1)[-1]) for pin, files in PINS.items()
    )


def test_every_private_name_that_the_code_uses_is_listed() -> None:
    missing = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, tree in _trees().items()
        for line, name in _used(tree)
        if not _is_pinned(name, path)
    ]
    assert missing == [], "give each a row in docs/pins.md and a check here, or use a public name"


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
    for name in ("connection_made", "connection_lost", "data_received", "send_400_response"):
        assert callable(getattr(protocol, name)), name
    writer.close()
    protocol.transport.close()
    server.close()


def _uvicorn_signals() -> None:
    import uvicorn

    assert "capture_signals" in vars(uvicorn.Server)


def _model_mapping() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, T5Config

    assert LlamaConfig in AutoModelForCausalLM._model_mapping
    assert T5Config not in AutoModelForCausalLM._model_mapping


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


def _silu() -> None:
    from transformers.activations import ACT2FN, SiLUActivation

    assert isinstance(ACT2FN["silu"], SiLUActivation)


def _without(module: str, code: str) -> None:
    """Run code in a new process in which a module is taken for absent."""
    code = f"import sys; sys.modules[{module!r}] = None\n{code}"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)


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
    data = object.__basicsize__ // 8
    words = (ctypes.c_int64 * (data + 3)).from_address(id(array))
    assert words[data] == array.ctypes.data
    assert list((ctypes.c_int64 * 2).from_address(words[data + 2])) == [3, 5]


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


CHECKS: dict[str, Callable[[], Any]] = {
    "h11._writers.ChunkedWriter": _h11_writer,
    "h11.Connection._writer": _h11_writer,
    "uvicorn.protocols.http.h11_impl.H11Protocol": _uvicorn_protocol,
    "uvicorn.Server.capture_signals": _uvicorn_signals,
    "transformers.AutoModelForCausalLM._model_mapping": _model_mapping,
    "transformers.PreTrainedModel._is_stateful": _is_stateful,
    "transformers.PreTrainedModel._can_set_attn_implementation": _can_set_attention,
    "transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS": _rope_functions,
    "transformers.activations.SiLUActivation": _silu,
    'sys.modules["torch"]': _transformers_without_torch,
    "tokenizers.decoders.DecodeStream.step": _decode_stream,
    "llguidance._lib.JsonCompileOptions": _json_options,
    "torch.nn.Module._modules": _torch_modules,
    "torch.nn.Module._parameters": _torch_parameters,
    "torch.Tensor._version": _torch_version,
    'sys.modules["triton"]': _torch_without_triton,
    "numba.core.cgutils": _cgutils,
    "numba.core.typing.templates.AttributeTemplate": _attribute_template,
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


def test_the_scan_finds_private_names() -> None:
    tree = ast.parse(
        "import sys\nimport numba.core.other\nfrom h11 import _private_thing\n"
        "from torch.nn import Linear\nsys.modules['a'] = None\nsys.modules.setdefault('b', None)\n"
        "getattr(model, '_hidden', None)\nmodel._buffers_of_torch\npoint._replace(x=1)\n"
        "class GuardedH11Protocol(Base):\n"
        "    def f(self):\n        self._timer.cancel()\n        self._modules\n"
    )
    assert [name for _, name in _used(tree)] == [
        *("numba.core.other", "h11._private_thing", "torch.nn.Linear"),
        *('sys.modules["a"]', 'sys.modules["b"]', "_hidden", "_buffers_of_torch", "_modules"),
    ]
