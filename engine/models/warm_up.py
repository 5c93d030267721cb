"""Warm-up: small steps through the whole model on CUDA, before the KV cache takes what is left.

They compile Triton's kernels, and let cuBLAS and NCCL allocate the workspaces and channels that
they make at their first call. What deals rows to copies runs besides, and every form of the
products of low-bit experts. Otherwise the cache would take that memory first, and ranks would stop
for a compilation while the others wait for them. On the CPU nothing runs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from engine.distributed.groups import Topology
from engine.layers.attention_backends.backend import plan_step
from engine.layers.kv_cache import KVCache
from engine.layers.step_inputs import Queries, ReadRows, StepTensors
from engine.models.decoder import GroupTokens
from engine.models.language_model import LanguageModel
from engine.moe.dispatch.static_layout import bucket_for
from engine.moe.placement.instances import Instances
from engine.ops.deal import deal_claims, deal_rows, list_claims, parts_of_list
from engine.ops.order_claims import order_claims
from engine.ops.paged_attention import SPLIT_KEYS
from engine.ops.sort_by_expert import sort_by_expert
from engine.ops.to_device import to_device
from engine.profiling.telemetry import Telemetry

_SEQUENCES = 2
_PROMPT = 128  # tokens: prefill attention takes larger tiles than decode
MOST_TOKENS = _SEQUENCES * _PROMPT  # of a step of it, not subject to capacity


@torch.inference_mode()
def warm_up(model: LanguageModel, topology: Topology, block_size: int) -> None:
    """Run a prefill and a decode step of a few tokens; leave nothing of them in the measurements.

    Collective over EP and TP on CUDA: every rank must call.

    Args:
        model: with its weights loaded.
        topology: of this rank.
        block_size: of the KV cache to come.
    """
    device = topology.device
    if device.type != "cuda":
        return
    prompt = max(1, min(_PROMPT, model.max_model_len - 1))
    blocks = -(-(prompt + 1) // block_size)
    spec = model.kv_spec
    cache = KVCache(spec, _SEQUENCES * blocks, block_size, device, model.kv_dtype, _SEQUENCES)
    num_data = topology.expert.size // topology.tensor.size
    telemetry = model.telemetry
    model.set_telemetry(Telemetry())
    spans, last = [(0, prompt, blocks)], min(prompt + 1, model.max_model_len)
    if prompt < last:  # not a model of one position
        spans.append((prompt, last, blocks))
        if model.max_model_len > SPLIT_KEYS:  # decodes with a wide block table have other kernels
            spans.append((prompt, last, -(-model.max_model_len // block_size)))
    for start, end, columns in spans:
        step = _step(start, end, block_size, blocks, model.vocab_size, device, spec.has_states)
        if columns > blocks:
            step = _widened(step, columns)
        step = plan_step(model.attention_backend, model.attention_kinds, step)
        tokens = _SEQUENCES * (end - start) * num_data
        bucket = None if start == 0 else bucket_for(-(-_SEQUENCES // topology.tensor.size))
        group = GroupTokens(tokens, _SEQUENCES * num_data, bucket=bucket)
        hidden_RD = model(step, cache, None, group)
        model.logits(hidden_RD)
    for moe in model.moe_layers:
        moe.experts.warm_up(model.dtype)
        if moe.instances.has_copies:
            _deal(moe.instances, device)
    torch.cuda.synchronize(device)  # SYNC: before the first step; the memory is measured next
    del cache, step, hidden_RD
    torch.cuda.empty_cache()  # what torch keeps for itself would count as taken
    model.set_telemetry(telemetry)
    for layer in model.moe_layers:
        layer.layout_policy.reset()  # the tuner's times are of a compilation


def _deal(instances: Instances, device: torch.device) -> None:
    """Run what deals rows to copies: a step does it only where rows have to move."""
    code_WB = torch.zeros(instances.num_ranks, 2, dtype=torch.int64, device=device)
    words, num_experts = [code_WB.int()] * 3, instances.num_experts
    order_M = order_claims(words)
    listed = list_claims(code_WB, order_M, code_WB[:, :1], num_experts)
    place_M1 = parts_of_list(listed, instances.num_ranks, num_experts)[1]
    _, slot_M1, _ = sort_by_expert(place_M1, num_experts)
    hosts_EH1 = instances.host_table(device)
    ends_EH = torch.zeros_like(hosts_EH1[:, 1:], memory_format=torch.contiguous_format)
    deal_rows(code_WB, code_WB, ends_EH, hosts_EH1)
    deal_claims(code_WB, order_M, slot_M1, ends_EH, hosts_EH1, instances.num_instances)


def _widened(step: StepTensors, columns: int) -> StepTensors:
    """Return a step whose rows are all read, with as many columns of the block table."""
    table_SB = step.queries.block_table_SB
    table_SB = F.pad(table_SB, (0, columns - table_SB.shape[1]))
    return replace(step, queries=replace(step.queries, block_table_SB=table_SB))


def _step(
    start: int,
    end: int,
    block_size: int,
    blocks: int,
    vocab_size: int,
    device: torch.device,
    has_states: bool,
) -> StepTensors:
    """Return the step that runs the positions from `start` to `end` of every sequence."""
    length = end - start
    # Spread over the vocabulary: the same token everywhere would leave most experts without rows.
    ids_T = torch.arange(_SEQUENCES * length) * 7919 + 31 * start
    positions = torch.arange(start, end)
    table_SB = torch.arange(_SEQUENCES * blocks, dtype=torch.int32).view(_SEQUENCES, blocks)
    slots = torch.cat([each * blocks * block_size + positions for each in range(_SEQUENCES)])

    states_S = to_device(torch.arange(_SEQUENCES), device) if has_states else None

    def queries(query_lens: list[int]) -> Queries:
        starts = torch.tensor([0, *query_lens]).cumsum(0, dtype=torch.int32)
        contexts = [end] * _SEQUENCES
        return Queries(
            query_start_S1=to_device(starts, device),
            query_lens=query_lens,
            context_lens=contexts,
            context_lens_S=to_device(torch.tensor(contexts, dtype=torch.int32), device),
            block_table_SB=to_device(table_SB, device),
            states_S=states_S,
        )

    read = None
    if length > 1:
        last = torch.arange(1, _SEQUENCES + 1) * length - 1
        read = ReadRows(rows_R=to_device(last, device), queries=queries([1] * _SEQUENCES))
    return StepTensors(
        token_ids_T=to_device(ids_T % vocab_size, device),
        positions_T=to_device(positions.repeat(_SEQUENCES), device),
        slots_T=to_device(slots, device),
        queries=queries([length] * _SEQUENCES),
        read=read,
    )
