"""`lockstep infer`: a JSONL file of requests in, a JSONL file of completions out.

`launch/infer.py` is the same command for a checkout that is not installed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import Config
from engine.config.loader import PROJECT_ROOT, load_config, to_yaml
from engine.config.preflight import check_runnable
from engine.distributed.standard_streams import check_printed

if TYPE_CHECKING:
    from engine.batch.input.shards import InputShard

SUMMARY = "batch inference: a JSONL file of requests in, a JSONL file of completions out"
_OVERRIDE = (
    "change one setting of the config, as in --set moe.capacity.policy=token_drop; the value is "
    "YAML. May be repeated; the last one wins. docs/configuration.md explains every key"
)

_INPUT = "requests, one per line: a file, also .gz or .zst, a folder, or -; may be repeated"
_RETRY_ERRORS = (
    "run the lines of error records again, once, and keep every other record of --output"
)


def add_to(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the command's arguments to a parser of its own; return the parser."""
    parser.description = (
        "Batch inference over JSONL. Start it with a launcher for several ranks; the same command "
        "resumes. Without --input it completes a few built-in prompts."
    )
    parser.add_argument("--config", metavar="NAME", help="a YAML file, here or in configs/")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides", help=_OVERRIDE
    )
    parser.add_argument("--input", type=_path, metavar="JSONL", action="append", help=_INPUT)
    parser.add_argument("--output", type=_path, metavar="JSONL", help="completions, in input order")
    parser.add_argument("--slice", metavar="I/N", help="run only this part; the last one merges")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --output")
    parser.add_argument("--retry-errors", action="store_true", help=_RETRY_ERRORS)
    parser.add_argument("--print-config", action="store_true", help="show every setting and exit")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    parser.set_defaults(prepare=partial(prepare, parser))
    return parser


def _path(text: str) -> Path:
    """Return a path with `~` expanded: no shell does it inside of --input=~/FILE."""
    return Path(os.path.expanduser(text))


def prepare(
    parser: argparse.ArgumentParser, args: argparse.Namespace, rank: int
) -> Callable[[], None]:
    """Check what this rank can check alone; return what all ranks then run together.

    Raises:
        ValueError: a wrong command line or config, or a config that cannot run on this host.
    """
    from engine.batch.input.shards import InputShard

    if args.config is None:
        names = sorted(path.stem for path in (PROJECT_ROOT / "configs").glob("*.yaml"))
        parser.error(f"--config is missing; in configs/ there are {', '.join(names)}")
    config = load_config(args.config, args.overrides)
    if args.print_config:
        return lambda: _print_config(config) if rank == 0 else None
    if args.retry_errors and args.overwrite:
        raise ValueError(
            "--retry-errors --overwrite: the first keeps the records that succeeded, the second "
            "discards them; give one of the two"
        )
    if args.retry_errors and args.input is None:
        raise ValueError("--retry-errors needs --input: name the JSONL file of the job")
    shard = None if args.slice is None else InputShard.parse(args.slice)
    check_runnable(config, os.environ)
    return lambda: _run(config, args, shard)


def _print_config(config: Config) -> None:
    print(to_yaml(config), end="")
    check_printed()


def _run(config: Config, args: argparse.Namespace, shard: InputShard | None) -> None:
    from engine.batch.run import run_batch
    from engine.distributed import bootstrap

    topology = bootstrap.start(config, is_watched=True)
    run_batch(
        config,
        topology,
        args.input,
        args.output,
        overwrite=args.overwrite,
        retry_errors=args.retry_errors,
        shard=shard,
    )
    bootstrap.stop(topology)
