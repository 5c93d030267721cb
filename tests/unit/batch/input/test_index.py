"""The index of a batch input: every line once, found again by its offset."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batch.input.index import line_id, scan_input
from engine.batch.input.pending import Line, PendingLines


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def pending(path: Path, done: list[int] = ()) -> PendingLines:
    index = scan_input(path)
    done_n = np.zeros(len(index), dtype=bool)
    done_n[list(done)] = True
    return PendingLines(path, PendingLines.select(index, done_n))


def test_offsets_and_line_numbers_by_hand(tmp_path):
    content = b'{"id": 1}\n\n  \t\n{"id": 2}\r\n{"id": 3}'
    index = scan_input(write(tmp_path / "in.jsonl", content))
    assert index.offsets_n.tolist() == [0, 15, 26]
    assert index.numbers_n.tolist() == [1, 4, 5]
    assert index.size == len(content)
    assert index.sha256 == hashlib.sha256(content).hexdigest()
    assert index.duplicates == {}


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    lines = pending(write(tmp_path / "in.jsonl", b'\xef\xbb\xbf{"id": 1}\n{"id": 2}\n'))
    assert [lines[0].raw, lines[1].raw] == [b'{"id": 1}\n', b'{"id": 2}\n']
    empty = scan_input(write(tmp_path / "bom.jsonl", b"\xef\xbb\xbf\n"))
    assert len(empty) == 0


@pytest.mark.parametrize("content", [b"", b"\n", b"\r\n \n\t"])
def test_an_input_without_lines_has_no_requests(tmp_path, content):
    index = scan_input(write(tmp_path / "in.jsonl", content))
    assert len(index) == 0
    assert PendingLines.select(index, np.zeros(0, dtype=bool)).shape == (0, 4)


def test_what_is_no_file_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        scan_input(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match="is not a regular file"):
        scan_input(tmp_path)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
newlines = st.sampled_from([b"\n", b"\r\n"])
bodies = st.one_of(
    st.builds(lambda i: json.dumps({"id": i, "prompt": "a"}).encode(), text | st.integers()),
    st.binary(max_size=12).filter(lambda raw: b"\n" not in raw),
    st.sampled_from([b"", b" ", b"\t\r"]),
)


@given(lines=st.lists(st.tuples(bodies, newlines), max_size=12), end=st.booleans())
def test_every_line_that_is_not_blank_is_found_again(tmp_path_factory, lines, end):
    content = b"".join(body + newline for body, newline in lines)
    if not end:
        content = content.removesuffix(b"\n")
    path = write(tmp_path_factory.mktemp("scan") / "in.jsonl", content)
    expected = [
        (number, raw)
        for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
        if raw.strip(b" \t\r\n\v\f")
    ]
    found = pending(path)
    lines_found = [found[i] for i in range(len(found))]
    assert [(line.number, line.raw.removesuffix(b"\n")) for line in lines_found] == expected
    assert [line.index for line in lines_found] == list(range(len(expected)))


@pytest.mark.parametrize(
    "raw, expected",
    [
        (b'{"id": "a", "prompt": "x"}', "a"),
        (b'{"id":7,"prompt":"x"}', 7),
        (b'{"prompt": "x", "id": -7}', -7),
        (b'{"custom_id": "a", "body": {"id": "b"}}', "a"),
        (b'{"body": {"id": "b"}, "custom_id": "a"}', "a"),
        (b'{"prompt": "has \\"id\\": 3 inside"}', None),
        (b'{"id": "\\u00e9"}', "\u00e9"),
        (b'{"id": "\xc3\xa9"}', "\u00e9"),
        (b'{"id": "a", "prompt": "broken', "a"),
        (b'{"id": 7.5}', None),
        (b'{"id": 7, "x": NaN', 7),
        (b'{"id": true}', None),
        (b'{"id": null}', None),
        (b'{"id": ["a"]}', None),
        (b'{"id": "\xff"}', None),
        (b"[1]", None),
        (b"[" * 100_000, None),
        (b"{", None),
    ],
)
def test_the_id_of_a_line(raw, expected):
    assert line_id(raw) == expected
    assert type(line_id(raw)) is type(expected)


def test_the_later_line_of_an_id_is_the_duplicate(tmp_path):
    ids = ['"a"', "1", '"1"', '"a"', "1", "01", '"\\u0061"']
    content = "".join(f'{{"prompt": "x", "id": {name}}}\n' for name in ids)
    index = scan_input(write(tmp_path / "in.jsonl", content.encode()))
    # Text "1" is not the number 1, 01 is no JSON, and an escape changes nothing.
    assert index.duplicates == {3: 1, 4: 2, 6: 1}


def test_lines_without_an_id_are_no_duplicates_of_each_other(tmp_path):
    index = scan_input(write(tmp_path / "in.jsonl", b'{"prompt": "x"}\n{"prompt": "x"}\n[]\n'))
    assert index.duplicates == {}


def test_equal_hashes_of_different_ids_are_no_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.batch.input.index._hash", lambda name: 42)
    index = scan_input(write(tmp_path / "in.jsonl", b'{"id": 1}\n{"id": 2}\n{"x": 3}\n{"id": 1}'))
    assert index.duplicates == {3: 1}


@given(names=st.lists(st.integers(0, 5) | st.sampled_from("abc01"), max_size=20))
def test_duplicates_are_those_a_dictionary_finds(tmp_path_factory, names):
    content = "".join(json.dumps({"id": name}) + "\n" for name in names)
    path = write(tmp_path_factory.mktemp("scan") / "in.jsonl", content.encode())
    first: dict = {}
    expected = {}
    for place, name in enumerate(names):
        number = first.setdefault(json.dumps(name), place + 1)
        if number != place + 1:
            expected[place] = number
    assert scan_input(path).duplicates == expected


def test_pending_lines_are_those_not_done_with_their_line_numbers(tmp_path):
    path = write(tmp_path / "in.jsonl", b'{"id": 1}\n\n{"id": 2}\n{"id": 1}\n')
    lines = pending(path, done=[0])
    assert len(lines) == 2
    assert lines[0] == Line(1, 3, b'{"id": 2}\n')
    assert lines[1] == Line(2, 4, b'{"id": 1}\n', duplicate_of=1)
    assert lines.number_of(2) == 4


def plain_index(content: bytes) -> tuple[list[int], list[int], dict[int, int]]:
    """Offsets, line numbers and duplicates, line by line by the rules."""
    offsets, numbers, duplicates = [], [], {}
    first: dict[tuple[type, str | int], int] = {}
    offset = 0
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if text.strip(b" \t\n\r\x0b\x0c"):
            name = line_id(text)
            if name is not None and first.setdefault((type(name), name), number) != number:
                duplicates[len(offsets)] = first[type(name), name]
            offsets.append(offset + len(line) - len(text))
            numbers.append(number)
        offset += len(line)
    return offsets, numbers, duplicates


LINES = st.sampled_from(
    [b"", b" \t", b'{"id": "a"}', b'{"id": "b", "prompt": "x"}', b'{"id": 1}', b'{"id": "1"}']
    + [b'{"prompt": "no id"}', b'{"custom_id": "a"}', b"{broken", b'{"id": "\xff"}', b"x" * 40]
)


@given(
    st.lists(st.tuples(LINES, st.sampled_from([b"\n", b"\r\n"])), max_size=12),
    LINES,
    st.booleans(),
    st.integers(1, 60),
)
def test_the_index_is_that_of_reading_line_by_line(tmp_path_factory, lines, last, bom, block):
    content = b"\xef\xbb\xbf" * bom + b"".join(line + end for line, end in lines) + last
    path = write(tmp_path_factory.mktemp("input") / "in.jsonl", content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.batch.input.index._CHUNK", block)
        index = scan_input(path)
    expected = plain_index(content)
    assert (index.offsets_n.tolist(), index.numbers_n.tolist(), index.duplicates) == expected
    assert (index.size, index.sha256) == (len(content), hashlib.sha256(content).hexdigest())
