"""Describes the compiled CPU kernels to setup.py, and their sources to native.py.

The library is optional: without torch at build time, without a compiler, or when compiling fails,
the install goes on and every op falls back to its torch reference (native.py says so in words).
setup.py stands in the project root and calls `ext_modules()`; the result is engine/_native*.so.
"""

import hashlib
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from setuptools import Extension

_SOURCES = Path(__file__).parent / "csrc"


def ext_modules() -> "list[Extension]":
    """The extension `engine._native`, or an empty list with the reason printed.

    Paths are relative to the project root, which must be the working directory.
    """
    obstacle = _obstacle()
    if obstacle:
        print(f"lockstep: native CPU kernels are not built: {obstacle}", file=sys.stderr)
        return []
    # Both stand behind the check: an install without them must still get as far as the message.
    import torch
    from setuptools import Extension
    from torch.utils.cpp_extension import include_paths

    libraries = Path(torch.__file__).parent / "lib"
    # Link the OpenMP runtime that torch itself loaded: with a second one in the process the two
    # thread pools would compete for the cores.
    openmp = sorted(str(path) for path in libraries.glob("libgomp*.so*"))
    return [
        Extension(
            "engine._native",
            sources=sorted(f"engine/ops/csrc/{path.name}" for path in _SOURCES.glob("*.cpp")),
            depends=sorted(f"engine/ops/csrc/{path.name}" for path in _SOURCES.glob("*.h")),
            include_dirs=include_paths(),
            library_dirs=[str(libraries)],
            libraries=["torch_cpu", "c10"],
            define_macros=[
                ("_GLIBCXX_USE_CXX11_ABI", str(int(torch.compiled_with_cxx11_abi()))),
                ("LOCKSTEP_SOURCES", source_digest()),
            ],
            extra_compile_args=["-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden"],
            extra_link_args=openmp[:1] or ["-fopenmp"],
            language="c++",
            optional=True,
        )
    ]


def source_digest() -> str:
    """Sixteen hex digits of the C++ sources: a library compiled from others is out of date."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.glob("*.*")):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    # It begins with a letter: the preprocessor must not take it for a number.
    return f"s{digest.hexdigest()[:16]}"


def _obstacle() -> str | None:
    if not sys.platform.startswith("linux"):
        return f"they are built on Linux only, this is {sys.platform}"
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        return f"there is no C++ compiler ({compiler.split()[0]})"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed here (install it first and pass --no-build-isolation)"
    return None
