"""Batch inference: a JSONL file of requests in, a JSONL file of completions out.

    python launch/infer.py --config tiny_mixtral
    torchrun --nproc-per-node 8 launch/infer.py --config mixtral_ep8.yaml \\
        --input requests.jsonl --output completions.jsonl

Started by torchrun, srun, mpirun or by hand; every rank runs this file. The same command resumes.
Without --input it completes a few built-in prompts. Exit codes: 0 done, 1 broke off, 2 wrong
command, config or files, 128 + signal when stopped by one.
"""

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout needs no install
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost store: one report, not 20 frames
if "TORCHELASTIC_RUN_ID" in os.environ:  # the imports take seconds, in which the agent may die
    from engine.distributed.launch_agent import die_with_agent

    die_with_agent()
from engine.batch.input_shards import InputShard
from engine.batch.run import JobFailed, Stopped, run_batch
from engine.config.loader import PROJECT_ROOT, load_config, to_yaml
from engine.config.preflight import check_runnable
from engine.distributed import bootstrap
from engine.distributed.errors import RendezvousError, UnreportedError
from engine.distributed.launch_agent import wait_for_rank_0_exit


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}\n{self.format_usage()}")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="infer.py", description="Batch inference over JSONL.", allow_abbrev=False)
    parser.add_argument("--config", metavar="NAME", help="a YAML file, here or in configs/")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides")
    parser.add_argument("--input", type=Path, metavar="JSONL", help="requests, one a line")
    parser.add_argument("--output", type=Path, metavar="JSONL", help="completions, in input order")
    parser.add_argument("--slice", metavar="I/N", help="run only this part; the last one merges")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --output")
    parser.add_argument("--print-config", action="store_true", help="show every setting and exit")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    args = parser.parse_args(argv)
    if args.config is None:
        names = sorted(path.stem for path in (PROJECT_ROOT / "configs").glob("*.yaml"))
        parser.error(f"--config is missing; in configs/ there are {', '.join(names)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Parse, build, run; return the exit code."""
    rank = local_rank = 0
    try:
        launch = bootstrap.discover(os.environ)
        rank, local_rank = launch.rank, launch.local_rank
        with bootstrap.broadcast_startup_error():  # this host may lack what the others have
            args = _parse(argv)
            config = load_config(args.config, args.overrides)
            if args.print_config:
                print(to_yaml(config) if rank == 0 else "", end="")
                return 0
            shard = None if args.slice is None else InputShard.parse(args.slice)
            check_runnable(config, os.environ)
        topology = bootstrap.start(config)
        run_batch(config, topology, args.input, args.output, overwrite=args.overwrite, shard=shard)
        bootstrap.stop(topology)
    except ValueError as error:  # the user's to mend, and the same on every rank that knows of it
        if rank == 0 or (isinstance(error, UnreportedError) and local_rank == 0):
            place = f"rank {rank} on {os.uname().nodename}: " if rank else ""
            print(f"{place}error: {error}", file=sys.stderr)
        else:
            wait_for_rank_0_exit(bootstrap.PATIENCE_S)
        return 2
    except (JobFailed, RendezvousError, Stopped) as error:
        if str(error):  # otherwise another rank has told
            print(f"rank {rank}: {error}; the same command goes on from here", file=sys.stderr)
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code) if code else sys.exit()  # orderly, without the others, it can hang or abort
