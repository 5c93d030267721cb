"""Report: runs all checks on this rank, gathers the ranks' findings and prints one table."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from engine.config import Config, ModelConfig, ParallelConfig, RuntimeConfig
from engine.config.loader import load_config
from engine.config.preflight import check_runnable
from engine.config.world_rules import validate_world
from engine.distributed import bootstrap
from engine.distributed.collectives import gather_objects
from engine.distributed.groups import Topology
from engine.distributed.shared_memory import SharedMemoryGroup
from engine.doctor.checks import check_installed, check_works
from engine.doctor.findings import Finding, check_one, table_lines
from engine.models.registry import read_config, read_spec
from engine.models.spec import SparseSpec
from engine.models.weight_dtype import dtype_in_words, model_dtype
from engine.moe.backend_choice import choose_backend

_TIMEOUT_S = 60.0


def run(config_name: str | None = None, overrides: Sequence[str] = ()) -> int:
    """Check everything; print the table on rank 0; return the exit code, the same on every rank.

    Collective over the world: every rank must call.

    Args:
        config_name: of the config that is to run; None: none in particular.
        overrides: as of `--set`.
    """
    loaded: list[Config] = []

    def load() -> str:
        loaded.append(load_config(config_name or "", list(overrides)))
        return str(config_name)

    found: list[Finding] = []
    if config_name is not None:
        found.append(check_one("chosen", "config", load, is_needed=True))
    config = loaded[0] if loaded else None
    topologies: list[Topology] = []

    def start() -> str:
        runtime = RuntimeConfig(timeout_s=_TIMEOUT_S) if config is None else config.runtime
        own = Config(model=ModelConfig(path="unused"), parallel=ParallelConfig(), runtime=runtime)
        topologies.append(bootstrap.start(own))
        return _use_group(topologies[0])

    group = check_one("works", "process group", start, is_needed=True)
    topology = topologies[0] if topologies else None
    device = torch.device("cpu") if topology is None else topology.device
    found = [*check_installed(), group, *check_works(device, config), *found]
    if config is not None:
        found += _chosen(config, device, 1 if topology is None else topology.world.size)
    ranks = [found]
    if topology is not None:  # also where the groups of the device do not work: this one is gloo's
        with suppress(RuntimeError):
            ranks = gather_objects(found, topology.control)
    if topology is None or topology.world.rank == 0:
        print("\n".join(table_lines(ranks)))
    if topology is not None:
        bootstrap.stop(topology)
    return int(any(each.is_needed and not each.works for rank in ranks for each in rank))


def _use_group(topology: Topology) -> str:
    """Run an all-reduce and an all-to-all over all ranks. Collective over the world."""
    group, device = topology.expert, topology.device
    total = torch.ones(1, device=device)
    sent = torch.full((group.size,), group.rank, dtype=torch.int64, device=device)
    received = torch.empty_like(sent)
    if group.size > 1:
        dist.all_reduce(total, group=group.handle)
        dist.all_to_all_single(received, sent, group=group.handle)
        if total.item() != group.size or received.tolist() != [*range(group.size)]:
            raise RuntimeError(f"an all-reduce or all-to-all of {group.size} ranks is wrong")
    shared = isinstance(group.handle, SharedMemoryGroup)
    kind = "shared memory" if shared else "NCCL" if device.type == "cuda" else "gloo"
    return f"all-reduce and all-to-all, ranks: {group.size}, {kind}"


def _chosen(config: Config, device: torch.device, num_ranks: int) -> Iterator[Finding]:
    def runs_here() -> str:
        check_runnable(config, os.environ)
        return config.model.path

    def ranks() -> str:
        expert = config.parallel.expert
        if num_ranks == 1 and isinstance(expert, int) and expert > 1:
            return f"needs a multiple of {expert}; this is one: start it with a launcher"
        validate_world(config, num_ranks)
        return f"{num_ranks}, in expert-parallel groups of {expert or num_ranks}"

    def backend() -> str:
        hf_config = read_config(Path(config.model.path), config.model.implementation)
        dtype = model_dtype(config.model.dtype, hf_config, device)
        layers = read_spec(hf_config, config.model.implementation).layers
        sparse = [layer.mlp.moe for layer in layers if isinstance(layer.mlp, SparseSpec)]
        widths = (sparse[0].hidden, sparse[0].ffn) if sparse else ()
        name = choose_backend(config.moe.experts.backend, device, dtype, widths)
        measured = device.type == "cuda" and config.moe.experts.backend == "auto"
        more = ", or te where it is measured to be faster" if measured else ""
        return f"{name} in {dtype_in_words(dtype, device)}{more}"

    def comms() -> str:
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError("profiler.deepspeed_comms needs DeepSpeed, which is not installed")
        return "deepspeed_comms"

    yield check_one("chosen", "device", lambda: str(device.type))
    yield check_one("chosen", "checkpoint", runs_here, is_needed=True)
    yield check_one("chosen", "ranks", ranks, is_needed=True)
    yield check_one("chosen", "experts backend", backend, is_needed=True)
    if config.profiler.deepspeed_comms:
        yield check_one("chosen", "profiler", comms, is_needed=True)
