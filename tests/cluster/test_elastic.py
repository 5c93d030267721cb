"""Elastic runs: torchrun restarts the available ranks, and the job resumes from its ledger.

python -m pytest tests/cluster/test_elastic.py

Real agents over gloo. Several agents of this machine, each with its own ranks, simulate nodes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from bench.parts import written
from chaos.job import Job, read_lines
from chaos.processes import alive, ranks_of, wait_until_gone
from chaos.records import compare

NUM_REQUESTS = 100
TIMEOUT_S = 10.0
# Lets a run of several nodes resume soon without one: how long the others wait for more nodes once
# they are enough, and how soon they declare one dead.
ELASTIC = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
# Agents of torch 2.13 keep using the first round's store, which was on the node of its rank 0.
FRESH_STORES = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


class Agents:
    """Torchrun agents of one run, and what they print."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.environ = {"OMP_NUM_THREADS": "1"}
        self.processes: list[subprocess.Popen[bytes]] = []
        self._known: set[int] = set()

    def start(self, options: Sequence[str], command: Sequence[str]) -> None:
        """Start one more."""
        log = (self._folder / f"agent{len(self.processes)}.log").open("wb")
        line = [sys.executable, "-m", "torch.distributed.run", *options, *command]
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        environ = {name: value for name, value in os.environ.items() if name not in names}
        with log:
            self.processes.append(
                subprocess.Popen(
                    line,
                    env=environ | self.environ,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )

    def ranks(self) -> dict[int, int]:
        """Return the process of each rank that exists now."""
        found: dict[int, int] = {}
        for agent in self.processes:
            found |= ranks_of(agent.pid)
        self._known |= set(found.values())
        return found

    def at_work(self, world: int, output: Path) -> dict[int, int]:
        """Wait until a world of this size has written records; return its ranks."""
        begun = written(output)
        self.until(lambda: len(self.ranks()) == world and written(output) > begun)
        return self.ranks()

    def until(self, holds: Any, within_s: float = 60.0) -> None:
        deadline = time.monotonic() + within_s
        while not holds():
            assert time.monotonic() < deadline, f"waited {within_s:g} s in vain:\n{self.log()}"
            time.sleep(0.02)

    def codes(self, within_s: float = 90.0) -> list[int]:
        deadline = time.monotonic() + within_s
        for agent in self.processes:
            try:
                agent.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                pytest.fail(f"an agent is still running:\n{self.log()}")
        return [agent.returncode for agent in self.processes]

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self._folder.glob("agent*.log")))

    def end(self) -> None:
        self.ranks()
        for agent in self.processes:
            if agent.poll() is None:
                agent.kill()
            agent.wait()
        for pid in self._known:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        wait_until_gone(self._known, 10.0)


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Agents]:
    started = Agents(tmp_path)
    yield started
    started.end()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("elastic"), NUM_REQUESTS, TIMEOUT_S)


def one_node(num_ranks: int, max_restarts: int = 1) -> list[str]:
    return ["--standalone", f"--nproc-per-node={num_ranks}", f"--max-restarts={max_restarts}"]


def node(port: int, nodes: str, run: str, is_host: bool = False) -> list[str]:
    """Return the options of one of several agents, with one rank, that rendezvous at a port.

    is_host: it holds the agents' store, without which the run cannot continue.
    """
    return [
        f"--nnodes={nodes}",
        "--nproc-per-node=1",
        "--max-restarts=3",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        f"--rdzv-id={run}",
        f"--rdzv-conf={ELASTIC},is_host={int(is_host)}",
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def report(output: Path) -> dict[str, Any]:
    return json.loads(output.with_name(output.name + ".report.json").read_text())


def finished_by(output: Path, undisturbed: list[str]) -> int:
    """Check the output of the last run; return its number of ranks."""
    found = compare(read_lines(output), undisturbed)
    assert found.same, found
    values = report(output)
    assert 0 < values["resumed"] < NUM_REQUESTS, "the fault came in the middle"
    return len(values["run"]["ranks"])


@pytest.mark.parametrize("name, world", [("SIGKILL", 4), ("SIGSTOP", 2)])
def test_a_dead_rank_is_restarted_and_the_job_resumes(
    agents, job, undisturbed, tmp_path, name, world
):
    output = tmp_path / "out.jsonl"
    agents.start(one_node(world), job.command(output))
    ranks = agents.at_work(world, output)
    os.kill(ranks[1], getattr(signal, name))
    agents.until(lambda: not set(agents.ranks().values()) & set(ranks.values()))
    agents.until(lambda: len(agents.ranks()) == world)
    assert agents.codes() == [0], agents.log()
    assert finished_by(output, undisturbed) == world
    reports = re.findall("^fault: (.*)$", agents.log(), re.MULTILINE)
    assert len(reports) == 1 and reports[0].startswith("rank 1 on "), agents.log()


@pytest.mark.parametrize("victim, world", [("the node of rank 0", 4), ("another node", 3)])
def test_the_work_of_a_dead_node_is_done_by_the_others(
    agents, job, undisturbed, tmp_path, victim, world
):
    output, port = tmp_path / "out.jsonl", free_port()
    if victim == "the node of rank 0":
        agents.environ |= FRESH_STORES
    nodes = f"{world - 1}:{world}"
    for number in range(world):
        agents.start(node(port, nodes, tmp_path.name, is_host=number == 1), job.command(output))
    ranks = agents.at_work(world, output)
    agent_of = {rank: agent for agent in agents.processes for rank in ranks_of(agent.pid)}
    lost = agent_of[0 if victim == "the node of rank 0" else world - 1]
    assert lost is not agents.processes[1], "process ids give torchrun's order"
    (orphan,) = ranks_of(lost.pid).values()
    lost.kill()
    assert wait_until_gone([orphan], 5.0), "the worker of a killed agent dies with it"
    agents.until(lambda: not set(agents.ranks().values()) & set(ranks.values()))
    agents.until(lambda: len(agents.ranks()) == world - 1)
    agents.processes.remove(lost)
    lost.wait()
    assert agents.codes() == [0] * (world - 1), agents.log()
    assert finished_by(output, undisturbed) == world - 1
