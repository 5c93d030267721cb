"""Whether this engine runs a checkpoint, on how many GPUs, and what is missing.

    python tools/check_model.py /data/Mixtral-8x7B-Instruct-v0.1 --ranks 8

`lockstep check-model` without an installation. Reads config.json and the headers of the safetensors
files, never the weights. Exit code 0: it runs; 1: it does not; 2: DIR or an option is wrong.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # engine
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "launch"))  # lockstep
from lockstep import check_model, cli


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return cli.main(argv, _parser())


def _parser() -> cli.CommandParser:
    parser = cli.CommandParser(prog="check_model.py", allow_abbrev=False)
    check_model.add_to(parser)
    return parser


if __name__ == "__main__":
    cli.run_and_exit(parser=_parser())
