"""Graph steps: which steps the captured decode graphs run, and what a step gives there.

Every rank's control message has the bucket that its own sequences would take, 0 where they need the
host. A graph runs the step where no rank says 0, and all take the largest of the buckets: ranks
without a sequence too, since the graph's collectives need them. A step in which tokens compete for
capacity, or which runs as two micro-batches, is eager; so is every complete one (profiler.every,
the 16th by default), which has all marks of the profiler and every position of the watchdog.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.generation.control import ControlMessage
from engine.generation.decode_graphs import DecodeGraphs
from engine.generation.decode_step import has_fixed_shape
from engine.generation.late.late_step import LateStep
from engine.generation.runner import Fed
from engine.generation.sampling.sampler import NonFiniteLogitsError
from engine.generation.sampling.static_sampler import Draws
from engine.generation.sampling.step_outcome import StepOutcome
from engine.generation.step import Step
from engine.layers.decode_inputs import bucket_of
from engine.profiling.late_loads import Record
from engine.profiling.phase_clock import Phase
from engine.profiling.telemetry import Telemetry

# What a replay counts on the device: the counts, which every replay overwrites, and their reader.
Counted = list[tuple[torch.Tensor, Record]]


class GraphSteps:
    """The decode steps of one rank that graphs run.

    Args:
        graphs: captured.
        counted: by bucket, what a replay counts.
        telemetry: of the engine.
        vocab: tokens of the vocabulary.
        splits: whether a step of so many tokens over all ranks runs as two micro-batches.
    """

    def __init__(
        self,
        graphs: DecodeGraphs,
        counted: dict[int, Counted],
        telemetry: Telemetry,
        vocab: int,
        splits: Callable[[int], bool],
    ) -> None:
        self.num_run = 0  # steps that graphs ran
        self._graphs, self._counted, self._telemetry = graphs, counted, telemetry
        self._vocab, self._splits = vocab, splits
        self._largest = max(graphs.buckets)

    @property
    def buckets(self) -> list[int]:
        """The buckets that are captured."""
        return self._graphs.buckets

    def wanted(self, step: Step) -> int:
        """Return the bucket that this rank's part of a step takes, 0: it cannot be in a graph."""
        bucket = bucket_of(len(step.slices))
        if bucket is None or bucket > self._largest or not has_fixed_shape(step, self._vocab):
            return 0
        return bucket

    def agreed(self, messages: Sequence[ControlMessage]) -> int | None:
        """Return the bucket of a step without capacity, None: it is eager. The same on
        every rank.

        Args:
            messages: of all ranks.
        """
        buckets = [message.graph_bucket for message in messages]
        if not all(buckets) or self._telemetry.clock.is_complete:
            return None
        splits = any(message.running > 1 for message in messages)
        if splits and self._splits(sum(message.tokens_decode for message in messages)):
            return None
        return max(buckets)

    def run(
        self,
        step: Step,
        bucket: int,
        *,
        samples: bool,
        fed: Fed | None = None,
        late: bool = False,
    ) -> StepOutcome | LateStep:
        """Run a step and return its outcome, without tokens where this rank does not sample.

        Args:
            step: of this rank.
            bucket: that all ranks have agreed on.
            samples: whether this rank samples.
            fed: where tokens of the step are pending.
            late: whether its tokens may stay on the device: then the step in flight is returned,
                except where no graph samples them.

        Collective over EP and TP: every rank must call with the same bucket.
        """
        # One mark: the layers' own are not taken in a replay. Ranks wait for each other within.
        self._telemetry.clock.enter_collective(Phase.GRAPH, tokens=step.num_tokens)
        graphs = self._graphs
        draws = graphs.forward(bucket, step.slices, fed)
        for counts, record in self._counted[bucket]:
            self._telemetry.loads.late.add(counts, record)
        self.num_run += 1
        chosen_S = graphs.choose(bucket, step.slices, draws) if late else None
        if chosen_S is not None:
            outcome = LateStep.of_chosen(step, chosen_S)
        else:
            outcome = self._sample(step, bucket, draws) if samples else StepOutcome()
        self._telemetry.clock.enter(Phase.OTHER)
        return outcome

    def _sample(self, step: Step, bucket: int, draws: Draws) -> StepOutcome:
        outcome = StepOutcome()
        try:
            outcome.tokens = self._graphs.sample(bucket, step.slices, draws).tokens
        except NonFiniteLogitsError as error:
            outcome.tokens = error.tokens
            outcome.errors = dict.fromkeys(error.rows, str(error))
        return outcome
