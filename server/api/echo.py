"""The prompt of a completion, given back before the answer (`echo`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..requests.protocol import CompletionBody
from ..text.tokenizer import Tokenizer


class Echo(NamedTuple):
    """A prompt as text, and where in it the text of each of its tokens begins."""

    text: str = ""
    offsets: Sequence[int] = ()


async def echo_of(
    tokenizer: Tokenizer, body: CompletionBody, prompt: str | list[int], token_ids: Sequence[int]
) -> Echo:
    """Return the echo of one prompt of a request.

    `prompt` is what the client sent and `token_ids` what the engine got of it: fewer tokens if
    truncate_prompt_tokens cut off the beginning. A text is given back as it is, from the first of
    these tokens on; token ids are decoded.
    """
    if isinstance(prompt, list):
        text, offsets = await tokenizer.decode_with_offsets(
            token_ids, skip_special_tokens=body.skip_special_tokens is not False
        )
        return Echo(text, offsets)
    if body.logprobs is None and body.truncate_prompt_tokens is None:
        return Echo(prompt)
    offsets = await tokenizer.offsets_of(
        prompt, add_special_tokens=body.add_special_tokens is not False
    )
    kept = offsets[len(offsets) - len(token_ids) :]
    cut = kept[0] if len(kept) < len(offsets) else 0
    return Echo(prompt[cut:], [max(0, offset - cut) for offset in kept])
