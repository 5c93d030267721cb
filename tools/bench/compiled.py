"""Small C programs that measure a machine, compiled for it where they are needed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def compile_for_here(source: Path, folder: Path) -> Path:
    """Compile a C source for this processor; return the program, in `folder`.

    Raises:
        RuntimeError: there is no compiler.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise RuntimeError("no C compiler here: install gcc")
    program = folder / source.stem
    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-Wno-psabi", "-pthread"]
    subprocess.run([compiler, *flags, source, "-o", program], check=True, capture_output=True)
    return program
