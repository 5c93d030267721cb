"""Prefix cache: what of a sequence's tokens runs when others had the same before.

Run: pytest tests/unit/generation/test_prefix_cache.py

That shared blocks give the right tokens is in test_scheduler.py, whose random workloads have common
prefixes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Literal, cast

import pytest

from engine.config import Config, ModelConfig, SchedulerConfig
from engine.generation.block_pool import BlockPool
from engine.generation.prefix_cache import (
    extend_hashes,
    may_share_prefixes,
    resolve_prefix_cache,
)
from engine.generation.scheduler import Scheduler
from engine.generation.sequence import Sequence
from engine.generation.step import Step
from engine.layers.attention import AttentionSpec
from engine.layers.gated_delta import GatedDeltaSpec
from engine.models.spec import ModelSpec
from engine.request import Request, RequestError, SamplingParams
from tools.make_random_checkpoint import make_checkpoint

PREFIX = list(range(100, 112))  # three blocks of 4


def make_scheduler(blocks: int = 64, tokens: int = 64, cache: bool = True) -> Scheduler:
    config = SimpleNamespace(max_batch_tokens=tokens, max_sequences=8, prefix_cache=cache)
    return Scheduler(config, BlockPool(blocks, 4), 1000)  # type: ignore[arg-type]


def make(index: int, prompt: list[int], new: int = 4, **params: bool) -> Sequence:
    settings = SamplingParams(max_new_tokens=new, **params)  # type: ignore[arg-type]
    request = Request(index=index, id=f"r{index}", prompt_token_ids=prompt, params=settings)
    return Sequence(request)


def spans(step: Step) -> list[tuple[int, int, int]]:
    return [(piece.seq.request.index, piece.start, piece.length) for piece in step.slices]


def commit(scheduler: Scheduler, step: Step, token: int = 1) -> None:
    scheduler.commit(
        step, [token] * len(step.sampling), prompt_logprobs=[-1.0] * len(step.prompt_rows)
    )


def run_all(scheduler: Scheduler) -> list[tuple[int, int, int]]:
    ran = []
    while scheduler.has_work:
        step = scheduler.schedule()
        ran += spans(step)
        commit(scheduler, step)
    return ran


def test_a_hash_tells_of_all_tokens_up_to_the_end_of_its_block() -> None:
    first: list[bytes] = []
    extend_hashes(first, [1, 2, 3, 4, 5, 6, 7], 2, 7)
    assert len(first) == len(set(first)) == 3  # the last token fills no block
    for change in range(6):
        tokens = [1, 2, 3, 4, 5, 6]
        tokens[change] += 1
        other: list[bytes] = []
        extend_hashes(other, tokens, 2, 6)
        same = [one == two for one, two in zip(first, other, strict=True)]
        assert same == [index < change // 2 for index in range(3)]
    again: list[bytes] = []
    for end in range(7):  # token by token, as they are generated
        extend_hashes(again, [1, 2, 3, 4, 5, 6, 7], 2, end)
    assert again == first
    # Every rank and every run has the same: not salted.
    assert first[0].hex() == "f59df9f51bfcb52f7ae49756810ec78b"


def test_a_common_prefix_runs_once_within_the_step_that_first_has_it() -> None:
    scheduler = make_scheduler()
    for index in range(3):
        scheduler.add(make(index, [*PREFIX, index, index]))
    step = scheduler.schedule()
    assert spans(step) == [(0, 0, 14), (1, 12, 2), (2, 12, 2)]
    first, second, third = (piece.seq for piece in step.slices)
    assert first.block_ids[:3] == second.block_ids[:3] == third.block_ids[:3]
    assert len({seq.block_ids[3] for seq in (first, second, third)}) == 3
    commit(scheduler, step)
    assert [seq.num_cached for seq in (first, second, third)] == [0, 12, 12]


def test_only_the_blocks_that_a_step_fills_are_shared_in_it() -> None:
    scheduler = make_scheduler(tokens=14)
    scheduler.add(make(0, [*PREFIX, *range(8)]))
    step = scheduler.schedule()
    assert spans(step) == [(0, 0, 14)]
    commit(scheduler, step)
    scheduler.add(make(1, [*PREFIX, *range(8)]))
    # The budget leaves 8 tokens for the second, which finds the blocks that the first fills now.
    assert spans(scheduler.schedule()) == [(0, 14, 6), (1, 16, 4)]


def test_the_last_token_of_a_prompt_runs_though_its_block_is_cached() -> None:
    scheduler = make_scheduler()
    scheduler.add(make(0, PREFIX))
    scheduler.add(make(1, PREFIX))
    assert spans(scheduler.schedule()) == [(0, 0, 12), (1, 8, 4)]


def test_a_finished_sequence_leaves_its_prompt_and_its_new_tokens_to_a_later_turn() -> None:
    scheduler = make_scheduler()
    scheduler.add(make(0, PREFIX[:6], new=7))
    run_all(scheduler)
    turn = make(1, [*PREFIX[:6], *[1] * 7, 50, 51])
    scheduler.add(turn)
    # Twelve of the thirteen tokens ran: the last one was sampled and not run.
    assert spans(scheduler.schedule()) == [(1, 12, 3)]


def test_a_request_for_prompt_logprobs_runs_whole_and_leaves_its_blocks_to_others() -> None:
    scheduler = make_scheduler()
    scheduler.add(make(0, [*PREFIX, 1]))
    scheduler.add(make(1, [*PREFIX, 2], prompt_logprobs=True))
    assert spans(scheduler.schedule()) == [(0, 0, 13), (1, 0, 13)]
    alone = make_scheduler()
    alone.add(make(0, [*PREFIX, 1], prompt_logprobs=True))
    alone.add(make(1, [*PREFIX, 2]))
    assert spans(alone.schedule()) == [(0, 0, 13), (1, 12, 1)]


def test_without_the_cache_every_prompt_runs_whole() -> None:
    scheduler = make_scheduler(cache=False)
    scheduler.add(make(0, [*PREFIX, 1]))
    scheduler.add(make(1, [*PREFIX, 2]))
    assert spans(scheduler.schedule()) == [(0, 0, 13), (1, 0, 13)]
    assert scheduler.running[0].block_hashes == []


def test_a_preempted_sequence_starts_with_its_own_blocks_if_they_are_cached() -> None:
    scheduler = make_scheduler()
    scheduler.add(make(0, [7, 8], new=20))
    scheduler.add(seq := make(1, PREFIX, new=9))
    for _ in range(6):
        commit(scheduler, scheduler.schedule())
    assert (seq.num_computed, len(seq.token_ids), len(seq.block_ids)) == (17, 18, 5)
    scheduler._preempt(scheduler.running.pop())
    step = scheduler.schedule()
    assert spans(step) == [(0, 7, 1), (1, 16, 2)]
    # One of the two ran before; what it took from the cache is its own and no cached prompt.
    assert (step.slices[1].num_recomputed, step.num_decode, seq.num_cached) == (1, 1, 0)


def test_a_preempted_sequence_never_comes_back_as_a_decode_among_prefills() -> None:
    scheduler = make_scheduler()
    scheduler.add(seq := make(0, PREFIX, new=9))
    for _ in range(5):
        commit(scheduler, scheduler.schedule())
    assert (seq.num_computed, len(seq.token_ids)) == (16, 17)
    scheduler.add(make(1, [7, 8]))
    commit(scheduler, scheduler.schedule())
    scheduler.running.reverse()
    seq.token_ids.pop()
    seq.num_computed -= 1
    scheduler._preempt(scheduler.running.pop())
    step = scheduler.schedule()
    assert spans(step) == [(1, 2, 1), (0, 12, 5)]
    assert [piece.is_decode for piece in step.slices] == [True, False]


def test_cached_blocks_are_dropped_before_a_sequence_is_preempted() -> None:
    scheduler = make_scheduler(blocks=8)
    scheduler.add(make(0, PREFIX[:8], new=1))
    run_all(scheduler)
    assert scheduler.pool.num_free == 8
    scheduler.add(make(1, list(range(8)), new=24))
    run_all(scheduler)
    assert scheduler.num_preemptions == 0


def test_shared_blocks_are_reckoned_once_when_a_sequence_is_admitted() -> None:
    # Four blocks for the first, one more for each that follows, one spare per sequence before it.
    for blocks, admitted in ((6, 2), (7, 2), (8, 3)):
        scheduler = make_scheduler(blocks=blocks)
        for index in range(3):
            scheduler.add(make(index, [*PREFIX, index], new=2))
        assert len(scheduler.schedule().slices) == admitted


def test_room_counts_what_a_waiting_prompt_is_expected_to_run() -> None:
    scheduler = make_scheduler(tokens=20)
    scheduler.add(make(0, [*PREFIX, 0]))
    assert scheduler.room() == 7
    scheduler.add(make(1, [*PREFIX, 1, 2]))  # expected of the first, which waits too
    assert scheduler.room() == 5
    assert spans(scheduler.schedule()) == [(0, 0, 13), (1, 12, 2)]


def test_a_failed_sequence_leaves_nothing_to_others() -> None:
    scheduler = make_scheduler()
    failed = make(0, [*PREFIX, 0])
    scheduler.add(failed)
    step = scheduler.schedule()
    scheduler.abort(failed, RequestError("non_finite_logits", "not finite"))
    commit(scheduler, step)
    scheduler.add(make(1, [*PREFIX, 0]))
    assert spans(scheduler.schedule()) == [(1, 0, 13)]


def test_a_cleared_cache_gives_nothing() -> None:
    scheduler = make_scheduler()
    scheduler.add(make(0, [*PREFIX, 0]))
    run_all(scheduler)
    scheduler.prefixes.clear()
    scheduler.add(make(1, [*PREFIX, 0]))
    assert spans(scheduler.schedule()) == [(1, 0, 13)]


@pytest.mark.parametrize("length", [13, 16])
def test_cached_tokens_of_a_completion_are_prompt_tokens_that_did_not_run(length: int) -> None:
    scheduler = make_scheduler()
    sequences = [make(index, [*PREFIX, *range(length - 12)]) for index in range(2)]
    for seq in sequences:
        scheduler.add(seq)
    ran = run_all(scheduler)
    for seq in sequences:
        done = seq.completion()
        own = sum(count for index, _, count in ran if index == seq.request.index)
        # Of four new tokens the last does not run.
        assert own + done.cached_tokens == length + 3
        assert done.record()["usage"].get("cached_tokens", 0) == done.cached_tokens
    assert sequences[1].completion().cached_tokens == 12


# --- the setting ------------------------------------------------------------------------------


def spec_of(*attentions: object) -> ModelSpec:
    return cast(
        ModelSpec, SimpleNamespace(layers=[SimpleNamespace(attention=x) for x in attentions])
    )


def test_auto_is_off_where_a_layer_has_recurrent_states_and_true_is_refused():
    linear = GatedDeltaSpec(
        hidden=8,
        num_key_heads=1,
        num_value_heads=1,
        key_dim=4,
        value_dim=4,
        conv_width=4,
        norm_eps=1e-6,
    )
    plain = AttentionSpec(hidden=8, num_heads=1, num_kv_heads=1, head_dim=8)
    found = [resolve_prefix_cache(each, spec_of(plain)) for each in ("auto", True, False)]
    assert found == [True, True, False]
    mixed = spec_of(linear, plain)
    assert not resolve_prefix_cache("auto", mixed) and not resolve_prefix_cache(False, mixed)
    with pytest.raises(ValueError, match=r"^scheduler\.prefix_cache = true: .*auto or false"):
        resolve_prefix_cache(True, mixed)


def test_a_job_shares_prefixes_by_the_config_of_its_checkpoint(tmp_path):
    missing = Config(model=ModelConfig(path=str(tmp_path / "none")))
    assert may_share_prefixes(missing), "loading the model says what is wrong"
    path = tmp_path / "mixtral"
    make_checkpoint("mixtral", path)
    settings: list[tuple[bool | Literal["auto"], bool]] = [("auto", True), (False, False)]
    for setting, expected in settings:
        scheduler = SchedulerConfig(prefix_cache=setting)
        config = Config(model=ModelConfig(path=str(path)), scheduler=scheduler)
        assert may_share_prefixes(config) is expected
