"""Token texts: what is written of a token next to its log probability: text, bytes, JSON; cached.

A token's text depends on its neighbours, and a token may be a part of a character. So a token has
the bytes that it adds behind an ordinary word; their text where they are whole characters, else
each byte as `\\xe2`. Without a tokenizer a token is written as `token_id:17`.
"""

from __future__ import annotations

import functools
import re
from contextlib import suppress
from typing import Any, NamedTuple

from engine.batch.records.json_bytes import to_json

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenText(NamedTuple):
    """One token."""

    text: bytes  # as a JSON string
    key: bytes  # the same and a colon
    entry: bytes  # {"token":...,"bytes":...,"logprob": without the number and what follows
    num_chars: int  # characters that begin in it


class TokenTexts(dict[int, TokenText]):
    """Token id -> how it is written; computed when first asked for."""

    def __init__(self, tokenizer: Any = None) -> None:
        """Build an empty cache.

        Args:
            tokenizer: transformers', one of `tokenizers`, or None.
        """
        super().__init__()
        self.has_twins = False  # whether two tokens are written alike
        self._texts: set[bytes] = set()
        self._tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._special: dict[int, str] = {}  # those that have no text in a completion
        self._before: list[int] = []  # an ordinary word, in front of which nothing is stripped
        self._known = ""
        if self._tokenizer is None:
            return
        with suppress(Exception):  # of a tokenizer written in Python
            added = self._tokenizer.get_added_tokens_decoder()
            self._special = {token: each.content for token, each in added.items() if each.special}
        with suppress(Exception):
            encoded = self._tokenizer.encode("a", add_special_tokens=False)
            before = list(getattr(encoded, "ids", encoded))
            self._known, self._before = self._decode(before), before

    def __missing__(self, token: int) -> TokenText:
        content: bytes | None = None
        with suppress(BaseException):  # also panics of Rust; the id stands for the token
            content = self._bytes(token)
        if content is None:
            text, num_chars = f"token_id:{token}", 0
        else:
            try:
                text = content.decode()
            except UnicodeDecodeError:
                text = "".join(f"\\x{byte:02x}" for byte in content)
            is_shown = token not in self._special
            num_chars = is_shown * sum(byte & 0xC0 != 0x80 for byte in content)
        shown = to_json(text)
        values = b"null" if content is None else to_json(list(content))
        entry = b'{"token":%b,"bytes":%b,"logprob":' % (shown, values)
        self.has_twins |= shown in self._texts
        self._texts.add(shown)
        found = self[token] = TokenText(shown, shown + b":", entry, num_chars)
        return found

    def _bytes(self, token: int) -> bytes | None:
        """Return the bytes that a token adds to a text, None where they are not known."""
        if self._tokenizer is None:
            return None
        if token in self._special:
            return self._special[token].encode()
        text = self._decode([*self._before, token]).removeprefix(self._known)
        if _REPLACEMENT not in text:
            return text.encode()
        name_of = getattr(self._tokenizer, "id_to_token", None)
        name_of = name_of or self._tokenizer.convert_ids_to_tokens
        name = name_of(token)
        if match := _BYTE_TOKEN.fullmatch(name):
            return bytes([int(match[1], 16)])
        byte_of = _byte_of_letter()
        return bytes(byte_of[letter] for letter in name)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """Return which byte each letter stands for in the names of byte-level tokens.

    A printable letter of Latin-1 is its own byte; the others are numbered from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }
