"""Plain Python form of csrc/homes.h: the fewest rows away from home by a flow of least cost.

The arcs, their order and every walk are those of the compiled form, so that both give the same
split also where several are equally good.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from engine.ops.expert_hosts import Hosts

_UNLIMITED = (2**63 - 1) // 4


@dataclass
class Levels:
    """What each rank takes: `base` rows, or one more where `extra`; a block shares `extras`."""

    base: list[int]
    extra: list[int]
    group: list[int]  # the block of each rank
    group_of: list[int]  # of each expert
    extras: list[int] = field(default_factory=lambda: [0])
    top: Fraction = Fraction(0)  # the highest level, in rows per unit of speed


class Homes:
    """A flow from experts over ranks (and a node per block for its extra rows) to a sink."""

    def __init__(self, hosts: Hosts, load: list[int], levels: Levels) -> None:
        self.levels = levels
        self.num_ranks, self.num_experts = hosts.num_ranks, hosts.num_experts
        blocks = len(levels.extras)
        self.sink = self.num_ranks + self.num_experts + blocks
        self.first: list[list[int]] = [[] for _ in range(self.sink + 1)]  # newest arc first
        self.to: list[int] = []
        self.cost: list[int] = []
        self.room: list[int] = []
        self.price = [0] * (self.sink + 1)
        self.excess = [0] * self.num_ranks
        self.rows = [0] * hosts.num_instances
        self.arc_of: dict[int, int] = {}
        self.arc_of_extra: dict[int, int] = {}
        start, rank = hosts.start_E1.tolist(), hosts.sorted_rank_I.tolist()
        for e, count in enumerate(load):
            if count:
                self._place(e, count, range(start[e], start[e + 1]), rank)
        for r in range(self.num_ranks):
            kept = min(self.excess[r], levels.base[r])
            self._add(r, self.sink, levels.base[r] - kept, kept, 0)
            self.excess[r] -= kept
            if levels.extra[r]:
                node = self.num_ranks + self.num_experts + levels.group[r]
                self.arc_of_extra[r] = self._add(r, node, 1, 0, 0)
        for block, extras in enumerate(levels.extras):
            if extras:
                self._add(self.num_ranks + self.num_experts + block, self.sink, extras, 0, 0)

    def run(self) -> bool:
        """Move what ranks have above their share; return whether all of it found a place."""
        while any(count > 0 for count in self.excess):
            if not self._measure():
                return False
            while self._layer():
                for r in range(self.num_ranks):
                    if self.excess[r] > 0:
                        self.excess[r] -= self._push(r, self.excess[r])
        return True

    def settle(self) -> None:
        """Give extra rows to the lower ranks where that moves no row away from home."""
        levels, num_ranks = self.levels, self.num_ranks
        dead: set[int] = set()
        for r in range(num_ranks):
            into = self.arc_of_extra.get(r)
            if into is None or not self.room[into] or self._gap(into) or r in dead:
                continue
            queue, via, seen, best = [r], {}, {r}, -1
            for node in queue:
                for arc in self.first[node]:
                    u, back = self.to[arc], arc ^ 1
                    if u >= num_ranks + self.num_experts or u in seen or u in dead:
                        continue
                    if not self.room[back] or self._gap(back):
                        continue
                    seen.add(u)
                    via[u] = back
                    queue.append(u)
                    if max(best, r) < u < num_ranks and levels.group[u] == levels.group[r]:
                        extra = self.arc_of_extra.get(u)
                        if extra is not None and self.room[extra ^ 1] and not self._gap(extra ^ 1):
                            best = u
            if best < 0:
                dead |= seen
                continue
            self._move(self.arc_of_extra[best] ^ 1, 1)
            u = best
            while u != r:
                self._move(via[u], 1)
                u = self.to[via[u]]
            self._move(into, 1)

    def split(self) -> list[int]:
        """Return the rows of each instance."""
        for i, arc in self.arc_of.items():
            self.rows[i] = self.room[arc ^ 1]
        return self.rows

    def _place(self, expert: int, count: int, instances: range, rank: list[int]) -> None:
        levels = self.levels
        shared = len(instances) > 1
        allowed = [
            i for i in instances if not shared or levels.group[rank[i]] == levels.group_of[expert]
        ]
        home = allowed[0] == instances[0]
        even, left = divmod(count, len(allowed))
        for number, i in enumerate(allowed):
            self.rows[i] = count * (number == 0) if home else even + (number < left)
            self.excess[rank[i]] += self.rows[i]
            if len(allowed) > 1:
                price = int(home and i != instances[0])
                node = self.num_ranks + expert
                self.arc_of[i] = self._add(node, rank[i], _UNLIMITED, self.rows[i], price)

    def _add(self, source: int, target: int, open_room: int, used: int, price: int) -> int:
        arc = len(self.to)
        self.to += [target, source]
        self.room += [open_room, used]
        self.cost += [price, -price]
        self.first[source].insert(0, arc)
        self.first[target].insert(0, arc + 1)
        return arc

    def _gap(self, arc: int) -> int:
        return self.cost[arc] + self.price[self.to[arc ^ 1]] - self.price[self.to[arc]]

    def _move(self, arc: int, count: int) -> None:
        self.room[arc] -= count
        self.room[arc ^ 1] += count

    def _measure(self) -> bool:
        """Raise prices by the distances from ranks with excess, up to the sink's."""
        distance: dict[int, int] = {r: 0 for r in range(self.num_ranks) if self.excess[r] > 0}
        buckets = [list(distance)]
        depth = 0
        while depth < len(buckets) and distance.get(self.sink, depth + 1) > depth:
            for u in buckets[depth]:
                if distance[u] != depth:
                    continue
                for arc in self.first[u]:
                    if not self.room[arc]:
                        continue
                    far, node = depth + self._gap(arc), self.to[arc]
                    if node in distance and far >= distance[node]:
                        continue
                    distance[node] = far
                    buckets += [[] for _ in range(far + 1 - len(buckets))]
                    buckets[far].append(node)
            depth += 1
        if self.sink not in distance:
            return False
        most = distance[self.sink]
        for u in range(self.sink + 1):
            self.price[u] += min(distance.get(u, most), most)
        return True

    def _layer(self) -> bool:
        self.level = {r: 0 for r in range(self.num_ranks) if self.excess[r] > 0}
        self.cursor = [0] * (self.sink + 1)
        queue = list(self.level)
        for u in queue:
            if self.sink in self.level:
                break
            for arc in self.first[u]:
                node = self.to[arc]
                if self.room[arc] and node not in self.level and not self._gap(arc):
                    self.level[node] = self.level[u] + 1
                    queue.append(node)
        return self.sink in self.level

    def _push(self, u: int, want: int) -> int:
        if u == self.sink:
            return want
        got = 0
        while self.cursor[u] < len(self.first[u]):
            arc = self.first[u][self.cursor[u]]
            node = self.to[arc]
            layered = self.level.get(node) == self.level[u] + 1
            if self.room[arc] and layered and not self._gap(arc):
                moved = self._push(node, min(want - got, self.room[arc]))
                self._move(arc, moved)
                got += moved
                if got == want:
                    return got
            self.cursor[u] += 1
        return got
