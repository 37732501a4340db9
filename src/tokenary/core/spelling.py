"""How vocabularies write bytes: one printable character a byte, or text with ``▁`` for a space and ``<0x0A>``."""

from __future__ import annotations

import re

#: Printable characters that byte-level vocabularies write bytes with; the 68 other bytes follow from U+0100 on.
_PLAIN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(byte): byte for byte in _PLAIN} | {
    chr(0x100 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in set(_PLAIN))
}
CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def is_byte(piece: str) -> bool:
    """Tell whether a piece of a SentencePiece-like vocabulary stands for one byte."""
    return bool(_BYTE.fullmatch(piece))


def piece_bytes(piece: str, byte_level: bool) -> bytes:
    """Return the bytes that a piece stands for.

    Parameters
    ----------
    piece : str
        As the vocabulary writes it.
    byte_level : bool
        Whether it writes one character a byte. A piece with other characters is plain text there.
    """
    if byte_level:
        return bytes(BYTE_OF[c] for c in piece) if all(c in BYTE_OF for c in piece) else piece.encode()
    if byte := _BYTE.fullmatch(piece):
        return bytes.fromhex(byte[1])
    return piece.replace("▁", " ").encode()
