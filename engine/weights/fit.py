"""Fit: how the tensors of a checkpoint's files differ from those that the model needs.

Used by `loader.py` before any data is read. Pure functions of names, shapes and dtypes: no data is
read here, and there are no collectives.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.weights.id_table import ID_DTYPES
from engine.weights.reader import DTYPES
from engine.weights.safetensors_header import INDEX, Catalog
from engine.weights.slot import WeightSlot

logger = logging.getLogger(__name__)

_MAX_SHOWN = 10  # names of each kind in one error
_NOT_IDS = (
    f"tensors must be integers (read are {', '.join(ID_DTYPES)}): use the files that the "
    "checkpoint was published with"
)
_NO_FLOATS = frozenset(("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"))


@dataclass(frozen=True, slots=True)
class Want:
    """What the model needs under one name; the fields are those of `WeightSlot`."""

    shape: tuple[int, ...]
    aliases: tuple[str, ...]
    tied_to: str | None
    unquantised: tuple[int, ...]  # the shape of a tensor that is not quantised
    is_ids: bool = False
    turned: tuple[int, ...] | None = None  # another shape that fits

    @classmethod
    def of(cls, slot: WeightSlot) -> Want:
        """Return what one slot needs."""
        shapes = [
            tuple(each.file_shape or each.full_shape) for each in (slot, slot.unquantised or slot)
        ]
        turned = None if slot.turned is None else tuple(slot.turned.full_shape)
        is_ids = slot.kind == "ids"
        return cls(shapes[0], slot.aliases, slot.tied_to, shapes[1], is_ids, turned)


def name_in(catalog: Catalog, name: str, aliases: tuple[str, ...]) -> str | None:
    """Return the name under which the files hold a tensor, or None."""
    return next((known for known in (name, *aliases) if known in catalog.entries), None)


def holds_values(catalog: Catalog, name: str) -> bool:
    """Return whether the files hold a tensor, and at least one value in it."""
    return name in catalog.entries and math.prod(catalog.entries[name].shape) > 0


def mismatches(
    path: Path, wanted: Mapping[str, Want], catalog: Catalog, ignored: Iterable[str]
) -> Iterator[str]:
    """Yield a sentence for each kind of difference between the model's tensors and the files'."""
    missing, lost, misshapen = [], [], []
    refused: dict[str, list[str]] = {}
    for name, want in wanted.items():
        if want.tied_to is not None and not holds_values(catalog, name):
            continue
        if (found := name_in(catalog, name, want.aliases)) is None:
            placed = [each for each in (name, *want.aliases) if each in catalog.lost]
            (lost if placed else missing).append((placed or [name])[0])
            continue
        entry = catalog.entries[found]
        shape = want.unquantised if entry.stored is None else want.shape
        fits = (shape,) if entry.stored is not None else (shape, want.turned)
        if entry.shape not in fits:
            misshapen.append(
                f"{found} in {entry.file.name} is {list(entry.shape)}, must be {list(shape)}"
            )
        if want.is_ids and entry.dtype not in ID_DTYPES:
            refused.setdefault(_NOT_IDS, []).append(
                f"{found} in {entry.file.name} is {entry.dtype}"
            )
        elif not want.is_ids and entry.stored is None and entry.dtype not in DTYPES:
            refused.setdefault(_why_refused(entry.dtype), []).append(
                f"{found} in {entry.file.name} is {entry.dtype}"
            )
    unknown = unknown_tensors(wanted, catalog, ignored)
    extra = [
        name for name in unknown if catalog.entries[name].is_listed and _may_matter(catalog, name)
    ]
    yield from _listed(
        f"tensors are missing; is config.json of this checkpoint?{_tied_hint(missing, catalog)}",
        [_with_nearest(name, unknown) for name in missing[:_MAX_SHOWN]] + missing[_MAX_SHOWN:],
    )
    if lost:
        yield (
            f"{path / INDEX} places {lost[0]!r} in {catalog.lost[lost[0]]}, which does not hold it"
            f"{f' ({len(lost)} such tensors)' if len(lost) > 1 else ''}: index and files do not "
            "belong together; download the checkpoint again"
        )
    yield from _listed(
        "tensors belong to no part of the model; is config.json theirs? if so, use the files it "
        "was published with",
        [f"{name} in {catalog.entries[name].file.name}" for name in extra],
    )
    yield from _listed("tensors have the wrong shape; is config.json theirs?", misshapen)
    for why, tensors in refused.items():
        yield from _listed(why, tensors)


def unknown_tensors(
    wanted: Mapping[str, Want], catalog: Catalog, ignored: Iterable[str]
) -> list[str]:
    """Return the tensors that the model has no name for, without those to ignore."""
    known = set(wanted).union(*(want.aliases for want in wanted.values()))
    skip = [re.compile(pattern) for pattern in ignored]
    return [
        name
        for name in catalog.entries
        if name not in known and not any(pattern.search(name) for pattern in skip)
    ]


def _may_matter(catalog: Catalog, name: str) -> bool:
    """Return whether a tensor that the model has no name for may be a weight that it lacks.

    Not one without values, nor one of integers: weights of integers replace a tensor, which is
    then missing.
    """
    return holds_values(catalog, name) and catalog.entries[name].dtype not in _NO_FLOATS


def log_unlisted(path: Path, unknown: Sequence[str], catalog: Catalog) -> None:
    """Log the tensors that neither the index nor the model has: an exporter has dropped them."""
    unlisted = [
        name
        for name in unknown
        if not catalog.entries[name].is_listed and _may_matter(catalog, name)
    ]
    if unlisted:
        found = [f"{name} in {catalog.entries[name].file.name}" for name in unlisted]
        logger.warning(
            "%d tensors are not read, because neither the model needs nor %s lists them: %s",
            len(unlisted),
            path / INDEX,
            shorten(found),
        )


def _tied_hint(missing: Sequence[str], catalog: Catalog) -> str:
    """Return what to do where the files hold one of embedding and head, "" otherwise."""
    pair = ("lm_head.weight", "model.embed_tokens.weight")
    lacking = [name for name in pair if name in missing]
    if len(lacking) != 1 or not any(name in catalog.entries for name in pair):
        return ""
    return (
        f" For {lacking[0]}: if head and embedding are the same tensor, set tie_word_embeddings to "
        "true there; if not, the files are incomplete"
    )


def _why_refused(dtype: str) -> str:
    """Return what to say of tensors that have a dtype that is not read."""
    if dtype.startswith(("F8", "F6", "F4")):
        kind = f"quantised to {dtype[1]} bits, and no quantization_config in config.json says how "
        kind += "to read them"
        remedy = "use the config.json of these files, or convert the checkpoint to bfloat16"
    elif dtype in ("I8", "U8", "I32"):
        kind = "integers, as in checkpoints quantised by GPTQ, AWQ or bitsandbytes, and no "
        kind += "quantization_config in config.json says how to read them"
        remedy = "convert the checkpoint to bfloat16, or use the one it was made from"
    elif dtype in _NO_FLOATS:
        kind = "true or false" if dtype == "BOOL" else "integers"
        kind += ", which no weights are"
        remedy = "use the files that the checkpoint was published with"
    else:
        kind = "complex numbers" if dtype == "C64" else f"of the unknown dtype {dtype}"
        remedy = "convert the checkpoint to bfloat16"
    return f"tensors are {kind} (read are F32, BF16, F16 and F64): {remedy}"


def _listed(what: str, items: Sequence[str]) -> Iterator[str]:
    if items:
        yield f"{len(items)} {what}: {shorten(items)}"


def shorten(items: Sequence[str]) -> str:
    """Return the first few items as one text."""
    return "; ".join(items[:_MAX_SHOWN]) + ("; ..." if len(items) > _MAX_SHOWN else "")


def _with_nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names[:5000], n=1)
    return f"{name} (the files have {near[0]})" if near else name
