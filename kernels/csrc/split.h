// Rows of experts on the ranks that hold them: flows between ranks that share experts.
//
// `Hosts` reads what kernels/split.py packs; `Flow` moves rows off ranks that are over a cap;
// `Levels` finds the blocks of ranks that share one level in the least majorised split.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace lockstep {

// Instances in the order of their experts, an expert's home first.
struct Hosts {
  int64_t ranks, experts, instances;
  const int64_t* start;       // [experts + 1] first instance of each expert
  const int64_t* rank;        // [instances]
  const int64_t* expert;      // [instances]
  const int64_t* rank_start;  // [ranks + 1] ranges of `by_rank`
  const int64_t* by_rank;     // instances of experts with several hosts, rank by rank
  const int64_t* place;       // [instances] where the caller keeps each

  explicit Hosts(const int64_t* packed) : ranks(packed[0]), experts(packed[1]), instances(packed[2]) {
    start = packed + 3;
    rank = start + experts + 1;
    expert = rank + instances;
    place = expert + instances;
    rank_start = place + instances;
    by_rank = rank_start + ranks + 1;
  }
  bool shared(int64_t e) const { return start[e + 1] - start[e] > 1; }
};

constexpr int64_t UNLIMITED = std::numeric_limits<int64_t>::max() / 4;

// Rows per instance, and the moves that bring ranks under their caps. Ranks and experts are in
// groups; rows of an expert move between the ranks of its group alone.
struct Flow {
  const Hosts& hosts;
  std::vector<int64_t> rows, total, cap;
  std::vector<int32_t> group, group_of;  // of ranks, of experts
  std::vector<int32_t> level, reached;   // of ranks, of experts; -1: not reached
  std::vector<int64_t> next, next_host;
  std::vector<int32_t> queue;

  explicit Flow(const Hosts& all)
      : hosts(all), rows(all.instances), total(all.ranks), cap(all.ranks), group(all.ranks),
        group_of(all.experts), level(all.ranks), reached(all.experts), next(all.ranks),
        next_host(all.experts) {
    queue.reserve(all.ranks);
  }

  void clear() {
    std::fill(rows.begin(), rows.end(), 0);
    std::fill(total.begin(), total.end(), 0);
    std::fill(group.begin(), group.end(), 0);
    std::fill(group_of.begin(), group_of.end(), 0);
  }

  bool allowed(int64_t i) const { return group[hosts.rank[i]] == group_of[hosts.expert[i]]; }

  // Spreads `count` rows of expert e over its allowed hosts so that what they have left is even.
  void spread(int64_t e, int64_t count) {
    const int64_t first = hosts.start[e], last = hosts.start[e + 1];
    for (int64_t i = first; i < last; ++i) {
      total[hosts.rank[i]] -= rows[i];
      rows[i] = 0;
    }
    if (!count) return;
    int64_t members = 0, chosen[64];
    for (int64_t i = first; i < last && members < 64; ++i)
      if (allowed(i)) chosen[members++] = i;
    // Ranks too full to take any drop out, fullest first, until all others get at least one row.
    for (;;) {
      int64_t sum = count, fullest = 0, most = std::numeric_limits<int64_t>::min();
      for (int64_t m = 0; m < members; ++m) {
        const int64_t over = total[hosts.rank[chosen[m]]] - cap[hosts.rank[chosen[m]]];
        sum += over;
        if (over > most) most = over, fullest = m;
      }
      if (members > 1 && sum <= most * members) {
        chosen[fullest] = chosen[--members];
        continue;
      }
      int64_t even = sum / members, left = sum % members;
      if (left < 0) left += members, --even;
      for (int64_t m = 0; m < members; ++m) {
        const int64_t r = hosts.rank[chosen[m]];
        const int64_t share = even + (m < left) - (total[r] - cap[r]);
        rows[chosen[m]] = share;
        total[r] += share;
      }
      return;
    }
  }

  // Rows move from ranks over their cap to ranks under it, as many as can. Returns whether some
  // rank stays over; then the ranks and experts such rows could reach have level or reached >= 0.
  bool drain(const std::vector<int32_t>& ranks, const std::vector<int32_t>& experts) {
    for (;;) {
      queue.clear();
      for (int32_t r : ranks) {
        level[r] = total[r] > cap[r] ? 0 : -1;
        next[r] = hosts.rank_start[r];
        if (!level[r]) queue.push_back(r);
      }
      if (queue.empty()) return false;
      for (int32_t e : experts) reached[e] = -1, next_host[e] = hosts.start[e];
      const size_t sources = queue.size();
      int32_t stop = std::numeric_limits<int32_t>::max();
      for (size_t head = 0; head < queue.size(); ++head) {
        const int32_t r = queue[head];
        if (level[r] >= stop) break;
        for (int64_t n = hosts.rank_start[r]; n < hosts.rank_start[r + 1]; ++n) {
          const int64_t i = hosts.by_rank[n], e = hosts.expert[i];
          if (!rows[i] || reached[e] >= 0) continue;
          reached[e] = level[r];
          for (int64_t j = hosts.start[e]; j < hosts.start[e + 1]; ++j) {
            const int64_t s = hosts.rank[j];
            if (group[s] != group[r] || level[s] >= 0) continue;
            level[s] = level[r] + 1;
            queue.push_back(static_cast<int32_t>(s));
            if (total[s] < cap[s]) stop = level[s];
          }
        }
      }
      if (stop == std::numeric_limits<int32_t>::max()) return true;
      for (size_t n = 0; n < sources; ++n)
        total[queue[n]] -= advance(queue[n], total[queue[n]] - cap[queue[n]]);
    }
  }

 private:
  // Finds place for up to `want` rows that come to rank r; returns for how many.
  int64_t advance(int64_t r, int64_t want) {
    if (total[r] < cap[r]) {
      const int64_t taken = std::min(want, cap[r] - total[r]);
      total[r] += taken;
      return taken;
    }
    int64_t got = 0;
    for (; next[r] < hosts.rank_start[r + 1]; ++next[r]) {
      const int64_t i = hosts.by_rank[next[r]], e = hosts.expert[i];
      if (!rows[i] || reached[e] != level[r]) continue;
      for (; next_host[e] < hosts.start[e + 1]; ++next_host[e]) {
        const int64_t j = next_host[e], s = hosts.rank[j];
        if (group[s] != group[r] || level[s] != level[r] + 1) continue;
        const int64_t moved = advance(s, std::min(want - got, rows[i]));
        rows[i] -= moved;
        rows[j] += moved;
        got += moved;
        if (got == want) return got;
        if (!rows[i]) break;
      }
    }
    return got;
  }
};

}  // namespace lockstep
