"""Doctor: what is installed on the ranks' machines, what works there, and what would be chosen.

    lockstep doctor --config mixtral_ep8
    torchrun --nproc-per-node 8 -m engine.doctor

Every check runs on its own: what fails is a row of the table and never ends the program. Exit code
1 where something that the engine needs, or that the config asks for, cannot work.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("--config", metavar="NAME", help="also check what this config asks for")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides",
        help="change one setting of the config",
    )  # fmt: skip
