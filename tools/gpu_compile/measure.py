"""Compiles every declared call of every kernel, for several GPUs, in a few processes.

    python -m gpu_compile.measure OUTPUT.json 80 90 100

A process of its own, because triton reads its version, interpreter and cache folder at import;
`tools/compile_kernels.py` starts it.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import triton

from gpu_compile.launches import calls, compile_launches, kernel_modules, kernel_names

ROWS = 64  # tokens or sequences per call; the kernels are the same for every number
MAX_PROCESSES = 4


def _compile(task: tuple[int, str, str]) -> list[dict[str, object]]:
    """Return the kernels of one call for one GPU, or what went wrong as one entry."""
    arch, module, variant = task
    place: dict[str, object] = {"arch": arch, "module": module, "variant": variant}
    try:
        compiled = compile_launches(lambda: calls(module)[variant](ROWS), arch)
    except Exception as error:  # any of the compiler's: the caller names the kernel
        return [{**place, "error": f"{type(error).__name__}: {error}"[:2000]}]
    return [{**place, **asdict(kernel)} for kernel in compiled]


def main(output: str, *archs: str) -> None:
    """Write {"triton": version, "missing": kernels no call launches, "kernels": entries}."""
    tasks = [
        (int(arch), module, variant)
        for module in kernel_modules()
        for variant in calls(module)
        for arch in archs
    ]
    workers = min(MAX_PROCESSES, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers) as pool:
        kernels = [entry for entries in pool.map(_compile, tasks) for entry in entries]
    failed = {entry["module"] for entry in kernels if "error" in entry}
    launched = {entry.get("kernel") for entry in kernels}
    missing = sorted(kernel_names() - launched) if not failed else []
    record = {"triton": triton.__version__, "missing": missing, "kernels": kernels}
    Path(output).write_text(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
