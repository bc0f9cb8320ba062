"""The loaded adapters: their weights on the host, and the slots of those that run."""

from __future__ import annotations

import logging
from collections import abc
from typing import NamedTuple

from ..adapters.adapter import Adapter, LinearShape, LoraWeight, version_of
from ..adapters.peft_config import read_config
from ..adapters.peft_files import read_adapter
from ..adapters.slots import AdapterSlots, LoraLimits
from ..config import EngineConfig
from ..errors import InvalidRequestError, ModelLoadError
from ..lora import AdapterSource
from ..model.causal_lm import CausalLM
from ..parallel.ranks import ALONE, Ranks
from ..step import AdapterLoad

DEFAULT_RANK = 16
"""Maximum rank if neither a flag nor an adapter asks for more."""

logger = logging.getLogger("quire.engine")


class _Model(NamedTuple):
    """What an adapter must fit: the whole layers."""

    linears: dict[str, LinearShape]
    prefix: str
    max_rank: int


class AdapterStore:
    """Reads adapters for one model, keeps their weights by id, and fills slots with them.

    Of several ranks, rank 0 reads, and sends the others what it has read; each keeps its part.
    """

    def __init__(
        self, config: EngineConfig, model: CausalLM, max_tokens: int, ranks: Ranks = ALONE
    ) -> None:
        """Read the adapters that the configuration names, whose ids count from 0, and enable
        adapters in the model; a step has at most `max_tokens` tokens. Raises ModelLoadError if one
        cannot be read."""
        self.sources: list[AdapterSource] = []
        """The adapters of the configuration that were read, in the order of their ids."""
        self._cuts, self._ranks = model.adapter_cuts, ranks
        linears, prefix = self._cuts.agree(model.linears, ranks), model.prefix
        max_rank = config.max_lora_rank or _largest_rank(config)
        [max_rank] = ranks.agree([max_rank])[0]  # another host may not have the files
        self._model = _Model(linears, prefix, max_rank)
        self._adapters: dict[int, Adapter] = {}
        self._unsent: list[tuple[int, Adapter]] = []
        """What other ranks get when they have started."""
        for source in config.lora if ranks.rank == 0 else ():
            try:
                adapter = self.read(source)
            except InvalidRequestError as error:
                message = f"cannot load the adapter {source.name!r}: {error.message}"
                if not config.skip_broken_lora:
                    raise ModelLoadError(message) from error
                logger.error("%s; the engine restarts without it", message)
            else:
                adapter_id = len(self.sources)
                self._adapters[adapter_id] = self._cuts.part(adapter)
                if ranks.size > 1:
                    self._unsent.append((adapter_id, adapter))
                self.sources.append(source._replace(version=adapter.version))
        limits = LoraLimits(config.max_loras, max_rank, max_tokens)
        self.slots: AdapterSlots = model.enable_adapters(limits)
        logger.info(
            "LoRA: %d slots for ranks up to %d take up to %.1f MiB",
            config.max_loras,
            max_rank,
            self.slots.num_bytes / 2**20,
        )

    @property
    def max_rank(self) -> int:
        return self._model.max_rank

    def read(self, source: AdapterSource) -> Adapter:
        """Read an adapter without keeping it; may run in any thread. Raises
        InvalidRequestError."""
        adapter = read_adapter(source.folder, *self._model)
        adapter = adapter._replace(version=version_of(adapter.weights))
        logger.info(
            "LoRA: read %r from %s: rank %d in %d layers, %.1f MiB",
            source.name,
            source.path,
            adapter.rank,
            len(adapter.weights),
            adapter.num_bytes / 2**20,
        )
        return adapter

    def send_first(self) -> None:
        """Send the adapters of the configuration to the other ranks, which have started."""
        for adapter_id, adapter in self._unsent:
            self._ranks.send_adapter(adapter_id, adapter)
        self._unsent.clear()

    def hold(self, adapter_id: int, adapter: Adapter) -> None:
        """Keep an adapter, to fill slots with it, on all ranks."""
        self._ranks.send_adapter(adapter_id, adapter)
        self._adapters[adapter_id] = self._cuts.part(adapter)

    def hold_layer(self, adapter_id: int, name: str, weight: LoraWeight) -> None:
        """Keep this rank's part of a layer of an adapter, which rank 0 has read."""
        adapter = self._cuts.part(Adapter({name: weight}))
        self._adapters.setdefault(adapter_id, Adapter({})).weights.update(adapter.weights)

    def drop(self, adapter_id: int) -> None:
        """Forget an adapter, which no later plan names, on all ranks."""
        if self._ranks.rank == 0:
            self._ranks.drop_adapter(adapter_id)
        del self._adapters[adapter_id]

    def fill(self, loads: abc.Iterable[AdapterLoad]) -> None:
        """Put adapters into slots, for the steps that are launched from now on."""
        for slot, adapter_id in loads:
            self.slots.write(slot, self._adapters[adapter_id])


def _largest_rank(config: EngineConfig) -> int:
    """Return the largest rank among the configured adapters, as far as their configurations can be
    read, and at least DEFAULT_RANK. (Reading the adapters will refuse the others.)"""
    largest = DEFAULT_RANK
    for source in config.lora:
        try:
            peft = read_config(source.folder)
        except InvalidRequestError:
            continue
        largest = max(largest, peft.rank, *peft.rank_pattern.values())
    return largest
