"""Host devices: the launcher, the ranks on this host, and the GPU of this rank.

Read by `preflight.py` before any communication and by `engine/distributed/bootstrap.py` for the
run, so both have the same numbers.

A variable counts only where this process is a rank of its launcher: inside an allocation Slurm's
counts are set for every process, also for one that no launcher has started.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Launcher = Literal["torchrun", "deepspeed", "slurm", "mpi", "single"]

# Slurm's numbers of the steps that hold one process and no ranks: the shell of salloc, a batch
# script and the like.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
# What says how many tasks each node has, the step's own first: others may be the allocation's.
TASKS_PER_NODE = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")
# A rank on its host and the number of ranks there, of Open MPI, Hydra (MPICH, Intel MPI) and PALS.
_MPI_LOCAL = (
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)
# Slurm's settings that give each task GPUs of its own.
_GPUS_OF_A_TASK = ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND")
# Variables that choose which GPUs a process sees, of CUDA and of HIP.
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


@dataclass(frozen=True, slots=True)
class LocalRank:
    """A rank among those of its host."""

    index: int
    num_ranks: int


@dataclass(frozen=True, slots=True)
class VisibleGpus:
    """The GPUs that this process sees, and which of them is this rank's."""

    ids: tuple[str, ...] = ()  # the unique ids, by device index
    index: int | None = None  # this rank's, unless the other ranks' GPUs require another
    why_none: str = ""  # why `index` is None


def launcher_of(environ: Mapping[str, str]) -> Launcher:
    """Return which launcher has started this process as a rank; `single` where none has."""
    if "RANK" in environ:
        counted = "LOCAL_WORLD_SIZE" not in environ and "LOCAL_SIZE" in environ
        return "deepspeed" if counted else "torchrun"
    step = environ.get("SLURM_STEP_ID", "")
    special = step.isascii() and step.isdigit() and int(step) >= _FIRST_SPECIAL_STEP
    in_step = "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ and not special
    # srun's PMI sets PMI_RANK too; MPI_LOCALRANKID comes from Hydra (MPICH, Intel MPI) alone.
    pmi = "PMI_RANK" in environ and ("MPI_LOCALRANKID" in environ or not in_step)
    if "OMPI_COMM_WORLD_RANK" in environ or pmi:
        return "mpi"
    return "slurm" if in_step else "single"


def local_rank_of(environ: Mapping[str, str]) -> LocalRank | None:
    """Return this rank among those of its host, or None where an MPI library alone knows.

    Raises:
        ValueError: a variable of the launcher is missing or wrong; the text names it.
    """
    launcher = launcher_of(environ)
    if launcher == "single":
        return LocalRank(0, 1)
    if launcher == "torchrun":
        return _numbers(environ, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if launcher == "deepspeed":
        return _numbers(environ, "LOCAL_RANK", "LOCAL_SIZE")
    if launcher == "mpi":
        known = (names for names in _MPI_LOCAL if all(name in environ for name in names))
        names = next(known, None)
        return None if names is None else _numbers(environ, *names)
    name = first_set(environ, *TASKS_PER_NODE)
    per_node = expand_tasks_per_node(environ[name], name)
    node = whole_number(environ, "SLURM_NODEID")
    if node >= len(per_node):
        # One number alone, as --ntasks-per-node is written, holds for every node.
        if name != TASKS_PER_NODE[-1] or len(per_node) > 1:
            raise ValueError(f"SLURM_NODEID={node} is outside {name}={environ[name]}")
        node = 0
    return LocalRank(whole_number(environ, "SLURM_LOCALID"), per_node[node])


def expand_tasks_per_node(text: str, name: str = "SLURM_TASKS_PER_NODE") -> list[int]:
    """Return the tasks per node from Slurm's short form: [2, 2, 2, 1] for `2(x3),1`.

    Args:
        text: the short form.
        name: of the variable that holds it.

    Raises:
        ValueError: it has another form; the text names the variable.
    """
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})(?:\(x([0-9]{1,6})\))?\s*", part)
        if not match:
            raise ValueError(f"{name}={text!r} is not of the form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def find_gpus(local: LocalRank | None, environ: Mapping[str, str]) -> VisibleGpus:
    """Return the GPUs that torch sees here, and this rank's among them.

    With one visible GPU it is that one, whatever the rank: the launcher gave each rank its own
    (Slurm's --gpus-per-task, or a wrapper), or the ranks share it, which the ids of all ranks tell.

    Args:
        local: this rank on its host; None where it is not known yet.
        environ: to name the variable that hides the GPUs.
    """
    import torch  # here, so that a config can be checked without it

    count, why = _count_gpus(environ)
    try:
        ids = tuple(_gpu_id(torch.cuda.get_device_properties(index)) for index in range(count))
    except (RuntimeError, AssertionError) as error:  # a broken driver, or another process's alone
        why = f"torch {torch.__version__} cannot use a GPU: {str(error).splitlines()[0]}"
        return VisibleGpus(why_none=why)
    index = 0 if count == 1 or local is None else local.index
    if count == 0:
        return VisibleGpus(why_none=why)
    if index < count:
        return VisibleGpus(ids, index)
    return VisibleGpus(ids, why_none=f"local rank {index}, but only {count} visible GPUs")


def gpu_problem(environ: Mapping[str, str]) -> str:
    """Return why the ranks of this host cannot have a GPU each, and what to do about it.

    "" where each may have its own, as far as one rank alone can know: with one visible GPU per
    rank, or where Slurm gives each task its own, only the ids of all ranks can tell.

    Raises:
        ValueError: a variable of the launcher is missing or wrong; the text names it.
    """
    count, why = _count_gpus(environ)
    if count == 0:
        return f"{why}; run where there are GPUs"
    local = local_rank_of(environ)
    own = launcher_of(environ) == "slurm" and any(map(environ.get, _GPUS_OF_A_TASK))
    if local is None or count == 1 or local.num_ranks <= count or own:
        return ""
    return (
        f"{local.num_ranks} ranks on this host but {count} visible GPUs; each rank needs its own, "
        "so start fewer ranks, use more hosts, or let each rank see its own GPU alone (srun "
        "--gpus-per-task 1)"
    )


def first_set(environ: Mapping[str, str], *names: str) -> str:
    """Return the first of these variables that is set in a task of a Slurm step.

    Raises:
        ValueError: none is.
    """
    for name in names:
        if name in environ:
            return name
    raise ValueError(
        f"this is a task of a Slurm step, but none of {', '.join(names)} is set: start with srun "
        "or torchrun"
    )


def whole_number(environ: Mapping[str, str], name: str) -> int:
    """Return a variable's value as a whole number. Raises ValueError that names the variable."""
    text = environ.get(name, "")
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ValueError(f"{name}={text!r} in the environment must be a whole number from 0")
    return int(text)


def _numbers(environ: Mapping[str, str], rank: str, size: str) -> LocalRank:
    return LocalRank(whole_number(environ, rank), whole_number(environ, size))


def _count_gpus(environ: Mapping[str, str]) -> tuple[int, str]:
    """Return how many GPUs torch sees, and for 0 why."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return count, "" if count else _why_no_gpu(torch, environ)


def _why_no_gpu(torch: Any, environ: Mapping[str, str]) -> str:
    hip = getattr(torch.version, "hip", None) is not None
    if torch.version.cuda is None and not hip:
        return f"torch {torch.__version__} is built without CUDA"
    for name in _VISIBLE:
        value = environ.get(name)
        first = (value or "").split(",")[0].strip()
        # An empty list, -1 and Slurm's NoDevFiles hide all; what follows a -1 is ignored.
        if value is not None and (first in ("", "NoDevFiles") or first.startswith("-")):
            return (
                f"torch {torch.__version__} sees no GPU: {name}={value!r} in the environment "
                "hides all of them; unset it, or ask the launcher for a GPU"
            )
    return f"torch {torch.__version__} sees no GPU"


def _gpu_id(properties: Any) -> str:
    """Return a device's unique id: its UUID, or its place on the PCI bus where torch has none."""
    uuid = getattr(properties, "uuid", None)
    if uuid is not None and str(uuid).strip("0-"):
        return str(uuid)
    names = ("pci_domain_id", "pci_bus_id", "pci_device_id")
    place = [getattr(properties, name, None) for name in names]
    return ":".join(map(str, place))
