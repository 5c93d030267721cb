"""Compile every kernel of kernels/gpu for sm_80, sm_90 and sm_100, without a GPU.

    python tools/compile_kernels.py                   # compare with the table
    python tools/compile_kernels.py --write           # write the table
    python tools/compile_kernels.py --install         # other tritons into build/triton/
    python tools/compile_kernels.py --triton build/triton/3.4.0   # with one of them: compile only

The table is docs/results/gpu/kernels.txt. Exits with 1 when a kernel does not compile, needs more
shared memory than the GPU has, or spills more or is a fifth larger than in the table. Each kernel
module declares in `variants()` which calls are compiled (kernels/gpu/variants.py).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_compile import table

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "results" / "gpu" / "kernels.txt"
# The oldest and the newest triton of the range in setup.py, beside the one that is installed.
OTHERS = ("3.4.0", "3.9.0")


def main(argv: list[str] | None = None) -> int:
    """Compile and compare or write; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    parser.add_argument("--triton", type=Path, help="folder with another triton; compile only")
    parser.add_argument("--install", action="store_true", help=f"install {' and '.join(OTHERS)}")
    args = parser.parse_args(argv)
    if args.install:
        for version in OTHERS:
            install(version)
        return 0
    record = compile_all(args.triton)
    problems = [*failures(record)]
    if not problems and args.triton is None:
        now = table.table_of(record["kernels"])
        if args.write:
            TABLE.parent.mkdir(parents=True, exist_ok=True)
            TABLE.write_text(table.write(now, record["triton"]))
        else:
            problems += comparison(record)
    print(f"triton {record['triton']}: {len(record['kernels'])} kernels compiled")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def folder_of(version: str) -> Path:
    """Return where `install` puts a version of triton."""
    return ROOT / "build" / "triton" / version


def install(version: str) -> None:
    """Install a version of triton into a folder of its own, unless it is there."""
    folder = folder_of(version)
    if folder.exists():
        return
    unfinished = folder.with_name(f"{version}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    options = ["--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    command = [sys.executable, "-m", "pip", *options, "--target", str(unfinished)]
    subprocess.run([*command, f"triton=={version}"], check=True)
    unfinished.rename(folder)


def python(module: str, *arguments: str, triton: Path | None = None) -> subprocess.CompletedProcess:
    """Run a module of gpu_compile with the installed triton, or with the one in a folder."""
    paths = [*([str(triton.resolve())] if triton else []), str(ROOT), str(ROOT / "tools")]
    with tempfile.TemporaryDirectory() as cache:  # empty: ptxas reports what it compiles, once
        environment = {
            **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "TRITON_CACHE_DIR": cache,
        }
        command = [sys.executable, "-m", f"gpu_compile.{module}", *arguments]
        return subprocess.run(
            command, env=environment, cwd=ROOT, check=False, capture_output=True, text=True
        )


def compile_all(folder: Path | None = None) -> dict[str, Any]:
    """Return what `gpu_compile/measure.py` writes, of the installed triton or the one in `folder`.

    Raises:
        RuntimeError: when it ended without a result, with its last output.
    """
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "kernels.json"
        run = python("measure", str(output), *map(str, table.ARCHS), triton=folder)
        if not output.exists():
            raise RuntimeError(f"compiling ended early:\n{(run.stdout + run.stderr)[-4000:]}")
        return json.loads(output.read_text())


def failures(record: dict[str, Any]) -> list[str]:
    """Return a sentence per kernel that is not compiled, does not compile or would not start."""
    place = "kernels/gpu/{module}.py ({variant}) on sm_{arch}: {error}"
    wrong = [place.format(**entry) for entry in record["kernels"] if "error" in entry]
    wrong += [f"{kernel}: no call in `variants()` launches it" for kernel in record["missing"]]
    return wrong or [*table.too_large(table.table_of(record["kernels"]))]


def table_version() -> str:
    """Return the version of triton that the table is of."""
    return table.read(TABLE.read_text())[1]


def comparison(record: dict[str, Any]) -> list[str]:
    """Return a sentence per kernel that grew since the table was written."""
    before, version = table.read(TABLE.read_text())
    if version != record["triton"]:
        return [f"{TABLE.name} is of triton {version}, installed is {record['triton']}: --write"]
    assert all(entry["registers"] >= 0 for entry in record["kernels"]), "ptxas reported nothing"
    return [*table.regressions(before, table.table_of(record["kernels"]))]


if __name__ == "__main__":
    sys.exit(main())
