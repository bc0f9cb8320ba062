"""An engine that generates scripted tokens, and a byte-level tokenizer that needs no download."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Encoder

from quire.engine.classifier_spec import NO_CLASSIFIER, ClassifierSpec
from quire.engine.client import EngineHealth, EngineState
from quire.engine.config import EngineInfo
from quire.engine.embedding_spec import NO_LAYOUT, EmbeddingSpec
from quire.engine.errors import EngineNotReadyError, InvalidRequestError, ModelNotFoundError
from quire.engine.lora import AdapterSource
from quire.engine.outputs import (
    EngineStats,
    FinishReason,
    LiveSnapshot,
    RowError,
    SequenceOutput,
    Timings,
    TokenLogprobs,
)
from quire.engine.request import Request
from quire.server.text.tokenizer import Tokenizer

BYTE_VOCABULARY = {
    character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
}
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}"
    "Answer with <tool_call>{...}</tool_call>.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>"
    "{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)
REASONING_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>"
    "{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that shows everything that was said, the reasoning of all turns included."""
IM_START, IM_END = 256, 257
VOCAB_SIZE = 258


def byte_tokenizer(
    chat_template: str | None = CHAT_TEMPLATE, special: Sequence[str] = ()
) -> Tokenizer:
    """Make a tokenizer with a token for each byte, ChatML's two control tokens, and `special`."""
    encoder = Encoder(models.BPE(vocab=BYTE_VOCABULARY, merges=[]))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    encoder.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>", *special)]
    )
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=encoder, eos_token="<|im_end|>")
    hf.chat_template = chat_template
    return Tokenizer(hf)


def ids(text: str) -> list[int]:
    """Return the token ids of a text that spells no control token."""
    table = pre_tokenizers.ByteLevel(add_prefix_space=False)
    [(mapped, _)] = table.pre_tokenize_str(text) if len(text) == 1 else [("", None)]
    if mapped:
        return [BYTE_VOCABULARY[character] for character in mapped]
    return [token for character in text for token in ids(character)]


@dataclass
class Script:
    """The tokens that the engine generates for a choice, and their end if max_tokens allows it."""

    tokens: list[int]
    finish: FinishReason = "stop"
    error: RowError | None = None
    stop_reason: int | None = None
    delay: float = 0.0
    """Seconds to wait before each output."""
    chunk: int = 1
    """Tokens per output."""
    logprob: float = -0.5
    preemptions: int = 0
    eos: bool = True
    """Whether "stop" adds the end-of-sequence token, as real engines do."""


Scripts = Callable[[Request, int], Script]


def say(text: str, **fields: Any) -> Scripts:
    """Return scripts in which every choice generates `text` and stops."""
    return lambda request, choice: Script(ids(text), **fields)


@dataclass
class FakeEngineClient:
    """An EngineClient that generates what `scripts` returns for each (request, choice)."""

    scripts: Scripts = field(default_factory=lambda: say("Hello, world"))
    vocab_size: int = VOCAB_SIZE
    max_model_len: int = 512
    max_num_seqs: int = 64
    num_blocks: int = 64
    embedding: EmbeddingSpec | str = NO_LAYOUT
    """With a spec, a prompt's vector holds its first token ids, padded with zeros."""
    classifier: ClassifierSpec | str = NO_CLASSIFIER
    can_generate: bool = True
    ready: bool = True
    alive: bool = True
    hold: asyncio.Event | None = None
    """An event that holds back all outputs until it is set, if there is one."""

    adapters: dict[str, AdapterSource] = field(default_factory=dict)
    """The LoRA adapters that are loaded."""

    requests: list[Request] = field(default_factory=list)
    aborted: list[tuple[str, int | None]] = field(default_factory=list)
    running: set[tuple[str, int]] = field(default_factory=set)
    live: list[LiveSnapshot] = field(default_factory=list)
    started: bool = False
    closed: bool = False
    resets: int = 0

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            model="fake",
            architecture="FakeForCausalLM",
            device="cpu",
            dtype="float32",
            num_parameters=1,
            source_format="GGUF Q4_0",
            computed_format="4-bit groups",
            weight_bytes=3,
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            block_size=16,
            num_blocks=self.num_blocks,
            kv_bytes_per_token=1,
            max_num_batched_tokens=512,
            is_asynchronous=False,
            max_num_seqs=self.max_num_seqs,
            max_logprobs=20,
            eos_token_ids=(IM_END,),
            embedding=self.embedding,
            classifier=self.classifier,
            can_generate=self.can_generate,
            adapters=tuple(self.adapters.values()),
            draft_weight_bytes=5,
            draft_kv_bytes_per_token=7,
        )

    async def start(self) -> None:
        self.started = True

    async def close(self) -> None:
        self.closed = True

    async def reset_prefix_cache(self) -> None:
        self.resets += 1

    async def load_adapter(self, source: AdapterSource, *, replace: bool = False) -> None:
        if source.name in self.adapters and not replace:
            raise InvalidRequestError("it is loaded already", "lora_name")
        self.adapters[source.name] = source

    async def unload_adapter(self, name: str) -> None:
        if name not in self.adapters:
            raise ModelNotFoundError("it is not loaded", "model")
        del self.adapters[name]

    def engines(self) -> dict[str, EngineState]:
        return {}

    def engine_of(self, request_id: str) -> str | None:
        return None

    def health(self) -> EngineHealth:
        return EngineHealth(self.alive, self.ready, "ok" if self.ready else "it loads", 0)

    def stats(self) -> EngineStats:
        return EngineStats(
            step=1,
            num_running=len(self.running),
            num_waiting=0,
            num_blocks=self.num_blocks,
            num_free_blocks=self.num_blocks - len(self.running),
            num_cached_blocks=0,
            step_tokens=0,
            prefix_queries=0,
            prefix_hits=0,
            preemptions=0,
            blocks_copied=0,
            blocks_shared=0,
        )

    async def snapshots(
        self, engine: str | None = None
    ) -> AsyncGenerator[LiveSnapshot | None, None]:
        """Yield those of `live`, and None for a second without one; then end."""
        for snapshot in self.live:
            yield snapshot
        yield None

    def abort(self, request_id: str, choice: int | None = None) -> None:
        self.aborted.append((request_id, choice))
        self.running -= {
            key for key in self.running if key[0] == request_id and choice in (None, key[1])
        }

    async def generate(self, request: Request) -> AsyncIterator[SequenceOutput]:
        if not self.ready:
            raise EngineNotReadyError("the engine is starting")
        self.requests.append(request)
        outputs: asyncio.Queue[SequenceOutput] = asyncio.Queue()
        choices = range(request.sampling_params.n)
        self.running |= {(request.request_id, choice) for choice in choices}
        tasks = [asyncio.create_task(self._run(request, choice, outputs)) for choice in choices]
        try:
            left = len(tasks)
            while left:
                output = await outputs.get()
                left -= output.finish_reason is not None
                yield output
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if any(key[0] == request.request_id for key in self.running):
                self.abort(request.request_id)

    def _embed(self, request: Request) -> SequenceOutput:
        if request.pooling == "classify":
            assert isinstance(self.classifier, ClassifierSpec)
            size = len(self.classifier.labels)
        else:
            assert isinstance(self.embedding, EmbeddingSpec)
            assert request.pooling == self.embedding.pooling
            size = self.embedding.size
        vector = np.zeros(size, dtype="<f4")
        prompt = request.prompt_token_ids[: len(vector)]
        vector[: len(prompt)] = prompt
        return SequenceOutput(
            request.request_id,
            0,
            [],
            finish_reason="stop",
            num_cached_tokens=0,
            embedding=vector.tobytes(),
        )

    async def _run(
        self, request: Request, choice: int, outputs: asyncio.Queue[SequenceOutput]
    ) -> None:
        if self.hold is not None:
            await self.hold.wait()
        if request.pooling is not None:
            self.running.discard((request.request_id, choice))
            outputs.put_nowait(self._embed(request))
            return
        params = request.sampling_params
        script = self.scripts(request, choice)
        tokens, finish = list(script.tokens), script.finish
        if finish == "stop" and script.eos:
            tokens.append(IM_END)
        if finish in ("stop", "length") and len(tokens) > params.max_tokens:
            tokens, finish = tokens[: params.max_tokens], "length"
        chunks = [tokens[at : at + script.chunk] for at in range(0, len(tokens), script.chunk)]
        if not chunks:
            chunks = [[]]
        for number, chunk in enumerate(chunks):
            await asyncio.sleep(script.delay)
            key = (request.request_id, choice)
            aborted = key not in self.running
            last = number == len(chunks) - 1
            failed = last and finish == "error"
            if last or aborted:
                self.running.discard(key)
            outputs.put_nowait(
                SequenceOutput(
                    request_id=request.request_id,
                    choice=choice,
                    token_ids=[] if aborted or failed else chunk,
                    logprobs=None
                    if params.logprobs is None
                    else [
                        self._logprob(token, script, params.logprobs)._replace(
                            named_logprobs=[-float(id) for id in params.logprob_token_ids] or None
                        )
                        for token in chunk
                    ],
                    prompt_logprobs=self._prompt_logprobs(request, choice, number),
                    finish_reason="abort" if aborted else finish if last else None,
                    stop_reason=script.stop_reason if last else None,
                    error=script.error if failed else None,
                    num_cached_tokens=3 if number == 0 else None,
                    timings=Timings(None, None, 1.0, script.preemptions)
                    if last or aborted
                    else None,
                )
            )
            if aborted:
                return

    def _logprob(self, token: int, script: Script, count: int) -> TokenLogprobs:
        others = [token, (token + 1) % VOCAB_SIZE][:count]
        return TokenLogprobs(
            token, script.logprob, 1, others, [script.logprob, float("-inf")][:count]
        )

    def _prompt_logprobs(
        self, request: Request, choice: int, number: int
    ) -> list[TokenLogprobs | None] | None:
        count = request.sampling_params.prompt_logprobs
        if count is None or choice or number:
            return None
        script = Script([], logprob=-1.0)
        rest = request.prompt_token_ids[1:]
        return [None, *(self._logprob(token, script, count) for token in rest)]


def prompt_text(engine: FakeEngineClient, tokenizer: Tokenizer) -> str:
    """Return the text of the latest request's prompt, control tokens included."""
    return b"".join(map(tokenizer.token_bytes, engine.requests[-1].prompt_token_ids)).decode()
