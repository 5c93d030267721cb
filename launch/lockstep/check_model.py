"""`lockstep check-model`: whether a checkpoint runs, and on how many GPUs: `engine/model_check`.

`tools/check_model.py` is the same command for a checkout that is not installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from engine.model_check import add_arguments

SUMMARY = "whether a checkpoint runs, on how many GPUs, and what is missing, from its headers alone"


def add_to(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the command's arguments to a parser of its own; return the parser."""
    parser.description = (
        "Reads config.json and the headers of the safetensors files, never the weights. Exit code "
        "0: the checkpoint runs; 1: it does not, and why; 2: DIR or an option is wrong."
    )
    add_arguments(parser)
    parser.set_defaults(prepare=prepare)
    return parser


def prepare(args: argparse.Namespace, rank: int) -> Callable[[], int]:
    """Return what rank 0 then runs; its result is the exit code. The other ranks do nothing."""

    def run() -> int:
        from engine.model_check import report

        if rank:
            return 0
        folder = Path(args.folder).expanduser()
        return report.run(
            folder,
            args.ranks,
            args.tensor,
            args.dtype,
            args.gpu_gib,
            args.json,
            args.quantization,
            args.implementation,
        )

    return run
