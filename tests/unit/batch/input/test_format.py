"""A file that is no JSONL is refused by its beginning; wrong lines among others are not.

python -m pytest tests/unit/batch/input/test_format.py
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from engine.batch.input.format import check_is_jsonl, count_text_lines

RECORDS = [{"id": number, "prompt": f"text {number}, with a comma"} for number in range(3)]
JSONL = "".join(json.dumps(record) + "\n" for record in RECORDS)

REFUSED = {
    "gzip": (gzip.compress(JSONL.encode()), "is compressed with gzip: `gzip -dc in.jsonl"),
    "bzip2": (bz2.compress(JSONL.encode()), "is compressed with bzip2"),
    "xz": (lzma.compress(JSONL.encode()), "is compressed with xz"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00", "is compressed with zstd"),
    "zip": (b"PK\x03\x04\x14\x00", "is compressed with zip"),
    "Parquet": (b"PAR1\x15\x04", "is a Parquet file"),
    "Arrow": (b"ARROW1\0\0", "is an Arrow file"),
    "SQLite": (b"SQLite format 3\0", "is a SQLite database"),
    "UTF-16": (JSONL.encode("utf-16"), "seems to be UTF-16 and must be UTF-8: `iconv -f UTF-16"),
    "UTF-16 without a mark": (JSONL.encode("utf-16-le"), "seems to be UTF-16"),
    "UTF-16, big endian": (JSONL.encode("utf-16-be"), "seems to be UTF-16"),
    "UTF-32": (JSONL.encode("utf-32"), "seems to be UTF-32"),
    "CSV in UTF-16": ("id,prompt\n1,a\n".encode("utf-16"), "seems to be UTF-16"),
    "array": (json.dumps(RECORDS).encode(), "seems to be one JSON array .*`jq -c"),
    "array, indented": (json.dumps(RECORDS, indent=1).encode(), "seems to be one JSON array"),
    "array, one object per line": (
        b"[\n" + b",\n".join(json.dumps(record).encode() for record in RECORDS) + b"\n]\n",
        "seems to be one JSON array",
    ),
    "array with a mark": (b"\xef\xbb\xbf\n" + json.dumps(RECORDS).encode(), "one JSON array"),
    "array of one": (b'[\n{"id": 1, "prompt": "a"}\n]\n', "seems to be one JSON array"),
    "long array": (json.dumps(RECORDS * 20_000).encode(), "seems to be one JSON array"),
    "object, indented": (json.dumps(RECORDS[0], indent=2).encode(), "objects over several lines"),
    "objects, indented": (
        "\n".join(json.dumps(record, indent=4) for record in RECORDS).encode(),
        "seems to be JSON with objects over several lines",
    ),
    "object around an array": (
        b'{"data": [\n  {"id": 1, "prompt": "a"},\n  {"id": 2, "prompt": "b"}\n]}',
        "seems to be JSON with objects over several lines",
    ),
    "carriage returns": (JSONL.replace("\n", "\r").encode(), "carriage returns alone"),
    "CSV": (b"id,prompt\n1,hello\n", "seems to be CSV with the columns id,prompt"),
    "CSV with a semicolon": (b"id;prompt\r\n1;hello\r\n", "seems to be CSV"),
    "CSV in quotes": (b'"id","prompt"\n"1","hello {x}"\n', "seems to be CSV"),
    "TSV": (b"id\tprompt\n1\thello\n", "seems to be TSV"),
    "YAML": (b"- id: 1\n  prompt: hello\n", "seems to be YAML"),
    "HTML": (b"<!DOCTYPE html>\n<html>", "seems to be XML or HTML"),
    "Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
        "run `git lfs pull`",
    ),
    "text": (b"Tell me a joke\nAnd another\n", "seems to be plain text and must be JSONL: write"),
    "numbers": (b"1\n2\n", "JSON values that are no objects"),
    "arrays": (b'[{"role": "user"}]\n[{"role": "user"}]\n', "JSON values that are no objects"),
    "strings": (b'"hello"\n"world"\n', "JSON values that are no objects"),
    "zeros": (bytes(5000), "binary data"),
    "pickle": (b"\x80\x04\x95\x10\x00\n", "binary data"),
}
# No line of some runs, but each of these becomes an error record of its own.
TAKEN = {
    "JSONL": JSONL.encode(),
    "a byte order mark": b"\xef\xbb\xbf" + JSONL.encode(),
    "CRLF": JSONL.replace("\n", "\r\n").encode(),
    "nothing": b"",
    "blank lines": b"\n \n\n",
    "blank lines first": b"\n\n" + JSONL.encode(),
    "a heading": b"# my requests\n" + JSONL.encode(),
    "a broken line first": b'{"id": 0, "prompt_token_ids": [\n' + JSONL.encode(),
    "a broken array first": b"[1, 2\n" + JSONL.encode(),
    "an array first": b"[1]\n" + JSONL.encode()[:30],
    "a row of CSV first": b"id,prompt\n" + JSONL.encode(),
    "one broken line": b'{"id": "broken", "prompt": "no end',
    "only broken lines": b'{"id": 1, "prompt": "a\n{"id": 2, "prompt": "b\n',
    "Python": b"{'id': 1, 'prompt': 'a'}\n",
    "a long line": json.dumps({"id": 1, "prompt": "x" * 500_000}).encode(),
    "a NUL in a line": b'{"id": 1, "prompt": "\0\0"}\n' + JSONL.encode(),
    "carriage returns inside": b'{"id": 1, "prompt": "a"}\r\n{"id": 2,\r "prompt": "b"}',
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_format_is_named_and_refused_with_what_to_do(tmp_path, name):
    content, message = REFUSED[name]
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        check_is_jsonl(path)
    assert str(caught.value).startswith(f"--input {path}: ")


@pytest.mark.parametrize("name", TAKEN)
def test_what_may_hold_a_request_is_taken(tmp_path, name):
    path = tmp_path / "in.jsonl"
    path.write_bytes(TAKEN[name])
    check_is_jsonl(path)


def test_a_missing_file_and_a_folder_are_left_to_the_scan(tmp_path: Path):
    check_is_jsonl(tmp_path / "nothing")
    check_is_jsonl(tmp_path)
    assert count_text_lines(tmp_path / "nothing") == count_text_lines(tmp_path) == 0


TEXT = [
    '{"id": 1, "prompt": "a"}',
    '{"id": 2, "messages": [{"role": "user", "content": "a"}]}',
    '{"custom_id": "c", "url": "/v1/completions", "body": {"prompt": "a"}}',
]
IDS = [
    '{"id": 4, "prompt_token_ids": [1]}',
    '{"id": 5, "prompt": [1, 2]}',
    '{"custom_id": "f", "body": {"prompt": [1]}}',
    '{"id": 6}',
]


@pytest.mark.parametrize(
    "lines, expected",
    [(TEXT, 3), ([*TEXT, "broken", ""], 3), ([], 0), (["broken"], 0)]
    + [([*TEXT, line], 0) for line in IDS],
)
def test_text_is_counted_where_every_request_needs_a_tokenizer(tmp_path, lines, expected):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines))
    assert count_text_lines(path) == expected
