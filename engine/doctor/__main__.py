"""`python -m engine.doctor`: `lockstep doctor` without an installation."""

from __future__ import annotations

import argparse
import sys

from engine.doctor import add_arguments
from engine.doctor.report import run


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m engine.doctor", allow_abbrev=False)
    add_arguments(parser)
    args = parser.parse_args(argv)
    return run(args.config, args.overrides)


if __name__ == "__main__":
    sys.exit(main())
