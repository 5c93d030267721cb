"""A real Slurm on this machine: munged, slurmctld, a slurmd per virtual node, all in one folder.

    with VirtualSlurm(num_nodes=3) as slurm:
        job = slurm.sbatch("--nodes=2", "job.sh")
        slurm.wait(lambda: slurm.ended(job), 60, "the job's end")

The daemons run as this user, listen on free ports and end with this process. The names of the nodes
do not resolve, as on sites that keep them out of DNS; all are 127.0.0.1 to Slurm.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
_POLL_S = 0.1

# cred_expire is also how long a requeued job waits before it starts again; it must be 5 or more.
_CONF = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool-%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd-%n.log
AuthType=auth/munge
AuthInfo=socket={dir}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=15
MinJobAge=600
JobRequeue=1
"""


def missing_programs() -> list[str]:
    """Return the programs of Slurm and munge that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=_search_path()) is None]


class VirtualSlurm:
    """Context manager: `num_nodes` nodes n1, n2, ... in the partition `main`.

    A node has `cpus` CPUs and two GPUs, which do not exist but are allocated as such. The
    partition `urgent` holds the same nodes and preempts the jobs of `main`.
    """

    def __init__(self, num_nodes: int, cpus: int = 4) -> None:
        self.nodes = [f"n{number}" for number in range(1, num_nodes + 1)]
        self.dir = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: sockets have at most 107 bytes
        self._cpus = cpus
        self._environ = os.environ | {
            "PATH": _search_path(),
            "SLURM_CONF": str(self.dir / "slurm.conf"),
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> VirtualSlurm:
        with ExitStack() as undo:
            undo.callback(self._stop)
            self._start()
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, *argv: str, environ: dict[str, str] | None = None, check: bool = True) -> str:
        """Run a client command; return its output. Raises RuntimeError where it fails."""
        environ = self._environ | (environ or {})
        done = subprocess.run(
            argv, check=False, env=environ, capture_output=True, text=True, timeout=60
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(argv)}: exit code {done.returncode}: {done.stderr}")
        return done.stdout

    def start(self, *argv: str) -> subprocess.Popen[bytes]:
        """Start a client command; its output is in pipes."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(argv, env=self._environ, **pipes)

    def sbatch(self, *argv: str, environ: dict[str, str] | None = None) -> str:
        """Submit a job; return its id."""
        return self.run("sbatch", "--parsable", *argv, environ=environ).strip()

    def job(self, job: str) -> dict[str, str]:
        """Return the output of `scontrol show job`."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def state(self, job: str) -> str:
        """Return the job's state, e.g. `RUNNING`."""
        return self.job(job)["JobState"]

    def ended(self, job: str) -> bool:
        """Return whether the job, or every task of the array, is out of the queue."""
        return not self.run("squeue", "--noheader", "--jobs", job, check=False).strip()

    def restart_now(self, job: str) -> None:
        """Shorten a requeued job's wait for the credentials of its previous run to expire."""
        self.wait(lambda: self.state(job) == "PENDING", 30, "the requeued job's end")
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+2")

    def wait(self, until: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Poll `until`. Raises RuntimeError with the logs if time is up or a daemon has ended."""
        deadline = time.monotonic() + timeout_s
        while not until():
            ended = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = (f"--- {path}\n{path.read_text()[-1500:]}" for path in self._logs())
                raise RuntimeError(
                    "\n".join([f"{what}: not within {timeout_s} s; daemons ended: {ended}", *logs])
                )
            time.sleep(_POLL_S)

    def processes(self) -> list[int]:
        """Return every process that a job of this Slurm has started and that is alive."""
        mark = f"SLURM_CONF={self.dir / 'slurm.conf'}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):  # another user's, or ended by now
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return [pid for pid in found if pid != os.getpid()]

    def _start(self) -> None:
        for name in ("state", *(f"spool-{node}" for node in self.nodes)):
            (self.dir / name).mkdir()
        ports = _free_ports(1 + len(self.nodes))
        conf = _CONF.format(
            host=_host(), user=getpass.getuser(), port=ports[0], dir=self.dir
        ) + "".join(
            f"NodeName={node} NodeHostname={_host()} NodeAddr=127.0.0.1 Port={port} "
            f"CPUs={self._cpus} Gres=gpu:2\n"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        )
        nodes = ",".join(self.nodes)
        conf += f"PartitionName=main Nodes={nodes} Default=YES PriorityTier=1 MaxTime=60\n"
        conf += f"PartitionName=urgent Nodes={nodes} PriorityTier=2 PreemptMode=OFF\n"
        (self.dir / "slurm.conf").write_text(conf)
        (self.dir / "gres.conf").write_text("Name=gpu File=/dev/null,/dev/zero\n")
        version = 2 if Path("/sys/fs/cgroup/cgroup.controllers").exists() else 1
        (self.dir / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v{version}\n")
        key = self.dir / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.dir.chmod(0o755)
        socket_path = self.dir / "munge.socket"
        munge = {"key-file": key, "socket": socket_path} | {
            f"{name}-file": self.dir / f"munge.{name}" for name in ("log", "pid", "seed")
        }
        self._spawn("munged", "--foreground", "--force", *(f"--{k}={v}" for k, v in munge.items()))
        self.wait(socket_path.exists, 10, "munged")
        self._spawn("slurmctld", "-D", "-c")
        for node in self.nodes:
            self._spawn("slurmd", "-D", "-N", node)
        self.wait(self._idle, 30, "the virtual nodes")

    def _logs(self) -> list[Path]:
        return sorted(path for path in self.dir.glob("*.log") if path.stat().st_size)

    def _idle(self) -> bool:
        shown = self.run("sinfo", "--noheader", "--Node", "-p", "main", "-o", "%T", check=False)
        return shown.split() == ["idle"] * len(self.nodes)

    def _spawn(self, *argv: str) -> None:
        with (self.dir / f"{argv[0]}.out.log").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", *argv],
                    env=self._environ,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )

    def _stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=5)
            daemon.kill()
            daemon.wait()
        while left := self.processes():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        shutil.rmtree(self.dir, ignore_errors=True)


def _search_path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # where Debian has the daemons


def _host() -> str:
    return socket.gethostname().split(".")[0]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        ports = []
        for _ in range(count):
            probe = held.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
        return ports
