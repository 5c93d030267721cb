"""Hashes of the beginnings of an input's prompts, taken while it is scanned.

Of the text as the line has it, from the first character of the prompt: JSON is not parsed.
Prompts that are written in the same way share their beginnings exactly where their texts do. A
prompt's size is that of the line from there on, with what the line has behind it. Where that is
wrong (another key by the name of the prompt comes first, say) an order is worse and no result is.
"""

from __future__ import annotations

import re
from array import array

import numpy as np

from engine.generation.prefix_order import PrefixHashes

# Bytes. The first is about one block of the KV cache; longer ones tell apart what begins alike, by
# every sixteenth byte: what differs in one word alone may count as equal up to the next length.
_LENGTHS = (96, 256, 1024, 2048, 4096, 8192)
_STRIDE = 16
_PROMPT = re.compile(rb'"(?:prompt|messages|prompt_token_ids)"\s*:\s*["\[]')


class PrefixHasher:
    """Collects the hashes of one line after the other: 16 bytes per line, 8 per further length."""

    def __init__(self) -> None:
        self._sizes = array("q")
        self._hashes = [array("q") for _ in _LENGTHS]
        self._key = b'"prompt": "'  # how the last line wrote it

    def add(self, lines: list[bytes]) -> None:
        """Add the next lines of the input."""
        key, width = self._key, len(self._key)
        sizes = self._sizes
        first, add_first = _LENGTHS[0], self._hashes[0].append
        longer = [
            (before, length, hashes.append)
            for before, length, hashes in zip(
                _LENGTHS, _LENGTHS[1:], self._hashes[1:], strict=False
            )
        ]
        for line in lines:
            begin = line.find(key)
            if begin < 0:
                if (match := _PROMPT.search(line)) is None:
                    sizes.append(0)
                    continue
                begin, key = match.start(), match[0]
                width = len(key)
            begin += width
            size = len(line) - begin
            sizes.append(size)
            if size >= first:
                add_first(hash(line[begin : begin + first]))
                for before, length, add in longer:
                    if size < length:
                        break
                    add(hash(line[begin + before : begin + length : _STRIDE]))
        self._key = key

    def finish(self) -> PrefixHashes:
        """Return the hashes of all lines, without a copy; no line can be added after it."""
        hashes = [_as_numpy(level) for level in self._hashes]
        return PrefixHashes(_LENGTHS, _as_numpy(self._sizes), hashes)


def _as_numpy(values: array[int]) -> np.ndarray:
    return np.frombuffer(values, dtype=np.int64) if values else np.empty(0, dtype=np.int64)
