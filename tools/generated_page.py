"""Command line of the tools that write a page of docs/: write it, or check that it is current."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


def run(
    argv: list[str] | None, page: Callable[[], str], path: Path, root: Path, command: str
) -> int:
    """Write a page, or with --check compare it; return the exit code.

    Args:
        argv: the command line; None: this process's.
        page: returns the whole text.
        path: of the page.
        root: of the project.
        command: that writes the page, for the message.
    """
    parser = argparse.ArgumentParser(description=f"Write {path.name} of docs/.")
    parser.add_argument("--check", action="store_true", help="only say whether it is current")
    check = parser.parse_args(argv).check
    text = page()
    if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
        print(f"{path.relative_to(root)} is not current: run `{command}`", file=sys.stderr)
        return 1
    if not check:
        path.write_text(text, encoding="utf-8")
    return 0
