"""JSON for answers, encoded by msgspec, which is faster than the standard library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

encode_json: Callable[[Any], bytes] = msgspec.json.Encoder().encode
"""Return a value as compact JSON in UTF-8. NaN and infinity become null."""
