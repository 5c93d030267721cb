"""Grouping: which tensors of the files make one weight, by their names.

`read_weights` returns the catalog of a folder in which each quantised weight is a single entry
under the name that the unquantised weight would have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from engine.weights.entry import StoredWeight, TensorEntry
from engine.weights.formats.mxfp4 import mxfp4_weight
from engine.weights.formats.packed import packed_weight
from engine.weights.formats.scaled import scaled_weight
from engine.weights.formats.scheme import Scheme, scheme_of
from engine.weights.formats.transposed import transposed_weight
from engine.weights.safetensors_header import Catalog, CheckpointError, read_catalog

# What a checkpoint holds for computing in its format alone: scales of activations and of the cache.
_UNUSED = re.compile(r"(\.|_)(input|activation|k|v|q|output)_scale$|\.weight_shape$")
_Entries = Mapping[str, TensorEntry]


def read_weights(folder: Path, catalog: Catalog | None = None) -> Catalog:
    """Return the weights of a folder. Raises CheckpointError.

    catalog: the folder's, where it is known.
    """
    catalog = catalog or read_catalog(folder)
    try:
        scheme = scheme_of(folder)
    except ValueError as error:
        raise CheckpointError(f"model.path = {str(folder)!r}: {error}") from error
    return catalog if scheme is None else group(catalog, scheme)


def example_of(folder: Path) -> str:
    """Return the first tensor of a folder that is of no floating-point dtype, in words; "" where
    there is none, or the files cannot be read.
    """
    try:
        entries = read_catalog(folder).entries
    except CheckpointError:  # loading reports it
        return ""
    for name, entry in sorted(entries.items()):
        if entry.dtype not in ("F64", "F32", "BF16", "F16"):
            return f" (such as {name} in {entry.file.name}, {entry.dtype} {list(entry.shape)})"
    return ""


def group(catalog: Catalog, scheme: Scheme) -> Catalog:
    """Return a catalog with one entry per weight. Raises CheckpointError: parts do not fit."""
    entries: dict[str, TensorEntry] = {}
    used: set[str] = set()
    for name, stored in _quantised(catalog.entries, scheme):
        used.update(stored.parts)
        largest = max(stored.parts.values(), key=lambda part: part.num_bytes)
        num_bytes = sum(part.num_bytes for part in stored.parts.values())
        listed = all(part.is_listed for part in stored.parts.values())
        entries[name] = replace(
            largest,
            dtype=scheme.name,
            shape=stored.shape,
            num_bytes=num_bytes,
            is_listed=listed,
            stored=stored,
        )
    for name, entry in catalog.entries.items():
        if name not in used and name not in entries and not _UNUSED.search(name):
            entries[name] = entry
    lost = {_weight_name(name): file for name, file in catalog.lost.items()} if entries else {}
    return Catalog(entries, catalog.bytes_read, {**lost, **catalog.lost})


def _weight_name(name: str) -> str:
    return re.sub(r"\.qweight$|\.weight_packed$", ".weight", name).removesuffix("_blocks")


def _quantised(entries: _Entries, scheme: Scheme) -> Iterator[tuple[str, StoredWeight]]:
    """Yield the name of each quantised weight and how to read it."""
    make: dict[str, Callable[[_Entries, str, Scheme], tuple[str, StoredWeight] | None]] = {
        "fp8": _scaled,
        "modelopt": _scaled,
        "mxfp4": _mxfp4,
        "compressed-tensors": lambda *each: _packed(*each) or _scaled(*each),
        "awq": _transposed,
        "gptq": _transposed,
    }
    for name in entries:
        if (found := make[scheme.name](entries, name, scheme)) is not None:
            yield found


def _scaled(entries: _Entries, name: str, scheme: Scheme) -> tuple[str, StoredWeight] | None:
    weight = entries[name]
    if weight.dtype != "F8_E4M3" or len(weight.shape) not in (2, 3):
        return None
    for scale in (f"{name}_scale_inv", f"{name}_scale"):
        if scale in entries:
            stored = scaled_weight(name, weight, scale, entries[scale], scheme.block)
            return name, stored
    raise CheckpointError(
        f"{name} in {weight.file} is {weight.dtype} and has no scale ({name}_scale_inv or "
        f"{name}_scale); download the rest of the checkpoint"
    )


def _mxfp4(entries: _Entries, name: str, scheme: Scheme) -> tuple[str, StoredWeight] | None:
    base = name.removesuffix("_blocks")
    if base == name or entries[name].dtype != "U8":
        return None
    scales = f"{base}_scales"
    if scales not in entries:
        raise CheckpointError(
            f"{name} in {entries[name].file} has no {scales}; download the rest of the checkpoint"
        )
    return base, mxfp4_weight(name, entries[name], scales, entries[scales])


def _packed(entries: _Entries, name: str, scheme: Scheme) -> tuple[str, StoredWeight] | None:
    base = name.removesuffix("_packed")
    if base == name or not base.endswith(".weight"):
        return None
    suffixes = ("packed", "scale", "zero_point", "g_idx")
    parts = _present(entries, (f"{base}_{suffix}" for suffix in suffixes))
    return base, packed_weight(base, parts, scheme.bits, scheme.group_size)


def _transposed(entries: _Entries, name: str, scheme: Scheme) -> tuple[str, StoredWeight] | None:
    module = name.removesuffix(".qweight")
    if module == name:
        return None
    suffixes = ("qweight", "qzeros", "scales", "g_idx")
    stored = transposed_weight(
        module,
        _present(entries, (f"{module}.{suffix}" for suffix in suffixes)),
        is_awq=scheme.name == "awq",
        group_size=scheme.group_size,
        zero_offset=scheme.zero_offset,
    )
    return f"{module}.weight", stored


def _present(entries: _Entries, names: Iterator[str]) -> dict[str, TensorEntry]:
    return {name: entries[name] for name in names if name in entries}
