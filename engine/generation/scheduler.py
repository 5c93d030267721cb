"""Scheduler: continuous batching. Picks which tokens of which sequences run in the next step.

Pure, no tensors. `schedule()` returns a `Step` (`step.py`); once it has run and its tokens are
sampled, `commit()` records them and returns the sequences that finished. A step joins one decode
token of every running sequence with chunks of prompts, within `max_batch_tokens`.

Everything follows arrival order: `running` and `waiting` are sorted by it, and every running
sequence came before every waiting one. A sequence is admitted when blocks for all its known tokens
are free, plus one spare block per sequence that already runs: decode can continue for a while
before a sequence is preempted, and a prompt never stalls in the middle. When decode finds no block,
the latest arrival is preempted: its blocks are freed and it moves to the front of the queue; its
tokens are kept and its keys and values recomputed. The earliest arrival always advances, so every
request finishes.

Only the last of `running` can be inside its prompt, because the next one is admitted only when
budget is left over. So arrival order puts decode before prefill with no sorting.

A sequence starts with the blocks of its tokens that are cached (`prefix_cache.py`), shared with
others: only what is behind them runs, and only what is behind them needs blocks. Cached blocks that
no sequence uses count as free, and are dropped before a sequence is preempted.

Where layers have recurrent states (`layers/kv_cache.py`) a sequence also has a row of them, from
its admission until it ends or is preempted: the lowest that is free, the same on every tensor rank.
A state sums up all tokens before it and cannot be shared, so there every sequence starts at its
first token.

A step may be scheduled before the one ahead of it is committed (`late/`): `advance()` counts that
one's tokens as computed and its new ones as pending. What is decided meanwhile holds for any ids: a
sequence that reaches its longest is left out, none is preempted (`can_look_ahead`), and a block is
published once all its ids are known. A sequence that turns out to have ended frees its blocks at
commit; who gets them writes to them behind the step that it still runs in.
"""

from __future__ import annotations

from collections import abc, deque
from heapq import heappop, heappush

from engine.config import SchedulerConfig
from engine.generation.block_pool import BlockPool
from engine.generation.prefix_cache import PrefixCache
from engine.generation.sequence import Sequence, Status
from engine.generation.step import Slice, Step
from engine.request import RequestError, TopLogprobs


class Scheduler:
    """The running and waiting sequences of one data rank.

    At most `max_batch_tokens` sequences run at once: each needs one token per step.

    Args:
        has_states: whether a sequence needs a row of recurrent states while it runs; then nothing
            is shared between sequences.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        max_model_len: int,
        *,
        has_states: bool = False,
    ) -> None:
        self.pool = pool
        self.prefixes = PrefixCache(pool, bool(config.prefix_cache) and not has_states)
        self.max_model_len = max_model_len
        self.max_batch_tokens = config.max_batch_tokens
        self.max_sequences = most_running(config)
        self._has_states = has_states
        self._free_rows = list(range(self.max_sequences if has_states else 0))  # a heap
        self.running: list[Sequence] = []  # those that own blocks
        self.waiting: deque[Sequence] = deque()  # not admitted yet, or preempted
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.running or self.waiting)

    def add(self, seq: Sequence) -> None:
        """Append a sequence to the waiting queue; its length is capped at `max_model_len`.

        Raises:
            RequestError: with both lengths, when it can never run: the prompt leaves no room in the
                model's context, or the KV cache is too small for its longest outcome.
        """
        request, prompt = seq.request, seq.num_prompt
        new = request.params.max_new_tokens
        if prompt + min(new, 1) > self.max_model_len:
            raise RequestError(
                "context_length_exceeded",
                f"request {request.id!r}: the prompt has {prompt} tokens and the context "
                f"(model.max_model_len) holds {self.max_model_len}, new ones included; shorten "
                "the prompt",
                prompt,
            )
        seq.max_length = min(prompt + new, self.max_model_len)
        # The last token is never run, so it needs no slot in the cache.
        needed = self.pool.blocks_for(max(prompt, seq.max_length - 1))
        if needed > self.pool.num_blocks:
            raise RequestError(
                "kv_cache_exceeded",
                f"request {request.id!r}: its {prompt} prompt tokens and max_new_tokens = {new} "
                f"reach {seq.max_length} tokens and the KV cache holds "
                f"{self.pool.num_blocks * self.pool.block_size}; lower max_new_tokens or raise "
                "scheduler.kv_cache_gib (kv_cache_blocks)",
                prompt,
            )
        self.prefixes.expect(seq)
        self.waiting.append(seq)

    def room(self, prompt_tokens: int = 1) -> int:
        """Return how many more requests of this many prompt tokens could start in the next step.

        Zero while the next step's token budget is used up: a request that cannot start yet is
        better left in the shared queue, for a rank that can run it. At least 1 when idle, if the
        cache can hold one. An estimate, out of date after each `add`.
        """
        running, waiting = len(self.running), len(self.waiting)
        tokens = self.max_batch_tokens - running
        tokens -= sum(len(seq.token_ids) - seq.num_expected for seq in self.waiting)
        if running:  # the last may have more than one token to run
            last = self.running[-1]
            tokens -= max(0, last.num_tokens - last.num_computed - 1)
        blocks_for = self.pool.blocks_for
        blocks = self.pool.num_free
        blocks -= sum(blocks_for(len(seq.token_ids) - seq.num_expected) for seq in self.waiting)
        # Each needs its own blocks and one spare per sequence before it.
        by_blocks = (blocks - running - waiting + 1) // (blocks_for(prompt_tokens) + 1)
        by_slots = self.max_sequences - running - waiting
        return max(0, min(by_slots, by_blocks, -(-tokens // prompt_tokens)))

    def schedule(self) -> Step:
        """Return the next step, its blocks allocated; preempt when blocks run out. May be empty.

        Every step must be committed before the next is scheduled, or given to `advance`.
        """
        slices: list[Slice] = []
        budget = self.max_batch_tokens
        block_size, prefixes = self.pool.block_size, self.prefixes
        for seq in self.running:  # preemption shortens the list, but only beyond `seq`, or by it
            known, start = seq.num_tokens, seq.num_computed
            if start == known or self._ends(seq):
                continue  # until the step ahead is committed
            if len(seq.block_ids) * block_size < known and not self._grow(seq):
                break  # preempted itself: it was the last
            length = min(known - start, budget)
            budget -= length
            slices.append(Slice(seq, start, length, start + length == known < seq.max_length))
            # A block whose last token was pending is published a step late.
            if length > 1 or known % block_size <= 1:
                prefixes.fill(seq, min(start + length, len(seq.token_ids)))
        num_decode = len(slices)
        if slices and not slices[-1].is_decode:
            num_decode -= 1
        while self.waiting and budget and len(self.running) < self.max_sequences:
            seq = self.waiting[0]
            known = len(seq.token_ids)
            shared = prefixes.find(seq)
            needed = self.pool.blocks_for(known) - len(shared)
            spare = self.pool.num_free - self.pool.num_unused(shared)
            if needed + len(self.running) > spare:
                break
            self.running.append(self.waiting.popleft())
            seq.status = Status.RUNNING
            self.pool.share(shared)
            seq.block_ids = shared + self.pool.allocate(needed)
            seq.num_published = len(shared)
            if self._has_states:
                seq.state_row = heappop(self._free_rows)
            seq.num_computed = start = len(shared) * block_size
            if not seq.num_computed_before:
                seq.num_cached = start
            length = min(known - start, budget)
            budget -= length
            slices.append(Slice(seq, start, length, start + length == known < seq.max_length))
            prefixes.fill(seq, start + length)
        return Step.of(slices, num_decode)

    def can_look_ahead(self) -> bool:
        """Return whether `schedule` preempts none, though a sequence may be about to end."""
        block_size = self.pool.block_size
        needed = sum(
            len(seq.block_ids) * block_size < seq.num_tokens and not self._ends(seq)
            for seq in self.running
        )
        return needed <= self.pool.num_free

    def advance(self, step: Step, void: abc.Collection[int] = ()) -> None:
        """Count a step's tokens as computed and its new ones as pending, before it is committed.

        void: slices whose rows ran on a wrong token; they stay as they were.
        """
        for index, piece in enumerate(step.slices):
            if piece.seq.status is Status.RUNNING and index not in void:
                piece.seq.num_computed += piece.length
                piece.seq.num_pending = int(piece.samples)

    def commit(
        self,
        step: Step,
        tokens: abc.Sequence[int],
        logprobs: abc.Sequence[float] | None = None,
        prompt_logprobs: abc.Sequence[float] = (),
        top: abc.Sequence[TopLogprobs] | None = None,
        prompt_top: abc.Sequence[TopLogprobs] | None = None,
        advanced: bool = False,
        void: abc.Collection[int] = (),
    ) -> list[Sequence]:
        """Record a step's results; return the sequences that finished, their blocks freed.

        Args:
            tokens: one per slice of `step.sampling`.
            logprobs: the same; None when no request wants them.
            prompt_logprobs: one per row of `step.prompt_rows`.
            top: the likeliest tokens, one list per slice of `step.sampling`; None as `logprobs`.
            prompt_top: the same per row of `step.prompt_rows`.
            advanced: whether `advance` was called for it.
            void: slices whose results are left out.

        Sequences aborted since `schedule` are skipped.
        """
        assert len(tokens) == len(step.sampling), f"{len(tokens)} tokens, {len(step.sampling)} rows"
        assert len(prompt_logprobs) == len(step.prompt_rows)
        taken = 0
        if step.prompt_rows:
            for piece in step.slices[step.num_decode :]:
                count, known = len(piece.prompt_logprob_rows), piece.seq.prompt_logprobs
                if count and known is not None:
                    known.extend(prompt_logprobs[taken : taken + count])
                    if piece.seq.prompt_top_logprobs is not None and prompt_top is not None:
                        piece.seq.prompt_top_logprobs.extend(prompt_top[taken : taken + count])
                    taken += count
        finished: list[Sequence] = []
        taken = 0
        for index, piece in enumerate(step.slices):
            seq = piece.seq
            alive = seq.status is Status.RUNNING and index not in void
            if alive and not advanced:
                seq.num_computed += piece.length
            if piece.samples:
                if alive:
                    seq.num_pending = 0
                    seq.append(
                        tokens[taken],
                        None if logprobs is None else logprobs[taken],
                        None if top is None else top[taken],
                    )
                taken += 1
            elif alive and seq.num_computed == seq.max_length:
                seq.finish("length")  # max_new_tokens = 0
            if alive and seq.finish_reason is not None:
                finished.append(seq)
        if finished:
            self.running = [seq for seq in self.running if seq.status is Status.RUNNING]
            for seq in finished:
                if advanced:
                    self.prefixes.fill(seq, min(seq.num_computed, len(seq.token_ids)))
                self._release(seq)
        return finished

    def abort(self, seq: Sequence, error: RequestError) -> None:
        """End a running or waiting sequence with an error, also between `schedule` and `commit`."""
        (self.running if seq.status is Status.RUNNING else self.waiting).remove(seq)
        seq.finish("error", error)
        self.prefixes.forget(seq)
        self._release(seq)

    def _ends(self, seq: Sequence) -> bool:
        """Return whether the pending token of a sequence is the last that it may have."""
        return bool(seq.num_pending) and seq.num_tokens == seq.max_length

    def _grow(self, seq: Sequence) -> bool:
        """Allocate the next block of a running sequence, preempting the latest arrivals if needed.

        Returns False when the latest arrival is `seq` itself: then it was preempted.
        """
        while not self.pool.num_free:
            victim = self.running.pop()
            self._preempt(victim)
            if victim is seq:
                return False
        seq.block_ids += self.pool.allocate(1)
        return True

    def _preempt(self, seq: Sequence) -> None:
        assert self.running, "a single sequence exceeds the cache, which add() rules out"
        assert not seq.num_pending, "a sequence is preempted while its newest token is unknown"
        self._release(seq)
        seq.num_computed_before = max(seq.num_computed_before, seq.num_computed)
        seq.num_computed = seq.num_expected = 0
        seq.status = Status.WAITING
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def _release(self, seq: Sequence) -> None:
        self.pool.free(seq.block_ids)
        seq.block_ids = []
        seq.num_published = 0
        if seq.state_row is not None:
            heappush(self._free_rows, seq.state_row)
            seq.state_row = None


def most_running(config: SchedulerConfig) -> int:
    """Return how many sequences of one data rank run at once, at most."""
    return min(config.max_sequences, config.max_batch_tokens)
