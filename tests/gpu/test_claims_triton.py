"""The Triton kernels around the selection of a capacity policy, against the torch references.

TRITON_INTERPRET=1 python -m pytest tests/gpu/test_claims_triton.py
"""

import pytest
import torch

from engine.ops import claims, native, triton_support
from engine.ops.claims import ClaimRule, ExtraRule
from engine.ops.select_experts import SelectionRule, apply_selection_reference
from tests.gpu.test_ops_triton import DEVICE, kernel
from tests.helpers.capacity_cases import Case, make_tokens, run_engine

EXPERTS, TOP_K, LOCAL = 12, 3, slice(4, 9)


def on_device(values):
    return [value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in values]


def equal(got, expected) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        if isinstance(mine, list):
            equal(mine, theirs)
        else:
            assert mine.dtype == theirs.dtype and torch.equal(mine.cpu(), theirs)


def routing(tokens: int) -> list[torch.Tensor]:
    """Scores, top-k and token ids; scores of a few levels, so that there are ties."""
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.randint(-3, 4, (tokens, EXPERTS + 2), generator=generator)[:, :EXPERTS] / 4.0
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    numbers = torch.randint(-(2**31), 2**31, (2, tokens), generator=generator)
    return [scores * -0.0 if tokens == 1 else scores, ids, *numbers.int()]


@kernel
@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize("order", ["score", "first", "last", "random"])
@pytest.mark.parametrize("extras", [False, True])
def test_claims_equal_the_reference(tokens, order, extras):
    from engine.ops.gpu.make_claims import make_claims_triton

    rule = ClaimRule(order, 2**63 - 1, 3, extras, 6, LOCAL.start)
    eligible = (torch.arange(tokens) % 3 > 0) if extras else None
    pool = torch.arange(-tokens, 4 * tokens).view(tokens, 5) if extras else None
    arguments = [*routing(tokens), rule, eligible, pool]
    equal(make_claims_triton(*on_device(arguments)), claims.make_claims_reference(*arguments))


@kernel
@pytest.mark.parametrize("order", ["score", "last"])
@pytest.mark.parametrize("extras", [False, True])
def test_claims_of_tokens_with_zero_experts_equal_the_reference(order, extras):
    from engine.ops.gpu.extra_claims import extra_claims_triton
    from engine.ops.gpu.make_claims import make_claims_triton

    tokens, num_extra = 37, LOCAL.stop - LOCAL.start
    scores, ids, *numbers = routing(tokens)
    ids = ids.masked_fill(torch.arange(tokens * TOP_K).view_as(ids) % 4 == 0, -1)
    eligible = (torch.arange(tokens) % 3 > 0) if extras else None
    pool = torch.arange(-tokens, 4 * tokens).view(tokens, num_extra) if extras else None
    rule = ClaimRule(order, 0, 3, extras, num_extra, LOCAL.start, some_none=True)
    arguments = [scores, ids, *numbers, rule, eligible, pool]
    expected = claims.make_claims_reference(*arguments)
    assert (expected[1].view(tokens, -1)[:, :TOP_K][ids < 0] == 3 * EXPERTS).all()
    equal(make_claims_triton(*on_device(arguments)), expected)
    more = ExtraRule(LOCAL.start, 2, some_none=True)
    arguments = [scores, ids, *numbers, torch.tensor([0, 0, 1, 2, 1]), more]
    equal(extra_claims_triton(*on_device(arguments)), claims.extra_claims_reference(*arguments))


@kernel
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_flagged(bad):
    from engine.ops.gpu.make_claims import make_claims_triton

    given = routing(20)
    rule = ClaimRule("score", 0, 0, False)
    assert make_claims_triton(*on_device(given), rule)[2].tolist() == [0]
    given[0][17, 11] = bad
    assert make_claims_triton(*on_device(given), rule)[2].tolist() == [1]


@kernel
@pytest.mark.parametrize("budget", [0, 1, 3, 9])
@pytest.mark.parametrize("limited", [False, True])
def test_extra_claims_equal_the_reference(budget, limited):
    from engine.ops.gpu.extra_claims import extra_claims_triton

    tokens = 20
    pool = torch.tensor([0, 0, 1, 2, 1])
    arguments = [*routing(tokens), pool, ExtraRule(LOCAL.start, budget)]
    if limited:
        keep = torch.rand(tokens, TOP_K + 2)[:, :TOP_K] < 0.5
        arguments += [torch.arange(tokens) % 4 > 0, torch.tensor([3, 0, 9]), keep]
    equal(extra_claims_triton(*on_device(arguments)), claims.extra_claims_reference(*arguments))


@kernel
@pytest.mark.parametrize("size", [0, 7, 1500])
def test_counts_of_claims_equal_the_reference(size):
    from engine.ops.gpu.count_claims import count_claims_triton

    generator = torch.Generator().manual_seed(size)
    code = torch.randint(0, 3 * EXPERTS + 1, (3, size), generator=generator)
    pool = torch.arange(EXPERTS) // 4
    pool_of_code = torch.cat((pool, torch.full_like(pool, -1), pool, torch.tensor([-1])))
    # Of what is exempt or nothing none is kept: it is in no pool.
    keep = (torch.rand(3, size, generator=generator) < 0.5) & (pool_of_code[code] >= 0)
    arguments = [code, keep, torch.tensor([[0], [1], [0]]), pool_of_code, 3]
    equal(count_claims_triton(*on_device(arguments)), claims.count_claims_reference(*arguments))


@kernel
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_what_is_left_of_the_assignments_equals_the_reference(tokens, extras, renormalize):
    from engine.ops.gpu.apply_selection import apply_selection_triton

    scores, ids, *_ = routing(tokens)
    scores = scores.abs() + 0.01
    keep = torch.rand(tokens, TOP_K + 5) < 0.6
    extra = keep[:, TOP_K:] if extras else None
    rule = SelectionRule(TOP_K, normalize=extras, normalize_eps=1e-3, scale=2.5, normalize_min=0.4)
    weights = scores.gather(1, ids)
    arguments = [keep[:, :TOP_K], scores, ids, weights, rule, LOCAL.start, renormalize, extra]
    got_ids, got_weights = apply_selection_triton(*on_device(arguments))
    left, left_weights = apply_selection_reference(*arguments)
    assert torch.equal(got_ids.cpu(), left)
    torch.testing.assert_close(got_weights.cpu(), left_weights, rtol=1e-6, atol=0)


# Rules of moe.capacity: every consensus, order and way to extras, in a few small cases.
DECISIONS = [
    {"policy": "token_drop", "scope": "expert", "consensus": "global", "order": "score"},
    {"policy": "token_drop", "scope": "rank", "consensus": "global", "order": "first"},
    {"policy": "expanded_drop", "scope": "rank", "consensus": "local", "extras": "dropped"},
    {"policy": "expanded_drop", "scope": "expert", "consensus": "global", "expand": 1},
    {"policy": "expanded_drop", "scope": "expert", "consensus": "quota", "tiers": "one"},
]


@kernel
@pytest.mark.parametrize("selection", ["gather", "radix"])
@pytest.mark.parametrize("number", range(len(DECISIONS)))
def test_decisions_by_the_kernels_equal_those_by_torch(number, selection):
    rules = DECISIONS[number]
    if selection == "radix" and rules["consensus"] != "global":
        return
    levels, passing = (1000, 0.0) if number % 2 else (2, 0.3)  # few levels make ties
    case = Case((4, 3), 4, 2, {"factor": "0.5", **rules}, selection, levels, passing=passing)
    tokens = make_tokens(case)
    by_torch = run_engine(case, tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "available", lambda: False)
        patch.setattr(triton_support, "serves", lambda _: True)
        by_kernels = run_engine(case, tokens)
    for mine, theirs in zip(by_kernels, by_torch, strict=True):
        assert torch.equal(mine.ids_TM, theirs.ids_TM)
        assert (mine.exchanged_Wn == theirs.exchanged_Wn).all()
        assert (mine.before_WE == theirs.before_WE).all()
        torch.testing.assert_close(mine.weights_TM, theirs.weights_TM, rtol=1e-6, atol=0)
