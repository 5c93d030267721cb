"""Capture: the decode graphs of a rank, over its KV cache.

Graphs keep memory: their buffers, and what lies between the first kernel and the last. It is known
once they are captured, and the KV cache takes what is left; so they are captured twice, over a
cache of one block first, which tells how much memory they take.

Legend: B rows of a bucket.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from engine.distributed.errors import is_out_of_memory
from engine.distributed.groups import Topology
from engine.generation.decode_graphs import DecodeGraphs
from engine.generation.graphs.steps import GraphSteps
from engine.layers.attention_backends.paged_kernels import PAGED_KERNELS
from engine.layers.decode_inputs import BUCKETS, DecodeInputs, bucket_of
from engine.layers.kv_cache import KVCache
from engine.layers.step_inputs import StepTensors
from engine.models.decoder import GroupTokens
from engine.models.language_model import LanguageModel
from engine.moe.dispatch.static_layout import bucket_for
from engine.profiling.telemetry import Telemetry

if TYPE_CHECKING:
    from collections.abc import Iterator


def buckets_up_to(max_sequences: int) -> list[int]:
    """Return the buckets that graphs are captured for, the largest first.

    Worked example: 6 sequences take 8, 4, 2 and 1 rows; more than 256 leave larger steps eager.
    """
    largest = bucket_of(max_sequences) or BUCKETS[-1]
    return [bucket for bucket in reversed(BUCKETS) if bucket <= largest]


def capture_graphs(
    model: LanguageModel,
    cache: KVCache,
    topology: Topology,
    max_sequences: int,
    *,
    use_copies: bool = True,
) -> GraphSteps:
    """Capture the graphs of all buckets.

    Args:
        cache: with a scratch block.
        max_sequences: the most decodes of a step on one rank.
        use_copies: whether copies of experts take rows in decode.

    Collective over EP and TP: every rank must call.

    Raises:
        ValueError: a capture failed; the text names the setting that does without.
    """
    assert cache.scratch_slot is not None, "a cache without scratch"
    tensor, loads = topology.tensor, model.telemetry.loads
    num_data = topology.expert.size // tensor.size

    def logits_of(step: StepTensors) -> torch.Tensor:
        loads.late.clear()  # of the run before this
        rows = step.token_ids_T.shape[0]
        everywhere = rows * num_data
        part = bucket_for(-(-rows // tensor.size))
        group = GroupTokens(everywhere, everywhere, use_copies, part)
        return model.logits(model(step, cache, None, group))

    graphs = DecodeGraphs(logits_of, model.vocab_size, samples=tensor.rank == 0)
    columns, counted = -(-model.max_model_len // cache.block_size), {}
    with _captures(model):
        for bucket in buckets_up_to(max_sequences):
            inputs = DecodeInputs(
                bucket,
                columns,
                cache.block_size,
                topology.device,
                cache.scratch_slot,
                cache.scratch_state,
            )
            try:
                graphs.capture([inputs])
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                raise ValueError(
                    f"runtime.graphs = 'auto': steps of {bucket} rows could not be captured as a "
                    f"CUDA graph ({type(error).__name__}: {error}); set runtime.graphs=off"
                ) from error
            counted[bucket] = loads.late.take()
    return GraphSteps(graphs, counted, model.telemetry, model.vocab_size, model.splits_batch)


def graph_bytes(
    model: LanguageModel, topology: Topology, block_size: int, max_sequences: int
) -> int:
    """Return the bytes that the graphs keep on this rank's device, by capturing them.

    Collective over EP and TP: every rank must call.
    """
    device = topology.device
    cache = KVCache(model.kv_spec, 1, block_size, device, model.kv_dtype, 1, has_scratch=True)
    torch.cuda.synchronize(device)  # SYNC: before the first step
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    graphs = capture_graphs(model, cache, topology, max_sequences)
    torch.cuda.synchronize(device)  # SYNC: before the first step
    torch.cuda.empty_cache()  # what the pool of the graphs has is no part of it
    taken = free - torch.cuda.mem_get_info(device)[0]
    del graphs, cache
    torch.cuda.empty_cache()
    return max(0, taken)


@contextmanager
def _captures(model: LanguageModel) -> Iterator[None]:
    """Let the model leave no mark with a time, and attend by kernels without a plan."""
    telemetry, backend = model.telemetry, model.attention_backend
    model.set_telemetry(Telemetry(loads=telemetry.loads))
    model.set_attention(PAGED_KERNELS)
    try:
        yield
    finally:
        telemetry.loads.late.clear()
        model.set_attention(backend)
        model.set_telemetry(telemetry)
