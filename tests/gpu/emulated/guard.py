"""The device guard that a torch without CUDA lacks: compiles guard.cpp, a second of work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths


def obstacle() -> str | None:
    """Return why CUDA cannot be emulated here, or None where it can be."""
    if torch.version.cuda is not None:
        return "this torch is built with CUDA"
    if shutil.which(_compiler()[0]) is None:
        return f"there is no C++ compiler ({_compiler()[0]})"
    return None


def compile_guard(folder: Path) -> Path:
    """Compile the guard into `folder`; return the library, for `torch.ops.load_library`."""
    library = folder / "cuda_guard.so"
    libraries = Path(torch.__file__).parent / "lib"
    command = [*_compiler(), "-std=c++20", "-O1", "-shared", "-fPIC", "-o", str(library)]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += [f"-I{path}" for path in include_paths()]
    command += [str(Path(__file__).with_name("guard.cpp")), f"-L{libraries}", "-lc10"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def _compiler() -> list[str]:
    return (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()
