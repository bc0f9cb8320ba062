"""Kernels: functions that are compiled by themselves and called through their addresses.

A kernel is a function of five arguments that does one item of a phase (see `region.py`):

    @kernel
    def scale(item, layer, rows, thread, work): ...

`work` holds everything else. In Python it is a NamedTuple of contiguous NumPy arrays and numbers;
`Packed` writes it down as words that lie side by side: a number, or the address of an array's data
and the lengths of its axes. The compiled kernel gets a pointer to those, and reads a field where
the source says `work.field`. Kernels therefore bind what they need to local variables first,
outside of their loops.

Numba links the code of every function into each of its callers and has LLVM optimise all of it
again there. A whole step as one Numba function therefore compiled its innermost loops seven times.
A kernel is compiled once, has an entry of its own in the cache on disk, and can be compiled by any
process (see `region.py`). It holds all the code that it runs (see `_Alone`).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.ccallback import CFunc
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, lower_getattr_generic, models, register_model
from numba.np.arrayobj import make_array, populate_array
from numba.np.numpy_support import from_dtype

from .numbers import CACHE, FAST

Work = tuple[Any, ...]
"""A NamedTuple of contiguous arrays, int, bool, and float (np.float32) values."""
Signature = tuple[Any, ...]
"""The class of a work, then for each field the dtype and dimensions of an array, or the class of a
number: what a kernel is compiled for."""

_WORD = ir.IntType(64)
_DATA = object.__basicsize__
"""The byte of a NumPy array (PyArrayObject, whose layout is part of NumPy's binary interface) at
which the address of its data is: after Python's own."""
_word_at = ctypes.c_int64.from_address


def signature_of(work: Work) -> Signature:
    """Return what a kernel that gets `work` must be compiled for."""
    return (
        type(work),
        *[
            (value.dtype.char, value.ndim) if type(value) is np.ndarray else type(value)
            for value in work
        ],
    )


class Packed:
    """A work written down as int64 words: a number is one word, an array of n axes is n + 1, the
    address of its data and the length of each axis.

    An item of a small product reads all of them, and the weights before it have pushed them out of
    the first-level cache; so they are few cache lines, and no address is at another address. The
    words are valid while this object is: it keeps the arrays alive.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        parts = [_words(value) for value in work]
        self._begins = [0, *itertools.accumulate(map(len, parts))]
        self.words = np.array([word for part in parts for word in part], dtype=np.int64)
        self._view = self.words.data  # a memoryview, of which Python writes an element sooner
        self.address = data_address(self.words)
        """Where the words are."""

    def update(self, work: Work) -> bool:
        """Write down what has changed of a work, or return False if its signature has changed.

        Most of a step's arrays are the very objects of the step before.
        """
        for at, (old, new) in enumerate(zip(self.work, work, strict=True)):
            if new is not old:
                if type(new) is not type(old):
                    return False
                if type(new) is np.ndarray and (new.dtype != old.dtype or new.ndim != old.ndim):
                    return False
                for word, value in enumerate(_words(new), self._begins[at]):
                    self._view[word] = value
        self.work = work
        return True


def data_address(array: np.ndarray[Any, Any]) -> int:
    """Return the address of an array's data: what `array.ctypes.data` is, in a tenth of the
    time."""
    return _word_at(id(array) + _DATA).value


def _words(value: Any) -> tuple[int, ...]:
    if type(value) is np.ndarray:
        assert value.flags.c_contiguous
        return data_address(value), *value.shape
    return (int(value.view(np.int32)) if type(value) is np.float32 else int(value),)


class WorkPointer(types.Type):  # type: ignore[misc]
    """The Numba type of a kernel's `work`: a pointer to the words of `Packed`."""

    def __init__(self, signature: Signature) -> None:
        work, *kinds = signature
        self.fields: dict[str, tuple[int, types.Type]] = {}
        """By name, the first word and the type of each field."""
        word = 0
        for name, kind in zip(work._fields, kinds, strict=True):
            if isinstance(kind, tuple):
                char, ndim = kind
                self.fields[name] = word, types.Array(from_dtype(np.dtype(char)), ndim, "C")
                word += 1 + ndim
            else:
                self.fields[name] = word, _NUMBERS[kind]
                word += 1
        codes = (kind if isinstance(kind, type) else f"{kind[0]}{kind[1]}" for kind in kinds)
        names = (code.__name__ if isinstance(code, type) else code for code in codes)
        super().__init__(f"{work.__name__}({','.join(names)})")


_NUMBERS = {int: types.int64, bool: types.boolean, np.float32: types.float32}


@register_model(WorkPointer)
class _WorkPointerModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _WORD.as_pointer())


@infer_getattr
class _Fields(AttributeTemplate):  # type: ignore[misc]
    """Tell Numba the types of `work.field`."""

    key = WorkPointer

    def generic_resolve(self, work, name):
        return work.fields[name][1] if name in work.fields else None


@lower_getattr_generic(WorkPointer)
def _read_field(context, builder, work, pointer, name):
    """Generate the code of `work.field`."""
    at, field = work.fields[name]

    def load(index):
        loaded = builder.load(builder.gep(pointer, [ir.Constant(_WORD, index)]))
        # No kernel changes its work, so that LLVM may move these loads out of loops.
        loaded.set_metadata("invariant.load", builder.module.add_metadata([]))
        return loaded

    word = load(at)
    if field == types.float32:
        return builder.bitcast(builder.trunc(word, ir.IntType(32)), ir.FloatType())
    if not isinstance(field, types.Array):
        return builder.trunc(word, ir.IntType(1)) if field == types.boolean else word
    data = builder.inttoptr(word, context.get_data_type(field.dtype).as_pointer())
    shape = [load(at + 1 + axis) for axis in range(field.ndim)]
    itemsize = context.get_abi_sizeof(context.get_data_type(field.dtype))
    strides = [ir.Constant(_WORD, itemsize)]
    for length in reversed(shape[1:]):
        strides.insert(0, builder.mul(length, strides[0]))
    value = make_array(field)(context, builder)
    populate_array(value, data, shape, strides, itemsize, meminfo=None)
    return value._getvalue()


class _Alone(CFunc):
    """A C function whose machine code calls no function of another kernel.

    LLVM does not inline all that Numba has linked in, but leaves some functions beside the kernel,
    under names that the whole process shares: of several functions of one name, the process takes
    the one that it has loaded first. They compute the same with other last bits, because each
    caller's copy has been optimised once more than the original. Which one comes first depends on
    what was compiled and what came from the cache on disk, in which order. So all names but the
    kernel's own are made private to it before LLVM sees them.
    """

    def _compile_uncached(self):
        compiled = super()._compile_uncached()  # type: ignore[misc]
        # The library is not optimised yet.
        library, entry = compiled.library, compiled.fndesc.llvm_cfunc_wrapper_name
        optimise = library._optimize_final_module

        def optimise_alone():
            for function in library._final_module.functions:
                if not function.is_declaration and function.name != entry:
                    function.linkage = "internal"
            optimise()

        library._optimize_final_module = optimise_alone
        return compiled


class Kernel:
    """A kernel, compiled for the works it is given."""

    def __init__(self, function: Callable[..., None], chunk: int = 1) -> None:
        self.name: str = function.__name__
        self.chunk = chunk
        """As in `region.Phase`."""
        self._function = function
        self._compiled: dict[Signature, Any] = {}

    def address(self, work: Work) -> int:
        """Return the machine code for such a work, compiled or loaded now if it has not been."""
        signature = signature_of(work)
        compiled = self._compiled.get(signature)
        if compiled is None:
            compiled = self.compile(signature)
        address: int = compiled.address
        return address

    def compile(self, signature: Signature) -> Any:
        """Compile the function as a C function, or load it from the cache on disk."""
        word = types.int64
        kind = types.void(word, word, word, word, WorkPointer(signature))
        options = {name: FAST[name] for name in ("fastmath", "error_model")}
        compiled = _Alone(self._function, (kind.args, kind.return_type), {}, options)
        compiled.enable_caching()
        with only_process(self.name):
            compiled.compile()
            self._marker(signature).touch()
        self._compiled[signature] = compiled
        return compiled

    def is_compiled(self, signature: Signature) -> bool:
        """Return whether this installation has compiled the kernel for such works."""
        return signature in self._compiled or self._marker(signature).exists()

    def _marker(self, signature: Signature) -> Path:
        """Return a file that exists once the cache on disk has the kernel."""
        name = WorkPointer(signature).name.encode()
        return CACHE / f"{self.name}-{hashlib.sha256(name).hexdigest()[:16]}.compiled"


def kernel(function: Callable[..., None]) -> Kernel:
    """Make a kernel of a function (item, layer, rows, thread, work)."""
    return Kernel(function)


def kernel_in_chunks(chunk: int) -> Callable[[Callable[..., None]], Kernel]:
    """Make a kernel of a function as `kernel` does, of which a thread takes up to `chunk` items at
    once: they should take equally long."""
    return lambda function: Kernel(function, chunk)


@contextmanager
def only_process(name: str) -> Iterator[None]:
    """Let one process at a time compile `name`: the next one finds it in the cache.

    Numba alone would not only compile it twice. Two processes that add to one index at the same
    time can leave one signature's entry pointing to the code of another.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
