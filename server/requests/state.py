"""The state that all endpoints share: one object in `app.state.quire`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request

from ...engine.client import EngineClient
from ...engine.config import EngineInfo
from ...engine.errors import EngineNotReadyError, ModelNotFoundError
from ...engine.lora import AdapterSource
from ..http.auth import Keys
from ..http.limits import InFlight
from ..http.responses_store import ResponseStore
from ..http.resumption import StreamRegistry
from ..http.siblings import Siblings
from ..metrics.metrics import Metrics
from ..parsing.formats.message_format import MessageFormat
from ..parsing.formats.reasoning_marks import ReasoningMarks
from ..settings import Settings
from ..templates.chat_template import read_template
from ..tenants.caller import present_caller
from ..tenants.key_metrics import KeyMetrics
from ..tenants.key_ring import KeyRing, KeySource
from ..text.grammar_check import GrammarCheck
from ..text.tokenizer import Tokenizer

RenderMetrics = Callable[[bool], Awaitable[tuple[bytes, str]]]
"""Returns the page of `/metrics` and its content type: `Metrics.render`, in the format of
OpenMetrics if the argument is true, or in one of several HTTP workers the page of all of them, in
Prometheus' format."""


class ServerState:
    """Everything that an endpoint needs to serve a request. `create_app` makes it once.

    `generation_defaults` are the sampling parameters of the model's generation_config.json.
    """

    def __init__(
        self,
        settings: Settings,
        engine: EngineClient,
        tokenizer: Tokenizer,
        metrics: Metrics,
        version: str,
        generation_defaults: dict[str, Any],
        siblings: Siblings,
    ) -> None:
        self.settings = settings
        self.engine = engine
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.version = version
        self.generation_defaults = generation_defaults
        self.score_template: str | None = None
        """The text of the template for pairs that the settings name, if they name one."""
        if settings.score_template is not None:
            self.score_template = read_template(settings.score_template)
        self.message_format = MessageFormat.of(
            settings, tokenizer.templates.texts, tokenizer.response_template
        )
        style = self.message_format.reasoning
        self.reasoning_marks = ReasoningMarks(style, tokenizer) if style is not None else None
        self.grammar_check = GrammarCheck()
        self.key_source = KeySource(settings) if siblings.tenants is None else None
        """Where the keys come from; None if the main process reads them for its HTTP workers."""
        tenants = siblings.tenants if self.key_source is None else self.key_source.tenants
        self.key_metrics = KeyMetrics(metrics)
        self.keys = Keys(KeyRing(tenants or ()), siblings.rates, self.key_metrics)
        self.siblings = siblings
        self.in_flight = InFlight(settings, engine, siblings.index, siblings.loads)
        self.responses = ResponseStore(settings)
        self.streams = StreamRegistry(settings.stream_resume_ttl, siblings.suffix)
        self.created = int(time.time())
        self.render_metrics: RenderMetrics = self._render_own_metrics

    async def _render_own_metrics(self, openmetrics: bool) -> tuple[bytes, str]:
        self.metrics.engine_health(self.engine.health().ready)
        return self.metrics.render(openmetrics=openmetrics)

    @property
    def model_name(self) -> str:
        """The model's name in answers."""
        return self.settings.served_names[0]

    @property
    def draining(self) -> bool:
        """Whether new requests are refused because the server is stopping."""
        return self.in_flight.draining

    def begin_drain(self) -> None:
        """Answer new requests and /ready with 503 from now on. Requests in flight go on."""
        self.in_flight.draining = True

    @property
    def engine_info(self) -> EngineInfo | None:
        """The facts about the engine and its model; None before its first start."""
        try:
            return self.engine.info
        except EngineNotReadyError:
            return None

    @property
    def adapters(self) -> dict[str, AdapterSource]:
        """The loaded LoRA adapters by name; before the first start, those that will be loaded."""
        info = self.engine_info
        adapters = self.settings.adapters if info is None else info.adapters
        return {adapter.name: adapter for adapter in adapters}

    def adapter_of(self, name: str | None) -> str | None:
        """Return the LoRA adapter that `name` selects, a name that `check_model` has accepted.
        None stands for the model itself."""
        return None if name is None or name in self.settings.served_names else name

    def name_of(self, name: str | None) -> str:
        """Return the name that answers carry if a request selects its model by `name`."""
        return self.adapter_of(name) or self.model_name

    def check_model(self, name: str | None) -> None:
        """Raise ModelNotFoundError unless `name` is a served name, that of a loaded LoRA adapter,
        or left out, and the present request's key may use it."""
        if not self.may_use(self.model_name if name is None else name):
            raise ModelNotFoundError(
                f"the model {(name or self.model_name)[:128]!r} is not served to this key", "model"
            )
        if name is None or name in self.settings.served_names:
            return
        if name not in self.adapters:
            raise ModelNotFoundError(f"the model {name[:128]!r} is not served here", "model")

    def may_use(self, name: str) -> bool:
        """Return whether the present request's key may use the model or adapter `name`."""
        caller = present_caller.get()
        return caller is None or caller.tenant.may_use(name)

    @property
    def isolates_keys(self) -> bool:
        """Whether what one key has cached is kept from the others."""
        chosen = self.settings.prefix_cache_isolation
        return self.keys.has_several if chosen is None else chosen == "key"

    def check_ready(self) -> None:
        """Raise EngineNotReadyError while the engine loads or restarts, or if it has given up."""
        health = self.engine.health()
        if not health.ready:
            raise EngineNotReadyError(f"the engine is not ready: {health.reason}")

    def fingerprint(self, name: str | None) -> str:
        """Return the `system_fingerprint` of requests that select their model by `name`. It changes
        with anything that may change the tokens that a seed gives."""
        info = self.engine.info
        adapter = self.adapters.get(self.adapter_of(name) or "", ())
        parts = (
            *(self.version, info.model, info.dtype, info.computed_format, info.device),
            *adapter,
        )
        return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def state_of(request: Request) -> ServerState:
    """Return the server's state from a request."""
    state: ServerState = request.app.state.quire
    return state
