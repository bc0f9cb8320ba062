"""How many processes run one model, and where: the fields of `EngineConfig` for that."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigurationError
from .flag import flag

MAX_RANKS = 1024
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """The ranks that run one model together, each on a device of its own.

    They form a grid: `pipeline_parallel_size` stages, each with a range of layers, of
    `tensor_parallel_size` ranks, each with a part of every layer. Rank r has the part
    r % tensor_parallel_size of stage r // tensor_parallel_size. Rank 0 is the engine process; the
    others are followers. Hosts have equal numbers of consecutive ranks.
    """

    tensor_parallel_size: int = flag(
        "Parallelism",
        "Devices that share each layer of the model.",
        1,
        details="Every device holds a part of each weight and of the KV cache. On the CPU it is "
        "slower than one process, and only of use for tests. "
        "See [Several devices](scaling-parallel.md).",
        ge=1,
        le=MAX_RANKS,
    )
    pipeline_parallel_size: int = flag(
        "Parallelism",
        "Devices, or groups of them, that each hold a range of the model's layers.",
        1,
        details="They work one after the other, so this only makes a model fit.",
        ge=1,
        le=MAX_RANKS,
    )
    nnodes: int = flag("Parallelism", "Hosts that run one model together.", 1, ge=1, le=MAX_RANKS)
    node_rank: int = flag(
        "Parallelism",
        "This host's number, from 0; host 0 speaks HTTP.",
        0,
        details="Every host gets the same flags otherwise.",
        ge=0,
    )
    master_addr: str = flag("Parallelism", "Address of host 0, for the other hosts.", LOOPBACK)
    master_port: int = flag(
        "Parallelism",
        "Port of host 0 for the other hosts; the next one is used as well.",
        29500,
        details="torch.distributed uses the latter and others without keys: use a private network.",
        ge=1,
        le=65534,
    )
    node_key_file: str | None = flag(
        "Parallelism",
        "File with a secret that all hosts have, for the links between them.",
        None,
        details="Needed unless --master-addr is this host's own. It has at least 32 characters, "
        "such as `openssl rand -hex 32` writes; hosts with another one are refused.",
    )

    @property
    def num_ranks(self) -> int:
        """The number of processes that run the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def ranks_per_node(self) -> int:
        """The number of ranks on each host."""
        return self.num_ranks // self.nnodes

    @property
    def ranks_of_node(self) -> range:
        """The ranks on this host."""
        first = self.node_rank * self.ranks_per_node
        return range(first, first + self.ranks_per_node)

    def check_ranks(self) -> None:
        """Raise ConfigurationError if ranks and hosts do not match."""
        if self.num_ranks > MAX_RANKS:
            raise ConfigurationError(f"{self.num_ranks} ranks are more than {MAX_RANKS}")
        if self.num_ranks % self.nnodes:
            raise ConfigurationError(
                f"--nnodes {self.nnodes} hosts cannot share {self.num_ranks} ranks equally "
                "(--tensor-parallel-size times --pipeline-parallel-size)"
            )
        if self.node_rank >= self.nnodes:
            raise ConfigurationError(
                f"--node-rank {self.node_rank} is not below --nnodes {self.nnodes}"
            )
        is_own = self.master_addr == "localhost" or self.master_addr.startswith("127.")
        if self.nnodes > 1 and self.node_key_file is None and not is_own:
            raise ConfigurationError(
                f"--master-addr {self.master_addr} can be reached by anybody in the network: give "
                "all hosts the same secret with --node-key-file"
            )
