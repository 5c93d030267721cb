"""Safetensors headers: which tensors a checkpoint folder holds, and where their bytes are.

First step of loading; `loader.py` compares the result with the model. Reads headers only and checks
each: a file that is truncated, overlapping, mislabelled or not safetensors at all raises
`CheckpointError`.

A file is 8 bytes, the header's length as a little-endian integer; the header, JSON: name ->
{"dtype", "shape", "data_offsets": [begin, end) counted from the header's end} and `__metadata__`;
then the data, without gaps. (https://github.com/huggingface/safetensors, "Format")

Why not the package safetensors: `reader.py` needs the offsets of every tensor, to read parts of it
straight into the model's memory, and the package gives tensors, over a mapped file whose pages
would count twice. Its errors also name neither tensor nor remedy. Tools and tests write with it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.config.checkpoint_files import (
    INDEX,
    SINGLE,
    describe_missing_weights,
    is_there,
    read_text,
    why_unreadable,
)
from engine.weights.entry import TensorEntry

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
_DAMAGED = "the file is damaged; download or copy it again"
_PREFIX, _EMBEDDING = "model.", "embed_tokens.weight"
# Prefixes of the language model beside one that sees images, and what stands for them here.
_NESTED = {"model.language_model.": _PREFIX, "language_model.": ""}


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the text names tensor, file and remedy."""


@dataclass(frozen=True, slots=True)
class Catalog:
    """All tensors of a checkpoint."""

    entries: Mapping[str, TensorEntry]  # by name
    bytes_read: int  # of headers and index
    lost: Mapping[str, str] = field(default_factory=dict)  # tensor that the index lists and no file
    # holds -> the file that the index names


def read_catalog(folder: Path) -> Catalog:
    """Return the tensors of `folder`: of `model.safetensors`, else of the files in the index.

    Where index and files contradict each other, the files count, as in transformers: a tensor is
    found in any listed file, also if the index lists it elsewhere or not at all. Of a tensor that
    several files hold, the index chooses; without its word the last file.

    Raises CheckpointError.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"model.path = {str(folder)!r}: no such folder; it must be a local Hugging Face model "
            "folder with config.json and safetensors files"
        )
    if is_there(folder / SINGLE):
        entries, num_bytes = read_header(folder / SINGLE)
        return _with_prefix(Catalog(entries, num_bytes))
    if not is_there(folder / INDEX):
        raise CheckpointError(f"{folder} {describe_missing_weights(folder)}")
    weight_map, total = _read_index(folder / INDEX)
    entries: dict[str, TensorEntry] = {}
    for file in sorted(set(weight_map.values())):
        found, num_bytes = read_header(folder / file)
        total += num_bytes
        for name, entry in found.items():
            place = weight_map.get(name)
            if name not in entries or entries[name].file.name != place:
                entries[name] = replace(entry, is_listed=place is not None)
    lost = {name: file for name, file in weight_map.items() if name not in entries}
    return _with_prefix(Catalog(entries, total, lost))


def _with_prefix(catalog: Catalog) -> Catalog:
    """Return the catalog under the names of a language model with a head.

    A checkpoint that was saved from the base model alone lacks the prefix "model."; transformers
    adds it. One that also sees images has the language model under a longer prefix.
    """
    embedding = _PREFIX + _EMBEDDING
    if embedding in catalog.entries:
        return catalog
    nested = next(
        (
            outer
            for outer, inner in _NESTED.items()
            if outer + embedding.removeprefix(inner) in catalog.entries
        ),
        None,
    )
    if nested is None and _EMBEDDING not in catalog.entries:
        return catalog

    def full(name: str) -> str:
        if nested is not None:
            inner = _NESTED[nested]
            return name.replace(nested, inner, 1) if name.startswith(nested) else name
        return name if name.startswith((_PREFIX, "lm_head.")) else _PREFIX + name

    entries = {full(name): entry for name, entry in catalog.entries.items()}
    lost = {full(name): file for name, file in catalog.lost.items()}
    return Catalog(entries, catalog.bytes_read, lost)


def read_header(path: Path) -> tuple[dict[str, TensorEntry], int]:
    """Return the tensors of one file and the bytes read for them. Raises CheckpointError."""
    if why := why_unreadable(path):
        raise CheckpointError(f"{path} {why}")
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(_read(file, 8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(_bad_length(path, size, length))
            header = _parse(path, _read(file, length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    start = 8 + length
    entries = {
        name: _entry(path, name, value, start)
        for name, value in header.items()
        if name != "__metadata__"
    }
    _check_layout(path, entries, start, size)
    return entries, start


def _read(file: Any, length: int) -> bytes:
    data = b""
    while len(data) < length and (part := file.read(length - len(data))):
        data = data + part if data else part
    return data


def _parse(path: Path, data: bytes, what: str = "the header") -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            raise ValueError("a name is given twice")
        return mapping

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {what} is not valid JSON ({error}): {_DAMAGED}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {what} is not a JSON object: {_DAMAGED}")
    return value


def _entry(path: Path, name: str, value: Any, start: int) -> TensorEntry:
    """Return one header item, checked; `start` is the byte at which the data begins."""
    try:
        dtype, shape = value["dtype"], value["shape"]
        begin, end = value["data_offsets"]
        numbers = [begin, end, *shape]
        sound = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in numbers)
        if not sound or begin > end:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{path}: tensor {name!r} has a damaged header item {str(value)[:120]}: it needs "
            f"dtype, shape and data_offsets [begin, end]: {_DAMAGED}"
        ) from None
    bits = math.prod(shape) * _BITS.get(dtype, 0)
    if dtype in _BITS and bits != 8 * (end - begin):
        raise CheckpointError(
            f"{path}: tensor {name!r} of dtype {dtype} and shape {shape} takes {bits / 8:g} bytes, "
            f"but the header gives it {end - begin}: {_DAMAGED}"
        )
    return TensorEntry(path, dtype, tuple(shape), start + begin, end - begin)


def _check_layout(path: Path, entries: Mapping[str, TensorEntry], start: int, size: int) -> None:
    """Check that tensors follow each other without gap or overlap up to the file's end."""
    position = start
    for name, entry in sorted(
        entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes)
    ):
        if entry.offset != position:
            fault = "overlaps the tensor before it" if entry.offset < position else "follows a gap"
            raise CheckpointError(f"{path}: tensor {name!r} {fault}: {_DAMAGED}")
        position += entry.num_bytes
        if position > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {name!r} ends at byte {position}, the file at byte "
                f"{size}; download or copy it again"
            )
    if position != size:
        raise CheckpointError(
            f"{path} holds {size - position} bytes after its last tensor: {_DAMAGED}"
        )


def _bad_length(path: Path, size: int, length: int) -> str:
    try:
        pointer = size < 1024 and path.read_bytes().startswith(b"version https://git-lfs")
    except OSError:
        pointer = False
    if pointer:
        return f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder"
    return (
        f"{path} is truncated or no safetensors file: it announces a header of {length} bytes, the "
        f"file has {size} (limit {MAX_HEADER_BYTES}); download or copy it again"
    )


def _read_index(path: Path) -> tuple[dict[str, str], int]:
    """Return the index's weight_map (tensor -> file name in its folder) and its size in bytes."""
    try:
        data = read_text(path).encode()
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    weight_map = _parse(path, data, "the index").get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise CheckpointError(
            f"{path}: weight_map must map tensor names to file names; download the index again"
        )
    files = set(weight_map.values())
    no_names = ("", ".", "..")
    if outside := sorted(
        file for file in files if Path(file).name != file or "\0" in file or file in no_names
    ):
        raise CheckpointError(_outside(path, weight_map, outside))
    if missing := sorted(file for file in files if not is_there(path.parent / file)):
        raise CheckpointError(
            f"{path} names {len(missing)} files that are not there: {', '.join(missing[:10])}"
            f"{', ...' if len(missing) > 10 else ''}; download the rest of the checkpoint"
        )
    return weight_map, len(data)


def _outside(path: Path, weight_map: Mapping[str, str], files: list[str]) -> str:
    """Return what is wrong with file names that are no names of files next to the index."""
    file = files[0]
    tensor = next(name for name, place in weight_map.items() if place == file)
    if "\0" in file or not file.strip("./"):
        what, remedy = "which is no file name", "download the index again"
    elif Path(file).is_absolute():
        what, remedy = "an absolute path", "put the files there and leave out the folders"
    elif ".." in Path(file).parts:
        what, remedy = "outside of the folder", "put the files there and leave out the folders"
    else:
        what, remedy = "in a subfolder", "move the files up and leave out the folder"
    more = f" ({len(files)} such files)" if len(files) > 1 else ""
    return (
        f"{path} places tensor {tensor!r} in {file!r}{more}, {what}: weight_map must have names of "
        f"files next to the index, without a folder; {remedy} in the index"
    )
