"""The command `lockstep`: parse, run one command on this rank, turn what went wrong into a code.

Exit codes: 0 done, 1 failed, 2 wrong command, settings or files, 3 done but every line failed,
128 + signal when stopped by one. A rank that fails prints why and records it for torchrun's summary
(`error_file.py`). What cannot be printed is lost and changes neither the job nor its code
(`standard_streams.py`).

Loads nothing slow before the command line is known, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from typing import NoReturn

from engine.distributed.error_file import record_error
from engine.distributed.launch_agent import die_with_agent
from engine.distributed.standard_streams import make_streams_safe, safe_streams
from lockstep import check_model, doctor, infer, simulate

_REPORTED = "another rank reports the error"


class CommandParser(argparse.ArgumentParser):
    """A parser that raises ValueError: all ranks report a wrong command line as one error."""

    def error(self, message: str) -> NoReturn:
        """Raise with the message and the usage."""
        raise ValueError(f"{message}\n{self.format_usage()}")


def command_parser() -> CommandParser:
    """Return the parser of `lockstep` with all its commands."""
    parser = CommandParser(
        prog="lockstep",
        description="Expert-parallel MoE inference that measures, and caps, its slowest rank.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    infer.add_to(commands.add_parser("infer", help=infer.SUMMARY, allow_abbrev=False))
    doctor.add_to(commands.add_parser("doctor", help=doctor.SUMMARY, allow_abbrev=False))
    check = commands.add_parser("check-model", help=check_model.SUMMARY, allow_abbrev=False)
    check_model.add_to(check)
    predict = commands.add_parser("simulate", help=simulate.SUMMARY, allow_abbrev=False)
    simulate.add_to(predict)
    return parser


def main(argv: list[str] | None = None, parser: CommandParser | None = None) -> int:
    """Run one command on this rank; return its exit code.

    Args:
        argv: the command line without the program's name; by default this process's.
        parser: of one command; by default, of `lockstep` with all commands.
    """
    with safe_streams():
        return _main(argv, parser)


def _main(argv: list[str] | None, parser: CommandParser | None) -> int:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost store: one report, not 20 frames
    die_with_agent()  # the imports below take seconds, in which the agent may die
    try:
        args: argparse.Namespace | ValueError = (parser or command_parser()).parse_args(argv)
    except ValueError as error:  # perhaps on this host alone
        args = error
    from engine.batch.run import EveryLineFailed, JobFailed, Stopped
    from engine.distributed import bootstrap
    from engine.distributed.errors import RendezvousError, UnreportedError
    from engine.distributed.launch_agent import wait_for_rank_0_exit

    rank = local_rank = 0
    try:
        launch = bootstrap.discover(os.environ)
        rank, local_rank = launch.rank, launch.local_rank
        with bootstrap.broadcast_startup_error():  # this host may lack what the others have
            if isinstance(args, ValueError):
                raise args
            run = args.prepare(args, rank)
        code = run()
    except ValueError as error:  # the user's to mend, and the same on every rank that knows of it
        record_error(f"error: {error}" if local_rank == 0 else _REPORTED, follows=rank > 0)
        if rank == 0 or (isinstance(error, UnreportedError) and local_rank == 0):
            place = f"rank {rank} on {os.uname().nodename}: " if rank else ""
            print(f"{place}error: {error}", file=sys.stderr)
        else:
            wait_for_rank_0_exit(bootstrap.RENDEZVOUS_TIMEOUT_S)
        return 2
    except EveryLineFailed as error:  # on every rank, once all is done
        record_error(f"error: {error}" if rank == 0 else _REPORTED, follows=rank > 0)
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        else:
            wait_for_rank_0_exit(bootstrap.RENDEZVOUS_TIMEOUT_S)
        return error.exit_code
    except (JobFailed, RendezvousError, Stopped) as error:
        text = f"rank {rank}: {error}; run the same command again to resume" if str(error) else ""
        record_error(text or _REPORTED, follows=not text)
        if text:
            print(text, file=sys.stderr)
        return error.exit_code
    except Exception:
        record_error(traceback.format_exc())
        traceback.print_exc()
        return 1
    return code or 0


def run_and_exit(argv: list[str] | None = None, parser: CommandParser | None = None) -> NoReturn:
    """Run one command and end the process. Takes what `main` takes."""
    make_streams_safe()
    code = main(argv, parser)
    sys.stdout.flush()
    # An orderly end without the other ranks can hang or abort.
    os._exit(code) if code else sys.exit()
