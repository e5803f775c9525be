"""How single tokens are written in lists of log-probabilities: as text, and as bytes."""

import re
from typing import Any

from serve.detokenize import REPLACEMENT

# A byte that is no piece of the vocabulary, as Llama 2 writes it.
BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def byte_level_alphabet() -> dict[str, int]:
    """The byte behind each character of byte-level pieces (GPT-2): printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + rank): byte for rank, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


ALPHABET = byte_level_alphabet()


class Spelling:
    """The tokens of one tokenizer, each spelled once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, tuple[int, ...] | None]] = {}

    def __call__(self, token: int) -> tuple[str, tuple[int, ...] | None]:
        """The token's text inside a sentence, and its bytes; None where they are not known."""
        if token not in self._known:
            self._known[token] = self._spell(token)
        return self._known[token]

    def _spell(self, token: int) -> tuple[str, tuple[int, ...] | None]:
        # The second of two: decoders leave out the space before the first word of a text.
        once, twice = self._decode([token]), self._decode([token, token])
        text = twice[len(once) :] if twice.startswith(once) else once
        if REPLACEMENT not in text:
            return text, tuple(text.encode())
        return text, raw_bytes(self._tokenizer.convert_ids_to_tokens(token))

    def _decode(self, tokens: list[int]) -> str:
        return str(
            self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )


def raw_bytes(piece: str | None) -> tuple[int, ...] | None:
    """The bytes of a piece that is no whole character, by the two ways in which vocabularies write such; else None."""
    if piece is None:
        return None
    if fallback := BYTE_FALLBACK.fullmatch(piece):
        return (int(fallback[1], 16),)
    if all(character in ALPHABET for character in piece):
        return tuple(ALPHABET[character] for character in piece)
    return None
