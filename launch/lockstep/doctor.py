"""`lockstep doctor`: what is installed, what works, what a config would use: `engine/doctor`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from engine.doctor import add_arguments

SUMMARY = "what is installed here, what works, and what a config would use, in one table"


def add_to(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the command's arguments to a parser of its own; return the parser."""
    parser.description = (
        "Checks this machine, or those of all ranks under a launcher. Exit code 1 where something "
        "that is needed, or that the config asks for, cannot work."
    )
    add_arguments(parser)
    parser.set_defaults(prepare=prepare)
    return parser


def prepare(args: argparse.Namespace, rank: int) -> Callable[[], int]:
    """Return what all ranks then run together; its result is the exit code."""

    def run() -> int:
        from engine.doctor import report

        return report.run(args.config, args.overrides)

    return run
