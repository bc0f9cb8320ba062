"""How a query and a document become one prompt, for models that score pairs.

A template for pairs is a chat template that reads messages of the roles "query" and "document", as
sentence-transformers and vLLM write it; a "system" message, if there is one, is the instruction. It
is that of the server's settings, or the folder's own, or Qwen3-Reranker's. Without one, the
tokenizer joins the texts as the pair for which its post-processor was made.
"""

from __future__ import annotations

import re
from typing import Any

from ...engine.classifier_spec import ClassifierSpec
from ...engine.errors import InvalidRequestError
from ..text.tokenizer import Tokenizer

_ROLES = (re.compile(r"""["']query["']"""), re.compile(r"""["']document["']"""))

# The words of arXiv 2506.05176 on which Qwen3-Reranker was trained.
_QWEN3_RERANKER = """\
{%- set ask = namespace(instruct="Given a web search query, retrieve relevant passages that answer \
the query", query="", document="") -%}
{%- for message in messages -%}
{%- if message.role == "system" %}{% set ask.instruct = message.content %}
{%- elif message.role == "query" %}{% set ask.query = message.content %}
{%- elif message.role == "document" %}{% set ask.document = message.content %}{% endif -%}
{%- endfor -%}
<|im_start|>system
Judge whether the Document meets the requirements based on the Query and the Instruct provided. \
Note that the answer can only be "yes" or "no".<|im_end|>
<|im_start|>user
<Instruct>: {{ ask.instruct }}
<Query>: {{ ask.query }}
<Document>: {{ ask.document }}<|im_end|>
<|im_start|>assistant
<think>

</think>

{{ "" }}"""


class PairEncoder:
    """Tokenises pairs of a query and a document."""

    def __init__(self, tokenizer: Tokenizer, template: str | None, spec: ClassifierSpec) -> None:
        """`template` is the text of a template for pairs, which takes precedence."""
        own = tokenizer.chat_template or ""
        if template is None and all(role.search(own) for role in _ROLES):
            template = own
        if template is None and spec.is_qwen3_reranker:
            template = _QWEN3_RERANKER
        self._tokenizer, self._template = tokenizer, template

    async def encode(
        self,
        query: str,
        document: str,
        *,
        instruction: str | None = None,
        max_tokens: int,
        keep: int | None = None,
    ) -> list[int]:
        """Return the token ids of a pair. `keep` n cuts the document's end until the prompt has at
        most n tokens.

        Raises ContextLengthError without tokenising if the texts cannot fit into `max_tokens`
        tokens, and InvalidRequestError if the template reads no instruction, or if `keep` leaves
        no room for the document.
        """
        if keep is not None:
            document = document[: keep * self._tokenizer.longest_token]
        token_ids = await self._encode(query, document, instruction, max_tokens)
        while keep is not None and len(token_ids) > keep:
            words = await self._tokenizer.encode(document, add_special_tokens=False)
            left = words[: max(0, len(words) - (len(token_ids) - keep))]
            shorter = await self._tokenizer.decode(left, skip_special_tokens=False)
            if not shorter or len(shorter) >= len(document):
                raise InvalidRequestError(
                    f"truncate_prompt_tokens of {keep} leaves no room for a document next to the "
                    "query",
                    "truncate_prompt_tokens",
                )
            document = shorter
            token_ids = await self._encode(query, document, instruction, max_tokens)
        return token_ids

    async def _encode(
        self, query: str, document: str, instruction: str | None, max_tokens: int
    ) -> list[int]:
        if self._template is None:
            if instruction is not None:
                raise InvalidRequestError(
                    "the model has no template for pairs, so it reads no instruction",
                    "instruction",
                )
            return await self._tokenizer.encode_pair(query, document, max_tokens=max_tokens)
        messages: list[dict[str, Any]] = []
        if instruction is not None:
            messages.append({"role": "system", "content": instruction})
        messages += [
            {"role": "query", "content": query},
            {"role": "document", "content": document},
        ]
        return await self._tokenizer.encode_template(
            self._template, messages, max_tokens=max_tokens
        )
