"""Input format: refuses a file that is no JSONL before it is read whole or a model is loaded.

Looks at the beginning of the file alone. A line that is wrong among others becomes an error record
(`line_parser.py`), so a file is refused only where its beginning shows that every line would.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_HEAD_BYTES = 256 << 10
_BOM = b"\xef\xbb\xbf"
# How a file begins -> the program that packed it, and the one that unpacks it.
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gzip -dc"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc"),
    b"BZh": ("bzip2", "bzip2 -dc"),
    b"\xfd7zXZ\0": ("xz", "xz -dc"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -dc"),
    b"PK\x03\x04": ("zip", "unzip -p"),
    b"7z\xbc\xaf\x27\x1c": ("7-Zip", "7z x -so"),
}
_BINARY = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow stream",
    b"SQLite format 3\0": "a SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy file",
    b"%PDF": "a PDF file",
}
# The byte order mark, or how `{"` or `["` begins without one; UTF-32 first, which begins as UTF-16.
_ENCODINGS = {
    "UTF-32": re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff|[^\0]\0\0\0|\0\0\0[^\0]"),
    "UTF-16": re.compile(rb"\xff\xfe|\xfe\xff|[^\0]\0[^\0]\0|\0[^\0]\0[^\0]"),
}
_ONE_PER_LINE = 'write one JSON object per line, {"id": 1, "prompt": "..."}'
_TEXT_KEYS = ("prompt", "messages")


def check_is_jsonl(path: Path) -> None:
    """Return where the file may be JSONL, also where it is missing or empty.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is of another format; says which, and what to do.
    """
    if path.is_file() and (problem := _problem(_head(path), path)):
        raise ValueError(f"--input {path}: {problem}")


def check_head(head: bytes, path: Path) -> None:
    """Raise ValueError where the beginning of a file, unpacked, is of another format."""
    if problem := _problem(head, path):
        raise ValueError(f"--input {path}: {problem}")


def count_text_lines(path: Path) -> int:
    """Return how many requests the beginning of the file has if all need a tokenizer, else 0."""
    if not path.is_file():
        return 0
    requests = [value for line in _lines(_head(path)) if isinstance(value := _parse(line), dict)]
    return len(requests) if all(map(_is_text, requests)) else 0


def _is_text(request: dict[str, Any]) -> bool:
    body = request.get("body")
    source = body if isinstance(body, dict) else request
    texts = [source[key] for key in _TEXT_KEYS if source.get(key) is not None]
    ids = source.get("prompt_token_ids")
    return ids is None and bool(texts) and not isinstance(source.get("prompt"), list)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def _lines(head: bytes) -> list[bytes]:
    """Return the lines that are not blank, stripped; the last one may be cut off."""
    lines = (line.strip() for line in head.removeprefix(_BOM).split(b"\n"))
    return [line for line in lines if line]


def _parse(line: bytes) -> Any:
    """Return the JSON value of a line, None for a line that is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _problem(head: bytes, path: Path) -> str | None:
    for magic, (name, command) in _COMPRESSED.items():
        if head.startswith(magic):
            return f"is compressed with {name}: `{command} {path.name} > requests.jsonl` unpacks it"
    for magic, name in _BINARY.items():
        if head.startswith(magic):
            return f"is {name} and must be JSONL: {_ONE_PER_LINE}"
    for name, pattern in _ENCODINGS.items():
        if pattern.match(head):
            return (
                f"seems to be {name} and must be UTF-8: `iconv -f {name} -t UTF-8 {path.name} > "
                "requests.jsonl` converts it"
            )
    lines = _lines(head)
    if not lines or sum(isinstance(_parse(line), dict) for line in lines[:1000]) > 1:
        return None
    if lines[0].startswith(b"{"):
        return _object_problem(lines, head, path)
    is_one_line = len(lines) > 1 and _parse(lines[0]) is not None
    if lines[0].startswith(b"[") and not is_one_line:
        return (
            f"seems to be one JSON array and must be JSONL, one object per line: `jq -c .[] "
            f"{path.name} > requests.jsonl` converts it"
        )
    if any(line.startswith(b"{") for line in lines):
        return None
    return f"seems to be {_describe(lines)} and must be JSONL: {_remedy(lines)}"


def _object_problem(lines: list[bytes], head: bytes, path: Path) -> str | None:
    """Return what is wrong with a file that begins with `{`, with at most one object on a line."""
    if b"\n" not in head and re.search(rb"\}\s*\r\s*\{", head):
        return (
            "ends its lines with carriage returns alone: "
            f"`tr '\\r' '\\n' < {path.name} > requests.jsonl` converts it"
        )
    if len(lines) < 2 or _parse(lines[0]) is not None:
        return None
    # A line that begins with a key is the inside of an object; so is what follows a bracket.
    if re.match(rb'"[^"]*"\s*:', lines[1]) or lines[0].endswith((b"[", b"{")):
        return (
            "seems to be JSON with objects over several lines and must be JSONL, one object per "
            f"line: `jq -c . {path.name} > requests.jsonl` writes each on one line"
        )
    return None


def _describe(lines: list[bytes]) -> str:
    first = lines[0]
    try:
        text = first.decode()
    except UnicodeDecodeError:
        return "binary data or text that is not UTF-8"
    if any(ord(letter) < 32 and letter not in "\t\r\x1e" for letter in text):
        return "binary data"
    if text.startswith("version https://git-lfs"):
        return "a Git LFS pointer"
    if text.startswith("<"):
        return "XML or HTML, such as the page of a failed download,"
    if text.startswith(("- ", "---")) or re.match(r"\w+:(\s|$)", text):
        return "YAML"
    if _parse(first) is not None:
        return "JSON values that are no objects"
    for delimiter, name in ((b"\t", "TSV"), (b",", "CSV"), (b";", "CSV")):
        if all(delimiter in line for line in lines[:2]):
            return f"{name} with the columns {text[:60]}"
    return "plain text"


def _remedy(lines: list[bytes]) -> str:
    if lines[0].startswith(b"version https://git-lfs"):
        return "run `git lfs pull` in its folder"
    return _ONE_PER_LINE
