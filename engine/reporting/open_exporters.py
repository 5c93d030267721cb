"""Open exporters: from the config to span files, routing traces, metrics, DeepSpeed's logger."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, reduce
from importlib.util import find_spec
from pathlib import Path

from engine.config import Config, ModelConfig
from engine.distributed.clock import ClockOffset
from engine.distributed.groups import Topology
from engine.models.language_model import LanguageModel
from engine.profiling.deepspeed_comms import open_deepspeed_comms
from engine.profiling.exporters import Exporters, check_listen
from engine.profiling.routing.recorder import RecorderGroup, RoutingRecorder
from engine.profiling.routing.trace_file import (
    CLAIMS,
    LOADS,
    TraceError,
    TraceHeader,
    trace_path,
)
from engine.profiling.routing.writer import TraceEnd, TraceWriter, find_end, min_bytes
from engine.profiling.span_file import SpanFileHeader, SpanWriter, check_folder, check_writable
from engine.weights.fingerprint import model_fingerprint

CLAIMS_EVERY = 8  # steps to one whose claims are recorded: those of every step take 2% of a small
# job's time on the CPU


def check_exporters(config: Config, topology: Topology) -> None:
    """Check what `open_exporters` will open on this rank; leaves nothing open.

    Takes no model: a setting that cannot be honoured is found before one is loaded.

    Raises:
        ValueError: as `open_exporters` does.
    """
    profiler = config.profiler
    if profiler.enabled and profiler.spans is not None:
        with _folder_in_words("spans", profiler.spans, topology):
            check_folder(Path(profiler.spans), topology.world.rank)
    find_routing_end(config, topology)
    if profiler.metrics_port is not None and topology.world.rank == 0:
        with _metrics_in_words(config, topology):
            check_listen(profiler.metrics_host, profiler.metrics_port)
    if profiler.enabled and profiler.deepspeed_comms and find_spec("deepspeed") is None:
        raise ValueError(
            f"profiler.deepspeed_comms = True: DeepSpeed cannot be imported on {topology.host}: "
            "it is not installed; pip install deepspeed"
        )


def open_exporters(
    config: Config,
    topology: Topology,
    model: LanguageModel,
    offset: ClockOffset,
    routing_end: TraceEnd | None = None,
) -> Exporters:
    """Open what `profiler.spans`, `routing`, `metrics_port` and `deepspeed_comms` require here.

    routing_end: the end of the routing trace over all ranks, None where there is none.

    Raises:
        ValueError: a folder that cannot be written, a port that cannot be opened, or a DeepSpeed
        that cannot be imported; the text names the setting.
    """
    profiler = config.profiler
    exporters = Exporters()
    if profiler.enabled and profiler.spans is not None:
        folder = Path(profiler.spans)
        with _folder_in_words("spans", profiler.spans, topology):
            folder.mkdir(parents=True, exist_ok=True)
            header = _header(config, topology, model, offset)
            num_bytes = int(profiler.spans_mib * 2**20)
            exporters.spans = SpanWriter(folder, header, num_bytes, topology.tensor_rank_offsets)
    if profiler.routing is not None and routing_end is not None and model.moe_layers:
        with _folder_in_words("routing", profiler.routing, topology):
            exporters.routing = _open_routing(
                config, Path(profiler.routing), topology, model, routing_end
            )
    if profiler.metrics_port is not None and topology.world.rank == 0:
        from engine.profiling.metrics import Metrics  # its HTTP server is rarely needed

        with _metrics_in_words(config, topology):
            host, port = profiler.metrics_host, profiler.metrics_port
            exporters.metrics = Metrics(host, port, topology.expert.ranks)
    if profiler.enabled and profiler.deepspeed_comms:
        try:
            exporters.comms = open_deepspeed_comms(topology.device.type, topology.expert.size)
        except Exception as error:  # MissingCUDAException of DeepSpeed, which needs its import
            advice = "pip install deepspeed"
            if not isinstance(error, ImportError):
                advice = "install what it asks for, or set profiler.deepspeed_comms=false"
            raise ValueError(
                f"profiler.deepspeed_comms = True: DeepSpeed cannot be imported on "
                f"{topology.host}: {str(error) or type(error).__name__}; {advice}"
            ) from error
    return exporters


def find_routing_end(config: Config, topology: Topology) -> TraceEnd | None:
    """Return where this rank's files of the routing trace end; None where there is to be none.

    Checks that they can be continued: the folder can be written, they are of this model.

    Raises:
        ValueError: they cannot be; the text names the setting or the file.
    """
    profiler, rank = config.profiler, topology.world.rank
    if profiler.routing is None:
        return None
    folder = Path(profiler.routing)
    with _folder_in_words("routing", profiler.routing, topology):
        check_writable(folder, f"routing.rank{rank:05d}")
        kinds = [CLAIMS] if profiler.routing_claims else []
        kinds += [LOADS] if topology.expert.rank == 0 else []
        found = TraceEnd(fingerprint="" if rank else _fingerprint(config.model))
        for kind in kinds:
            end, header = find_end(folder, kind, rank)
            if header is not None:
                trace_path(folder, kind, rank).open("ab").close()
            if header is not None and rank == 0 and header.fingerprint != found.fingerprint:
                raise TraceError(
                    f"profiler.routing = {profiler.routing!r}: has the routing of another model, "
                    f"{header.model} ({header.fingerprint}), and this one is {config.model.path} "
                    f"({found.fingerprint}); name a folder of its own for every model"
                )
            found = found.join(end)
    return found


def join_routing_ends(ends: Sequence[TraceEnd | None]) -> TraceEnd | None:
    """Return the end of the routing trace over all ranks, the same on every rank."""
    found = [end for end in ends if end is not None]
    return reduce(TraceEnd.join, found) if found else None


def _open_routing(
    config: Config, folder: Path, topology: Topology, model: LanguageModel, end: TraceEnd
) -> RoutingRecorder:
    """Open this rank's files of the routing trace."""
    profiler, layers = config.profiler, model.moe_layers
    router = layers[0].spec.router
    header = TraceHeader(
        kind=LOADS,
        rank=topology.world.rank,
        host=topology.host,
        model=config.model.path,
        fingerprint=end.fingerprint,
        layers=[layer.layer for layer in layers],
        num_experts=router.num_experts,
        top_k=max(layer.spec.router.top_k for layer in layers),
    )
    # The claims of a rank and the loads of its group have half of the bound each.
    num_bytes = int(profiler.routing_mib * 2**20) // (2 if profiler.routing_claims else 1)
    if num_bytes < (least := min_bytes(header)):
        raise TraceError(
            f"profiler.routing_mib = {profiler.routing_mib}: is too small for one step of this "
            f"model; give at least {least * (1 + profiler.routing_claims) / 2**20:.4f}"
        )
    loads = claims = None
    if topology.expert.rank == 0:
        loads = TraceWriter(folder, header, num_bytes)
    if profiler.routing_claims:
        claims = TraceWriter(folder, replace(header, kind=CLAIMS, every=CLAIMS_EVERY), num_bytes)
    ranks = topology.expert.ranks
    group = RecorderGroup(first_rank=ranks[0], num_ranks=len(ranks))
    return RoutingRecorder(folder, header, group, end, loads, claims)


@cache
def _fingerprint(model: ModelConfig) -> str:
    return model_fingerprint(model)


@contextmanager
def _folder_in_words(key: str, folder: str, topology: Topology) -> Iterator[None]:
    """Turn what the system says of a folder into an error that names the setting."""
    try:
        yield
    except TraceError:  # says all that there is to say
        raise
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        name = getattr(error, "filename", None)
        more = f" ({name})" if name and str(name) != folder else ""
        raise ValueError(
            f"profiler.{key} = {folder!r}: cannot be written on {topology.host}: {why}{more}; name "
            "a folder with room that every rank may write to"
        ) from error


@contextmanager
def _metrics_in_words(config: Config, topology: Topology) -> Iterator[None]:
    """Turn what the system says of an address into an error that names the setting at fault."""
    host, port = config.profiler.metrics_host, config.profiler.metrics_port
    try:
        yield
    except (OSError, UnicodeError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        unknown = isinstance(error, socket.gaierror | UnicodeError)
        if unknown or getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
            raise ValueError(
                f"profiler.metrics_host = {host!r}: is no address of {topology.host}: {why}; name "
                "one of this host's, 127.0.0.1 for this host alone or 0.0.0.0 for all"
            ) from error
        raise ValueError(
            f"profiler.metrics_port = {port}: cannot listen at {host}:{port} on {topology.host}: "
            f"{why}; name a free port, or 0 for any"
        ) from error


def _header(
    config: Config, topology: Topology, model: LanguageModel, offset: ClockOffset
) -> SpanFileHeader:
    layers = model.moe_layers
    return SpanFileHeader(
        rank=topology.world.rank,
        host=topology.host,
        world_size=topology.world.size,
        group=list(topology.expert.ranks),
        clock_offset_ns=offset.nanoseconds,
        clock_error_ns=offset.error,
        num_layers=model.num_layers,
        num_experts=layers[0].spec.router.num_experts if layers else 0,
        own_experts={each.layer: each.local_experts for each in layers},
        num_homes={each.layer: each.instances.num_homes(topology.expert.rank) for each in layers},
        num_copies={each.layer: each.instances.placement.num_copies for each in layers},
        policy=config.moe.capacity.policy,
    )
