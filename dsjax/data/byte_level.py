"""How a byte-level vocabulary spells bytes: each as one visible character, as GPT-2's does.

Bytes that are visible in Latin-1 stand for themselves; the others are moved behind U+0100, in their
order.
"""

from __future__ import annotations

_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(0x100) if byte not in _VISIBLE]

BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {
    chr(0x100 + place): byte for place, byte in enumerate(_HIDDEN)
}
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}
