"""The one exception tree of quire.

QuireError
├── InvalidRequestError                 the client's mistake; names the parameter     → 400
│   ├── ContextLengthError              prompt (+ max_tokens) over the context        → 400
│   ├── PoolTooSmallError               can never fit the KV pool                     → 400
│   ├── ModelNotFoundError              not a served name                             → 404
│   ├── StreamNotFoundError             no such resumable stream, or not this key's   → 404
│   └── StreamGoneError                 the stream, or the asked part, was dropped    → 410
├── AuthenticationError                 key missing or wrong                          → 401
├── OverloadedError                     refused on arrival; carries `retry_after`
│   ├── QueueFullError                                                                → 429
│   ├── RateLimitError              over a limit of its key                           → 429
│   └── ShuttingDownError                                                             → 503
├── RequestFailedError                  admitted, then failed; others are unaffected
│   ├── QueueTimeoutError               its deadline passed while it waited           → 503
│   ├── RequestTimeoutError             its deadline passed while it ran              → 504
│   ├── NonFiniteLogitsError            NaN or infinity in its logits                 → 500
│   ├── GrammarError                    no token continues its grammar, or it failed  → 500
│   ├── StepFailedError                 its row raised in the sampler or a mask       → 500
│   └── DeviceMemoryError               out of memory even alone in a step            → 503
├── EngineError                         the engine process is not serving
│   ├── EngineDeadError                 it died with the request in flight            → 500
│   └── EngineNotReadyError             starting, restarting or given up              → 503
└── StartupError                        one line for a person, exit code ≠ 0; never on HTTP
    ├── ConfigurationError              a flag, a file or their combination
    ├── ModelLoadError                  weights or configuration cannot be read
    └── UnsupportedModelError           could be read, but cannot run here; says why

`server/errors.py` maps every leaf to its HTTP answer, and a test asserts that none is missing.
The class attribute `code` is what a client sees in `error.code`. It also identifies an error that
crosses the process boundary (`error_from_code`).
"""

from __future__ import annotations

from pathlib import Path


class QuireError(Exception):
    """The root of all errors that quire raises on purpose."""

    code: str = "internal_error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequestError(QuireError):
    """The request cannot be served as it stands; `param` names the offending field."""

    code = "invalid_value"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidRequestError):
    """The prompt, or the prompt with max_tokens, exceeds the context.

    `num_tokens` are those of a prompt that exceeds it by itself, if they were counted.
    """

    code = "context_length_exceeded"

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        num_tokens: int | None = None,
        max_model_len: int | None = None,
    ) -> None:
        super().__init__(message, param)
        self.num_tokens = num_tokens
        self.max_model_len = max_model_len

    @classmethod
    def of_prompt(
        cls, num_tokens: int, max_model_len: int, param: str, *, answered: bool = True
    ) -> ContextLengthError:
        """Make the error for a prompt in the field `param` that is too long by itself; `answered`
        says that it must leave room for an answer. Clients look for the first words."""
        room = ", so there is no room for an answer" if answered else ""
        return cls(
            f"This model's maximum context length is {max_model_len} tokens, but your {param} came "
            f"to {num_tokens} tokens{room}. Shorten the {param}.",
            param,
            num_tokens=num_tokens,
            max_model_len=max_model_len,
        )


class PoolTooSmallError(InvalidRequestError):
    code = "kv_pool_too_small"


class ModelNotFoundError(InvalidRequestError):
    code = "model_not_found"


class StreamNotFoundError(InvalidRequestError):
    code = "stream_not_found"


class StreamGoneError(InvalidRequestError):
    code = "stream_gone"


class AuthenticationError(QuireError):
    code = "invalid_api_key"


class OverloadedError(QuireError):
    """The request was refused on arrival; the client may retry after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFullError(OverloadedError):
    code = "queue_full"


class RateLimitError(OverloadedError):
    code = "rate_limit_exceeded"


class ShuttingDownError(OverloadedError):
    code = "shutting_down"


class RequestFailedError(QuireError):
    """An admitted request failed; other requests are unaffected."""


class QueueTimeoutError(RequestFailedError):
    code = "queue_timeout"


class RequestTimeoutError(RequestFailedError):
    code = "request_timeout"


class NonFiniteLogitsError(RequestFailedError):
    code = "non_finite_logits"


class GrammarError(RequestFailedError):
    code = "grammar_failed"


class StepFailedError(RequestFailedError):
    code = "step_failed"


class DeviceMemoryError(RequestFailedError):
    code = "device_out_of_memory"


class EngineError(QuireError):
    """The engine process is not serving."""


class EngineDeadError(EngineError):
    code = "engine_dead"


class EngineNotReadyError(EngineError):
    code = "engine_not_ready"


class StartupError(QuireError):
    """The server cannot start. The message is one line for a person."""

    code = "startup_failed"


class ConfigurationError(StartupError):
    code = "bad_configuration"


class ModelLoadError(StartupError):
    code = "model_load_failed"


class UnsupportedModelError(StartupError):
    code = "unsupported_model"


_CROSSING: dict[str, type[QuireError]] = {
    error.code: error
    for error in (
        ContextLengthError,
        PoolTooSmallError,
        ModelNotFoundError,
        QueueFullError,
        QueueTimeoutError,
        RequestTimeoutError,
        NonFiniteLogitsError,
        GrammarError,
        StepFailedError,
        DeviceMemoryError,
        EngineDeadError,
        EngineNotReadyError,
        InvalidRequestError,
    )
}
"""The errors that the engine process reports to its clients, by code."""


MAX_LINE = 400
"""Characters that `one_line` keeps."""


def one_line(error: BaseException | str) -> str:
    """Return a message, or an error's type and message, as one line for a person to read.

    Each run of whitespace becomes one space, and what exceeds MAX_LINE characters is cut off.
    """
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    return text if len(text) <= MAX_LINE else text[:MAX_LINE] + " …"


def error_from_code(code: str, message: str) -> QuireError:
    """Rebuild an error that crossed the process boundary as (code, message)."""
    return _CROSSING.get(code, QuireError)(message)


def check_folder(model: str) -> None:
    """Raise ModelLoadError if `model` is the path of a folder, rather than a hub id, and there is
    no such folder. (The hub's own error would only say that the path is no valid id.)"""
    if model.startswith(("/", "./", "../", "~")) and not Path(model).is_dir():
        raise ModelLoadError(f"there is no folder {model}")
