"""The symmetric transport over gloo ranks: the same sums as the counted exchange, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.config import DispatchConfig, MoEConfig
from engine.distributed.groups import Group
from engine.moe.dispatch.chunk_layout import ExpertLayout
from engine.moe.dispatch.transports.symmetric import SymmetricTransport, obstacle
from engine.moe.dispatch.transports.transport import Limits, Outgoing, Setup
from engine.ops import symmetric_memory
from engine.ops.permute import combine_rows
from tests.helpers.fake_symm_mem import SCHEMAS, VERSION, ContractError, fake_symm_mem
from tests.helpers.ranks import run_ranks

WIDTH, TOP_K = 8, 2
BOUNDS = {2: (0, 3, 8), 3: (0, 2, 4, 6), 4: (0, 1, 4, 6, 8)}
TOKENS = {2: (5, 0), 3: (4, 7, 1), 4: (0, 9, 2, 0)}


def setup_of(rank: int, size: int, handle: Any = None) -> Setup:
    return Setup(
        group=Group(rank, size, tuple(range(size)), handle),
        device=torch.device("cpu"),
        dtype=torch.float32,
        width=WIDTH,
        first_experts=BOUNDS.get(size, (0, *range(1, size + 1))),
        top_k=TOP_K,
    )


def scaled(rows_RD: torch.Tensor, places_e: torch.Tensor, first: int) -> torch.Tensor:
    """Run experts that each multiply by another number; NaN past the places."""
    expert = torch.arange(first, first + len(places_e)).repeat_interleave(places_e)
    out = torch.full_like(rows_RD, float("nan"))
    out[: len(expert)] = rows_RD[: len(expert)] * (expert + 2)[:, None]
    return out


def call(rank: int, size: int, dropped: bool) -> bool:
    dist.init_process_group("gloo")
    try:
        with fake_symm_mem():
            setup = setup_of(rank, size, dist.group.WORLD)
            transport = SymmetricTransport(setup)
            counts = TOKENS[size]
            limit = sum(counts) * TOP_K
            assert transport.reserve(Limits(tokens=9, sent=18, received=limit)) > 0
            layout = ExpertLayout(list(setup.first_experts), 1)
            for seed in range(3):  # buffers are used again, as by the layers of a step
                made = torch.Generator().manual_seed(10 * rank + seed)
                x_TD = torch.randn(counts[rank], WIDTH, generator=made)
                logits_TE = torch.rand(counts[rank], setup.first_experts[-1], generator=made)
                if seed == 2:
                    logits_TE[:, -1] = logits_TE[:, -2] = 2.0  # all rows for the last rank
                weights_TK, ids_TK = logits_TE.topk(TOP_K)
                if dropped:
                    ids_TK = ids_TK.where(torch.rand(ids_TK.shape, generator=made) > 0.4, -1)
                outgoing = Outgoing(x_TD, ids_TK, weights_TK, layout.sort(ids_TK), limit)
                arrived = transport.dispatch(outgoing).wait()
                first = setup.first_experts[rank]
                out_RD = scaled(arrived.rows_RD, arrived.places_e, first)
                assert int(arrived.places_e.sum()) <= len(arrived.rows_RD)
                found_TD = combine_rows(*transport.combine(arrived, out_RD))
                plain_SD = (x_TD[:, None] * (ids_TK + 2)[..., None]).flatten(0, 1)
                slot_TK = torch.arange(ids_TK.numel()).view_as(ids_TK).where(ids_TK >= 0, -1)
                assert torch.equal(found_TD, combine_rows(plain_SD, slot_TK, weights_TK))
                load_W1 = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
                dist.all_gather(load_W1, arrived.load_e.sum()[None])
                total = torch.tensor([(ids_TK >= 0).sum()])
                dist.all_reduce(total)
                assert sum(load_W1) == total
        return True
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_token_gets_the_sum_of_its_experts(size: int, dropped: bool) -> None:
    """Uneven experts and tokens, and ranks without a token or a row."""
    assert all(run_ranks(call, size, size, dropped))


def exceed(rank: int) -> str:
    dist.init_process_group("gloo")
    try:
        with fake_symm_mem():
            setup = setup_of(rank, 2, dist.group.WORLD)
            transport = SymmetricTransport(setup)
            transport.reserve(Limits(tokens=4, sent=8, received=1))
            ids_TK = torch.tensor([[3, 4]] * 4)
            order = ExpertLayout([0, 3, 8], 1).sort(ids_TK)
            outgoing = Outgoing(torch.ones(4, WIDTH), ids_TK, torch.ones(4, 2), order)
            try:
                transport.dispatch(outgoing)
            except ContractError as error:
                return str(error)
            return ""
    finally:
        dist.destroy_process_group()


def test_the_fake_refuses_rows_past_the_end_of_a_buffer() -> None:
    assert run_ranks(exceed, 2) == ["", "18 places are written of 6"]


def test_more_rows_than_were_reserved_are_refused_in_words() -> None:
    transport = SymmetricTransport(setup_of(0, 2))
    order = ExpertLayout([0, 3, 8], 1).sort(torch.tensor([[0, 1]]))
    rows = Outgoing(torch.ones(1, WIDTH), torch.tensor([[0, 1]]), torch.ones(1, 2), order)
    with pytest.raises(ValueError, match="a call of 2 rows, and buffers for 0 were reserved"):
        transport.dispatch(rows)


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_the_contract_is_that_of_the_torch_that_was_read(name: str) -> None:
    if torch.__version__.split("+")[0] != VERSION:
        pytest.skip(f"the contract was read in torch {VERSION}")
    assert str(getattr(torch.ops.symm_mem, name).default._schema) == SCHEMAS[name]
    assert SCHEMAS[name] in (symmetric_memory.OUT, symmetric_memory.HOME)


def test_a_torch_without_nvshmem_is_refused_in_words() -> None:
    why = obstacle(setup_of(0, 2), MoEConfig())
    assert why is not None and "built without it or cannot load" in why


def test_another_signature_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMAS, "all_to_all_vdev_2d", "symm_mem::all_to_all_vdev_2d(Tensor a)")
    with fake_symm_mem():
        why = obstacle(setup_of(0, 2), MoEConfig())
    assert why is not None and "all_to_all_vdev_2d as torch 2.13 has it" in why
    assert why.endswith("has with other arguments")


@pytest.mark.parametrize(
    ("dispatch", "word"),
    [
        (DispatchConfig(partial_sums=True), "partial_sums"),
        (DispatchConfig(dtype="bf16"), "dtype = 'bf16'"),
    ],
)
def test_settings_of_packed_rows_are_refused(dispatch: DispatchConfig, word: str) -> None:
    with fake_symm_mem():
        assert obstacle(setup_of(0, 2), MoEConfig()) is None
        assert word in (obstacle(setup_of(0, 2), MoEConfig(dispatch=dispatch)) or "")


def test_more_ranks_or_experts_than_the_operators_scan_are_refused() -> None:
    with fake_symm_mem():
        assert "17" in (obstacle(setup_of(0, 17), MoEConfig()) or "")
        many = replace(setup_of(0, 2), first_experts=(0, 8, 25))
        assert "a rank has 17" in (obstacle(many, MoEConfig()) or "")
