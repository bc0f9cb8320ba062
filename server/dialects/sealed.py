"""Reasoning in an opaque form, for clients that keep it without showing it.

OpenAI calls it `encrypted_content`, Anthropic a thinking block's `signature` or `data`. Nothing is
encrypted here: it is the text in base64, which this server reads back when the client returns it.
It holds nothing that a client may not see, since a client may ask for the reasoning itself.
"""

from __future__ import annotations

import base64
import binascii

_PREFIX = "quire1."
"""It tells quire's own from what other servers have sealed."""


def seal(text: str) -> str:
    """Return `text` in the opaque form."""
    return _PREFIX + base64.urlsafe_b64encode(text.encode()).decode()


def unseal(sealed: str) -> str | None:
    """Return the text in an opaque form, or None if quire has not made it."""
    if not sealed.startswith(_PREFIX):
        return None
    try:
        return base64.b64decode(sealed[len(_PREFIX) :], b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError):
        return None
