"""The sizes of captured mixed steps, in which prompts share a step with decodes.

A mixed step of a small model costs the host more time to launch, layer by layer, than the device to
run. What differs between two such steps is data, but for the number of tokens: the decode kernel
reads a list of items, and the extend kernel finds its rows behind a number of decodes that lies on
the device. So there is one graph for each of a ladder of token counts, whatever rows they are of:

    tokens   | one of each decode | those of each prompt | padding |
    rows     | decodes | prompts  | one with all the padding, of length 0 | rows without tokens |

The row of the padding writes no K and V, sees no key, and gets zeros.
"""

from __future__ import annotations

MAX_TOKENS = 2048
"""Maximum number of tokens by default. A larger step has enough work to hide its launches."""
_WORK = 10**12
"""Tokens times parameters of a step that computes for as long as its launches take: 2 FLOPs for
each at some 500 TFLOP/s (H200) are 4 ms, as are the launches of 30 layers."""


def mixed_sizes(asked: int | None, num_parameters: int, max_num_tokens: int) -> list[int]:
    """Return the token counts to capture, ascending: up to the number that is `asked` for, by
    default those whose launches take longer than their work, for a model of so many parameters."""
    largest = min(MAX_TOKENS, _WORK // max(1, num_parameters)) if asked is None else asked
    largest = min(largest, max_num_tokens)
    ladder = [*range(64, 512, 64), *range(512, largest + 1, 128)]
    sizes = [size for size in ladder if size <= largest]
    exactly = [largest] if asked is not None and largest > 1 and largest not in sizes else []
    return sizes + exactly


def max_prompts(size: int) -> int:
    """Return how many rows of a captured step of `size` tokens may have several of them. Each takes
    a program of the extend kernel's grid for each kv head, whether it is there or not."""
    return max(16, size // 32)
