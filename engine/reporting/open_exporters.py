"""Open exporters: from the config to span files, live metrics and DeepSpeed's comms logger."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from engine.config import Config
from engine.distributed.clock import ClockOffset
from engine.distributed.groups import Topology
from engine.models.decoder import CausalLM
from engine.profiling.deepspeed_comms import open_deepspeed_comms
from engine.profiling.exporters import Exporters, check_listen
from engine.profiling.span_file import SpanFileHeader, SpanWriter, check_folder


def check_exporters(config: Config, topology: Topology) -> None:
    """Check what `open_exporters` will open on this rank; leaves nothing open.

    Takes no model: a setting that cannot be honoured is found before one is loaded.

    Raises:
        ValueError: as `open_exporters` does.
    """
    profiler = config.profiler
    if profiler.enabled and profiler.spans is not None:
        with _spans_in_words(profiler.spans, topology):
            check_folder(Path(profiler.spans), topology.world.rank)
    if profiler.metrics_port is not None and topology.world.rank == 0:
        with _metrics_in_words(config, topology):
            check_listen(profiler.metrics_host, profiler.metrics_port)
    if profiler.enabled and profiler.deepspeed_comms and find_spec("deepspeed") is None:
        raise ValueError(
            f"profiler.deepspeed_comms = True: DeepSpeed cannot be imported on {topology.host}: "
            "it is not installed; pip install deepspeed"
        )


def open_exporters(
    config: Config, topology: Topology, model: CausalLM, offset: ClockOffset
) -> Exporters:
    """Open what `profiler.spans`, `metrics_port` and `deepspeed_comms` require on this rank.

    Raises:
        ValueError: a folder that cannot be written, a port that cannot be opened, or a DeepSpeed
        that cannot be imported; the text names the setting.
    """
    profiler = config.profiler
    exporters = Exporters()
    if profiler.enabled and profiler.spans is not None:
        folder = Path(profiler.spans)
        with _spans_in_words(profiler.spans, topology):
            folder.mkdir(parents=True, exist_ok=True)
            header = _header(config, topology, model, offset)
            num_bytes = int(profiler.spans_mib * 2**20)
            exporters.spans = SpanWriter(folder, header, num_bytes, topology.tensor_rank_offsets)
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


@contextmanager
def _spans_in_words(folder: str, topology: Topology) -> Iterator[None]:
    """Turn what the system says of a span file into an error that names the setting."""
    try:
        yield
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        name = getattr(error, "filename", None)
        more = f" ({name})" if name and str(name) != folder else ""
        raise ValueError(
            f"profiler.spans = {folder!r}: cannot be written on {topology.host}: {why}{more}; name "
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
    config: Config, topology: Topology, model: CausalLM, offset: ClockOffset
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
