"""Counts by the names of keys. Only names of the file become labels, never a key."""

from __future__ import annotations

from ..metrics.metrics import Metrics


class KeyMetrics:
    """Counters in the registry of `metrics`, with the label `key`. Keys without a name are not
    counted."""

    def __init__(self, metrics: Metrics) -> None:
        self._requests = metrics.counter_by(
            "key_requests", "Requests admitted, by the key's name.", "key"
        )
        self._tokens = metrics.counter_by(
            "key_tokens", "Tokens of prompts and of answers, by the key's name.", "key", "kind"
        )
        self._rejections = metrics.counter_by(
            "key_rejections", "Requests over a limit of their key, by its name.", "key"
        )

    def finished(self, name: str, prompt_tokens: int, generated_tokens: int) -> None:
        """Count an engine request that was admitted and has ended."""
        if name:
            self._requests(name).inc()
            self._tokens(name, "prompt").inc(prompt_tokens)
            self._tokens(name, "generation").inc(generated_tokens)

    def rejected(self, name: str) -> None:
        """Count a request that exceeds a limit of its key."""
        if name:
            self._rejections(name).inc()
