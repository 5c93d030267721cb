"""Batch inference: a JSONL file of requests in, a JSONL file of completions out.

    python launch/infer.py --config tiny_mixtral
    torchrun --nproc-per-node 8 launch/infer.py --config mixtral_ep8.yaml \\
        --input requests.jsonl --output completions.jsonl

`lockstep infer` without an installation. Started by torchrun, srun, mpirun or by hand; every rank
runs this file. The same command resumes. Without --input it completes a few built-in prompts. Exit
codes: 0 done, 1 failed, 2 wrong command, config or files, 128 + signal when stopped by one.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # lockstep: a checkout needs no install
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # engine
from lockstep import cli, infer


def main(argv: list[str] | None = None) -> int:
    """Run the command on this rank; return its exit code."""
    return cli.main(argv, _parser())


def _parser() -> cli.CommandParser:
    parser = cli.CommandParser(prog="infer.py", allow_abbrev=False)
    infer.add_to(parser)
    return parser


if __name__ == "__main__":
    cli.run_and_exit(parser=_parser())
