"""How a vocabulary spells bytes: as characters of their own, as SentencePiece does, or as words."""

from __future__ import annotations

import re
from functools import lru_cache

from tokenizers import Tokenizer as Encoder


class Spelling:
    """Reads the tokens of one vocabulary as bytes."""

    def __init__(self, backend: Encoder) -> None:
        self._backend = backend
        self._added = frozenset(backend.get_added_tokens_decoder())
        decoder = str(backend.decoder.__getstate__())
        self._is_wordpiece = '"WordPiece"' in decoder
        self.byte_level = '"ByteLevel"' in decoder
        """Whether tokens spell bytes, as GPT-2's do, rather than SentencePiece's characters."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to a text."""
        # 1. Added tokens are written as they are; an id outside the vocabulary has no bytes.
        piece = self._backend.id_to_token(token_id)
        if token_id in self._added or piece is None:
            return (piece or "").encode()
        # 2. A byte-level vocabulary has one printable character for each byte.
        if self.byte_level:
            table = _byte_of_character()
            if all(character in table for character in piece):
                return bytes(table[character] for character in piece)
            return piece.encode()
        # 3. SentencePiece writes bytes outside its vocabulary as <0xNN>, and a space as U+2581.
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        if self._is_wordpiece:  # a word's first piece follows a space, the others have a prefix
            text: str = self._backend.decoder.decode(["a", piece])
            return text.removeprefix("a").encode()
        return piece.replace("\u2581", " ").encode()


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """Return the inverse of GPT-2's table of a printable character for each byte: printable Latin-1
    characters stand for themselves, and U+0100 onwards for the other bytes, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in printable]
    return table | {chr(0x100 + offset): byte for offset, byte in enumerate(rest)}
