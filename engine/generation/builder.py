"""Builder: the parts that one rank runs, built from the config.

In this order: the model without weights, the weights, then the KV cache in the memory that is
left on the rank with the least, with the runner and the scheduler on top of it.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from engine.config import CapacityConfig, Config
from engine.config.world_rules import validate_world
from engine.distributed.errors import memory_in_words
from engine.distributed.groups import Topology
from engine.distributed.health.progress import ProgressReporter
from engine.distributed.shared_memory import SharedMemoryGroup
from engine.generation.block_pool import BlockPool
from engine.generation.graphs.capture import graph_bytes
from engine.generation.memory import MoEShape, RowBound, num_kv_blocks, row_bound
from engine.generation.prefix_cache import resolve_prefix_cache
from engine.generation.quantization import resolve_quantization
from engine.generation.runner import Runner
from engine.generation.scheduler import Scheduler, most_running
from engine.layers.attention_backends.choose import choose_backend
from engine.layers.kv_cache import KVCache
from engine.layers.mlp import DenseMLP
from engine.layers.precision import cache_dtype, compute_dtype
from engine.models.language_model import LanguageModel
from engine.models.measured_choices import measured_at_start
from engine.models.policy import set_policy
from engine.models.registry import build_model, read_spec
from engine.models.warm_up import MOST_TOKENS, warm_up
from engine.models.weight_dtype import dtype_in_words
from engine.moe.layer_static import COUNTED, STATIC
from engine.moe.placement.placement import Placement
from engine.moe.policy.policy import Policy
from engine.weights import loader
from engine.weights.formats.grouping import read_weights

# Where profiler.every is auto: a stamp on CUDA takes the host some microseconds.
_CUDA_EVERY = 16


def import_libraries(config: Config, device: torch.device) -> None:
    """Import what this device's kernels and experts need, wherever it is installed.

    Called before the watchdog starts: eight ranks may take long to read these libraries from a
    shared file system, and an import holds the GIL, so no heartbeat is published. A library that
    cannot be imported is reported where it is used.
    """
    names = []
    if device.type == "cuda":
        names.append("triton")
        if config.moe.experts.backend in ("auto", "te"):
            names.append("transformer_engine.pytorch")
        if config.moe.experts.backend in ("auto", "deep_gemm"):
            names.append("deep_gemm")
    for name in names:
        with suppress(Exception):
            importlib.import_module(name)


def build(
    config: Config,
    hf_config: Any,
    topology: Topology,
    dtype: torch.dtype,
    placement: Placement | None = None,
    policy: Policy | None = None,
) -> LanguageModel:
    """Build this rank's part of the model, its weights uninitialised.

    Args:
        hf_config: the checkpoint's transformers configuration.
        dtype: of the weights, the same on every rank (`agree_dtype`).
        placement: of the experts; None: contiguous homes.
        policy: of moe.policy; None: without one.

    Collective over EP on CUDA: every rank must call.

    Raises:
        ValueError: when the model cannot run on these ranks, with this dtype or this backend.
    """
    spec = read_spec(hf_config, config.model.implementation)
    resolve_prefix_cache(config.scheduler.prefix_cache, spec)
    device = topology.device
    held = resolve_quantization(config, spec, device, compute_dtype(dtype, device))
    if held.layouts and config.moe.experts.backend == "auto":  # nothing to measure
        experts = replace(config.moe.experts, backend="torch")
        config = replace(config, moe=replace(config.moe, experts=experts))
    if policy is not None:  # layers get their settings once they are built
        config = replace(config, moe=replace(config.moe, capacity=CapacityConfig()))
    config, topology = measured_at_start(config, spec, topology, dtype)
    model = build_model(hf_config, config, topology, device, dtype, placement, held.layouts)
    if policy is not None:
        set_policy(model, policy, config.moe.policy or "")
    model.quantization = held.name
    model.kv_dtype = cache_dtype(config.scheduler.kv_dtype, model.dtype)
    backend = choose_backend(
        config.attention.backend,
        model.attention_kinds,
        device=device,
        dtype=model.dtype,
        kv_dtype=model.kv_dtype,
        block_size=config.scheduler.block_size,
    )
    model.set_attention(backend)
    for layer in model.moe_layers[:1]:
        validate_world(config, topology.world.size, layer.spec.router.num_experts)
    return model


def checkpoint_names(config: Config) -> frozenset[str]:
    """Return the names of the checkpoint's tensors; empty with model.load_format = dummy.

    Raises:
        ValueError, OSError: when the checkpoint cannot be read.
    """
    if config.model.load_format == "dummy":
        return frozenset()
    return frozenset(read_weights(Path(config.model.path)).entries)


def load_weights(
    model: LanguageModel,
    config: Config,
    topology: Topology,
    names: frozenset[str],
    reporter: ProgressReporter,
) -> loader.LoadReport | None:
    """Read this rank's weights from the checkpoint, or draw random ones (load_format = dummy).

    Args:
        names: the checkpoint's tensors, see `checkpoint_names`.

    Returns what was read and how long it took; None for random weights. Collective over all ranks:
    every rank must call.

    Raises:
        ValueError: on every rank, naming tensor and file.
    """
    if config.model.load_format == "dummy":
        loader.fill_dummy(model.weight_slots(), config.runtime.seed, reporter.advance)
        return None
    return loader.load_weights(
        Path(config.model.path),
        model.weight_slots(names),
        ignored=model.ignored_weights(names),
        group=topology.host_world,
        reporter=reporter,
    )


def plan_cache(
    model: LanguageModel,
    config: Config,
    topology: Topology,
    policy: Policy | None = None,
    *,
    has_graphs: bool = False,
) -> int:
    """Return the KV cache blocks that this rank's memory has room for; reserve the row buffers.

    policy: of moe.policy; None: without one.
    has_graphs: whether decode graphs will be captured, whose memory comes first.

    Collective over EP and TP on CUDA: every rank must call.

    Raises:
        ValueError: when the memory does not suffice.
    """
    settings, spec = config.scheduler, model.kv_spec
    reserve = None
    if model.row_buffers.transports.transports:  # their buffers do not grow
        reserve = reserve_rows(model, config, topology, policy)
    warm_up(model, topology, settings.block_size)
    if reserve is None:
        reserve = reserve_rows(model, config, topology, policy)
    bytes_per_block = spec.bytes_per_block(settings.block_size, model.kv_dtype)
    if has_graphs:  # and their scratch
        reserve += bytes_per_block + spec.state_bytes
        reserve += graph_bytes(model, topology, settings.block_size, settings.max_sequences)
    return num_kv_blocks(
        settings,
        bytes_per_block=bytes_per_block,
        state_bytes=spec.state_bytes,
        max_model_len=model.max_model_len,
        reserve_bytes=reserve if topology.device.type == "cuda" else 0,
        device=topology.device,
        local_world_size=topology.local_world_size,
        copy_bytes=sum(layer.experts.copy_bytes for layer in model.moe_layers),
    )


def build_cache(
    model: LanguageModel,
    config: Config,
    topology: Topology,
    num_blocks: int,
    *,
    has_graphs: bool = False,
) -> tuple[Runner, Scheduler]:
    """Build the KV cache, and the runner and scheduler that use it.

    Args:
        num_blocks: equal on every rank (`agree_kv_blocks`).
        has_graphs: whether idle rows of decode graphs need a scratch block.

    Raises:
        ValueError: when the memory does not suffice.
    """
    settings, device, spec = config.scheduler, topology.device, model.kv_spec
    rows, states, fewer = most_running(settings), "", ""
    if spec.has_states:
        states, fewer = f" beside the recurrent states of {rows} sequences", " or max_sequences"
    with memory_in_words(
        f"scheduler.kv_cache_blocks = {num_blocks}: the KV cache cannot be allocated{states}; "
        f"lower it, or scheduler.kv_cache_gib{fewer}"
    ):
        cache = KVCache(
            spec,
            num_blocks,
            settings.block_size,
            device,
            model.kv_dtype,
            rows,
            has_scratch=has_graphs,
        )
    pool = BlockPool(num_blocks, settings.block_size)
    scheduler = Scheduler(settings, pool, model.max_model_len, has_states=spec.has_states)
    return Runner(model, cache, device), scheduler


def schedules_ahead(config: Config, model: LanguageModel, topology: Topology) -> bool:
    """Resolve scheduler.async_scheduling: whether a step may be scheduled while one runs.

    A tensor group broadcasts what it reads; under a policy, tokens that compete depend on which
    requests are in the step; copies that are counted or moved are read by the host between steps.
    """
    setting = config.scheduler.async_scheduling
    wanted = setting == "on" or (setting == "auto" and topology.device.type == "cuda")
    low_bit = any(layer.experts.copy_layouts is not None for layer in model.moe_layers)
    moe = config.moe
    competes = moe.capacity.policy != "none" or moe.policy is not None
    apart = topology.tensor.size == 1 and not competes and not low_bit
    return wanted and apart and moe.copies.replan == "off"


def profiler_every(config: Config, device: torch.device) -> int:
    """Resolve profiler.every: steps from one in which every phase is timed to the next."""
    profiler = config.profiler
    if profiler.every != "auto":
        return profiler.every
    reads_all = profiler.spans is not None or profiler.deepspeed_comms
    reads_all = reads_all or config.moe.capacity.speed_aware
    return _CUDA_EVERY if device.type == "cuda" and not reads_all else 1


def resolved_settings(
    model: LanguageModel, topology: Topology, kv_cache_blocks: int, prefix_cache: bool
) -> dict[str, Any]:
    """Return the values that the engine chose for settings left to it: setting -> value.

    With moe.overlap.chunks = auto its value is itself a mapping, from a step's tokens to the chunks
    chosen so far.
    """
    device, layers = topology.device, model.moe_layers
    is_cuda = device.type == "cuda"
    found: dict[str, Any] = {
        "runtime.device": torch.cuda.get_device_name(device) if is_cuda else device.type,
        "runtime.threads": torch.get_num_threads(),
        "runtime.shared_memory": isinstance(topology.control.handle, SharedMemoryGroup),
        "model.dtype": dtype_in_words(model.weight_dtype, device),
        "model.quantization": model.quantization,
        "model.max_model_len": model.max_model_len,
        "parallel.expert": topology.expert.size,
        "scheduler.kv_cache_blocks": kv_cache_blocks,
        "scheduler.prefix_cache": prefix_cache,
        "attention.backend": model.attention_backend.name,
        "scheduler.kv_dtype": str(model.kv_dtype).removeprefix("torch."),
    }
    if layers:
        found["moe.experts.backend"] = layers[0].backend
        choices = layers[0].layout_policy.choices
        chunks = {f"from {2**bucket} tokens": each for bucket, each in choices.items()}
        found["moe.overlap.chunks"] = chunks or layers[0].num_chunks
        if ways := layers[0].static.choices:
            names = {COUNTED: "counted", STATIC: "static"}
            by_tokens = {f"from {2**bucket} tokens": names[way] for bucket, way in ways.items()}
            found["moe.dispatch.exchange"] = by_tokens
    return found


def reserve_rows(
    model: LanguageModel, config: Config, topology: Topology, policy: Policy | None = None
) -> int:
    """Limit the rows that a rank receives at once, and allocate the MoE row buffers: on CUDA, and
    where a capacity policy bounds their size. Of layers that differ the widest decides.

    policy: of moe.policy; None: moe.capacity holds in all layers.

    Returns the bytes that the layers' activations may still take.

    Raises:
        ValueError: they do not fit into memory; the text names the setting.
    """
    layers = model.moe_layers
    if not layers:
        return 0
    # Of the layers, which share the buffers, the one with the widest rows: deduplicated ones have
    # the mask of a rank's experts, and tokens of one expert are not deduplicated.
    layer = max(
        layers,
        key=lambda each: (each.spec.router.top_k > 1, each.instances.most_local),
    )
    shape = MoEShape(
        num_ranks=topology.expert.size,
        top_k=layer.spec.router.top_k,
        num_experts=layer.spec.router.num_experts,
        num_local_experts=max(each.instances.most_local for each in layers),
        num_homes=max(each.instances.most_homes for each in layers),
        has_copies=any(each.instances.has_copies for each in layers),
        hidden=layer.spec.width,
        ffn=layer.spec.ffn,
    )
    limits = config.scheduler
    # By experts per token and capacity settings, in which layers may differ.
    kinds = [
        (
            each.spec.router.top_k,
            config.moe.capacity if policy is None else policy.layer(each.layer),
        )
        for each in layers
    ]
    bounds = {
        (top_k, capacity): row_bound(
            replace(shape, top_k=top_k),
            capacity,
            limits.max_batch_tokens,
            limits.max_sequences,
            in_rounds=layer.on_device.transport is None,
        )
        for top_k, capacity in set(kinds)
    }
    bound = reduce(RowBound.join, bounds.values())
    if layer.on_device.transport is not None:
        most = min(shape.top_k, shape.num_local_experts)
        received = topology.expert.size * MOST_TOKENS * most
        bound = bound.join(RowBound(MOST_TOKENS * shape.top_k, received))
    dtype = model.dtype
    is_cuda = topology.device.type == "cuda"
    needed = bound.activation_bytes(shape, dtype, is_cuda=is_cuda)
    if config.moe.shared_expert == "balanced" and isinstance(layer.shared, DenseMLP):
        # Of shared rows from other ranks: three buffers, and what their inner activations take more
        # than those of experts. A rank that takes some has less to do than the most loaded one, so
        # it has at most the room of that rank's own tokens more.
        widths = shape.hidden + layer.shared.ffn
        needed += limits.max_batch_tokens * 3 * widths * dtype.itemsize
    for each, kind in zip(layers, kinds, strict=True):
        own = bounds[kind]
        each.row_limit = own.received if own.has_rounds else None
    is_limited = any(capacity.policy != "none" for _, capacity in kinds)
    if not is_limited and not is_cuda:  # grown to the largest step seen
        return needed
    with memory_in_words(
        f"scheduler.max_batch_tokens = {limits.max_batch_tokens}: the rows that a rank may have in "
        "one step do not fit into memory; lower it, use more ranks, or "
        f"{'moe.policy = null' if config.moe.policy else 'moe.capacity.policy = none'}, which "
        "reserves nothing"
    ):
        taken = layer.reserve(bound.sent, bound.received, max(limits.max_batch_tokens, MOST_TOKENS))
    return needed - taken
