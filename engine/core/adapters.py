"""Loads and unloads LoRA adapters while requests run.

An adapter is read in a thread, since that takes as long as many steps, and becomes known between
two steps. Whatever is wrong with it has no effect on anything else.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from ..config import EngineConfig, WorkerInfo
from ..errors import InvalidRequestError, QuireError, one_line
from ..lora import AdapterSource, name_problem
from ..scheduling.adapter_table import AdapterTable
from ..worker_protocol import ReadAdapter, WorkerProtocol

logger = logging.getLogger("quire.engine")


class Loading(NamedTuple):
    """An adapter that is being read. `replace` lets it take the place of one of its name."""

    source: AdapterSource
    replace: bool
    read: Future[ReadAdapter]


class LoadedAdapters:
    """The adapters of one engine. `table` is the scheduler's view of them."""

    def __init__(self, config: EngineConfig, info: WorkerInfo, worker: WorkerProtocol) -> None:
        """`info` says which adapters the worker has loaded with the model."""
        self._worker = worker
        self._is_enabled = info.max_lora_rank is not None
        self.table = AdapterTable(config.max_loras, config.max_cpu_loras)
        for source in info.adapters:
            self.table.add(source)
        self._reader: ThreadPoolExecutor | None = None

    @property
    def sources(self) -> tuple[AdapterSource, ...]:
        """The loaded adapters, in the order of their first loading."""
        return self.table.sources

    def begin(self, source: AdapterSource, *, replace: bool) -> Loading:
        """Begin to read an adapter. Raises InvalidRequestError if none can have this name."""
        if not self._is_enabled:
            raise InvalidRequestError("LoRA is off: start the server with --enable-lora")
        if (problem := name_problem(source.name)) is not None:
            raise InvalidRequestError(problem, "lora_name")
        self.table.check_name(source.name, replace=replace)
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapter reader")
        return Loading(source, replace, self._reader.submit(self._worker.read_adapter, source))

    def finish(self, loading: Loading) -> None:
        """Make an adapter known that has been read. Raises InvalidRequestError if it could not be
        read, or if another one has got its name since."""
        try:
            adapter = loading.read.result()
        except QuireError:
            raise
        except Exception as error:  # such as too little memory
            raise InvalidRequestError(
                f"the adapter cannot be read: {one_line(error)}", "lora_path"
            ) from error
        self.table.check_name(loading.source.name, replace=loading.replace)
        source = loading.source._replace(version=adapter.version)
        self._worker.hold_adapter(self.table.add(source), adapter)
        logger.info("LoRA: adapter %r is loaded", loading.source.name)
        self.drop_unused()

    def unload(self, name: str) -> None:
        """Refuse new requests for an adapter; running ones finish. Raises ModelNotFoundError."""
        self.table.remove(name)
        logger.info("LoRA: adapter %r is unloaded", name)
        self.drop_unused()

    def drop_unused(self) -> None:
        """Let the worker forget the adapters that nobody can use any more."""
        for adapter_id in self.table.take_dropped():
            self._worker.drop_adapter(adapter_id)
