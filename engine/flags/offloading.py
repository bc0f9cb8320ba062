"""Where the KV blocks go that the cache gives up: the fields of `EngineConfig` for that."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigurationError
from .flag import flag
from .parallel import ParallelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadingConfig(ParallelConfig):
    """Host memory for evicted blocks, and one store below it: a folder or a connector."""

    kv_offloading_size: int | None = flag(
        "KV cache",
        "Host memory for KV blocks that the cache gives up, such as 8GiB. Default: none.",
        None,
        details="A later prompt with the same beginning brings them back, as does a preempted "
        "sequence, if that is faster than computing them. Each engine takes as much.",
        is_size=True,
        ge=1,
    )
    kv_offloading_disk: str | None = flag(
        "KV cache",
        "Folder for KV blocks that host memory gives up.",
        None,
        details="It is used again after a restart. Needs `--kv-offloading-size`.",
    )
    kv_offloading_disk_size: int | None = flag(
        "KV cache",
        "Maximum size of --kv-offloading-disk, for each engine. Default: 32GiB.",
        None,
        is_size=True,
        ge=1,
    )
    kv_offloading_connector: str | None = flag(
        "KV cache",
        "Python function that makes a store in place of the folder, as MODULE:FUNCTION.",
        None,
        details="See [Evicted blocks](operations.md#evicted-blocks).",
    )

    def check_offloading(self, *, enable_prefix_caching: bool) -> None:
        """Raise ConfigurationError if evicted blocks cannot be kept as the flags say."""
        below = {
            "--kv-offloading-disk": self.kv_offloading_disk,
            "--kv-offloading-connector": self.kv_offloading_connector,
        }
        given = [name for name, value in below.items() if value is not None]
        if len(given) > 1:
            raise ConfigurationError(f"{' and '.join(given)} exclude one another")
        if self.kv_offloading_size is None:
            if given:
                raise ConfigurationError(
                    f"{given[0]} needs --kv-offloading-size: blocks pass through host memory"
                )
            return
        if not enable_prefix_caching:
            raise ConfigurationError(
                "--kv-offloading-size needs --enable-prefix-caching: evicted blocks are found by "
                "the hashes of their prefixes"
            )
        if self.num_ranks > 1 and given:
            raise ConfigurationError(f"{given[0]} works only with a model on one device")
