// The fewest rows away from home, given what each rank takes: a flow of least cost.
//
// Primal and dual: distances by rows moved away from home, then as many rows as can along shortest
// paths, until no rank has more than it takes. Arcs are kept in pairs, so that one's other
// direction is its number ^ 1. kernels/split_homes.py walks them in the same order: both give the
// same split, also where several are equally good.
#pragma once
#include <tuple>

#include "levels.h"

namespace lockstep {

struct Homes {
  const Hosts& hosts;
  std::vector<int32_t> first, next, to, cost;
  std::vector<int64_t> room;
  std::vector<int32_t> arc_of;  // of instances; -1 where the instance takes no part
  std::vector<int32_t> arc_of_extra;
  std::vector<int64_t> excess, rows;
  std::vector<int32_t> price, distance, level, cursor, queue;
  int32_t sink;

  // base, extra, extras as in Levels; group and group_of say which hosts may be used.
  Homes(const Hosts& all, const int64_t* load, const Levels& levels)
      : hosts(all), arc_of(all.instances, -1), arc_of_extra(all.ranks, -1), excess(all.ranks),
        rows(all.instances) {
    const int64_t blocks = static_cast<int64_t>(levels.extras.size());
    sink = static_cast<int32_t>(all.ranks + all.experts + blocks);
    first.assign(sink + 1, -1);
    price.assign(sink + 1, 0);
    for (int64_t e = 0; e < all.experts; ++e) place_expert(e, load[e], levels);
    for (int64_t r = 0; r < all.ranks; ++r) {
      const int64_t kept = std::min(excess[r], levels.base[r]);
      add(r, sink, levels.base[r] - kept, kept, 0);
      excess[r] -= kept;
      if (levels.extra[r])
        arc_of_extra[r] = add(r, all.ranks + all.experts + levels.flow.group[r], 1, 0, 0);
    }
    for (int64_t b = 0; b < blocks; ++b)
      if (levels.extras[b]) add(all.ranks + all.experts + b, sink, levels.extras[b], 0, 0);
  }

  // Returns false where some rank cannot get rid of what is above its share.
  bool run() {
    for (;;) {
      queue.clear();
      for (int32_t r = 0; r < hosts.ranks; ++r)
        if (excess[r] > 0) queue.push_back(r);
      if (queue.empty()) break;
      if (!measure()) return false;
      while (layer()) {
        for (int32_t r = 0; r < hosts.ranks; ++r)
          if (excess[r] > 0) excess[r] -= push(r, excess[r]);
      }
    }
    return true;
  }

  // Where several ranks could have a block's extra rows at the same cost, the lower ones get them.
  void settle(const Levels& levels) {
    std::vector<int32_t> via(sink + 1);
    std::vector<char> seen(sink + 1, 0);  // also what no later search needs to look at again
    for (int32_t r = 0; r < hosts.ranks; ++r) {
      const int32_t into = arc_of_extra[r];
      if (into < 0 || !room[into] || gap(into) || seen[r]) continue;
      queue.assign(1, r);
      seen[r] = 1;
      int32_t best = -1;
      for (size_t head = 0; head < queue.size(); ++head) {
        for (int32_t a = first[queue[head]]; a >= 0; a = next[a]) {
          const int32_t u = to[a], back = a ^ 1;
          if (u >= hosts.ranks + hosts.experts || seen[u] || !room[back] || gap(back)) continue;
          seen[u] = 1;
          via[u] = back;
          queue.push_back(u);
          const bool above = u > best && u > r && u < hosts.ranks;
          if (above && holds(u, levels.flow.group[r], levels)) best = u;
        }
      }
      if (best < 0) continue;
      for (int32_t u : queue) seen[u] = 0;
      move(arc_of_extra[best] ^ 1, 1);
      for (int32_t u = best; u != r; u = to[via[u]]) move(via[u], 1);
      move(into, 1);
    }
  }

  // Rows of each instance in the order of hosts.
  const std::vector<int64_t>& split() {
    for (int64_t i = 0; i < hosts.instances; ++i)
      if (arc_of[i] >= 0) rows[i] = room[arc_of[i] ^ 1];
    return rows;
  }

 private:
  int32_t add(int64_t from, int64_t target, int64_t open, int64_t used, int32_t price_of) {
    const int32_t arc = static_cast<int32_t>(to.size());
    for (const auto& [u, v, left, sign] :
         {std::tuple{from, target, open, 1}, std::tuple{target, from, used, -1}}) {
      to.push_back(static_cast<int32_t>(v));
      room.push_back(left);
      cost.push_back(sign * price_of);
      next.push_back(first[u]);
      first[u] = static_cast<int32_t>(to.size()) - 1;
    }
    return arc;
  }

  // Starts an expert's rows at home, or evenly on its copies where its home is too full for any.
  void place_expert(int64_t e, int64_t count, const Levels& levels) {
    if (!count) return;
    const int64_t begin = hosts.start[e], end = hosts.start[e + 1];
    int64_t open = 0;
    for (int64_t i = begin; i < end; ++i) open += levels.flow.allowed(i) || !hosts.shared(e);
    const bool home = !hosts.shared(e) || levels.flow.allowed(begin);
    int64_t even = count / open, left = count % open;
    for (int64_t i = begin; i < end; ++i) {
      if (hosts.shared(e) && !levels.flow.allowed(i)) continue;
      rows[i] = home ? (i == begin ? count : 0) : even + (left-- > 0);
      excess[hosts.rank[i]] += rows[i];
      if (open > 1)
        arc_of[i] = add(hosts.ranks + e, hosts.rank[i], UNLIMITED, rows[i], home && i != begin);
    }
  }

  int32_t gap(int32_t arc) const { return cost[arc] + price[to[arc ^ 1]] - price[to[arc]]; }

  void move(int32_t arc, int64_t count) {
    room[arc] -= count;
    room[arc ^ 1] += count;
  }

  bool holds(int32_t r, int32_t group, const Levels& levels) const {
    const int32_t arc = arc_of_extra[r];
    return arc >= 0 && levels.flow.group[r] == group && room[arc ^ 1] && !gap(arc ^ 1);
  }

  // Distances from the ranks with excess (in queue) by gaps; prices rise by them, up to the sink's.
  bool measure() {
    constexpr int32_t FAR = std::numeric_limits<int32_t>::max();
    distance.assign(sink + 1, FAR);
    std::vector<std::vector<int32_t>> buckets(1, queue);
    for (int32_t r : queue) distance[r] = 0;
    for (size_t d = 0; d < buckets.size(); ++d) {
      if (distance[sink] <= static_cast<int32_t>(d)) break;
      for (size_t n = 0; n < buckets[d].size(); ++n) {
        const int32_t u = buckets[d][n];
        if (distance[u] != static_cast<int32_t>(d)) continue;
        for (int32_t a = first[u]; a >= 0; a = next[a]) {
          if (!room[a]) continue;
          const int32_t via = static_cast<int32_t>(d) + gap(a);
          if (via >= distance[to[a]]) continue;
          distance[to[a]] = via;
          if (static_cast<size_t>(via) >= buckets.size()) buckets.resize(via + 1);
          buckets[via].push_back(to[a]);
        }
      }
    }
    if (distance[sink] == FAR) return false;
    for (int32_t u = 0; u <= sink; ++u) price[u] += std::min(distance[u], distance[sink]);
    return true;
  }

  // Layers of the arcs without a gap, from the ranks with excess; whether they get to the sink.
  bool layer() {
    level.assign(sink + 1, -1);
    cursor = first;
    queue.clear();
    for (int32_t r = 0; r < hosts.ranks; ++r)
      if (excess[r] > 0) level[r] = 0, queue.push_back(r);
    for (size_t head = 0; head < queue.size() && level[sink] < 0; ++head) {
      const int32_t u = queue[head];
      for (int32_t a = first[u]; a >= 0; a = next[a]) {
        if (!room[a] || level[to[a]] >= 0 || gap(a)) continue;
        level[to[a]] = level[u] + 1;
        queue.push_back(to[a]);
      }
    }
    return level[sink] >= 0;
  }

  int64_t push(int32_t u, int64_t want) {
    if (u == sink) return want;
    int64_t got = 0;
    for (int32_t& a = cursor[u]; a >= 0; a = next[a]) {
      if (!room[a] || level[to[a]] != level[u] + 1 || gap(a)) continue;
      const int64_t moved = push(to[a], std::min(want - got, room[a]));
      move(a, moved);
      got += moved;
      if (got == want) return got;
    }
    return got;
  }
};

}  // namespace lockstep
