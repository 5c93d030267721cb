"""Greedy and seeded sampling. Run: pytest tests/unit/generation/sampling/test_sampler.py

A slow oracle in float64, one row at a time in plain Python, gives the token of each draw.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.generation.sampling import sampler
from engine.generation.sampling.drawn_rows import invert
from engine.generation.sampling.likeliest import token_logprobs
from engine.generation.sampling.sampler import (
    NonFiniteLogitsError,
    sample,
    sample_rows,
    uniform,
)
from engine.request import SamplingParams

LOG = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]


def oracle(logits: list[float], params: SamplingParams, u: float) -> int:
    """Filter by top_k, then top_p, then invert the CDF in order of token id."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if params.greedy:
        return order[0]
    top = logits[order[0]]
    weight = [math.exp((value - top) / params.temperature) for value in logits]
    order = order[: params.top_k or None]
    order = [token for token in order if weight[token] >= params.min_p]
    total = math.fsum(weight[token] for token in order)
    kept, mass = [], 0.0
    for token in order:
        if mass >= params.top_p * total:
            break
        kept.append(token)
        mass += weight[token]
    target, mass = u * math.fsum(weight[token] for token in kept), 0.0
    for token in sorted(kept):
        mass += weight[token]
        if mass > target:
            return token
    raise AssertionError("u < 1, so some token is reached")


def draws(params: SamplingParams, logits: list[float], count: int) -> list[int]:
    """One token for each of `count` positions of request 5."""
    rows = torch.tensor([logits]).expand(count, -1).contiguous()
    return sample(rows, [params] * count, range(count), [5] * count)[0]


# --- greedy -----------------------------------------------------------------------------------


def test_greedy_takes_the_largest_logit_and_of_equals_the_lowest_id():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, -1.0, 5.0, 5.0], [-9.0, -8.0, -8.0, -9.0]])
    tokens, logprobs = sample(logits, [SamplingParams()] * 3, [0, 0, 0], [0, 1, 2])
    assert (tokens, logprobs) == ([1, 0, 1], None)


def test_no_rows_give_no_tokens():
    assert sample(torch.empty(0, 7), [], [], []) == ([], None)


def test_a_vanishing_temperature_is_greedy_and_overflows_nothing():
    logits = torch.tensor([[1e4, -3e4, 1.00001e4], [0.0, 1e-30, 0.0]])
    for temperature in (1e-3, 1e-30, 1e-300):
        params = SamplingParams(temperature=temperature)
        tokens, _ = sample(logits[:1], [params], [3], [0])
        assert tokens == [2]


# --- the draw ---------------------------------------------------------------------------------


def test_an_integer_of_any_size_is_a_temperature():
    logits = torch.tensor([[0.0, 3.0], [0.0, 3.0]])
    params = [SamplingParams(temperature=10**30), SamplingParams(temperature=1.0, top_p=0.9)]
    tokens, _ = sample(logits, params, [0, 0], [0, 1])
    assert set(tokens) <= {0, 1}


def test_uniform_is_reproducible_in_every_release():
    # A change here changes every seeded result users have.
    values = uniform([0, 0, 0, 1, 2**63 - 1], [0, 0, 1, 0, 12345], [0, 1, 0, 0, 678])
    expected = [0.1387094101, 0.1843666743, 0.2691303196, 0.6935121390, 0.8836429716]
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-9)


def test_uniform_agrees_with_integers_of_unlimited_size():
    def mix(state: int, key: int) -> int:
        low = 2**64 - 1
        state = ((state ^ key) + 0x9E3779B97F4A7C15) & low
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & low
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & low
        return state ^ (state >> 31)

    keys = [(0, 0, 0), (7, 1, 2), (2**63 - 1, 2**40, 131072)]
    expected = [(mix(mix(mix(0, a), b), c) >> 11) / 2**53 for a, b, c in keys]
    assert uniform(*zip(*keys, strict=True)).tolist() == expected


def test_uniform_is_even_and_its_three_keys_are_independent():
    n = 20_000
    for keys in (
        ([3] * n, [4] * n, range(n)),
        ([3] * n, range(n), [4] * n),
        (range(n), [3] * n, [4] * n),
    ):
        values = uniform(*keys)
        assert values.min() >= 0
        assert values.max() < 1
        counts = np.histogram(values, bins=20, range=(0, 1))[0]
        # Chi-square with 19 degrees of freedom: above 43.8 once in a thousand.
        assert ((counts - n / 20) ** 2 / (n / 20)).sum() < 43.8
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03
    assert uniform([1], [2], [3]) != uniform([2], [1], [3])
    assert uniform([1], [2], [3]) != uniform([1], [3], [2])


# --- the distribution -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"top_k": 3}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.69}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 0.3}, [0, 1, 0, 0]),
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),  # 0.4 of 0.7 is more than half
        ({"top_k": 2, "top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"min_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"min_p": 0.4, "top_p": 0.8}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"min_p": 0.4, "top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"min_p": 0.6, "temperature": 2.0}, [0, 0.4**0.5, 0.2**0.5, 0.3**0.5]),
    ],
)
def test_frequencies_match_the_filtered_softmax(params, expected):
    n = 20_000
    tokens = draws(SamplingParams(**{"temperature": 1.0, "seed": 11, **params}), LOG, n)
    counts = np.bincount(tokens, minlength=4)
    expected = [share / sum(expected) for share in expected]
    for count, probability in zip(counts, expected, strict=True):
        # Four standard deviations; exactly none where the probability is 0.
        assert abs(count - n * probability) <= 4 * math.sqrt(n * probability * (1 - probability))


@pytest.mark.parametrize("candidates", [2, 5, 1024])
@given(data=st.data())
def test_every_draw_is_the_one_of_the_oracle(candidates, data):
    vocab = data.draw(st.integers(2, 24))
    # Few distinct values, so that ties at the edges of top_k and top_p are the rule.
    value = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 3.0])
    size = data.draw(st.integers(1, 6))
    logits = [data.draw(st.lists(value, min_size=vocab, max_size=vocab)) for _ in range(size)]
    params = [
        SamplingParams(
            temperature=data.draw(st.sampled_from([0.0, 0.7, 1.0, 2.5])),
            top_k=data.draw(st.sampled_from([0, 0, 1, 2, 3, 30])),
            top_p=data.draw(st.sampled_from([1.0, 1.0, 0.37, 0.77, 0.96])),
            min_p=data.draw(st.sampled_from([0.0, 0.0, 0.1, 0.4])),
            seed=data.draw(st.integers(0, 3)),
        )
        for _ in range(size)
    ]
    positions, indices = list(range(size)), [3 * row for row in range(size)]
    u = uniform([p.seed for p in params], indices, positions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "NUCLEUS_CANDIDATES", candidates)
        tokens, _ = sample(torch.tensor(logits), params, positions, indices)
    assert tokens == [oracle(*row) for row in zip(logits, params, u.tolist(), strict=True)]


def test_top_p_that_needs_more_candidates_than_are_looked_at_first_gets_them():
    # Flat over 5000 tokens: half of the mass is 2500 of them, the lowest ids.
    tokens = draws(SamplingParams(temperature=1.0, top_p=0.5), [0.0] * 5000, 400)
    assert max(tokens) < 2500
    assert max(tokens) > 2400


def test_top_p_is_of_the_mass_of_top_k_also_with_other_rows_without_top_k():
    # 0.5, 0.3, 0.15 and a tail of 0.05: of the first three's 0.95, 0.83 is 0.7885, less than 0.8.
    logits = torch.full((400, 2003), math.log(0.05 / 2000))
    logits[:, :3] = torch.tensor([0.5, 0.3, 0.15]).log()
    both = SamplingParams(temperature=1.0, top_k=3, top_p=0.83)
    nucleus = SamplingParams(temperature=1.0, top_p=0.83)
    tokens, _ = sample(logits, [both, nucleus] * 200, range(400), [0] * 400)
    assert set(tokens[0::2]) == {0, 1}
    assert set(tokens[1::2]) == {0, 1, 2}


def test_zeros_of_both_signs_are_equal_at_the_edge_of_top_k():
    tokens = draws(SamplingParams(temperature=1.0, top_k=2), [0.0, -0.0, 0.0, 0.0, -0.0], 200)
    assert set(tokens) == {0, 1}


def test_a_draw_on_the_border_goes_to_the_next_token_and_never_to_one_of_weight_zero():
    weights = torch.tensor([[0.0, 1.0, 0.0, 1.0]]).expand(4, -1)
    below_one = 1 - 2.0**-53
    u = torch.tensor([0.0, 0.25, 0.5, below_one], dtype=torch.float64)
    assert invert(weights, u).tolist() == [1, 1, 3, 3]


def test_a_forbidden_token_is_never_drawn():
    logits = [0.0, -math.inf, 0.0, -math.inf]
    for params in ({}, {"top_k": 3}, {"top_p": 0.999}):
        tokens = draws(SamplingParams(temperature=5.0, **params), logits, 500)
        assert set(tokens) == {0, 2}


# --- independence of everything else ----------------------------------------------------------


def mixed_batch(size: int) -> tuple[torch.Tensor, list[SamplingParams]]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(size, 3000, generator=generator)
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 40},
        {"temperature": 1.2, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 0.8, "top_k": 20},
        {"temperature": 3.0, "top_p": 0.95, "seed": 9},
        {"temperature": 2.0, "min_p": 0.1},
        {"temperature": 2.0, "min_p": 0.02, "top_p": 0.9},
    ]
    return logits, [SamplingParams(**kinds[row % len(kinds)]) for row in range(size)]


def test_a_token_does_not_depend_on_the_other_rows_nor_on_their_order():
    size = 48
    logits, params = mixed_batch(size)
    positions = [7 * row % 50 for row in range(size)]
    whole, _ = sample(logits, params, positions, range(size))
    for row in range(size):
        part = slice(row, row + 1)
        assert sample(logits[part], params[part], positions[part], [row])[0] == [whole[row]]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled, _ = sample(
        logits[order], [params[r] for r in order], [positions[r] for r in order], order
    )
    assert shuffled == [whole[r] for r in order]


def test_seed_request_and_position_each_change_the_draws():
    logits = torch.zeros(64, 1000)
    base = [SamplingParams(temperature=1.0)] * 64
    other_seed = [SamplingParams(temperature=1.0, seed=1)] * 64
    first = sample(logits, base, range(64), [0] * 64)[0]
    assert sample(logits, base, range(64), [0] * 64)[0] == first
    for changed in (
        sample(logits, other_seed, range(64), [0] * 64)[0],
        sample(logits, base, range(64), [1] * 64)[0],
        sample(logits, base, range(64, 128), [0] * 64)[0],
    ):
        assert sum(a == b for a, b in zip(first, changed, strict=True)) < 4


@pytest.mark.parametrize("extra", [{}, {"top_k": 4}, {"top_p": 0.9}])
def test_rounding_of_the_logits_does_not_change_the_tokens(extra):
    # Noise makes equal tokens trade places in the order of probability, in every row.
    n = 4000
    logits = torch.tensor([[0.0, -6.0, 0.0, -6.0, 0.0, -6.0, 0.0]]).expand(n, -1)
    noise = 1e-6 * torch.randn(n, 7, generator=torch.Generator().manual_seed(2))
    params = [SamplingParams(temperature=1.0, **extra)] * n
    one = sample(logits + noise, params, range(n), [0] * n)[0]
    assert sample(logits - noise, params, range(n), [0] * n)[0] == one


# --- logprobs ---------------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_logits_whatever_the_temperature_and_filters():
    logits, _ = mixed_batch(6)
    params = [
        SamplingParams(logprobs=True),
        SamplingParams(temperature=0.3, top_k=5),
        SamplingParams(temperature=2.0, top_p=0.5, logprobs=True),
    ] * 2
    tokens, logprobs = sample(logits, params, range(6), range(6))
    expected = logits.double().log_softmax(1)[range(6), tokens]
    assert logprobs is not None
    assert all(isinstance(token, int) for token in tokens)
    np.testing.assert_allclose(logprobs, expected, atol=2e-6)


def test_asking_for_logprobs_does_not_change_the_tokens():
    logits, params = mixed_batch(12)
    asked = [SamplingParams(temperature=0.0, logprobs=True), *params[1:]]
    assert (
        sample(logits, asked, range(12), range(12))[0]
        == (sample(logits, params, range(12), range(12))[0])
    )


def test_token_logprobs_pick_one_token_per_row_in_float32():
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(3))
    targets = [0, 99, 5, 5, 42]
    result = token_logprobs(logits, targets)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, logits.log_softmax(1)[range(5), targets])
    assert torch.equal(token_logprobs(logits, torch.tensor(targets)), result)
    assert token_logprobs(logits[:0], []).shape == (0,)


def test_the_likeliest_tokens_are_those_that_a_row_asks_for_and_of_equals_the_lower_ids():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 5.0, 1.0]])
    params = [SamplingParams(logprobs=3), SamplingParams(), SamplingParams(logprobs=1)]
    sampled = sample_rows(logits, params, [0] * 3, range(3))
    exact = logits.double().log_softmax(1)
    assert sampled.top is not None
    assert [[token for token, _ in row] for row in sampled.top] == [[1, 3, 2], [], [2]]
    for row in (0, 2):
        for token, logprob in sampled.top[row]:
            assert logprob == pytest.approx(exact[row, token].item(), abs=1e-6)


def test_the_likeliest_tokens_do_not_depend_on_the_other_rows():
    logits, _ = mixed_batch(8)
    params = [SamplingParams(logprobs=row) for row in range(8)]
    whole = sample_rows(logits, params, [0] * 8, range(8)).top
    assert whole is not None
    for row in range(1, 8):
        one = sample_rows(logits[row : row + 1], [params[row]], [0], [row])
        assert one.top == [whole[row]]


def test_more_likeliest_tokens_than_there_are_gives_all():
    sampled = sample_rows(torch.zeros(1, 3), [SamplingParams(logprobs=20)], [0], [0])
    assert sampled.top is not None
    assert [token for token, _ in sampled.top[0]] == [0, 1, 2]


# --- bad logits -------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}])
def test_non_finite_logits_name_their_requests_and_spare_the_others(bad, params):
    logits = torch.zeros(4, 9)
    logits[:, 3] = 50.0
    logits[1, 5] = logits[2, 0] = bad
    each = [SamplingParams(logprobs=True, **params)] * 4
    with pytest.raises(ValueError, match="request 'b', 'c': its logits are not finite") as caught:
        sample(logits, each, [0] * 4, range(4), ["a", "b", "c", "d"])
    error = caught.value
    assert isinstance(error, NonFiniteLogitsError)
    assert (error.rows, error.tokens) == ([1, 2], [3, -1, -1, 3])
    assert error.logprobs is not None
    assert error.logprobs[3] == pytest.approx(0.0, abs=1e-6)


def test_a_row_of_forbidden_tokens_only_is_refused_by_index_without_ids():
    with pytest.raises(ValueError, match="request #8: its logits are not finite"):
        sample(torch.full((1, 4), -math.inf), [SamplingParams()], [0], [8])


@pytest.mark.gpu
def test_cuda_gives_the_tokens_of_the_cpu():
    logits, params = mixed_batch(48)
    asked = [SamplingParams(logprobs=True), *params[1:]]
    on_cpu = sample(logits, asked, range(48), range(48))
    on_cuda = sample(logits.cuda(), asked, range(48), range(48))
    assert on_cuda[0] == on_cpu[0]
    np.testing.assert_allclose(on_cuda[1], on_cpu[1], atol=1e-5)
