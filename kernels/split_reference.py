"""Plain Python form of split.py: the integers that the compiled library gives, slowly.

`_levels` is free to move rows as it likes: which ranks share a level is the same in the end.
`Homes` walks its arcs in the order of csrc/homes.h, which decides between equally good splits.

Legend: E experts, W ranks, I instances in the order of their experts (homes first), N claims.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from engine.ops.expert_hosts import Hosts
from engine.ops.split_homes import Homes, Levels


class Flow:
    """Rows per instance, moved between ranks of one group along paths of hosts."""

    def __init__(self, hosts: Hosts) -> None:
        start = hosts.start_E1.tolist()
        self.rank = hosts.sorted_rank_I.tolist()
        self.instances = [range(a, b) for a, b in zip(start, start[1:], strict=False)]
        self.held: list[list[tuple[int, int]]] = [[] for _ in range(hosts.num_ranks)]
        for e, instances in enumerate(self.instances):
            for i in instances:
                self.held[self.rank[i]].append((e, i))
        self.rows = [0] * hosts.num_instances
        self.total = [0] * hosts.num_ranks

    def place(self, expert: int, count: int, ranks: set[int]) -> None:
        """Put rows of an expert evenly on its hosts among `ranks`."""
        open_hosts = [i for i in self.instances[expert] if self.rank[i] in ranks]
        for number, i in enumerate(open_hosts):
            rows = (count + number) // len(open_hosts)
            self.rows[i] += rows
            self.total[self.rank[i]] += rows

    def drain(self, ranks: set[int], experts: set[int], cap: dict[int, int]) -> set[int]:
        """Move rows off ranks over their cap; return the ranks that what is left can reach."""
        while True:
            via: dict[int, tuple[int, int, int]] = {}
            queue = [r for r in sorted(ranks) if self.total[r] > cap[r]]
            seen = set(queue)
            target = None
            for r in queue:
                if self.total[r] < cap[r]:
                    target = r
                    break
                for expert, i in self.held[r]:
                    if expert not in experts or not self.rows[i]:
                        continue
                    for j in self.instances[expert]:
                        s = self.rank[j]
                        if s in ranks and s not in seen:
                            seen.add(s)
                            via[s] = (r, i, j)
                            queue.append(s)
            if target is None:
                return seen
            path, r = [], target
            while r in via:
                path.append(via[r])
                r = via[r][0]
            count = min(cap[target] - self.total[target], self.total[r] - cap[r])
            count = min(count, *(self.rows[i] for _, i, _ in path))
            for _, i, j in path:
                self.rows[i] -= count
                self.rows[j] += count
            self.total[r] -= count
            self.total[target] += count


def split_rows(
    load_E: np.ndarray,
    hosts: Hosts,
    speeds_W: np.ndarray | None,
    limit_W: np.ndarray | None,
    fewest_moved: bool,
) -> np.ndarray | None:
    """Plain form of `split.split_rows` without small blocks; None: no split is in the limits."""
    load = load_E.tolist()
    speeds = [1] * hosts.num_ranks if speeds_W is None else speeds_W.tolist()
    limit = None if limit_W is None else limit_W.tolist()
    if fewest_moved:
        assert limit is not None
        homes = Homes(hosts, load, _capped(hosts, limit))
        if not homes.run():
            top = _levels(load, hosts, speeds, None).top
            raised = [
                max(most, int(top * speed)) for most, speed in zip(limit, speeds, strict=True)
            ]
            homes = Homes(hosts, load, _capped(hosts, raised))
            assert homes.run()
    else:
        try:
            levels = _levels(load, hosts, speeds, limit)
        except ValueError:
            return None
        homes = Homes(hosts, load, levels)
        assert homes.run()
        homes.settle()
    rows_I = np.zeros(hosts.num_instances, dtype=np.int64)
    rows_I[hosts.place_I] = homes.split()
    return rows_I


def optimum(load_E: np.ndarray, hosts: Hosts) -> int:
    """Return the rows of the most loaded rank after the split."""
    return int(_levels(load_E.tolist(), hosts, [1] * hosts.num_ranks, None).top)


def cut(expert_N: np.ndarray, hosts: Hosts, limit_W: np.ndarray) -> np.ndarray:
    """Plain form of `split.cut`: the first claim that does not fit, again and again."""
    kept_E = np.bincount(expert_N, minlength=hosts.num_experts)
    position_E = [np.flatnonzero(expert_N == e) for e in range(hosts.num_experts)]
    cap = {rank: max(0, limit) for rank, limit in enumerate(limit_W.tolist())}
    ranks, experts = set(range(hosts.num_ranks)), set(range(hosts.num_experts))
    fits = 0
    while ranks:
        # The first `full` claims are one too many for the ranks in `tight`.
        full, tight = len(expert_N) + 1, set[int]()
        while full - fits > 1:
            middle = (fits + full) // 2
            flow = Flow(hosts)
            for e in experts:
                flow.place(e, int(np.searchsorted(position_E[e], middle)), ranks)
            reached = flow.drain(ranks, experts, cap)
            if reached:
                full, tight = middle, reached
            else:
                fits = middle
        if not tight:
            break
        ranks -= tight
        for e in sorted(experts):
            if not ranks & set(_ranks_of(hosts, e)):
                kept_E[e] = np.searchsorted(position_E[e], fits)
                experts.remove(e)
    return kept_E.astype(np.int64)


def _ranks_of(hosts: Hosts, expert: int) -> list[int]:
    return hosts.sorted_rank_I[hosts.start_E1[expert] : hosts.start_E1[expert + 1]].tolist()


def _capped(hosts: Hosts, limit: list[int]) -> Levels:
    num_ranks = hosts.num_ranks
    return Levels(limit, [0] * num_ranks, [0] * num_ranks, [0] * hosts.num_experts)


def _levels(
    load: list[int], hosts: Hosts, speeds: Sequence[int], limit: list[int] | None
) -> Levels:
    """Find the blocks of ranks that share a level; raise ValueError where limits do not allow."""
    num_ranks = hosts.num_ranks
    levels = Levels([0] * num_ranks, [0] * num_ranks, [0] * num_ranks, [0] * hosts.num_experts, [0])
    flow = Flow(hosts)
    everyone = set(range(num_ranks))
    for e, count in enumerate(load):
        flow.place(e, count, everyone)
    open_groups = [(everyone, set(range(hosts.num_experts)), 0)]
    while open_groups:
        ranks, experts, group = open_groups.pop()
        rows = sum(flow.total[r] for r in ranks)
        if not ranks or not rows:
            continue
        level = _level(ranks, rows, speeds, limit)
        most = {r: len(everyone) * rows if limit is None else limit[r] for r in ranks}
        lax = {r: min(most[r], int(level * speeds[r])) for r in ranks}
        strict = {r: min(most[r], max(0, -int(-level * speeds[r] // 1) - 1)) for r in ranks}
        reached = flow.drain(ranks, experts, lax)
        above = bool(reached)
        if not above:
            reached = flow.drain(ranks, experts, strict)
        inside = {
            e
            for e in experts
            if any(flow.rows[i] for i in flow.instances[e] if flow.rank[i] in reached)
        }
        levels.extras.append(0)
        block = len(levels.extras) - 1
        for r in reached:
            levels.group[r] = block
        for e in inside:
            levels.group_of[e] = block
        open_groups.append((ranks - reached, experts - inside, group))
        if above:
            open_groups.append((reached, inside, block))
            continue
        levels.top = max(levels.top, level)
        for r in reached:
            levels.base[r] = strict[r]
            levels.extra[r] = lax[r] - strict[r]
            levels.extras[block] += flow.total[r] - strict[r]
    return levels


def _level(ranks: set[int], rows: int, speeds: Sequence[int], limit: list[int] | None) -> Fraction:
    """Return the level of the last of `rows` rows that ranks fill evenly, up to their limits."""
    most = {r: rows if limit is None else min(rows, limit[r]) for r in ranks}
    if sum(most.values()) < rows:
        raise ValueError("more rows than the ranks may have")
    # The level is a count over a speed; the number of places at or below it grows with it.
    found: Fraction | None = None
    for speed in {speeds[r] for r in ranks}:
        low, high = 0, max(rows, 1) * speed
        while high - low > 1:
            middle = (low + high) // 2
            level = Fraction(middle, speed)
            if sum(min(most[r], int(level * speeds[r])) for r in ranks) >= rows:
                high = middle
            else:
                low = middle
        level = Fraction(high, speed)
        enough = sum(min(most[r], int(level * speeds[r])) for r in ranks) >= rows
        if enough and (found is None or level < found):
            found = level
    assert found is not None
    return found
