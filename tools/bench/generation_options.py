"""Options of bench_generate.py."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from pathlib import Path

from bench.candidate import add_candidates_option
from bench.generation import COMPARED, PEERS
from bench.jobs import JOBS

DEFAULT_CHECKPOINT = Path.home() / ".cache" / "lockstep-bench" / "mixtral-57.7m"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the bench."""
    parser.add_argument("--peer", type=_peer, action="append", default=[], metavar="NAME=PYTHON")
    add_candidates_option(parser)
    parser.add_argument(
        "--jobs",
        type=lambda text: text.split(","),
        default=["batch8", "ragged"],
        metavar=f"of {','.join(JOBS)}",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--against",
        metavar="COMMIT",
        help=f"also run {COMPARED} of this commit, in the same rounds",
    )
    parser.add_argument(
        "--also",
        type=_settings,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"also run {COMPARED} with this setting, in the same rounds; may be repeated",
    )
    parser.add_argument("--pause", type=float, default=0.3, help="seconds before each measurement")
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="CPU threads per candidate, shared by its ranks",
    )
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument(
        "--size",
        choices=("bench", "tiny"),
        default="bench",
        help="of the checkpoint, when it has to be made",
    )
    parser.add_argument(
        "--hot",
        type=float,
        default=1.0,
        metavar="SCALE",
        help="when the checkpoint has to be made, multiply the router's rows of the first half of "
        "the experts, which makes the first of two ranks hot; 1: balanced",
    )
    parser.add_argument(
        "--transformers-batch",
        type=int,
        metavar="N",
        help="let transformers run batches of N prompts sorted by length",
    )
    parser.add_argument(
        "--peer-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of vLLM and transformers",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a config key for lockstep"
    )
    parser.add_argument("--out", type=Path, help="folder for bench_generate.txt and .json")


def _settings(text: str) -> tuple[str, ...]:
    try:
        found = tuple(shlex.split(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    if not found or not all(re.match(r"\w+(\.\w+)+=.", each) for each in found):
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be SECTION.KEY=VALUE, such as model.dtype=bfloat16"
        )
    return found


def _peer(text: str) -> tuple[str, str]:
    name, separator, python = text.partition("=")
    if name not in PEERS or not separator:
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be NAME=PYTHON, NAME of {', '.join(PEERS)}"
        )
    if not Path(python).exists():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no interpreter at {python}")
    return name, python
