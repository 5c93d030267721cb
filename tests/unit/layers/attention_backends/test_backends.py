"""Attention backends: each against the reference, with stand-ins of the libraries' functions.

Run: pytest tests/unit/layers/attention_backends/test_backends.py
"""

from __future__ import annotations

import pytest
import torch

from engine.layers.attention_backends.backend import AttentionKind, plan_step
from engine.layers.attention_backends.flashinfer import FlashInferAttention
from engine.layers.attention_backends.paged_kernels import PAGED_KERNELS
from engine.layers.attention_backends.varlen import VarlenAttention
from engine.layers.step_inputs import Queries, ReadRows, StepTensors
from engine.ops.float8_cache import rounded
from engine.ops.paged_attention import paged_attention_reference
from tests.helpers import flashinfer_fake
from tests.helpers.ops_cases import PagedCase, paged_case
from tests.helpers.varlen_fake import varlen_attn

STEPS = {
    "decodes": [(1, 40), (1, 7), (1, 16)],
    "prefills": [(5, 5), (9, 40)],
    "both": [(1, 40), (1, 3), (7, 90), (1, 33), (12, 12)],
}


def kind_of(case: PagedCase, window: int | None = None) -> AttentionKind:
    return AttentionKind(
        num_heads=case.q_THD.shape[1],
        num_kv_heads=case.k_cache.shape[1],
        key_dim=case.k_cache.shape[3],
        value_dim=case.v_cache.shape[3],
        scale=0.2,
        window=window,
        is_latent=case.v_cache.shape[3] < case.k_cache.shape[3],
    )


def queries_of(case: PagedCase) -> Queries:
    _, _, _, starts, contexts, table = case.tensors
    return Queries(
        query_start_S1=starts, context_lens_S=contexts, block_table_SB=table, **case.lens
    )


def step_of(case: PagedCase) -> StepTensors:
    tokens = torch.zeros(case.q_THD.shape[0], dtype=torch.int64)
    return StepTensors(
        token_ids_T=tokens, positions_T=tokens, slots_T=tokens, queries=queries_of(case)
    )


def flashinfer(case: PagedCase) -> FlashInferAttention:
    q, k = case.q_THD, case.k_cache
    return FlashInferAttention(q.device, q.dtype, k.dtype, k.shape[2], flashinfer_fake)


def check(backend, case: PagedCase, window: int | None = None) -> None:
    kind = kind_of(case, window)
    step = plan_step(backend, (kind, kind), step_of(case))
    got = backend.run(kind, case.q_THD, case.k_cache, case.v_cache, step.queries)
    expected = paged_attention_reference(*case.tensors, **case.lens, scale=0.2, window=window)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize("lens", STEPS.values(), ids=STEPS)
def test_every_backend_attends_as_the_reference(lens, heads, window):
    case = paged_case(lens, heads=heads, kv_heads=2, key_dim=64, value_dim=64)
    for backend in (PAGED_KERNELS, flashinfer(case), VarlenAttention(varlen_attn)):
        check(backend, case, window)


@pytest.mark.parametrize("lens", STEPS.values(), ids=STEPS)
def test_flashinfer_attends_over_latents_as_the_reference(lens):
    case = paged_case(lens, heads=4, kv_heads=1, key_dim=576)
    case.v_cache = case.k_cache[..., :512]
    check(flashinfer(case), case)


def test_flashinfer_reads_a_cache_in_float8():
    case = paged_case(STEPS["both"], heads=4, kv_heads=2, key_dim=64, value_dim=64)
    case.k_cache, case.v_cache = rounded(case.k_cache), rounded(case.v_cache)
    check(flashinfer(case), case)


def test_layers_of_one_kind_are_planned_once_and_rows_that_are_read_apart():
    case = paged_case(STEPS["both"], heads=4, kv_heads=2, key_dim=64, value_dim=64)
    backend, wide, narrow = flashinfer(case), kind_of(case), kind_of(case, 9)
    step = step_of(case)
    last = paged_case([(1, each) for each in case.context_lens], heads=4, kv_heads=2, key_dim=64)
    read = ReadRows(rows_R=torch.zeros(5, dtype=torch.int64), queries=queries_of(last))
    step = StepTensors(
        token_ids_T=step.token_ids_T,
        positions_T=step.positions_T,
        slots_T=step.slots_T,
        queries=step.queries,
        read=read,
    )
    planned = plan_step(backend, (wide, narrow, wide, narrow), step)
    assert planned.read is not None
    assert set(planned.queries.plan) == {wide, narrow}
    assert set(planned.read.queries.plan) == {narrow}
    wrappers = [w for plan in planned.queries.plan.values() for _, w in plan]
    wrappers += [w for plan in planned.read.queries.plan.values() for _, w in plan]
    assert len(wrappers) == len(set(map(id, wrappers))) == 5
    assert [each.plans for each in wrappers] == [1] * 5
    other = plan_step(backend, (wide,), step_of(case), micro_batch=1)
    assert other.queries.plan[wide][0][1] is not planned.queries.plan[wide][0][1]


def test_own_kernels_and_empty_steps_are_not_planned():
    case = paged_case(STEPS["both"], heads=4, kv_heads=2, key_dim=64, value_dim=64)
    step, kind = step_of(case), kind_of(case)
    assert plan_step(PAGED_KERNELS, (kind,), step) is step
    empty = step_of(paged_case([], heads=4, kv_heads=2, key_dim=64, value_dim=64))
    assert plan_step(flashinfer(case), (kind,), empty) is empty


def test_a_call_that_the_library_does_not_take_is_refused_by_the_stand_in():
    with pytest.raises(TypeError, match="window"):
        flashinfer_fake.bound("BatchDecodeWithPagedKVCacheWrapper.plan", *range(7), window=3)
