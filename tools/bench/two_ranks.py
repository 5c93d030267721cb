"""Two ranks of a layer bench as processes of their own: start them, return what they print."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

from bench.candidate import REPOSITORY, TOOLS, WorkerError
from bench.link import End


def run_two_ranks(
    module: str, job: dict[str, Any], ends: tuple[End, End], timeout: float
) -> list[dict[str, Any]]:
    """Run `python -m module JOB` as both ranks; return the JSON that each prints last.

    Raises:
        WorkerError: a rank failed or did not end within `timeout` seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank, end in enumerate(ends):
        environ = {
            **os.environ,
            **end.env,
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            # To gloo, each end is a host of its own.
            "LOCAL_RANK": "0" if end.command else str(rank),
            "LOCAL_WORLD_SIZE": "1" if end.command else "2",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(TOOLS), str(REPOSITORY)]),
        }
        command = [*end.command, sys.executable, "-m", module, json.dumps(job)]
        running.append(
            subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    replies = []
    try:
        for rank, process in enumerate(running):
            out, err = process.communicate(timeout=timeout)
            if process.returncode:
                text = err.decode(errors="replace")
                raise WorkerError(f"rank {rank} failed:\n{text[-2000:]}")
            replies.append(json.loads(out.decode().splitlines()[-1]))
    except subprocess.TimeoutExpired as error:
        raise WorkerError(f"no result in {timeout} s") from error
    finally:
        for process in running:
            process.kill()
            process.wait()
    return replies
