"""Steps scheduled before the one ahead of them is committed, against a model that reads blocks.

Run: pytest tests/unit/generation/late/test_ahead.py

`FedModel` is `PagedModel` with new tokens that stay with it for a step: what a row runs on is the
token that the model has chosen, not the one that the host knows by then.
"""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from engine.generation.scheduler import Scheduler
from engine.generation.sequence import Sequence
from engine.generation.step import Step
from engine.request import Completion, Request
from tests.unit.generation.test_scheduler import (
    EOS,
    PagedModel,
    alone,
    check_blocks,
    logprob,
    make,
    make_scheduler,
    next_token,
    shape,
    workloads,
)


class FedModel(PagedModel):
    def launch(self, step: Step, fed: dict[int, int]) -> tuple[list[int], list[float], list[float]]:
        """Run a step; fed: id of a sequence -> its newest token, where the host has not read it."""
        contexts: list[list] = []
        for piece in step.slices:
            ids = piece.seq.token_ids[piece.start : piece.start + piece.length]
            if piece.is_pending:
                ids = [fed[id(piece.seq)]]
            assert len(ids) == piece.length
            row = piece.seq.state_row
            if row is not None:
                self.states[row] = (self.states[row] if piece.start else []) + ids
                assert len(self.states[row]) == piece.start + piece.length
            for offset, token in enumerate(ids):
                self.cache[self.slot(piece.seq, piece.start + offset)] = token
            for offset in range(len(ids)):
                end = piece.start + offset + 1
                contexts.append([self.cache[self.slot(piece.seq, p)] for p in range(end)])
                if row is not None:
                    assert contexts[-1] == self.states[row][:end]
        tokens = [next_token(contexts[row]) for row in step.sample_rows]
        logprobs = [
            logprob(contexts[row], token)
            for row, token in zip(step.sample_rows, tokens, strict=True)
        ]
        of_prompt = [
            logprob(contexts[row], target)
            for row, target in zip(step.prompt_rows, step.prompt_targets, strict=True)
        ]
        return tokens, logprobs, of_prompt


class Driver:
    """What `GenerationLoop` does with its flight.

    chance: in some steps the tokens are needed at once; some tokens fed on are wrong.
    """

    def __init__(self, scheduler: Scheduler, chance: random.Random) -> None:
        self.scheduler, self.model, self.chance = scheduler, FedModel(scheduler.pool), chance
        self.flight: tuple[Step, tuple, dict[int, int], set[int]] | None = None
        self.done: list[Completion] = []
        self.num_late = self.num_void = 0

    def land(self) -> set[int]:
        """Commit the step in flight; return the sequences whose token fed on was wrong."""
        if self.flight is None:
            return set()
        (step, (tokens, logprobs, _), fed, void), self.flight = self.flight, None
        wrong = {
            id(piece.seq)
            for piece, token in zip(step.sampling, tokens, strict=True)
            if fed[id(piece.seq)] != token
        }
        done = self.scheduler.commit(step, tokens, logprobs, advanced=True, void=void)
        self.done += [seq.completion() for seq in done]
        check_blocks(self.scheduler)
        return wrong

    def turn(self, may_be_wrong: bool) -> Step:
        scheduler = self.scheduler
        if self.flight is not None and not scheduler.can_look_ahead():
            self.land()
        before = scheduler.num_preemptions
        is_ahead = self.flight is not None
        step = scheduler.schedule()
        assert not is_ahead or scheduler.num_preemptions == before
        if self.flight is not None and not step.slices:
            self.land()
            step = scheduler.schedule()
        check_blocks(scheduler)
        made = self.model.launch(step, {} if self.flight is None else self.flight[2])
        wrong = self.land()
        void = {index for index, piece in enumerate(step.slices) if id(piece.seq) in wrong}
        if step.sampling and not step.prompt_rows and self.chance.random() < 0.8:
            fed = {}
            for piece, token in zip(step.sampling, made[0], strict=True):
                is_wrong = may_be_wrong and self.chance.random() < 0.1
                fed[id(piece.seq)] = (token + 1) if is_wrong else token
            scheduler.advance(step, void)
            self.flight = step, made, fed, void
            self.num_late += 1
            self.num_void += len(void)
        else:
            done = scheduler.commit(step, *made, void=void)
            self.done += [seq.completion() for seq in done]
        return step


@given(workloads(), st.integers(0, 2**32))
def test_every_request_finishes_once_with_the_tokens_it_has_alone(workload, seed):
    limits, requests, arrivals = workload
    scheduler = make_scheduler(**limits)
    driver = Driver(scheduler, random.Random(seed))
    pending = list(zip(arrivals, requests, strict=True))
    refused: list[int] = []
    turn = 0
    while pending or scheduler.has_work:
        while pending and pending[0][0] <= turn:
            request: Request = pending.pop(0)[1]
            try:
                scheduler.add(Sequence(request, eos_token_ids={EOS}))
            except ValueError:
                refused.append(request.index)
        step = driver.turn(may_be_wrong=not limits["has_states"])
        assert step.num_tokens <= limits["tokens"]
        assert step.num_decode == sum(piece.is_decode for piece in step.slices)
        turn += 1
        assert turn < 3000, "no progress"
    assert driver.flight is None or not driver.land()
    assert scheduler.pool.num_free == limits["blocks"]
    found = sorted(driver.done, key=lambda each: each.index)
    assert [each.index for each in found] == [
        each.index for each in requests if each.index not in refused
    ]
    for each in found:
        expected = alone(requests[each.index], limits["max_model_len"])
        for name in ("token_ids", "finish_reason", "logprobs", "prompt_logprobs"):
            assert getattr(each, name) == getattr(expected, name), name


def test_the_next_step_has_the_places_of_tokens_that_are_not_known():
    scheduler = make_scheduler(block_size=4)
    scheduler.add(make(0, 4, max_new_tokens=3))
    scheduler.add(make(1, 2, max_new_tokens=1))
    step = scheduler.schedule()
    scheduler.advance(step)
    ahead = scheduler.schedule()  # the second has had its only token
    assert shape(ahead) == [(0, 4, 1, True)]
    assert ahead.slices[0].is_pending
    assert ahead.num_decode == 1 and len(ahead.slices[0].seq.block_ids) == 2
    (done,) = scheduler.commit(step, [20, 21], advanced=True)
    assert done.token_ids[2:] == [21] and not ahead.slices[0].is_pending


def test_a_sequence_that_had_ended_gives_its_blocks_back_and_gains_nothing():
    scheduler = make_scheduler(block_size=4)
    scheduler.add(make(0, 4, max_new_tokens=9))
    step = scheduler.schedule()
    scheduler.advance(step)
    surplus = scheduler.schedule()
    (done,) = scheduler.commit(step, [EOS], advanced=True)
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    scheduler.advance(surplus)
    assert scheduler.commit(surplus, [30], advanced=True) == []
    assert (done.token_ids[4:], done.finish_reason) == ([EOS], "stop")
    assert not scheduler.has_work


def test_blocks_run_short_before_a_sequence_is_preempted_whose_token_is_unknown():
    scheduler = make_scheduler(blocks=4, block_size=2, cache=False)
    for index in range(2):
        scheduler.add(make(index, 3, max_new_tokens=5))
    step = scheduler.schedule()  # the second lacks a spare block
    assert shape(step) == [(0, 0, 3, True)]
    scheduler.advance(step)
    assert scheduler.can_look_ahead()  # the fourth token has room in the second block
    ahead = scheduler.schedule()
    scheduler.commit(step, [20], advanced=True)
    scheduler.advance(ahead)
    scheduler.pool.allocate(scheduler.pool.num_free)
    assert not scheduler.can_look_ahead()


def test_a_block_is_published_once_all_its_tokens_are_known():
    scheduler = make_scheduler(block_size=4)
    seq = make(0, 3, max_new_tokens=9)
    scheduler.add(seq)
    published = []
    step, tokens = scheduler.schedule(), iter(range(20, 40))
    for _ in range(4):
        scheduler.advance(step)
        ahead = scheduler.schedule()
        published.append(seq.num_published)
        scheduler.commit(step, [next(tokens)], advanced=True)
        step = ahead
    # The fourth token is pending in the second step and known in the third.
    assert published == [0, 1, 1, 1]


def test_the_last_block_of_a_sequence_that_ends_is_published_though_it_was_known_late():
    scheduler = make_scheduler(block_size=4)
    seq = make(0, 3, max_new_tokens=2)
    scheduler.add(seq)
    step = scheduler.schedule()
    scheduler.advance(step)
    ahead = scheduler.schedule()  # runs the fourth token
    scheduler.commit(step, [20], advanced=True)
    scheduler.advance(ahead)
    assert not scheduler.schedule().slices and seq.num_published == 0
    scheduler.commit(ahead, [21], advanced=True)
    again = make(1, seq.token_ids[:4] + [9], max_new_tokens=1)
    scheduler.add(again)
    assert shape(scheduler.schedule()) == [(1, 4, 1, True)]
