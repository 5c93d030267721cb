"""Open exporters: from the config to span files, live metrics and DeepSpeed's comms logger."""

from __future__ import annotations

from pathlib import Path

from engine.config import Config
from engine.distributed.clock import ClockOffset
from engine.distributed.groups import Topology
from engine.models.decoder import CausalLM
from engine.profiling.deepspeed_comms import open_deepspeed_comms
from engine.profiling.exporters import Exporters
from engine.profiling.span_file import SpanFileHeader, SpanWriter


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
        try:
            folder.mkdir(parents=True, exist_ok=True)
            header = _header(config, topology, model, offset)
            num_bytes = int(profiler.spans_mib * 2**20)
            exporters.spans = SpanWriter(folder, header, num_bytes, topology.tensor_rank_offsets)
        except OSError as error:
            raise ValueError(
                f"profiler.spans = {profiler.spans!r}: cannot be written on {topology.host}: "
                f"{error.strerror}; name a folder that every rank may write to"
            ) from error
    if profiler.metrics_port is not None and topology.world.rank == 0:
        from engine.profiling.metrics import Metrics  # its HTTP server is rarely needed

        host, port = profiler.metrics_host, profiler.metrics_port
        try:
            exporters.metrics = Metrics(host, port, topology.expert.ranks)
        except OSError as error:
            raise ValueError(
                f"profiler.metrics_port = {port}: cannot listen at {host}:{port} on "
                f"{topology.host}: {error.strerror}; name a free port, or 0 for any"
            ) from error
    if profiler.enabled and profiler.deepspeed_comms:
        try:
            exporters.comms = open_deepspeed_comms(topology.device.type, topology.expert.size)
        except ImportError as error:
            raise ValueError(
                f"profiler.deepspeed_comms = True: DeepSpeed cannot be imported on "
                f"{topology.host}: {error}; pip install deepspeed"
            ) from error
    return exporters


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
        first_expert=layers[0].first_expert if layers else 0,
        num_local_experts=layers[0].num_local_experts if layers else 0,
        policy=config.moe.capacity.policy,
    )
