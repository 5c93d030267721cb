// The least majorised split: which ranks share a level, and what each takes of it.
#pragma once
#include <queue>
#include <utility>

#include "split.h"

namespace lockstep {

// A level: the rows that a rank takes per unit of its speed, as an exact fraction.
struct Level {
  int64_t rows = 0, speed = 1;
};

// Every rank ends with `base` rows, or with one more where `extra` says so; of the ranks of one
// block `extras` get it. Ranks in one group are one block.
struct Levels {
  const Hosts& hosts;
  const int64_t *load, *speeds, *limit;  // speeds and limit may be null
  Flow flow;
  std::vector<int64_t> base, extra, strict, lax;
  std::vector<int64_t> extras;  // by group
  Level found;

  Levels(const Hosts& all, const int64_t* load, const int64_t* speeds, const int64_t* limit)
      : hosts(all), load(load), speeds(speeds), limit(limit), flow(all), base(all.ranks),
        extra(all.ranks), strict(all.ranks), lax(all.ranks), extras(1) {}

  // Starts again with other loads.
  void reset(const int64_t* other) {
    load = other;
    flow.clear();
    extras.assign(1, 0);
  }

  // Finds all blocks, or (`top`) the highest level alone. Returns false where no split is within
  // the limits.
  bool find(bool top = false) {
    std::vector<int32_t> ranks(hosts.ranks), experts;
    for (int64_t r = 0; r < hosts.ranks; ++r) ranks[r] = static_cast<int32_t>(r);
    int64_t rows = 0;
    for (int64_t e = 0; e < hosts.experts; ++e) {
      rows += load[e];
      if (hosts.shared(e) && load[e]) experts.push_back(static_cast<int32_t>(e));
    }
    if (!set_caps(ranks, rows)) return false;
    flow.cap = lax;
    for (int64_t e = 0; e < hosts.experts; ++e)
      if (!hosts.shared(e)) flow.spread(e, load[e]);
    for (int pass = 0; pass < 3; ++pass) {
      for (int32_t e : experts) flow.spread(e, load[e]);
      bool fits = true;
      for (int64_t r = 0; r < hosts.ranks; ++r) fits &= flow.total[r] <= lax[r];
      if (fits) break;
    }
    return solve(ranks, experts, 0, top);
  }

 private:
  int64_t speed_of(int64_t r) const { return speeds ? speeds[r] : 1; }
  int64_t limit_of(int64_t r) const { return limit ? limit[r] : UNLIMITED; }

  // Sets the caps of ranks that share `rows` alone: `lax` at the level of the last row and
  // `strict` just below it.
  bool set_caps(const std::vector<int32_t>& ranks, int64_t rows) {
    if (!speeds && !limit) {
      const int64_t count = static_cast<int64_t>(ranks.size());
      found = {(rows + count - 1) / count, 1};
    } else if (!share(ranks, rows)) {
      return false;
    }
    for (int32_t r : ranks) {
      const __int128 scaled = static_cast<__int128>(found.rows) * speed_of(r);
      const int64_t floor = static_cast<int64_t>(scaled / found.speed);
      const int64_t below = floor - (scaled % found.speed == 0);
      lax[r] = std::min(limit_of(r), floor);
      strict[r] = std::min(limit_of(r), std::max<int64_t>(0, below));
    }
    return true;
  }

  bool share(const std::vector<int32_t>& ranks, int64_t rows) {
    std::vector<int32_t> open = ranks, still;
    std::vector<std::pair<int32_t, int64_t>> taken;
    int64_t left = rows;
    while (!open.empty()) {
      __int128 speed = 0;
      for (int32_t r : open) speed += speed_of(r);
      still.clear();
      int64_t fixed = 0;
      for (int32_t r : open) {
        if (static_cast<__int128>(left) * speed_of(r) >= speed * limit_of(r)) {
          taken.push_back({r, limit_of(r)});
          fixed += limit_of(r);
        } else {
          still.push_back(r);
        }
      }
      left -= fixed;
      const bool same = still.size() == open.size();
      open.swap(still);
      if (!same) continue;
      const auto later = [&](const std::pair<int32_t, int64_t>& a,
                             const std::pair<int32_t, int64_t>& b) {
        return static_cast<__int128>(a.second) * speed_of(b.first) >
               static_cast<__int128>(b.second) * speed_of(a.first);
      };
      std::priority_queue<std::pair<int32_t, int64_t>, std::vector<std::pair<int32_t, int64_t>>,
                          decltype(later)>
          heap(later);
      int64_t remain = left;
      std::vector<int64_t> count(hosts.ranks);
      for (int32_t r : open) {
        count[r] = static_cast<int64_t>(static_cast<__int128>(left) * speed_of(r) / speed);
        remain -= count[r];
        heap.push({r, count[r] + 1});
      }
      for (; remain > 0 && !heap.empty(); --remain) {
        const auto [r, number] = heap.top();
        heap.pop();
        count[r] = number;
        if (number < limit_of(r)) heap.push({r, number + 1});
      }
      if (remain > 0) return false;
      for (int32_t r : open) taken.push_back({r, count[r]});
      left = 0;
      break;
    }
    if (left > 0) return false;
    found = {0, 1};
    for (const auto& [r, count] : taken)
      if (static_cast<__int128>(count) * found.speed > static_cast<__int128>(found.rows) * speed_of(r))
        found = {count, speed_of(r)};
    return true;
  }

  // Splits off what the last drain reached, as a group of its own; returns the group.
  int32_t part(std::vector<int32_t>& ranks, std::vector<int32_t>& experts,
               std::vector<int32_t>& far_ranks, std::vector<int32_t>& far_experts) {
    const int32_t group = static_cast<int32_t>(extras.size());
    extras.push_back(0);
    std::vector<int32_t> near_ranks, near_experts;
    for (int32_t r : ranks) (flow.level[r] >= 0 ? near_ranks : far_ranks).push_back(r);
    for (int32_t e : experts) (flow.reached[e] >= 0 ? near_experts : far_experts).push_back(e);
    for (int32_t r : near_ranks) flow.group[r] = group;
    for (int32_t e : near_experts) flow.group_of[e] = group;
    ranks.swap(near_ranks);
    experts.swap(near_experts);
    return group;
  }

  bool solve(std::vector<int32_t> ranks, std::vector<int32_t> experts, int32_t group, bool top) {
    for (;;) {
      int64_t rows = 0;
      for (int32_t r : ranks) rows += flow.total[r];
      if (!set_caps(ranks, rows)) return false;
      for (int32_t r : ranks) flow.cap[r] = lax[r];
      std::vector<int32_t> far_ranks, far_experts;
      if (flow.drain(ranks, experts)) {
        // Some ranks end above this level, the others at or below it.
        const int32_t high = part(ranks, experts, far_ranks, far_experts);
        if (!top && !solve(std::move(far_ranks), std::move(far_experts), group, false)) return false;
        group = high;
        continue;
      }
      if (top) return true;
      for (int32_t r : ranks) flow.cap[r] = strict[r];
      if (rows && flow.drain(ranks, experts)) {
        const int32_t at_level = part(ranks, experts, far_ranks, far_experts);
        for (int32_t r : ranks) {
          base[r] = strict[r];
          extra[r] = lax[r] - strict[r];
          extras[at_level] += flow.total[r] - strict[r];
        }
        ranks = std::move(far_ranks);
        experts = std::move(far_experts);
        if (ranks.empty()) return true;
        continue;
      }
      for (int32_t r : ranks) base[r] = extra[r] = 0;
      return true;
    }
  }
};

}  // namespace lockstep
