"""Stored tensors: what the files of a checkpoint hold, by part, and how it differs from the model.

Headers alone are read (`weights/safetensors_header.py`); the comparison is the loader's own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine.models.language_model import LanguageModel
from engine.models.transformers_model.model import TransformersModel
from engine.weights.fit import Want, mismatches, unknown_tensors
from engine.weights.formats.grouping import read_weights
from engine.weights.safetensors_header import Catalog, CheckpointError, read_catalog
from engine.weights.slot import WeightSlot

PARTS = ("experts", "attention", "shared, dense", "router", "embedding, head", "norms")
# Scales and zero points that quantised weights bring along.
_SCALES = r"(_scale_inv|_scale|_scales|_packed|_shape|_zero_point|\.scales|\.qzeros|\.g_idx)$"


@lru_cache(1 << 17)
def part_of(name: str) -> str:
    """Return the part of the model, one of `PARTS`, that a tensor belongs to, by its name."""
    if "embed_tokens" in name or name.startswith("lm_head"):
        return "embedding, head"
    if "norm" in name.rpartition("layers.")[2]:
        return "norms"
    if "attn" in name or "attention" in name:
        return "attention"
    if ".experts." in name:
        return "experts"
    if re.search(r"\.(gate|router)\.|correction_bias|expert_bias", name):
        return "router"
    return "shared, dense"


def part_finder(model: LanguageModel, checkpoint: Collection[str]) -> Callable[[str], str]:
    """Return what finds the part of a checkpoint's tensor by its place in the model.

    Args:
        model: transformers' may have other names than the checkpoint.
        checkpoint: names of its tensors; empty: names are the model's.
    """
    places = model.places(checkpoint) if isinstance(model, TransformersModel) else {}
    return lambda name: part_of(places.get(name, name))


@dataclass(slots=True)
class StoredTensors:
    """The tensors of a checkpoint's files."""

    catalog: Catalog = field(default_factory=lambda: Catalog({}, 0))
    weights: Catalog | None = None  # of a format that is read, one entry per weight; None: unknown
    problems: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)  # neither needed nor known to be ignored
    num_ignored: int = 0  # known and not needed, such as multi-token prediction heads
    # part -> dtype in the file -> bytes; of what is loaded
    bytes_by_part: dict[str, Counter[str]] = field(default_factory=dict)

    @property
    def num_files(self) -> int:
        """Files that hold tensors."""
        return len({entry.file for entry in self.catalog.entries.values()})

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, also of those that are not loaded."""
        return sum(entry.num_bytes for entry in self.catalog.entries.values())

    def part_bytes(self) -> dict[str, int]:
        """Return the stored bytes of each part."""
        return {part: sum(kinds.values()) for part, kinds in self.bytes_by_part.items()}

    def as_json(self) -> dict[str, Any]:
        """Return the fields of the report."""
        return {
            "files": self.num_files,
            "bytes": self.num_bytes,
            "parts": {part: dict(kinds) for part, kinds in self.bytes_by_part.items()},
            "ignored": self.num_ignored,
            "unused": self.unused,
        }


def read_stored(folder: Path) -> StoredTensors:
    """Return the tensors in a folder's files; a file that cannot be read is a problem."""
    try:
        return StoredTensors(read_catalog(folder))
    except CheckpointError as error:
        return StoredTensors(problems=[str(error)])


def group_weights(stored: StoredTensors, folder: Path) -> None:
    """Find the weights that the tensors make; what does not fit is a problem."""
    if stored.problems:
        return
    try:
        stored.weights = read_weights(folder, stored.catalog)
    except CheckpointError as error:
        stored.problems.append(str(error))


def compare(
    stored: StoredTensors,
    folder: Path,
    slots: Sequence[WeightSlot] | None,
    ignored: Iterable[str],
    is_quantised: bool,
    find_part: Callable[[str], str] = part_of,
) -> None:
    """Sort the stored tensors by part and add how they differ from those that the model needs.

    Args:
        slots: of a rank that holds the whole model; None: the model is not known.
        ignored: regular expressions of tensors that no rank needs.
        is_quantised: whether they are in a format that is refused, so that neither scales nor the
            dtypes of weights are problems of their own.
        find_part: of a tensor by its name in the files.
    """
    catalog, skip = stored.catalog, [re.compile(pattern) for pattern in ignored]
    is_ignored = {
        name: any(pattern.search(name) for pattern in skip) for name in catalog.entries
    }  # fmt: skip
    stored.num_ignored = sum(is_ignored.values())
    for name, entry in catalog.entries.items():
        if not is_ignored[name]:
            kinds = stored.bytes_by_part.setdefault(find_part(name), Counter())
            kinds[entry.dtype] += entry.num_bytes
    if slots is None or not catalog.entries:
        return
    wanted: Mapping[str, Want] = {slot.name: Want.of(slot) for slot in slots}
    known = (*ignored, _SCALES) if is_quantised else tuple(ignored)
    weights = catalog if is_quantised else stored.weights
    if weights is None:  # a problem already
        return
    stored.unused = unknown_tensors(wanted, weights, known)
    if is_quantised:  # shapes and dtypes are the format's
        missing = [
            slot.name
            for slot in slots
            if slot.tied_to is None and not _is_stored(catalog, slot.name, slot.aliases)
        ]
        if missing:
            shown = "; ".join(missing[:10]) + ("; ..." if len(missing) > 10 else "")
            stored.problems.append(f"{len(missing)} tensors are missing: {shown}")
    else:
        stored.problems += mismatches(folder, wanted, weights, known)


def _is_stored(catalog: Catalog, name: str, aliases: Sequence[str]) -> bool:
    """Return whether the files hold a tensor, be it packed under a name that begins alike."""
    stem = name.removesuffix("weight")
    kinds = ("weight", "weight_packed", "qweight")
    packed = [stem + kind for kind in kinds if stem != name]
    return any(each in catalog.entries for each in (name, *aliases, *packed))
