"""A run's spans in memory: one record per rank, cut to the steps that a group of ranks share.

Ranks of a group run in lockstep: the wait of one is caused by another. Ranks of different
groups are independent, so every view across ranks is of one group.

Legend: S steps, N spans of all steps, L MoE layers, E experts, e experts of one rank, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

# Columns of a table of spans: one row per span. Offsets count from the step's start; times are in
# nanoseconds; WAITED is -1 where it is unknown.
PHASE, LAYER, OFFSET, DURATION, TOKENS, BYTES, WAITED = range(7)
NUM_COLUMNS = 7
# The phases in which a rank waits for others; all else is its own work.
COLLECTIVES = ("consensus", "dispatch", "combine", "control", "tensor")
# Of them, those in which it waits for its own tensor group alone.
PARTIAL = ("tensor",)
# The first steps make kernels and connections; their times are not typical of the ranks.
_WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Held:
    """The experts of one rank in one layer."""

    experts: tuple[int, ...]  # those whose home it is, then those that it has a copy of
    num_homes: int
    num_copies: int  # on all ranks of the group

    @property
    def homes(self) -> tuple[int, ...]:
        """The experts whose home it is."""
        return self.experts[: self.num_homes]

    @property
    def copies(self) -> tuple[int, ...]:
        """The experts that it has a copy of."""
        return self.experts[self.num_homes :]


@dataclass(frozen=True, slots=True)
class RankHeader:
    """The first line of a span file."""

    rank: int
    host: str
    world_size: int
    group: tuple[int, ...]  # ranks in lockstep with this one, itself included
    clock_error_ns: int  # largest error of this rank's timestamps
    phases: tuple[str, ...]
    num_layers: int
    num_experts: int
    policy: str
    held: dict[int, Held]  # by MoE layer

    @property
    def collectives(self) -> list[int]:
        """Numbers of the phases that are collectives."""
        return [index for index, name in enumerate(self.phases) if name in COLLECTIVES]


@dataclass(frozen=True, slots=True)
class RankSpans:
    """The span files of one rank."""

    header: RankHeader
    steps_S: np.ndarray  # int64, step numbers, ascending
    starts_S: np.ndarray  # int64, nanoseconds on the run's common clock
    tokens_S2: np.ndarray  # int64, this rank's prefill and decode tokens
    begins_S: np.ndarray  # int64 [S + 1], the first span of every step in table_N7
    table_N7: np.ndarray  # int64, columns as above
    layers: list[int]  # the MoE layers
    before_SLE: np.ndarray | None  # int32, rows of all ranks before capacity; None: another rank's
    after_SLe: np.ndarray  # int32, rows of this rank's own experts after capacity, homes and then
    # copies; 0 behind those of a layer with fewer than the one with most

    def after(self, place: int) -> np.ndarray:
        """Return the rows of the place-th layer's own experts over all steps, int64 [e]."""
        width = len(self.header.held[self.layers[place]].experts)
        return self.after_SLe[:, place, :width].sum(0, dtype=np.int64)

    def spans(self, index: int) -> np.ndarray:
        """Return the spans of the index-th step, int64 [n, 7]."""
        return self.table_N7[self.begins_S[index] : self.begins_S[index + 1]]

    @property
    def step_of_N(self) -> np.ndarray:
        """int64 [N], the index of every span's step."""
        return np.repeat(np.arange(len(self.steps_S)), np.diff(self.begins_S))

    @property
    def ends_S(self) -> np.ndarray:
        """int64 [S], when the last span of every step ended, nanoseconds."""
        last = self.table_N7[self.begins_S[1:] - 1]
        return self.starts_S + last[:, OFFSET] + last[:, DURATION]

    def only(self, steps: np.ndarray) -> RankSpans:
        """Return the same with these steps alone: ascending step numbers that this rank has."""
        if len(steps) == len(self.steps_S):
            return self
        chosen = np.searchsorted(self.steps_S, steps)
        lengths = np.diff(self.begins_S)
        keep_N = np.isin(self.step_of_N, chosen)
        return replace(
            self,
            steps_S=self.steps_S[chosen],
            starts_S=self.starts_S[chosen],
            tokens_S2=self.tokens_S2[chosen],
            begins_S=np.concatenate(([0], lengths[chosen].cumsum())),
            table_N7=self.table_N7[keep_N],
            before_SLE=None if self.before_SLE is None else self.before_SLE[chosen],
            after_SLe=self.after_SLe[chosen],
        )


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks of one lockstep group, all with the same steps."""

    name: str
    ranks: list[RankSpans]
    missing: list[int]  # ranks of the group whose files were not found
    notes: list[str]  # sentences for the reader

    @property
    def steps_S(self) -> np.ndarray:
        """int64 [S], the steps that all ranks have."""
        return self.ranks[0].steps_S

    @property
    def phases(self) -> tuple[str, ...]:
        """The names of the phases."""
        return self.ranks[0].header.phases

    @property
    def begin_ns(self) -> np.ndarray:
        """int64 [S], when the first rank began each step."""
        return np.stack([rank.starts_S for rank in self.ranks]).min(0)

    @property
    def length_ns(self) -> np.ndarray:
        """int64 [S], from the first rank's begin to the last rank's end of each step."""
        return np.stack([rank.ends_S for rank in self.ranks]).max(0) - self.begin_ns

    @property
    def settled_S(self) -> np.ndarray:
        """bool [S], false for the run's first steps, unless there are no others."""
        settled = self.steps_S > _WARM_UP
        return settled if settled.any() else np.ones_like(settled)


@dataclass(frozen=True, slots=True)
class Run:
    """All span files of a folder."""

    name: str
    ranks: list[RankSpans]  # ascending
    notes: list[str]  # sentences on what was left out

    def group(self, of_rank: int | None = None) -> Group:
        """Return the lockstep group of a rank (default: the first), cut to common steps.

        Raises:
            ValueError: the rank has no spans, or its group has no step in common.
        """
        ranks = {rank.header.rank: rank for rank in self.ranks}
        if of_rank is None:
            of_rank = min(ranks)
        if of_rank not in ranks:
            raise ValueError(
                f"--rank {of_rank}: {self.name} has no spans of it; choose one of "
                f"{ranges(sorted(ranks))}"
            )
        members = ranks[of_rank].header.group
        found = [ranks[rank] for rank in members if rank in ranks]
        missing = [rank for rank in members if rank not in ranks]
        for rank in found:
            if rank.layers != found[0].layers:
                raise ValueError(
                    f"{self.name}: rank {rank.header.rank} has loads of layers "
                    f"{ranges(rank.layers)}, rank {found[0].header.rank} of "
                    f"{ranges(found[0].layers)}; copy the files of one run"
                )
        steps = reduce(np.intersect1d, [rank.steps_S for rank in found])
        if not len(steps):
            raise ValueError(
                f"{self.name}: ranks {ranges(members)} have no step in common; copy the files of "
                "one run, or give the job a larger profiler.spans_mib"
            )
        notes = [*self.notes, *_group_notes(found, missing, steps)]
        others = sorted({rank.header.group for rank in self.ranks} - {members})
        if others:
            notes.append(
                f"This page is about ranks {ranges(members)}, which run in lockstep; --rank shows "
                f"another group: {'; '.join(ranges(group) for group in others)}."
            )
        return Group(self.name, [rank.only(steps) for rank in found], missing, notes)


def _group_notes(found: list[RankSpans], missing: list[int], steps: np.ndarray) -> list[str]:
    notes = []
    if missing:
        notes.append(
            f"There are no spans of {'rank' if len(missing) == 1 else 'ranks'} {ranges(missing)}: "
            "its bars are missing, and its experts' loads after capacity; copy its files from its "
            "host into the folder."
        )
    seen = len(reduce(np.union1d, [rank.steps_S for rank in found]))
    if seen != len(steps):
        notes.append(
            f"Ranks hold different steps; everything here is of the {len(steps):,} of {seen:,} "
            f"steps that all of them have, {steps[0]:,} to {steps[-1]:,}."
        )
    unknown = np.zeros(len(steps), dtype=bool)
    for rank in found:
        kept = rank.only(steps)
        unknown[kept.step_of_N[kept.table_N7[:, WAITED] < 0]] = True
    if unknown.any():
        notes.append(
            f"In {unknown.sum():,} of {len(steps):,} steps it is not known how long ranks waited; "
            "there it counts as none."
        )
    return notes


def ranges(numbers: tuple[int, ...] | list[int]) -> str:
    """Return ascending numbers as text: [0, 1, 2, 5] as "0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
