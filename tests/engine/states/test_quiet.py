from __future__ import annotations

import logging
from contextlib import ExitStack

from quire.engine.states.layers import quiet


def test_uses_that_overlap_leave_the_level_as_it_was() -> None:
    """Ranks that are threads prove their layers at the same time."""
    logger = logging.getLogger("transformers")
    level = logger.level
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(quiet())
        second.enter_context(quiet())
        first.close()
        assert logger.level == logging.ERROR
    assert logger.level == level
