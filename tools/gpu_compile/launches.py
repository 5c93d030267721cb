"""Runs launchers of Triton kernels on a machine without a GPU: every launch compiles and no more.

Needs triton with the interpreter off. Works with each version that setup.py allows.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before triton is imported. The log of ptxas has the registers; a kernel from a cache has no log.
os.environ["TRITON_DUMP_PTXAS_LOG"] = os.environ["TRITON_ALWAYS_COMPILE"] = "1"

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

FOLDER = Path(__file__).resolve().parents[2] / "kernels" / "gpu"


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel that a call launches, as ptxas reports it."""

    kernel: str  # name of its function
    registers: int  # per thread; -1 where this triton does not report it
    spills: int  # bytes per thread stored to local memory; -1 likewise
    shared: int  # bytes per block


class _Device:
    """The little of a driver that choosing and compiling a kernel asks for; launches nothing."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # triton keeps its compiled kernels per device

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextlib.contextmanager
def _compiling_only(arch: int, compiled: Callable[[JITFunction, Any], None]) -> Iterator[None]:
    """Inside, a launch is compiled for `arch` and handed to `compiled`."""
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        self.device_caches.clear()
        compiled(self, run(self, *args, **{**kwargs, "warmup": True}))

    triton.runtime.driver.set_active(_Device(arch))  # type: ignore[arg-type]
    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run  # the device stays: without a GPU triton has none to go back to


def compile_launches(call: Callable[[], object], arch: int) -> list[Compiled]:
    """Compile what one call launches for sm_<arch>, in the order of its launches."""
    found: list[Compiled] = []
    log = io.StringIO()

    def measure(kernel: JITFunction, compiled: Any) -> None:
        text = log.getvalue()
        log.seek(0)
        log.truncate()
        registers = [int(number) for number in re.findall(r"Used (\d+) registers", text)]
        spills = [int(number) for number in re.findall(r"(\d+) bytes spill stores", text)]
        name, shared = kernel.fn.__name__, compiled.metadata.shared
        found.append(Compiled(name, max(registers, default=-1), max(spills, default=-1), shared))

    with contextlib.redirect_stdout(log), _compiling_only(arch, measure):
        call()
    return found


def launched_keys(call: Callable[[], object], arch: int = 90) -> set[str]:
    """Return what triton would look up for each launch of a call: one compiled kernel per key."""
    keys: set[str] = set()

    def note(**launch: Any) -> bool:
        keys.add(launch["fn"].name + " " + str(launch["compile"]["key"]))
        return True  # and do not compile

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        with _compiling_only(arch, lambda kernel, compiled: None):
            call()
    finally:
        knobs.runtime.jit_cache_hook = before
    return keys


def kernel_modules() -> list[str]:
    """Names of the files of kernels/gpu that define a kernel."""
    return [path.stem for path in sorted(FOLDER.glob("*.py")) if "@triton.jit" in path.read_text()]


def kernel_names() -> set[str]:
    """Names of all kernels: functions of triton whose name ends in _kernel."""
    text = "\n".join(path.read_text() for path in FOLDER.glob("*.py"))
    return set(re.findall(r"@triton\.jit.*?\ndef (\w+_kernel)\(", text, flags=re.DOTALL))


def calls(module: str) -> dict[str, Callable[[int], object]]:
    """Return the declared calls of one file of kernels/gpu by name.

    Raises:
        ValueError: when the file declares none, or two of one name.
    """
    loaded = importlib.import_module(f"engine.ops.gpu.{module}")
    if not hasattr(loaded, "variants"):
        raise ValueError(f"kernels/gpu/{module}.py has no `variants()`: see CONTRIBUTING.md")
    declared = list(loaded.variants())
    named = {variant.name: variant.call for variant in declared}
    if not named or len(named) < len(declared):
        raise ValueError(f"kernels/gpu/{module}.py: variants need names that differ")
    return named
