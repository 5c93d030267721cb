"""Continuous batching against a model that reads through the block tables.

Run: pytest tests/unit/generation/test_scheduler.py

`PagedModel` keeps token ids where a real one keeps keys and values; its next token is a hash of the
context read back through the sequence's blocks. So a block shared, lost, misplaced or not computed
again after a preemption changes the tokens. Where sequences have a row of recurrent states, its
state is all the tokens that have run on it. `alone` is the same without cache or scheduler.
"""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.generation.block_pool import BlockPool
from engine.generation.scheduler import Scheduler
from engine.generation.sequence import Sequence, Status
from engine.generation.step import Slice, Step
from engine.request import Completion, Request, RequestError, SamplingParams, error_record

NOT_FINITE = RequestError("non_finite_logits", "logits are not finite")

VOCAB = 50
EOS = 7


def logit_rows(piece: Slice) -> list[int]:
    """The rows of a slice whose logits are needed: the sampled one, then those of the prompt."""
    sampled = [piece.length - 1] if piece.samples else []
    return sampled + list(piece.prompt_logprob_rows)


def next_token(context: list[int]) -> int:
    digest = hashlib.blake2b(repr(context).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % VOCAB


def logprob(context: list[int], token: int) -> float:
    return -next_token([*context, -1, token]) / 8 - 1


class PagedModel:
    def __init__(self, pool: BlockPool) -> None:
        self.block_size = pool.block_size
        self.cache: list[int | None] = [None] * (pool.num_blocks * pool.block_size)
        self.states: dict[int, list[int]] = {}  # row -> tokens

    def slot(self, seq: Sequence, position: int) -> int:
        block = seq.block_ids[position // self.block_size]
        return block * self.block_size + position % self.block_size

    def advance(self, piece: Slice) -> None:
        row, end = piece.seq.state_row, piece.start + piece.length
        if row is None:
            return
        if not piece.start:
            self.states[row] = []  # whatever it held
        self.states[row] += piece.seq.token_ids[piece.start : end]
        assert self.states[row] == piece.seq.token_ids[:end]

    def run(self, step: Step) -> tuple[list[int], list[float], list[float]]:
        contexts: list[tuple[Sequence, int]] = []  # of every row
        for piece in step.slices:
            for position in range(piece.start, piece.start + piece.length):
                self.cache[self.slot(piece.seq, position)] = piece.seq.token_ids[position]
                contexts.append((piece.seq, position))
            self.advance(piece)
        assert len(contexts) == step.num_tokens

        def read(row: int) -> list:
            seq, position = contexts[row]
            return [self.cache[self.slot(seq, p)] for p in range(position + 1)]

        sampled = [read(row) for row in step.sample_rows]
        tokens = [next_token(context) for context in sampled]
        logprobs = [logprob(c, t) for c, t in zip(sampled, tokens, strict=True)]
        of_prompt = [
            logprob(read(row), target)
            for row, target in zip(step.prompt_rows, step.prompt_targets, strict=True)
        ]
        return tokens, logprobs, of_prompt


def alone(request: Request, max_model_len: int) -> Completion:
    params, tokens = request.params, list(request.prompt_token_ids)
    prompt = len(tokens)
    of_prompt = [None, *(logprob(tokens[:i], tokens[i]) for i in range(1, prompt))]
    logprobs, reason = [], "length"
    while len(tokens) < min(prompt + params.max_new_tokens, max_model_len):
        token = next_token(tokens)
        logprobs.append(logprob(tokens, token))
        tokens.append(token)
        if token == EOS:
            reason = "stop"
            break
    return Completion(
        index=request.index,
        id=request.id,
        text="",
        token_ids=tokens[prompt:],
        finish_reason=reason,
        prompt_tokens=prompt,
        completion_tokens=len(tokens) - prompt,
        request=request,
        logprobs=logprobs if params.logprobs else None,
        prompt_logprobs=of_prompt if params.prompt_logprobs else None,
    )


def make_scheduler(
    blocks=64,
    block_size=4,
    tokens=64,
    sequences=8,
    max_model_len=1000,
    cache=True,
    has_states=False,
):
    config = SimpleNamespace(max_batch_tokens=tokens, max_sequences=sequences, prefix_cache=cache)
    pool = BlockPool(blocks, block_size)
    return Scheduler(config, pool, max_model_len, has_states=has_states)  # type: ignore[arg-type]


def make(index: int, prompt: int | list[int], **params) -> Sequence:
    ids = [(index + i) % VOCAB for i in range(prompt)] if isinstance(prompt, int) else prompt
    request = Request(
        index=index, id=f"r{index}", prompt_token_ids=ids, params=SamplingParams(**params)
    )
    return Sequence(request, eos_token_ids={EOS})


def shape(step: Step) -> list[tuple[int, int, int, bool]]:
    return [(p.seq.request.index, p.start, p.length, p.samples) for p in step.slices]


def commit(scheduler: Scheduler, step: Step, token: int = 1) -> list[int]:
    done = scheduler.commit(
        step, [token] * len(step.sampling), prompt_logprobs=[-1.0] * len(step.prompt_rows)
    )
    return [seq.request.index for seq in done]


# --- hand-worked steps ------------------------------------------------------------------------


def test_prompts_are_cut_into_chunks_that_fill_the_budget_left_by_decode():
    scheduler = make_scheduler(tokens=10)
    for index, prompt in enumerate([4, 13, 3]):
        scheduler.add(make(index, prompt, max_new_tokens=9))
    step = scheduler.schedule()
    assert shape(step) == [(0, 0, 4, True), (1, 0, 6, False)]
    assert (step.num_decode, step.num_tokens, step.sample_rows) == (0, 10, [3])
    commit(scheduler, step)
    step = scheduler.schedule()
    assert shape(step) == [(0, 4, 1, True), (1, 6, 7, True), (2, 0, 2, False)]
    assert (step.num_decode, step.num_tokens, step.sample_rows) == (1, 10, [0, 7])
    commit(scheduler, step)
    step = scheduler.schedule()
    # The last token of a prompt is prefill, though it is one token.
    assert shape(step) == [(0, 5, 1, True), (1, 13, 1, True), (2, 2, 1, True)]
    assert (step.num_decode, step.sample_rows) == (2, [0, 1, 2])
    commit(scheduler, step)
    assert scheduler.schedule().num_decode == 3


def test_prompt_logprob_rows_cover_each_prompt_token_once_over_the_chunks():
    scheduler = make_scheduler(tokens=4)
    seq = make(0, [10, 11, 12, 13, 14, 15], max_new_tokens=2, prompt_logprobs=True)
    scheduler.add(seq)
    step = scheduler.schedule()
    assert (step.sample_rows, step.prompt_rows) == ([], [0, 1, 2, 3])
    assert step.prompt_targets == [11, 12, 13, 14]
    assert list(step.slices[0].prompt_logprob_rows) == logit_rows(step.slices[0]) == [0, 1, 2, 3]
    scheduler.commit(step, [], prompt_logprobs=[-1.0, -2.0, -3.0, -4.0])
    step = scheduler.schedule()
    # Position 4 speaks of the prompt's last token, position 5 of the first new one.
    assert (step.sample_rows, step.prompt_rows, step.prompt_targets) == ([1], [0], [15])
    assert step.sample_rows + step.prompt_rows == logit_rows(step.slices[0]) == [1, 0]
    scheduler.commit(step, [3], prompt_logprobs=[-5.0])
    assert seq.prompt_logprobs == [None, -1.0, -2.0, -3.0, -4.0, -5.0]
    assert scheduler.schedule().prompt_rows == []


def test_what_is_read_are_the_last_rows_of_a_slice_from_the_first_whose_logits_are_needed():
    scheduler = make_scheduler(tokens=6)
    scheduler.add(make(0, [10, 11, 12, 13, 14, 15, 16, 17], max_new_tokens=2))
    scheduler.add(make(1, [20, 21, 22, 23, 24, 25], max_new_tokens=2, prompt_logprobs=True))
    step = scheduler.schedule()
    assert shape(step) == [(0, 0, 6, False)]
    assert ([piece.num_read for piece in step.slices], step.num_read) == ([0], 0)
    commit(scheduler, step)
    step = scheduler.schedule()
    assert shape(step) == [(0, 6, 2, True), (1, 0, 4, False)]
    assert ([piece.num_read for piece in step.slices], step.num_read) == ([1, 4], 5)
    commit(scheduler, step)
    step = scheduler.schedule()  # the prompt's last two tokens: one speaks of the other
    assert shape(step) == [(0, 8, 1, True), (1, 4, 2, True)]
    assert ([piece.num_read for piece in step.slices], step.num_read) == ([1, 2], 3)


def test_a_sequence_gets_its_next_block_exactly_when_the_last_is_full():
    scheduler = make_scheduler(blocks=8, block_size=4)
    seq = make(0, 3, max_new_tokens=20)
    scheduler.add(seq)
    held = []
    for _ in range(7):
        step = scheduler.schedule()
        held.append((seq.num_computed + step.slices[0].length, len(seq.block_ids)))
        commit(scheduler, step)
    assert held == [(3, 1), (4, 1), (5, 2), (6, 2), (7, 2), (8, 2), (9, 3)]


def test_the_latest_arrival_is_preempted_and_runs_again_with_what_it_had():
    scheduler = make_scheduler(blocks=4, block_size=2)
    first, second = make(0, 2, max_new_tokens=5), make(1, 3, max_new_tokens=3)
    scheduler.add(first)
    scheduler.add(second)
    step = scheduler.schedule()
    assert shape(step) == [(0, 0, 2, True), (1, 0, 3, True)]
    assert scheduler.pool.num_free == 1
    commit(scheduler, step, token=20)
    step = scheduler.schedule()  # the first takes the last free block; the second needs none yet
    assert shape(step) == [(0, 2, 1, True), (1, 3, 1, True)]
    commit(scheduler, step, token=21)
    step = scheduler.schedule()  # now the second needs one and is the latest itself
    assert shape(step) == [(0, 3, 1, True)]
    assert (second.status, second.block_ids, second.num_computed) == (Status.WAITING, [], 0)
    assert second.token_ids[3:] == [20, 21]
    assert scheduler.num_preemptions == 1
    commit(scheduler, step, token=22)
    assert shape(scheduler.schedule()) == [(0, 4, 1, True)]  # three blocks for the first
    assert scheduler.waiting[0] is second


def test_recomputed_tokens_are_counted_and_the_last_of_them_samples():
    scheduler = make_scheduler(blocks=4, block_size=2, tokens=4)
    first, second = make(0, 2, max_new_tokens=4), make(1, 3, max_new_tokens=4)
    scheduler.add(first)
    scheduler.add(second)
    again = []
    while scheduler.has_work:
        step = scheduler.schedule()
        again += [
            (p.start, p.length, p.num_recomputed, p.samples)
            for p in step.slices
            if p.seq is second and scheduler.num_preemptions
        ]
        commit(scheduler, step)
    assert scheduler.num_preemptions == 1
    # Prompt 3 and two new tokens are known, four of the five ran before.
    assert again == [(0, 4, 4, False), (4, 1, 0, True), (5, 1, 0, True)]
    assert second.num_generated == 4


def test_a_second_preemption_during_recomputation_forgets_nothing_of_the_first():
    scheduler = make_scheduler(tokens=4, cache=False)
    scheduler.add(make(0, 2, max_new_tokens=30))
    seq = make(1, 6, max_new_tokens=9)
    scheduler.add(seq)
    for expected in (0, 0, 3, 3):  # the budget leaves 2 and 3 tokens, then again 3 and 3
        step = scheduler.schedule()
        assert step.slices[-1].seq is seq
        assert step.slices[-1].num_recomputed == expected
        commit(scheduler, step)
        if seq.num_computed in (5, 3):
            scheduler._preempt(scheduler.running.pop())
            assert seq.num_computed_before == 5


def test_one_recomputed_token_left_over_by_the_budget_is_no_decode():
    scheduler = make_scheduler(tokens=4)
    seq = make(0, 3, max_new_tokens=9)
    seq.token_ids += [20, 21, 22]  # as if generated before a preemption
    scheduler.add(seq)
    commit(scheduler, scheduler.schedule())
    scheduler.max_batch_tokens = 1
    step = scheduler.schedule()
    assert shape(step) == [(0, 4, 1, False)]
    assert (step.num_decode, step.sampling, step.sample_rows) == (0, [], [])


def test_admission_keeps_a_spare_block_for_each_running_sequence():
    scheduler = make_scheduler(blocks=6, block_size=4)
    for index in range(4):
        scheduler.add(make(index, 4, max_new_tokens=8))
    assert len(scheduler.schedule().slices) == 3  # 3 blocks in use, 3 spare
    assert (len(scheduler.running), len(scheduler.waiting)) == (3, 1)


def test_a_long_prompt_at_the_head_of_the_line_is_not_overtaken():
    scheduler = make_scheduler(blocks=10, block_size=4)
    scheduler.add(make(0, 8, max_new_tokens=8))
    scheduler.add(make(1, 36, max_new_tokens=4))
    scheduler.add(make(2, 1, max_new_tokens=4))
    order = []
    while scheduler.has_work:
        step = scheduler.schedule()
        order += [p.seq.request.index for p in step.slices if p.start == 0]
        commit(scheduler, step)
    assert order == [0, 1, 2]


def test_no_more_sequences_run_than_allowed_nor_than_the_budget_has_tokens():
    for tokens, sequences, expected in ((64, 3, 3), (2, 8, 2)):
        scheduler = make_scheduler(tokens=tokens, sequences=sequences)
        for index in range(6):
            scheduler.add(make(index, 1, max_new_tokens=9))
        for _ in range(3):
            step = scheduler.schedule()
            assert len(step.slices) == expected
            commit(scheduler, step)


def test_a_prompt_alone_is_scored_without_sampling():
    scheduler = make_scheduler(tokens=4, max_model_len=6)
    scheduler.add(make(0, 6, max_new_tokens=0, prompt_logprobs=True))
    commit(scheduler, scheduler.schedule())
    step = scheduler.schedule()
    assert shape(step) == [(0, 4, 2, False)]
    assert (step.sampling, step.prompt_rows) == ([], [0])
    (done,) = scheduler.commit(step, [], prompt_logprobs=[-1.0])
    completion = done.completion()
    assert (completion.finish_reason, completion.token_ids) == ("length", [])
    assert completion.prompt_logprobs == [None] + [-1.0] * 5
    assert not scheduler.has_work


def test_an_empty_scheduler_gives_an_empty_step():
    scheduler = make_scheduler()
    step = scheduler.schedule()
    assert (step.slices, step.num_tokens) == ([], 0)
    assert step.sample_rows + step.prompt_rows == []
    assert scheduler.commit(step, []) == []
    assert not scheduler.has_work


# --- recurrent states --------------------------------------------------------------------------


def test_a_sequence_keeps_its_row_of_states_over_chunks_and_the_lowest_free_row_comes_next():
    scheduler = make_scheduler(tokens=6, sequences=4, has_states=True)
    for index, (prompt, new) in enumerate([(1, 9), (1, 2), (9, 9)]):
        scheduler.add(make(index, prompt, max_new_tokens=new))
    rows = []
    for _ in range(4):
        step = scheduler.schedule()
        rows.append([(piece.seq.request.index, piece.seq.state_row) for piece in step.slices])
        commit(scheduler, step)
        if len(rows) == 2:
            scheduler.add(make(3, 2, max_new_tokens=9))
    assert rows == [
        [(0, 0), (1, 1), (2, 2)],
        [(0, 0), (1, 1), (2, 2)],  # the second ends
        [(0, 0), (2, 2), (3, 1)],
        [(0, 0), (2, 2), (3, 1)],
    ]


def test_a_row_of_states_is_given_back_when_a_sequence_ends_fails_or_is_preempted():
    scheduler = make_scheduler(blocks=8, block_size=2, tokens=8, sequences=3, has_states=True)
    seqs = [make(index, 2, max_new_tokens=2 if index == 1 else 6) for index in range(5)]
    for seq in seqs:
        scheduler.add(seq)
    step = scheduler.schedule()
    assert [seq.state_row for seq in seqs] == [0, 1, 2, None, None]
    scheduler.abort(seqs[0], NOT_FINITE)
    assert seqs[0].state_row is None
    commit(scheduler, step)
    step = scheduler.schedule()
    assert [seq.state_row for seq in seqs] == [None, 1, 2, 0, None]
    commit(scheduler, step)  # the second ends
    scheduler._preempt(scheduler.running.pop())
    assert [seq.state_row for seq in seqs] == [None, None, 2, None, None]
    step = scheduler.schedule()
    assert [(seqs[3].state_row, piece.start) for piece in step.slices if piece.seq is seqs[3]] == [
        (0, 0)
    ]
    while scheduler.has_work:
        commit(scheduler, step)
        step = scheduler.schedule()
    assert sorted(scheduler._free_rows) == [0, 1, 2]


def test_models_without_states_hand_out_no_rows():
    scheduler = make_scheduler()
    seq = make(0, 3)
    scheduler.add(seq)
    scheduler.schedule()
    assert seq.state_row is None and scheduler._free_rows == []


def test_nothing_is_shared_between_sequences_with_states():
    prompt = list(range(12))
    for has_states in (False, True):
        scheduler = make_scheduler(has_states=has_states)
        for index in range(2):
            scheduler.add(make(index, prompt, max_new_tokens=1))
        step = scheduler.schedule()
        assert [piece.start for piece in step.slices] == ([0, 0] if has_states else [0, 8])
        assert [piece.seq.num_cached for piece in step.slices] == [p.start for p in step.slices]


# --- what can never run, and what ends early --------------------------------------------------


def test_a_prompt_that_fills_the_context_is_refused_with_both_lengths():
    scheduler = make_scheduler(max_model_len=10)
    with pytest.raises(ValueError, match=r"'r0'.*10 tokens.*holds 10"):
        scheduler.add(make(0, 10))
    with pytest.raises(ValueError, match=r"11 tokens.*holds 10"):
        scheduler.add(make(0, 11, max_new_tokens=0))
    assert not scheduler.has_work


def test_a_request_larger_than_the_cache_is_refused_with_both_lengths():
    scheduler = make_scheduler(blocks=4, block_size=4)
    with pytest.raises(ValueError, match=r"'r0'.*10 prompt.*= 8 reach 18.*holds 16; lower"):
        scheduler.add(make(0, 10, max_new_tokens=8))
    scheduler.add(make(1, 10, max_new_tokens=7))  # the seventeenth token is never run
    while scheduler.has_work:
        commit(scheduler, scheduler.schedule())
    assert scheduler.pool.num_free == 4


def test_generation_stops_at_the_context_with_reason_length():
    scheduler = make_scheduler(max_model_len=10)
    seq = make(0, 7, max_new_tokens=100)
    scheduler.add(seq)
    while scheduler.has_work:
        commit(scheduler, scheduler.schedule())
    assert (seq.finish_reason, len(seq.token_ids)) == ("length", 10)


def test_aborting_between_schedule_and_commit_ends_one_request_and_no_other():
    scheduler = make_scheduler()
    seqs = [make(index, 3, max_new_tokens=2) for index in range(3)]
    for seq in seqs:
        scheduler.add(seq)
    step = scheduler.schedule()
    scheduler.abort(seqs[1], NOT_FINITE)
    assert scheduler.commit(step, [20, 21, 22]) == []
    assert [seq.token_ids[3:] for seq in seqs] == [[20], [], [22]]
    assert seqs[1].completion().error == error_record(NOT_FINITE)
    assert commit(scheduler, scheduler.schedule()) == [0, 2]
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    waiting = make(3, 3)
    scheduler.add(waiting)
    scheduler.abort(waiting, NOT_FINITE)
    assert not scheduler.has_work


# --- room -------------------------------------------------------------------------------------


def test_room_ends_with_the_slots_the_tokens_or_the_blocks():
    assert make_scheduler(sequences=5).room() == 5
    assert make_scheduler(tokens=64, sequences=8).room(prompt_tokens=30) == 3
    # The third needs its two blocks in addition to four in use and two spare.
    assert make_scheduler(blocks=8, block_size=4).room(prompt_tokens=8) == 3
    assert make_scheduler(blocks=7, block_size=4).room(prompt_tokens=8) == 2
    assert make_scheduler(blocks=1).room() == 1


def test_room_leaves_a_spare_block_for_each_that_runs_or_waits():
    scheduler = make_scheduler(blocks=9, block_size=4)
    scheduler.add(make(0, 3, max_new_tokens=9))
    commit(scheduler, scheduler.schedule())
    scheduler.add(make(1, 4, max_new_tokens=9))
    # Of 9 blocks 2 are spoken for; the last of three more takes one and leaves 4 spare.
    assert scheduler.room() == 3
    for index in (2, 3, 4):
        assert scheduler.room() > 0
        scheduler.add(make(index, 4, max_new_tokens=9))
    assert scheduler.room() == 0
    scheduler.add(make(5, 4, max_new_tokens=9))
    assert len(scheduler.schedule().slices) == 5


def test_room_is_zero_once_the_next_step_is_full():
    scheduler = make_scheduler(tokens=10, sequences=20)
    scheduler.add(make(0, 6))
    assert scheduler.room() == 4
    scheduler.add(make(1, 6))
    assert scheduler.room() == 0
    commit(scheduler, scheduler.schedule())  # leaves two tokens of the second's prompt
    assert scheduler.room() == 7


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=20),
    st.integers(6, 30),
    st.integers(1, 30),
    st.integers(1, 8),
)
def test_what_room_promises_to_an_idle_scheduler_starts_in_the_next_step(
    prompts, blocks, tokens, sequences
):
    scheduler = make_scheduler(blocks=blocks, tokens=tokens, sequences=sequences)
    added = 0
    for prompt in prompts:
        if scheduler.room(prompt) == 0:
            break
        scheduler.add(make(added, prompt, max_new_tokens=1))
        added += 1
    assert added >= 1
    assert len(scheduler.schedule().slices) == added


# --- random workloads -------------------------------------------------------------------------


@st.composite
def workloads(draw):
    block_size = draw(st.sampled_from([1, 2, 4]))
    blocks = draw(st.integers(6, 24))
    max_model_len = draw(st.integers(8, 40))
    prefixes = [[draw(st.integers(0, VOCAB - 1)) for _ in range(10)] for _ in range(2)]
    requests = []
    for index in range(draw(st.integers(1, 12))):
        prompt = draw(st.integers(1, 14))
        common = draw(st.sampled_from(prefixes))[: draw(st.integers(0, 10))]
        own = [draw(st.integers(0, VOCAB - 1)) for _ in range(max(0, prompt - len(common)))]
        new = draw(st.integers(0, 16))
        params = SamplingParams(
            max_new_tokens=new,
            logprobs=draw(st.booleans()),
            prompt_logprobs=draw(st.booleans()),
        )
        requests.append(
            Request(
                index=index,
                id=f"r{index}",
                prompt_token_ids=(common + own)[:prompt],
                params=params,
            )
        )
    limits = {
        "blocks": blocks,
        "block_size": block_size,
        "tokens": draw(st.integers(1, 24)),
        "sequences": draw(st.integers(1, 8)),
        "max_model_len": max_model_len,
        "cache": draw(st.booleans()),
        "has_states": draw(st.booleans()),
    }
    arrivals = [draw(st.integers(0, 20)) for _ in requests]
    return limits, requests, sorted(arrivals)


def check_blocks(scheduler: Scheduler) -> None:
    """Every block is free or owned by running sequences, which have room for their tokens; only
    those whose tokens are the same up to a block's end own it together.
    """
    pool, size = scheduler.pool, scheduler.pool.block_size
    owned: dict[int, list[int]] = {}
    for seq in scheduler.running:
        assert len(set(seq.block_ids)) == len(seq.block_ids)
        for index, block in enumerate(seq.block_ids):
            known = seq.token_ids[: (index + 1) * size]
            assert owned.setdefault(block, known) == known
    assert len(owned) == pool.num_blocks - pool.num_free
    has_states = scheduler._has_states
    rows = [seq.state_row for seq in scheduler.running if seq.state_row is not None]
    assert len(set(rows)) == len(rows) == (len(scheduler.running) if has_states else 0)
    for seq in scheduler.waiting:
        assert seq.state_row is None
        assert (seq.block_ids, seq.num_computed, seq.status) == ([], 0, Status.WAITING)
    for seq in scheduler.running:
        assert seq.status is Status.RUNNING
        assert seq.num_computed <= len(seq.block_ids) * pool.block_size


def check_step(scheduler: Scheduler, step: Step, limits: dict) -> None:
    assert step.num_tokens == sum(p.length for p in step.slices) <= limits["tokens"]
    assert len(step.slices) <= limits["sequences"]
    assert [p.is_decode for p in step.slices] == sorted(
        (p.is_decode for p in step.slices), reverse=True
    )
    assert step.num_decode == sum(p.is_decode for p in step.slices)
    assert len({p.seq.request.index for p in step.slices}) == len(step.slices)
    row = 0
    expected_rows: list[int] = []
    for piece in step.slices:
        assert piece.length > 0
        assert piece.start == piece.seq.num_computed
        assert piece.start + piece.length <= len(piece.seq.token_ids)
        assert piece.start + piece.length <= len(piece.seq.block_ids) * limits["block_size"]
        expected_rows += [row + r for r in logit_rows(piece)]
        row += piece.length
    rows = step.sample_rows + step.prompt_rows
    assert sorted(rows) == sorted(expected_rows)
    assert len(set(rows)) == len(rows)
    # First come, first served: every running sequence arrived before every waiting one.
    order = [seq.request.index for seq in (*scheduler.running, *scheduler.waiting)]
    assert order == sorted(order)
    # Progress: the earliest arrival always runs, so none starves.
    if scheduler.has_work:
        assert step.slices[0].seq.request.index == order[0]


def drive(limits: dict, requests: list[Request], arrivals: list[int]):
    """Run a workload to its end with all invariants checked; completions, refusals, scheduler."""
    scheduler = make_scheduler(**limits)
    model = PagedModel(scheduler.pool)
    pending = list(zip(arrivals, requests, strict=True))
    done: list[Completion] = []
    refused: list[int] = []
    seen: dict[int, int] = {}
    turn = 0
    while pending or scheduler.has_work:
        while pending and pending[0][0] <= turn:
            request = pending.pop(0)[1]
            try:
                scheduler.add(Sequence(request, eos_token_ids={EOS}))
            except ValueError:
                refused.append(request.index)
        step = scheduler.schedule()
        check_step(scheduler, step, limits)
        check_blocks(scheduler)
        for piece in step.slices:
            before = seen.get(piece.seq.request.index, 0)
            end = piece.start + piece.length
            assert piece.num_recomputed == max(0, min(before, end) - piece.start)
            seen[piece.seq.request.index] = max(before, end)
        tokens, logprobs, of_prompt = model.run(step)
        done += [seq.completion() for seq in scheduler.commit(step, tokens, logprobs, of_prompt)]
        check_blocks(scheduler)
        turn += 1
        assert turn < 3000, "no progress"
    assert scheduler.pool.num_free == limits["blocks"]
    return done, refused, scheduler


@given(workloads())
def test_every_request_finishes_once_with_the_tokens_it_has_alone(workload):
    limits, requests, arrivals = workload
    done, refused, _ = drive(limits, requests, arrivals)
    assert sorted([*refused, *(c.index for c in done)]) == [r.index for r in requests]
    for completion in done:
        expected = alone(requests[completion.index], limits["max_model_len"])
        expected.timing, expected.cached_tokens = completion.timing, completion.cached_tokens
        expected.request = completion.request
        assert completion == expected
    capacity = limits["blocks"] * limits["block_size"]
    for request in requests:
        prompt, new = len(request.prompt_token_ids), request.params.max_new_tokens
        longest = min(prompt + new, limits["max_model_len"])
        too_long = prompt + min(new, 1) > limits["max_model_len"]
        too_large = max(prompt, longest - 1) > capacity
        assert (request.index in refused) == (too_long or too_large)


@pytest.mark.parametrize("has_states", [False, True])
def test_heavy_preemption_loses_nothing(has_states):
    requests = [
        Request(
            index=index,
            id=f"r{index}",
            prompt_token_ids=[(3 * index + i) % VOCAB for i in range(5 + index % 3)],
            params=SamplingParams(max_new_tokens=24, logprobs=True, prompt_logprobs=True),
        )
        for index in range(12)
    ]
    limits = {"blocks": 20, "block_size": 2, "tokens": 16, "sequences": 8, "max_model_len": 100}
    limits["has_states"] = has_states
    done, refused, scheduler = drive(limits, requests, [0] * 12)
    assert refused == []
    assert scheduler.num_preemptions >= 5
    assert len(done) == 12
    for completion in done:
        expected = alone(requests[completion.index], 100)
        assert completion.token_ids == expected.token_ids
        assert completion.logprobs == expected.logprobs
        assert completion.prompt_logprobs == expected.prompt_logprobs
