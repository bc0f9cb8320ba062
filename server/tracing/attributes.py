"""The names and values of attributes, by OpenTelemetry's semantic conventions for generative AI.

Source: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/ (status: development). The
names are written here instead of imported, since the package that defines them calls them
incubating and may move them; a test compares them with that package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .current import EndedGeneration

Value = str | int | float | Sequence[str]

OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
RESPONSE_MODEL = "gen_ai.response.model"
MAX_TOKENS = "gen_ai.request.max_tokens"
TEMPERATURE = "gen_ai.request.temperature"
TOP_P = "gen_ai.request.top_p"
CHOICE_COUNT = "gen_ai.request.choice.count"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
FINISH_REASONS = "gen_ai.response.finish_reasons"
ERROR_TYPE = "error.type"
HTTP_METHOD = "http.request.method"
HTTP_ROUTE = "http.route"
HTTP_STATUS = "http.response.status_code"
REQUEST_ID = "quire.request_id"
PREEMPTIONS = "quire.num_preemptions"
"""Attributes of the conventions, and two of our own: the answer's x-request-id, which the log has
too, and how often the request's sequences were preempted."""

PROVIDER_NAME = "quire"

OPERATIONS: Mapping[str, str] = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/responses/compact": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/invocations": "generate_content",
    **dict.fromkeys(("/v1/rerank", "/v2/rerank", "/rerank"), "rerank"),
    **dict.fromkeys(("/v1/score", "/score"), "score"),
    **dict.fromkeys(("/v1/classify", "/classify"), "classify"),
}
"""The paths whose requests are traced → the operation. The conventions allow names of one's own if
none of theirs fits, as for rerank, score and classify."""


def of_generation(model: str, ended: EndedGeneration) -> dict[str, Value]:
    """Return the attributes of a generation, whose requests share their parameters."""
    requests, records = ended.requests, ended.records
    params = requests[0].sampling_params
    name = requests[0].adapter or model
    values: dict[str, Value] = {
        REQUEST_MODEL: name,
        RESPONSE_MODEL: name,
        INPUT_TOKENS: sum(record.prompt_tokens for record in records),
        OUTPUT_TOKENS: sum(sum(record.generation_tokens) for record in records),
        CACHED_TOKENS: ended.num_cached_tokens,
        PREEMPTIONS: sum(record.preemptions for record in records),
    }
    if requests[0].pooling is None:
        values |= {
            MAX_TOKENS: params.max_tokens,
            TEMPERATURE: params.temperature,
            TOP_P: params.top_p,
        }
        if params.n != 1:
            values[CHOICE_COUNT] = params.n
    return values
