"""`lockstep simulate`: predicted layers and steps on other ranks: `engine/simulate`.

`tools/simulate.py` is the same command for a checkout that is not installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from engine.simulate import add_arguments

SUMMARY = "what recorded or made routing would take on 2 to 4,096 ranks, and what settings change"


def add_to(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the command's arguments to a parser of its own; return the parser."""
    parser.description = (
        "Runs the engine's own decisions on recorded or made loads for every combination of the "
        "options that take several values; each is a line of the table. Needs no GPU. Exit code 2: "
        "an option or a file is wrong."
    )
    add_arguments(parser)
    parser.set_defaults(prepare=prepare)
    return parser


def prepare(args: argparse.Namespace, rank: int) -> Callable[[], int]:
    """Return what rank 0 then runs; its result is the exit code. The other ranks do nothing."""

    def run() -> int:
        from engine.simulate import command

        return 0 if rank else command.run(args)

    return run
