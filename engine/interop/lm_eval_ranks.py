"""Ranks of an evaluation: rank 0 decides what all ranks of the engine run next.

The harness runs on rank 0 alone (`lm_eval.py`), since its tasks may read, download or raise there;
the engine needs every rank in every call. So rank 0 publishes each call in the store and the others
poll it, without a time limit: building a task's requests may take longer than a collective may.

    ranks = EvaluationRanks(config)
    with ranks.driving() as is_driver:  # the other ranks follow in here, until rank 0 leaves
        if is_driver:
            ranks.use(config)
            outcomes = ranks.run(jobs)
"""

from __future__ import annotations

import gc
import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from engine.config import Config
from engine.distributed import bootstrap
from engine.distributed.collectives import broadcast_object, gather_objects
from engine.distributed.errors import RankError
from engine.generation.request_source import ListSource, partition
from engine.interop.lm_eval_usage import Usage
from engine.llm import LLM
from engine.profiling.report import StepReport
from engine.request import Completion, Request, SamplingParams

_FIRST_POLL_S = 0.002
_LAST_POLL_S = 0.1
_TIMEOUT_S = 10.0  # for all ranks to receive that the evaluation has ended


class DriverFailed(RuntimeError):
    """Rank 0 has failed, for a reason that it reports itself."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request: a text to continue, or tokens to score."""

    prompt_token_ids: Sequence[int]
    params: SamplingParams
    num_scored: int = 0  # tokens at the end of the prompt whose log probabilities count; 0: none


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one job."""

    text: str = ""  # new text
    logprob: float = 0.0  # natural logarithm, sum over the scored tokens
    is_greedy: bool = False  # each of them is the likeliest one in its place
    error: str | None = None  # why the job could not run


def outcome_of(completion: Completion, job: Job) -> Outcome:
    """Return what the harness needs of a completion.

    Where tokens are scored, it has the prompt's log probabilities and, per place, the likeliest
    token.
    """
    if completion.error is not None:
        return Outcome(error=str(completion.error["message"]))
    if not job.num_scored:
        return Outcome(text=completion.text)
    assert completion.prompt_logprobs is not None and completion.prompt_top_logprobs is not None
    scored = job.prompt_token_ids[-job.num_scored :]
    tops = completion.prompt_top_logprobs[-job.num_scored :]
    logprobs = completion.prompt_logprobs[-job.num_scored :]
    return Outcome(
        logprob=sum(value for value in logprobs if value is not None),
        is_greedy=all(
            top is not None and top[0][0] == token for token, top in zip(scored, tops, strict=True)
        ),
    )


class EvaluationRanks:
    """The engine of one rank in an evaluation. Every rank makes one. Collective over the world.

    Args:
        config: equal on every rank; its model is loaded by `use`.

    Raises:
        ValueError: the launch or the config is wrong, with the same text on every rank.
    """

    def __init__(self, config: Config) -> None:
        self.config = config  # of the engine
        self._llm: LLM | None = None
        self._is_over = False
        self.usage = Usage()  # of the jobs since the last `use`, on rank 0
        self._join()

    @property
    def llm(self) -> LLM:
        """The engine, after `use`."""
        assert self._llm is not None, "use(config) comes first"
        return self._llm

    @property
    def num_ranks(self) -> int:
        """Number of ranks of all replicas."""
        return self._topology.world.size

    @contextmanager
    def driving(self) -> Iterator[bool]:
        """Run the block on rank 0, which is given True; on the others, first follow rank 0.

        Raises:
            RankError: rank 0's block has raised a ValueError: the same on every rank.
            DriverFailed: it has raised anything else, which rank 0 raises.
        """
        if self._topology.world.rank != 0:
            self._follow()
            yield False
            return
        try:
            yield True
        except ValueError as error:
            self._end(str(error), is_users=True)
            raise
        except BaseException as error:
            self._end(repr(error), is_users=False)
            raise
        self._end(None, is_users=False)

    def use(self, config: Config) -> None:
        """Run what follows with `config`; a capacity policy alone needs no new engine. Rank 0 only.

        Raises:
            ValueError: settings that this model or this number of ranks does not support.
        """
        self._announce("use")
        self._use(broadcast_object(config, self._topology.host_world))

    def run(
        self, jobs: Sequence[Job], on_finished: Callable[[int], object] = lambda count: None
    ) -> list[Outcome]:
        """Run jobs on all ranks; return their outcomes in their order. Rank 0 only.

        Args:
            jobs: their place in the list seeds their sampling.
            on_finished: is given the number of jobs that have finished, now and then.
        """
        self._announce("run")
        jobs = broadcast_object(list(jobs), self._topology.host_world)
        return self._run(jobs, on_finished)

    def close(self) -> None:
        """Leave the run. Safe to call twice."""
        self._llm = None
        bootstrap.stop(self._topology)

    def _join(self) -> None:
        self._topology = bootstrap.start(self.config)
        # A store can outlive a run: the keys of an earlier one must not be taken for this one's.
        self._key = broadcast_object(f"evaluate/{uuid.uuid4().hex}", self._topology.host_world)
        self._num_calls = 0

    def _announce(self, call: str, error: str | None = None, is_users: bool = False) -> None:
        text = json.dumps({"call": call, "error": error, "is_users": is_users})
        self._topology.store.set(f"{self._key}/{self._num_calls}", text)
        self._num_calls += 1

    def _end(self, error: str | None, is_users: bool) -> None:
        """Tell the other ranks that no call follows, and wait until they know: this process may
        hold the store.
        """
        if self._is_over:  # a call failed on every rank
            return
        self._is_over = True
        self._announce("end", error, is_users)
        deadline = time.monotonic() + _TIMEOUT_S
        others = self._topology.world.size - 1
        while self._topology.store.add(f"{self._key}/ended", 0) < others:
            if time.monotonic() > deadline:
                return
            time.sleep(_FIRST_POLL_S)

    def _follow(self) -> None:
        """Take part in the calls of rank 0 until it has ended."""
        while True:
            store, key = self._topology.store, f"{self._key}/{self._num_calls}"
            pause_s = _FIRST_POLL_S
            while not store.check([key]):
                time.sleep(pause_s)
                pause_s = min(1.2 * pause_s, _LAST_POLL_S)
            self._num_calls += 1
            message = json.loads(store.get(key))
            if message["call"] == "end":
                store.add(f"{self._key}/ended", 1)
                if message["error"] is not None:
                    raise (RankError if message["is_users"] else DriverFailed)(message["error"])
                return
            given = broadcast_object(None, self._topology.host_world)
            if message["call"] == "use":
                self._use(given)
            else:
                self._run(given)

    def _use(self, config: Config) -> None:
        """Collective over all ranks: every rank must call."""
        self.usage = Usage()
        try:
            if self._llm is not None and _same_but_capacity(self.config, config):
                self._llm.set_capacity(config.moe.capacity)
            else:
                self._rebuild(config)
        except ValueError:  # on every rank: the others need not be told
            self._is_over = True
            raise
        self.config = config

    def _rebuild(self, config: Config) -> None:
        self._llm = None  # so that the weights and the cache of the last one go first
        gc.collect()
        if (config.parallel, config.runtime) != (self.config.parallel, self.config.runtime):
            bootstrap.stop(self._topology)
            self.config = config
            self._join()
        self._llm = LLM(config, self._topology)

    def _run(
        self, jobs: Sequence[Job], on_finished: Callable[[int], object] = lambda count: None
    ) -> list[Outcome]:
        """Collective over all ranks: every rank must call."""
        topology = self._topology
        requests = [
            Request(
                index=index,
                id=index,
                prompt_token_ids=job.prompt_token_ids,
                params=job.params,
            )
            for index, job in enumerate(jobs)
        ]
        own = partition(requests, topology.num_data)[topology.data_rank]
        done: list[tuple[int, Outcome]] = []

        def sink(completions: list[Completion]) -> None:
            done.extend((item.index, outcome_of(item, jobs[item.index])) for item in completions)

        def on_step(report: StepReport) -> None:
            on_finished(report.finished)

        report = self.llm.run(ListSource(own), sink, on_step)
        usage, group = Usage(), topology.expert
        if group.rank == 0:
            usage = Usage.of(report, group.size)
        shares = gather_objects((done, usage), topology.host_world)
        for _, of_rank in shares:
            self.usage.add(of_rank)
        outcomes = dict(pair for of_rank, _ in shares for pair in of_rank)
        return [outcomes[index] for index in range(len(jobs))]


def _same_but_capacity(one: Config, other: Config) -> bool:
    """Return whether two configs differ in nothing but moe.capacity, which moe.policy overrides."""
    return one.moe.policy is None and one == replace(
        other, moe=replace(other.moe, capacity=one.moe.capacity)
    )
