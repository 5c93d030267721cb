"""Hashes of prompts' beginnings: equal for prompts that begin alike, whatever the line around them.

Run: pytest tests/unit/batch/input/test_prefix_hashes.py
"""

from __future__ import annotations

import json
import random
import tracemalloc

import numpy as np
import pytest

from engine.batch.input.index import scan_input
from engine.batch.input.prefix_hashes import PrefixHasher
from engine.generation.prefix_order import PrefixHashes, find_shared

TEXT = "".join(random.Random(0).choices("abcdefghij klmnop", k=9000))


def hashes(lines: list[bytes], block: int = 3) -> PrefixHashes:
    hasher = PrefixHasher()
    for start in range(0, len(lines), block):
        hasher.add(lines[start : start + block])
    return hasher.finish()


def lines_of(prompt: str) -> list[bytes]:
    """One prompt in lines with different ids and settings around it."""
    return [
        json.dumps({"id": number, "prompt": prompt, "max_new_tokens": number}).encode()
        for number in (1, 23456)
    ] + [b'{"prompt":  ' + json.dumps(prompt).encode() + b', "id": "prompt"}']


@pytest.mark.parametrize("length, levels", [(50, 0), (100, 1), (300, 2), (1100, 3), (8200, 6)])
def test_a_prompt_has_the_same_hashes_in_every_line_around_it(length, levels):
    prompt = TEXT[:length]
    found = hashes(lines_of(prompt))
    assert [len(level) for level in found.hashes] == [3] * levels + [0] * (6 - levels)
    assert all(len(set(level.tolist())) == 1 for level in found.hashes[:levels])


def test_prompts_share_the_levels_before_their_first_difference():
    other = TEXT[:2500] + "".join(reversed(TEXT[2500:]))
    found = hashes([json.dumps({"id": 1, "prompt": text}).encode() for text in (TEXT, other)])
    assert [len(set(level.tolist())) for level in found.hashes] == [1, 1, 1, 1, 2, 2]


def test_messages_token_ids_and_bodies_are_found():
    ids = list(range(200))
    messages = [{"role": "user", "content": TEXT[:200]}]
    forms = [
        {"id": 1, "prompt_token_ids": ids},
        {"custom_id": "a", "body": {"model": "m", "prompt": ids, "max_tokens": 3}},
        {"id": 2, "messages": messages},
        {"custom_id": "b", "url": "/v1/chat/completions", "body": {"messages": messages}},
    ]
    first = hashes([json.dumps(form).encode() for form in forms]).hashes[0].tolist()
    assert first[0] == first[1] != first[2] == first[3]


def test_lines_without_a_prompt_have_no_hashes_and_change_no_others():
    good = lines_of(TEXT[:150])
    mixed = hashes([good[0], b"", b"{broken", good[1], b"[1]" * 100, good[2]])
    assert (mixed.sizes_n > 0).tolist() == [True, False, False, True, False, True]
    assert mixed.hashes[0].tolist() == hashes(good).hashes[0].tolist()


def test_the_scan_gives_every_line_that_is_not_blank_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.batch.input.index._CHUNK", 64)
    lines = [b'{"id": %d, "prompt": "%s"}' % (n, b"x" * n * 30) for n in range(8)]
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n \n".join(lines))
    given: list[bytes] = []
    index = scan_input(path, on_lines=given.extend)
    assert given == lines and len(index) == len(lines)


def test_ordering_a_million_long_lines_takes_less_than_200_mib():
    number = 20_000
    prompts = [TEXT[:80] + name + TEXT[83:8300] for name in ("one", "two", "ten")]
    lines = [b'{"id": 1, "prompt": "%s"}' % text.encode() for text in prompts]
    table = np.zeros((number, 4), dtype=np.int64)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        hasher = PrefixHasher()
        for line in range(number):
            hasher.add([lines[line % 3]])
        found = hasher.finish().select(np.arange(number))
        shared = find_shared(found)
        assert shared is not None and shared.num_sharing == number
        dealt_n, _ = shared.deal(found.sizes_n, 8)
        table = table[dealt_n]
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak / number < 200 * 2**20 / 1_000_000
