"""Runs a function on several ranks of this machine, for tests: `run_ranks(fn, world, *args)`.

Every rank is a process that sees what torchrun would give it (RANK, WORLD_SIZE, MASTER_ADDR, ...),
so `bootstrap.start` works in it unchanged. The rendezvous store lives in the calling process on a
port the system chose: no port is guessed and it survives the death of any rank. Nothing hangs:
after `timeout` seconds all ranks are killed.

    from tests.helpers.ranks import run_ranks

    def sum_of_ranks(rank, offset): ...

    def test_sum(): assert run_ranks(sum_of_ranks, 2, 10) == [21, 21]
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

# Ranks that outlive the first failure get this long to report their own before they are killed.
GRACE_S = 3.0

# Children fork from a server that has imported the slow libraries and started no thread, which
# saves seconds per rank.
_SLOW = [
    "torch",
    "torch.distributed",
    "transformers.models.auto.configuration_auto",
    "pytest",
    "hypothesis",
    "engine.llm",
    "engine.batch.file_job",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_SLOW)


class RanksFailed(AssertionError):
    """At least one rank raised, died or did not return in time; the text lists every rank."""


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call `fn(rank, *args)` on `world` processes; return the results in rank order.

    `fn` must be importable (a module-level function); arguments and results must pickle.

    Raises:
        RanksFailed: with the traceback, exit code or timeout of every rank.
    """
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=timeout), False)
    payload = pickle.dumps((fn, args))
    ranks: list[tuple[Any, Connection]] = []
    try:
        for rank in range(world):
            receiver, sender = _context.Pipe(duplex=False)
            environ = _environ(rank, world, store.port)
            process = _context.Process(
                target=_child, args=(sender, payload, environ, timeout), daemon=True
            )
            process.start()
            sender.close()
            ranks.append((process, receiver))
        return _collect(ranks, time.monotonic() + timeout, timeout)
    finally:
        for process, receiver in ranks:
            if process.is_alive():
                process.kill()
            process.join()
            receiver.close()


def _environ(rank: int, world: int, port: int) -> dict[str, str]:
    number, size = str(rank), str(world)
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "OMPI_", "PMI_", "PMIX_", "TORCHELASTIC_"))
    }
    return inherited | {
        "RANK": number,
        "WORLD_SIZE": size,
        "LOCAL_RANK": number,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # As under torchrun: the store exists already, rank 0 must not open one.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }


def _child(sender: Connection, payload: bytes, environ: dict[str, str], timeout: float) -> None:
    # Only Python's own signal handling: pytest's interrupt must not print one traceback per rank.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(environ)
    torch.set_num_threads(1)
    # A rank that hangs prints its stack before the parent kills it.
    faulthandler.dump_traceback_later(0.9 * timeout, file=sys.__stderr__)
    try:
        fn, args = pickle.loads(payload)
        message = pickle.dumps((True, fn(int(environ["RANK"]), *args)))
    except BaseException:  # SystemExit too: the parent reports what ended the rank
        message = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(message)
    sender.close()
    # At once: a process group whose peers have exited may wait for them on the way out.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _collect(ranks: list[tuple[Any, Connection]], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    outcomes: dict[int, str] = {}
    pending = {receiver: rank for rank, (_, receiver) in enumerate(ranks)}
    while pending and (remaining_s := deadline - time.monotonic()) > 0:
        for receiver in wait(list(pending), remaining_s):
            assert isinstance(receiver, Connection)
            rank = pending.pop(receiver)
            try:
                worked, value = pickle.loads(receiver.recv_bytes())
            except EOFError:
                process = ranks[rank][0]
                process.join(1.0)
                worked, value = False, f"exited without a result, exit code {process.exitcode}\n"
            (results if worked else outcomes)[rank] = value
        if outcomes:
            deadline = min(deadline, time.monotonic() + GRACE_S)
    if not pending and not outcomes:
        return [results[rank] for rank in range(len(ranks))]
    for rank in pending.values():
        reason = "killed while the others failed" if outcomes else f"no result in {timeout:g} s"
        outcomes[rank] = f"{reason}\n"
    for rank in results:
        outcomes[rank] = "returned\n"
    raise RanksFailed("\n".join(f"rank {rank}: {outcomes[rank]}" for rank in sorted(outcomes)))
