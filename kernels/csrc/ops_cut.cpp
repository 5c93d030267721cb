// cut: how many claims of each expert the greedy set keeps. Halves the range of claims in which
// experts close, and the ranks and experts with it: at the middle, those that rows over a limit
// reach have closed by then, the others have not. About log2(claims) flows over the whole graph.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include <bit>

#include "library.h"
#include "split.h"

namespace lockstep {
namespace {

// Claims of each expert before a position: whole counts per block of claims, the rest counted.
template <typename Id>
struct Prefix {
  const Id* expert;
  int64_t count, experts, shift;
  std::vector<int32_t> at;  // [blocks + 1, experts]

  Prefix(const Id* expert, int64_t count, int64_t experts)
      : expert(expert), count(count), experts(experts) {
    // A block about as long as there are experts, so that the table is no longer than the claims.
    shift = std::max<int64_t>(8, std::bit_width(static_cast<uint64_t>(experts)));
    const int64_t blocks = count >> shift;
    at.resize((blocks + 2) * experts);
    int32_t* row = at.data();
    for (int64_t n = 0, b = 0; b <= blocks; ++b) {
      int32_t* following = row + experts;
      std::copy(row, following, following);
      for (const int64_t end = std::min(count, (b + 1) << shift); n < end; ++n) {
        TORCH_CHECK(expert[n] >= 0 && expert[n] < experts, "cut: expert ", expert[n], " of ", experts);
        ++following[expert[n]];
      }
      row = following;
    }
  }

  // Counts of all experts among the first `position` claims.
  void read(int64_t position, std::vector<int64_t>& into) const {
    const int64_t block = position >> shift;
    std::copy_n(at.data() + block * experts, experts, into.data());
    for (int64_t n = block << shift; n < position; ++n) ++into[expert[n]];
  }
};

template <typename Id>
struct Cut {
  const Hosts& hosts;
  const Prefix<Id> claims;
  Flow flow;
  std::vector<int64_t> counts, kept;
  std::vector<std::vector<int32_t>> alone;  // experts with one host, by rank
  int32_t groups = 1;

  Cut(const Hosts& all, const Id* expert, int64_t count, const int64_t* limit)
      : hosts(all), claims(expert, count, all.experts), flow(all), counts(all.experts),
        kept(all.experts), alone(all.ranks) {
    for (int64_t r = 0; r < all.ranks; ++r) flow.cap[r] = std::clamp<int64_t>(limit[r], 0, count);
    std::vector<int32_t> ranks(all.ranks), experts;
    for (int64_t r = 0; r < all.ranks; ++r) ranks[r] = static_cast<int32_t>(r);
    for (int64_t e = 0; e < all.experts; ++e) {
      if (all.shared(e)) experts.push_back(static_cast<int32_t>(e));
      else alone[all.rank[all.start[e]]].push_back(static_cast<int32_t>(e));
    }
    claims.read(count, kept);
    if (!over(ranks, experts, count)) return;
    part(ranks, experts);
    solve(std::move(ranks), std::move(experts), 0, count);
  }

 private:
  // Whether the first `position` claims do not fit the group; then `level` and `reached` say where.
  bool over(const std::vector<int32_t>& ranks, const std::vector<int32_t>& experts,
            int64_t position) {
    claims.read(position, counts);
    for (int32_t r : ranks) flow.total[r] = 0;
    for (int32_t r : ranks)
      for (int32_t e : alone[r]) flow.total[r] += counts[e];
    for (int32_t e : experts)
      for (int64_t i = hosts.start[e]; i < hosts.start[e + 1]; ++i) flow.rows[i] = 0;
    for (int pass = 0; pass < 2; ++pass)
      for (int32_t e : experts) flow.spread(e, counts[e]);
    return flow.drain(ranks, experts);
  }

  // Makes what the last flow reached a group of its own; returns the others.
  std::pair<std::vector<int32_t>, std::vector<int32_t>> part(std::vector<int32_t>& ranks,
                                                             std::vector<int32_t>& experts) {
    std::vector<int32_t> near_ranks, near_experts, far_ranks, far_experts;
    for (int32_t r : ranks) (flow.level[r] >= 0 ? near_ranks : far_ranks).push_back(r);
    for (int32_t e : experts) {
      // An expert without a claim so far is inside where all its hosts of this group are.
      bool inside = true;
      for (int64_t i = hosts.start[e]; i < hosts.start[e + 1]; ++i)
        inside &= !flow.allowed(i) || flow.level[hosts.rank[i]] >= 0;
      (inside ? near_experts : far_experts).push_back(e);
    }
    for (int32_t r : near_ranks) flow.group[r] = groups;
    for (int32_t e : near_experts) flow.group_of[e] = groups;
    ++groups;
    ranks.swap(near_ranks);
    experts.swap(near_experts);
    return {std::move(far_ranks), std::move(far_experts)};
  }

  // The group fits its first `fits` claims and is full by claim `full`: all its experts close.
  void solve(std::vector<int32_t> ranks, std::vector<int32_t> experts, int64_t fits, int64_t full) {
    while (!ranks.empty() && full - fits > 1) {
      const int64_t middle = fits + (full - fits) / 2;
      if (!over(ranks, experts, middle)) {
        fits = middle;
        continue;
      }
      auto [later_ranks, later_experts] = part(ranks, experts);
      solve(std::move(later_ranks), std::move(later_experts), middle, full);
      full = middle;
    }
    if (ranks.empty()) return;
    claims.read(fits, counts);
    for (int32_t e : experts) kept[e] = counts[e];
    for (int32_t r : ranks)
      for (int32_t e : alone[r]) kept[e] = counts[e];
  }
};

}  // namespace

at::Tensor cut(const at::Tensor& packed, const at::Tensor& expert, const at::Tensor& limit) {
  TORCH_CHECK(packed.scalar_type() == at::kLong && limit.scalar_type() == at::kLong &&
                  packed.is_contiguous() && limit.is_contiguous() && expert.is_contiguous(),
              "cut: contiguous int64 hosts and limits and contiguous experts expected");
  const Hosts hosts(packed.const_data_ptr<int64_t>());
  TORCH_CHECK(limit.numel() == hosts.ranks, "cut: ", hosts.ranks, " limits expected");
  const at::Tensor result = at::empty({hosts.experts}, limit.options());
  AT_DISPATCH_INDEX_TYPES(expert.scalar_type(), "cut", [&] {
    const Cut<index_t> found(hosts, expert.const_data_ptr<index_t>(), expert.numel(),
                             limit.const_data_ptr<int64_t>());
    std::copy(found.kept.begin(), found.kept.end(), result.mutable_data_ptr<int64_t>());
  });
  return result;
}

}  // namespace lockstep
