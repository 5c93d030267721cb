"""What recorded or made routing would take on other ranks and with other settings.

    python tools/simulate.py RUN/routing --ranks 2,8,64 --gamma none,1.5 --device h200 --model DIR
    python tools/simulate.py RUN/routing --ranks 4 --fit RUN/spans
    python tools/simulate.py --synthetic zipf:0.5 --layers 61 --experts 256 --top-k 8 \
        --tokens 1000000 --ranks 1024 --device h100 --hidden 7168 --ffn 2048

`lockstep simulate` without an installation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # engine
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "launch"))  # lockstep
from lockstep import cli, simulate


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return cli.main(argv, _parser())


def _parser() -> cli.CommandParser:
    parser = cli.CommandParser(prog="simulate.py", allow_abbrev=False)
    simulate.add_to(parser)
    return parser


if __name__ == "__main__":
    cli.run_and_exit(parser=_parser())
