"""How a model turns a prompt into an embedding."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InvalidRequestError
from .request import Pooling

NO_LAYOUT = "its folder has no modules.json, as sentence-transformers writes it"
"""The usual reason why a model makes no embeddings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingSpec:
    """How a model makes embeddings.

    `size` counts a vector's components. `prompt` precedes every text. The vectors of a Matryoshka
    model may be cut to their first components: to any number of them, or to one of
    `matryoshka_dimensions` if the model lists some.
    """

    pooling: Pooling
    normalize: bool
    size: int
    prompt: str = ""
    is_matryoshka: bool = False
    matryoshka_dimensions: tuple[int, ...] = ()

    def check_dimensions(self, dimensions: int | None) -> None:
        """Raise InvalidRequestError if the model cannot make vectors of this size."""
        if dimensions is None or dimensions == self.size:
            return
        allowed = self.matryoshka_dimensions
        if not self.is_matryoshka:
            reason = f"the model's vectors have {self.size} components and cannot be shortened"
        elif dimensions > self.size:
            reason = f"the model's vectors have {self.size} components"
        elif allowed and dimensions not in allowed:
            reason = f"the model allows only {', '.join(map(str, allowed))}"
        else:
            return
        raise InvalidRequestError(f"dimensions of {dimensions}: {reason}", "dimensions")
