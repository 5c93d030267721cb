"""The table of registers, spills and shared memory of the GPU kernels, and what may not grow in it.

A line per kernel and variant, with three numbers per GPU: registers per thread, bytes per thread
spilled to local memory, bytes of shared memory per block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

ARCHS = (80, 90, 100)
GROWTH = 1.2
# Up to these a block's registers or shared memory never decide how many blocks run at once.
FREE_REGISTERS, FREE_SHARED = 32, 1024
# Shared memory that one block may have (CUDA C++ Programming Guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

Numbers = tuple[int, int, int]  # registers, spills, shared
Table = dict[tuple[str, str], dict[int, Numbers]]  # (kernel, variant) -> GPU -> numbers


def table_of(kernels: list[dict[str, Any]]) -> Table:
    """Return the entries of `measure.py` as a table; what a call launches twice is one row, unless
    the two differ on one of the GPUs.
    """
    launches: dict[tuple[str, str], dict[int, list[Numbers]]] = {}
    for entry in kernels:
        name = entry["kernel"].strip("_").removesuffix("_kernel")
        per_arch = launches.setdefault((name, entry["variant"]), {})
        numbers = (entry["registers"], entry["spills"], entry["shared"])
        per_arch.setdefault(entry["arch"], []).append(numbers)
    table: Table = {}
    for (name, variant), per_arch in launches.items():
        rows: list[dict[int, Numbers]] = []
        # Launches of a call come in one order, whatever the GPU.
        for each in zip(*per_arch.values(), strict=True):
            row = dict(zip(per_arch, each, strict=True))
            if row not in rows:
                rows.append(row)
                table[name, variant if len(rows) == 1 else f"{variant} ({len(rows)})"] = row
    return table


def write(table: Table, version: str) -> str:
    """Return the text of the table, of triton `version`."""
    heads = "".join(f"{f'sm_{arch}':>20}" for arch in ARCHS)
    lines = [
        "# The kernels of kernels/gpu, compiled without a GPU; nothing here was run. Per GPU:",
        "# registers per thread, bytes spilled per thread, bytes of shared memory per block.",
        "# Written by `python tools/compile_kernels.py --write`.",
        f"# triton {version}",
        f"# {'kernel':<22}{'variant':<48}{heads}",
    ]
    for (kernel, variant), per_arch in sorted(table.items()):
        numbers = "".join("{:>8}{:>5}{:>7}".format(*per_arch[arch]) for arch in ARCHS)
        lines.append(f"{kernel:<24}{variant:<48}{numbers}")
    return "\n".join(lines) + "\n"


def read(text: str) -> tuple[Table, str]:
    """Return the table in a text of `write`, and its version of triton."""
    table: Table = {}
    version = ""
    for line in text.splitlines():
        if line.startswith("#"):
            version = line.removeprefix("# triton ") if line.startswith("# triton ") else version
            continue
        match = re.fullmatch(rf"(\S+)\s+(.+?)((?:\s+-?\d+){{{3 * len(ARCHS)}}})", line)
        assert match is not None, line
        numbers = [int(number) for number in match[3].split()]
        table[match[1], match[2]] = {
            arch: (numbers[3 * i], numbers[3 * i + 1], numbers[3 * i + 2])
            for i, arch in enumerate(ARCHS)
        }
    return table, version


def too_large(table: Table) -> Iterator[str]:
    """Yield a sentence per kernel that needs more shared memory than the GPU has per block."""
    for (kernel, variant), per_arch in table.items():
        for arch, (_, _, shared) in per_arch.items():
            if shared > SHARED_LIMIT[arch]:
                limit = SHARED_LIMIT[arch]
                yield f"{kernel} ({variant}) on sm_{arch}: {shared} bytes shared, limit {limit}"


def regressions(before: Table, now: Table) -> Iterator[str]:
    """Yield a sentence per kernel that spills more or grew by more than a fifth since `before`."""
    for key in sorted(before.keys() | now.keys()):
        name = f"{key[0]} ({key[1]})"
        if key not in now:
            yield f"{name} is in the table and no longer compiled"
        elif key not in before:
            yield f"{name} is not in the table"
        else:
            for arch in ARCHS:
                for growth in _growth(before[key][arch], now[key][arch]):
                    yield f"{name} on sm_{arch}: {growth}"


def _growth(before: Numbers, now: Numbers) -> Iterator[str]:
    if now[1] > before[1]:
        yield f"{now[1]} bytes of spills, before {before[1]}"
    if now[0] > max(before[0], FREE_REGISTERS) * GROWTH:
        yield f"{now[0]} registers, before {before[0]}"
    if now[2] > max(before[2], FREE_SHARED) * GROWTH:
        yield f"{now[2]} bytes of shared memory, before {before[2]}"
