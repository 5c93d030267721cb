"""Progress of a running job: the ledger shards (`*.parts/part-*`) of its output."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def part_files(output: Path) -> list[Path]:
    """Return the shards of an unfinished output; none before it begins or after it is merged."""
    folder = output.with_name(output.name + ".parts")
    names: list[str] = []
    with suppress(FileNotFoundError):
        names = os.listdir(folder)
    return sorted(folder / name for name in names if name.startswith("part-"))


def written(output: Path) -> int:
    """Return the bytes in the shards of an unfinished output."""
    size = 0
    for part in part_files(output):
        with suppress(FileNotFoundError):  # merged in this moment
            size += part.stat().st_size
    return size
