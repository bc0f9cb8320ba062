"""The flags of other servers and what takes their place here, for people who come from these.

`quire serve` explains them when it is given one, and docs/migrating.md lists them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

Server = Literal["vLLM", "SGLang", "llama.cpp"]
Answer = Literal["same", "other name", "not needed", "refused"]
"""What becomes of a flag: `same` is a flag of quire, `other name` names the flag or setting to use,
`not needed` says what is so anyway, and `refused` says why not, or what to do."""


class ForeignFlag(NamedTuple):
    """A flag of another server. `advice` completes "`flag`: `answer`: …"; it may be empty if the
    flag is the same."""

    server: Server
    flag: str
    answer: Answer
    advice: str


_ONE_COPY = "experts are cut as other layers are: see --tensor-parallel-size"
_TEXT_ONLY = "only text is served"
_OWN_TOKENIZER = "the tokenizer is the one in the model's folder"
_GRAPHS = (
    "CUDA graphs are captured for all decode batches, and for steps with prompts up to "
    "--max-cudagraph-capture-size; --enforce-eager disables them"
)
_IN_CONFIG = "edit config.json in the model's folder"
_PROXY = "let a proxy in front check clients' certificates"
_ATTENTION = "there is one implementation of attention per device"
_GRAMMARS = "grammars are always compiled by llguidance"
_ALWAYS_CHUNKED = "prompts are always computed in chunks, within --max-num-batched-tokens"

_VLLM_SAME = """
    --host --port --uds --api-key --served-model-name --dtype --kv-cache-dtype --max-model-len
    --seed --enforce-eager --trust-remote-code --gpu-memory-utilization --block-size
    --num-gpu-blocks-override --enable-prefix-caching --max-num-seqs --max-num-batched-tokens
    --scheduling-policy --async-scheduling --disable-cascade-attn --max-logprobs --chat-template
    --trust-request-chat-template --reasoning-parser --tool-call-parser --generation-config
    --config --enable-log-requests --root-path --ssl-keyfile --ssl-certfile --shutdown-timeout
    --enable-lora --max-loras --max-lora-rank --max-cpu-loras --max-cudagraph-capture-size
"""
_SGLANG_SAME = """
    --host --port --api-key --served-model-name --dtype --kv-cache-dtype --trust-remote-code
    --chat-template --reasoning-parser --tool-call-parser --device --log-level --ssl-keyfile
    --ssl-certfile --nnodes --node-rank
"""
_HOSTS = "--nnodes --node-rank --master-addr --master-port"
_LLAMA_SAME = "--host --port --api-key --seed --chat-template --pooling"

_FLAGS: dict[Server, dict[Answer, dict[str, str]]] = {
    "vLLM": {
        "same": {
            **dict.fromkeys(_VLLM_SAME.split(), ""),
            "--load-format": "auto or dummy",
            "--speculative-config": "model, num_speculative_tokens; method ngram or draft_model",
            "--lora-modules": "NAME=FOLDER each; no JSON",
            "--quantization": "int8 and int4 on the CPU; a checkpoint's own is read off its files",
            "--kv-events-config": "the same JSON; encoding array for readers of older events",
            "--kv-offloading-size": "in bytes, or with a unit such as 8GiB",
            "--data-parallel-size": "",
            "--tensor-parallel-size": "",
            "--pipeline-parallel-size": "one step at a time",
            **dict.fromkeys(_HOSTS.split(), ""),
            "--allowed-origins": "repeat it for each origin instead of a JSON list",
            "--otlp-traces-endpoint": "OTLP over HTTP only; needs the extra otel",
        },
        "other name": {
            "--model": "give the model as an argument: quire serve MODEL",
            "--kv-cache-memory-bytes": "--kv-cache-memory",
            "--swap-space": "--kv-offloading-size",
            "--kv-offloading-backend": "--kv-offloading-disk or --kv-offloading-connector",
            "--api-server-count": "--http-workers",
            "--uvicorn-log-level": "--log-level",
            "--log-config-file": "--log-level and --log-format",
            "--pooler-config": "--pooling",
            "--override-pooler-config": "--pooling",
            "--override-generation-config": "--generation-config with a folder of your own",
            "--download-dir": "HF_HOME in the environment",
            "--hf-token": "HF_TOKEN in the environment",
        },
        "not needed": {
            "--disable-log-requests": "requests are logged only with --enable-log-requests",
            "--disable-log-stats": "statistics are on /metrics and never in the log",
            "--max-log-len": "prompts are never logged",
            "--preemption-mode": "preempted sequences are recomputed, or with "
            "--kv-offloading-size swapped if that is faster",
            "--max-seq-len-to-capture": _GRAPHS,
            "--cuda-graph-sizes": _GRAPHS,
            "--cudagraph-capture-sizes": _GRAPHS,
            "--compilation-config": "nothing is compiled that can be configured",
            "--enable-chunked-prefill": _ALWAYS_CHUNKED,
            "--max-num-partial-prefills": _ALWAYS_CHUNKED,
            "--long-prefill-token-threshold": _ALWAYS_CHUNKED,
            "--num-scheduler-steps": "--async-scheduling launches a step ahead",
            "--use-v2-block-manager": "there is one block manager",
            "--prefix-caching-hash-algo": "prefixes are always found by a cryptographic hash",
            "--disable-sliding-window": "sliding windows are computed as the model has them",
            "--model-impl": "models are always those of transformers",
            "--attention-backend": _ATTENTION,
            "--guided-decoding-backend": _GRAMMARS,
            "--structured-outputs-config": _GRAMMARS,
            "--enable-auto-tool-choice": "tool calls are parsed if the format is known",
            "--exclude-tools-when-tool-choice-none": "with none, the prompt mentions no tools",
            "--enable-reasoning": "reasoning is parsed if the format is known",
            "--chat-template-content-format": "content is text",
            "--enable-prompt-tokens-details": "usage always has them",
            "--enable-request-id-headers": "answers always have x-request-id",
            "--enable-server-load-tracking": "/load always counts",
            "--enable-tokenizer-info-endpoint": "/tokenizer_info is always served",
            "--disable-fastapi-docs": "/docs shows no data; requests need a key if one is set",
            "--disable-frontend-multiprocessing": "the engine is always a process of its own",
            "--allow-credentials": "keys are sent in headers, not in cookies",
            "--allowed-methods": "all methods of the API are allowed to --allowed-origins",
            "--allowed-headers": "all headers are allowed to --allowed-origins",
            "--h11-max-incomplete-event-size": "headers may have 64 KiB",
            "--h11-max-header-count": "a request may have 100 headers",
            "--distributed-executor-backend": "ranks are processes of quire's own",
            "--headless": "a host whose --node-rank is above 0 speaks no HTTP",
            "--max-parallel-loading-workers": "weights are loaded once",
            "--task": "embeddings are served beside generations",
            "--runner": "embeddings are served beside generations",
            "--convert": "--pooling makes embeddings of any model",
            "--collect-detailed-traces": "a request's trace has its queue, prefill and decode",
        },
        "refused": {
            "--enable-expert-parallel": _ONE_COPY,
            "--tokenizer": _OWN_TOKENIZER,
            "--tokenizer-mode": _OWN_TOKENIZER,
            "--skip-tokenizer-init": _OWN_TOKENIZER,
            "--revision": "download the revision and give its folder as MODEL",
            "--code-revision": "download the revision and give its folder as MODEL",
            "--hf-overrides": _IN_CONFIG,
            "--rope-scaling": _IN_CONFIG,
            "--rope-theta": _IN_CONFIG,
            "--config-format": "models have the layout of Hugging Face",
            "--cpu-offload-gb": "the whole model must fit the device",
            "--enable-sleep-mode": "stop the server instead",
            "--kv-transfer-config": "the KV cache stays in one server",
            "--calculate-kv-scales": "scales are read from the checkpoint",
            "--limit-mm-per-prompt": _TEXT_ONLY,
            "--mm-processor-kwargs": _TEXT_ONLY,
            "--allowed-local-media-path": _TEXT_ONLY,
            "--enable-prompt-embeds": _TEXT_ONLY,
            "--logits-processors": "allowed_token_ids, bad_words and logit_bias are in requests",
            "--response-role": "the role of answers is assistant",
            "--middleware": "put a proxy in front",
            "--tool-parser-plugin": "only the built-in formats are parsed",
            "--reasoning-parser-plugin": "only the built-in formats are parsed",
            "--return-tokens-as-token-ids": "set return_tokens_as_token_ids in the request",
            "--enable-force-include-usage": "set stream_options.include_usage in the request",
            "--ssl-ca-certs": _PROXY,
            "--ssl-cert-reqs": _PROXY,
        },
    },
    "SGLang": {
        "same": dict.fromkeys(_SGLANG_SAME.split(), ""),
        "other name": {
            "--model-path": "give the model as an argument: quire serve MODEL",
            "--speculative-algorithm": "--speculation model for STANDALONE, ngram for NGRAM",
            "--speculative-draft-model-path": "--speculative-model",
            "--speculative-num-draft-tokens": "--num-speculative-tokens",
            "--lora-paths": "--lora, once for each NAME=FOLDER",
            "--context-length": "--max-model-len",
            "--mem-fraction-static": "--gpu-memory-utilization, weights included",
            "--max-running-requests": "--max-num-seqs",
            "--max-queued-requests": "--max-num-queued-reqs",
            "--max-total-tokens": "--num-gpu-blocks-override, in blocks",
            "--chunked-prefill-size": "--max-num-batched-tokens",
            "--page-size": "--block-size",
            "--schedule-policy": "--scheduling-policy",
            "--disable-radix-cache": "--no-enable-prefix-caching",
            "--enable-hierarchical-cache": "--kv-offloading-size",
            "--hicache-size": "--kv-offloading-size",
            "--hicache-storage-backend": "--kv-offloading-disk",
            "--disable-cuda-graph": "--enforce-eager",
            "--random-seed": "--seed",
            "--log-requests": "--enable-log-requests",
            "--watchdog-timeout": "--engine-stall-timeout",
            "--tp-size": "--tensor-parallel-size",
            "--tp": "--tensor-parallel-size",
            "--pp-size": "--pipeline-parallel-size",
            "--dp-size": "--data-parallel-size",
            "--dist-init-addr": "--master-addr and --master-port",
        },
        "not needed": {
            "--enable-metrics": "/metrics is always served",
            "--is-embedding": "embeddings are served beside generations",
            "--grammar-backend": _GRAMMARS,
            "--sampling-backend": "there is one sampler",
            "--cuda-graph-max-bs": _GRAPHS,
            "--enable-mixed-chunk": "prompts and decodes always share steps",
            "--enable-cache-report": "usage always has cached_tokens",
            "--skip-server-warmup": "requests are accepted as soon as the model is loaded",
        },
        "refused": {
            "--tokenizer-path": _OWN_TOKENIZER,
            "--ep-size": _ONE_COPY,
        },
    },
    "llama.cpp": {
        "same": {
            **dict.fromkeys(_LLAMA_SAME.split(), ""),
            "--lora": "NAME=FOLDER, in the format of PEFT; requests select it by its name",
        },
        "other name": {
            "--hf-repo": "give the model as an argument: quire serve MODEL, with --gguf-file",
            "--ctx-size": "--max-model-len, which each request may use up",
            "--parallel": "--max-num-seqs",
            "--batch-size": "--max-num-batched-tokens",
            "--ubatch-size": "--max-num-batched-tokens",
            "--model-draft": "--speculative-model",
            "--draft-max": "--num-speculative-tokens",
            "--n-gpu-layers": "--device cuda, for all layers",
            "--gpu-layers": "--device cuda, for all layers",
            "--threads": "--num-threads",
            "--threads-http": "--http-workers, which are processes",
            "--alias": "--served-model-name",
            "--chat-template-file": "--chat-template",
            "--reasoning-format": "--reasoning-parser",
            "--cache-type-k": "--kv-cache-dtype, for K and V",
            "--cache-type-v": "--kv-cache-dtype, for K and V",
            "--no-cache-prompt": "--no-enable-prefix-caching",
            "--api-prefix": "--root-path",
            "--api-key-file": "QUIRE_API_KEY in the environment, or --config",
            "--ssl-key-file": "--ssl-keyfile",
            "--ssl-cert-file": "--ssl-certfile",
            "--timeout": "--request-timeout and --stream-stall-timeout",
            "--temp": "temperature in a generation_config.json; see --generation-config",
            "--verbose": "--log-level debug",
        },
        "not needed": {
            "--cont-batching": "requests are always batched continuously",
            "--flash-attn": _ATTENTION,
            "--jinja": "chat templates are always rendered",
            "--metrics": "/metrics is always served",
            "--embeddings": "embeddings are served beside generations",
            "--cache-reuse": "prefixes are shared to the token",
            "--mlock": "weights stay in memory",
            "--no-mmap": "weights are read into memory",
        },
        "refused": {
            "--mmproj": _TEXT_ONLY,
            "--n-predict": "max_tokens is in requests; see --request-timeout",
            "--grammar-file": "structured_outputs is in requests",
        },
    },
}

FOREIGN_FLAGS = tuple(
    ForeignFlag(server, flag, answer, advice)
    for server in get_args(Server)
    for answer in get_args(Answer)
    for flag, advice in _FLAGS[server][answer].items()
)
"""All flags of other servers that are explained, by server and answer."""


_SAID: dict[Answer, str] = {
    "same": "",
    "other name": "use instead: ",
    "not needed": "not needed, since ",
    "refused": "not supported: ",
}


def explain(flag: str, known: Iterable[str]) -> str:
    """Return one line about a flag, such as "--max_model_len", that is none of the `known` ones.

    It says what takes its place, or which known flag is most like it.
    """
    name = flag.split("=")[0].split(".")[0].replace("_", "-")
    known = list(known)
    if name in known:
        return f"{flag}: did you mean {name}?"
    for foreign in FOREIGN_FLAGS:
        if foreign.flag == name:
            return f"{name} of {foreign.server}: {_SAID[foreign.answer]}{foreign.advice}"
    close = difflib.get_close_matches(name, known, 1, cutoff=0.75)
    hint = f"did you mean {close[0]}?" if close else "`quire serve --help` lists all flags"
    return f"{name}: {hint}"
