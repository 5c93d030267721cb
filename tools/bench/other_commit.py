"""Another commit of this repository in a temporary git worktree, so that a bench can run it.

    with checkout("771224a") as tree:      # tree.folder is a git worktree with compiled kernels
        ...                                # a candidate with root=tree.folder imports its engine

The candidate runs that commit's own worker script, so the two commits may differ in module paths.
They share the protocol of `protocol.py` and the arguments and replies of
`workers/generate_lockstep.py`, unchanged since 771224a.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.candidate import REPOSITORY, WorkerError

_LIBRARY = "engine/_native*.so"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    """A checked-out commit."""

    folder: Path
    commit: str  # its full hash
    kernels: Literal["copied", "compiled"]  # from the work tree, or there


@contextlib.contextmanager
def checkout(name: str, repository: Path = REPOSITORY) -> Iterator[Tree]:
    """Check out a commit in a temporary git worktree with its native kernels; remove it at the end.

    The kernels are copied from the work tree where its sources are the same, else compiled.

    Raises:
        ValueError: there is no such commit.
        WorkerError: its kernels cannot be compiled here.
    """
    commit = _git(repository, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if not commit:
        raise ValueError(f"--against {name}: must be a commit of {repository.name}; see `git log`")
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary, "tree")
        try:
            _git(repository, "worktree", "add", "--detach", str(folder), commit, check=True)
            yield Tree(folder=folder, commit=commit, kernels=_add_kernels(repository, folder))
        finally:
            # By force: a build leaves untracked files.
            _git(repository, "worktree", "remove", "--force", str(folder))


def _add_kernels(repository: Path, folder: Path) -> Literal["copied", "compiled"]:
    libraries = sorted(repository.glob(_LIBRARY))
    if libraries and _kernel_sources(repository) == _kernel_sources(folder):
        shutil.copy2(libraries[0], folder / "engine")
        return "copied"
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=folder, capture_output=True, text=True, check=False)
    # The extension is optional to setup.py: a failed compilation exits with 0.
    if done.returncode or (libraries and not list(folder.glob(_LIBRARY))):
        raise WorkerError(
            f"--against: its kernels do not compile here:\n{(done.stdout + done.stderr)[-2000:]}"
        )
    return "compiled"


def _kernel_sources(repository: Path) -> dict[str, bytes]:
    """Return the contents that the compiled library depends on: sources, and flags in build.py."""
    files = [repository / "kernels" / "build.py", *(repository / "kernels" / "csrc").glob("*")]
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def _git(repository: Path, *arguments: str, check: bool = False) -> str:
    command = ["git", "-C", str(repository), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise WorkerError(f"`{' '.join(command[3:])}` failed:\n{done.stderr}")
    return done.stdout.strip() if done.returncode == 0 else ""
