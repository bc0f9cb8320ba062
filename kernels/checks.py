"""Argument checks that the launchers share: shapes, dtypes, memory layouts and devices."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of activations and weights."""
CACHE_DTYPES = (*FLOAT_DTYPES, torch.float8_e4m3fn)
"""Dtypes of a KV cache."""


_REMEMBERED = 4096
"""Maximum number of signatures that a check remembers. Prompts have many lengths."""


def once_a_signature(check: Callable[..., None]) -> Callable[..., None]:
    """Make a launcher's check return at once if it has passed before for the same signature.

    Checks are most of a launch's time on the host, and a model launches its kernels with the same
    few signatures in every layer. A signature is the shape, strides, dtype and device of each
    tensor, and the value of each other argument, which must be hashable. A check may depend on
    nothing else.
    """
    passed: set[tuple[Any, ...]] = set()

    @functools.wraps(check)
    def check_once(*args: Any) -> None:
        signature = tuple(
            [
                (arg.shape, arg.stride(), arg.dtype, arg.device)
                if isinstance(arg, torch.Tensor)
                else arg
                for arg in args
            ]
        )
        if not args[0].is_cuda:
            signature += (interpreting(),)
        if signature not in passed:
            check(*args)
            if len(passed) >= _REMEMBERED:
                passed.clear()
            passed.add(signature)

    return check_once


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_shape(name: str, tensor: torch.Tensor, *shape: int | None) -> None:
    """Raise ValueError unless `tensor` has this shape; None matches any size."""
    actual = tuple(tensor.shape)
    if len(actual) != len(shape) or any(
        want is not None and want != have for want, have in zip(shape, actual, strict=True)
    ):
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], not {list(actual)}")


def require_dtype(name: str, tensor: torch.Tensor, *dtypes: torch.dtype) -> None:
    """Raise ValueError unless the dtype of `tensor` is one of `dtypes`."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be one of {[str(d) for d in dtypes]}, not {tensor.dtype}")


def require_contiguous(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless `tensor` is contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, not strided {tensor.stride()}")


def require_last_contiguous(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless the last dimension of `tensor` has stride 1."""
    if tensor.stride(-1) != 1:
        raise ValueError(f"{name} needs a contiguous last dimension, not strides {tensor.stride()}")


def interpreting() -> bool:
    """Return whether Triton's interpreter is switched on, so that kernels run on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def require_launchable(**tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless all tensors are on one device that Triton can run on.

    That is a CUDA device, or the CPU if Triton's interpreter is switched on. None stands for an
    optional tensor that was not given.
    """
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    first = next(iter(devices.values()))
    if any(device != first for device in devices.values()):
        raise ValueError(f"tensors are on different devices: {devices}")
    if first.type != "cuda" and not interpreting():
        raise ValueError(f"Triton kernels need CUDA tensors, not {first}; see kernels/reference.py")


def check_cache(
    key_cache: torch.Tensor, value_cache: torch.Tensor | None, value_width: int | None = None
) -> tuple[int, int, int]:
    """Check one layer's caches and return (num_kv_heads, block_size, head_dim).

    Both must be contiguous `[num_blocks, num_kv_heads, block_size, head_dim]` of one dtype, with a
    head_dim that is a multiple of 8 from 16 to 512 and a block_size that is a power of two from 16
    to 256. A cache of latents has no value_cache and one kv head, whose first value_width numbers,
    a power of two from 16 to 512, are the values; 16 to 64 follow, a multiple of 8. Raises
    ValueError otherwise.
    """
    if (value_cache is None) != (value_width is not None):
        raise ValueError("either value_cache or value_width must be given")
    dtypes = CACHE_DTYPES if value_width is None else FLOAT_DTYPES
    require_dtype("key_cache", key_cache, *dtypes)
    require_shape("key_cache", key_cache, None, None, None, None)
    require_contiguous("key_cache", key_cache)
    if value_cache is not None:
        require_dtype("value_cache", value_cache, key_cache.dtype)
        require_shape("value_cache", value_cache, *key_cache.shape)
        require_contiguous("value_cache", value_cache)
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    if value_width is not None:
        require(num_kv_heads == 1, f"latents have one kv head, not {num_kv_heads}")
        if (obstacle := obstacle_of_latents(value_width, head_dim)) is not None:
            raise ValueError(obstacle)
    elif head_dim % 8 or not 16 <= head_dim <= 512:
        raise ValueError(f"head_dim must be a multiple of 8 from 16 to 512, not {head_dim}")
    if block_size & (block_size - 1) or not 16 <= block_size <= 256:
        raise ValueError(f"block_size must be a power of two from 16 to 256, not {block_size}")
    return num_kv_heads, block_size, head_dim


def obstacle_of_latents(value_width: int, head_dim: int) -> str | None:
    """Return why the attention kernels do not take latents of `head_dim` numbers whose first
    `value_width` are the values; None if they do."""
    if value_width & (value_width - 1) or not 16 <= value_width <= 512:
        return f"value_width must be a power of two from 16 to 512, not {value_width}"
    rest = head_dim - value_width
    if rest % 8 or not 16 <= rest <= 64:
        return f"head_dim - value_width must be a multiple of 8 from 16 to 64, not {rest}"
    return None


def check_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor | None,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    value_width: int | None,
) -> tuple[int, int, int]:
    """Check what both attention kernels take; return (num_kv_heads, block_size, head_dim)."""
    num_kv_heads, block_size, head_dim = check_cache(key_cache, value_cache, value_width)
    stored_wide = key_cache.dtype in FLOAT_DTYPES
    require_dtype("query", query, *((key_cache.dtype,) if stored_wide else FLOAT_DTYPES))
    require_shape("query", query, None, None, head_dim)
    require_last_contiguous("query", query)
    num_heads = query.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are not a multiple of {num_kv_heads} kv heads")
    require_dtype("block_table", block_table, torch.int32)
    require_shape("block_table", block_table, seq_lens.shape[0], None)
    require_last_contiguous("block_table", block_table)
    require_dtype("seq_lens", seq_lens, torch.int32)
    require_shape("seq_lens", seq_lens, None)
    require_contiguous("seq_lens", seq_lens)
    require(scale > 0, f"scale must be positive, not {scale}")
    require(window != 0, "window must be positive, or below 0 for chunks")
    require(softcap is None or softcap > 0, f"softcap must be positive, not {softcap}")
    if sinks is not None:
        require_dtype("sinks", sinks, *FLOAT_DTYPES)
        require_shape("sinks", sinks, num_heads)
        require_contiguous("sinks", sinks)
    require_dtype("out", out, query.dtype)
    require_shape("out", out, *query.shape[:2], value_width or head_dim)
    require_last_contiguous("out", out)
    require_launchable(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        block_table=block_table,
        seq_lens=seq_lens,
        sinks=sinks,
        out=out,
    )
    return num_kv_heads, block_size, head_dim
