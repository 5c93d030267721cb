// select_top: the best claims of every pool. Gathers a pool's claims by their first word, finds the
// cut with nth_element, and looks at the other words only of claims that share it.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "library.h"

namespace lockstep {

std::tuple<at::Tensor, at::Tensor> select_top(at::TensorList words, const at::Tensor& pool,
                                              const at::Tensor& need) {
  const int64_t count = pool.numel(), pools = need.numel();
  TORCH_CHECK(!words.empty() && pool.scalar_type() == at::kLong && need.scalar_type() == at::kLong,
              "select_top: at least one word, int64 pools and int64 needs expected");
  std::vector<at::Tensor> held;
  std::vector<const int32_t*> word;
  for (const at::Tensor& tensor : words) {
    TORCH_CHECK(tensor.numel() == count && tensor.scalar_type() == at::kInt,
                "select_top: int32 words of ", count, " claims expected, got ", tensor.sizes());
    held.push_back(tensor.contiguous());
    word.push_back(held.back().const_data_ptr<int32_t>());
  }
  const at::Tensor pool_in = pool.contiguous(), need_in = need.contiguous();
  const int64_t* pool_of = pool_in.const_data_ptr<int64_t>();
  const int64_t* need_of = need_in.const_data_ptr<int64_t>();
  const at::Tensor keep = at::empty({count}, pool.options().dtype(at::kBool));
  bool* kept = keep.mutable_data_ptr<bool>();
  std::fill(kept, kept + count, false);

  std::vector<int64_t> start(pools + 1, 0);
  for (int64_t n = 0; n < count; ++n) {
    TORCH_CHECK(pool_of[n] >= -1 && pool_of[n] < pools, "select_top: pool ", pool_of[n], " of ",
                pools);
    if (pool_of[n] >= 0) ++start[pool_of[n] + 1];
  }
  for (int64_t p = 0; p < pools; ++p) start[p + 1] += start[p];
  struct Claim {
    int32_t first;
    int32_t index;
  };
  std::vector<Claim> claims(start[pools]);
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  for (int64_t n = 0; n < count; ++n)
    if (pool_of[n] >= 0) claims[next[pool_of[n]]++] = {word[0][n], static_cast<int32_t>(n)};

  bool tied = false;
  for (int64_t p = 0; p < pools; ++p) {
    Claim *begin = claims.data() + start[p], *end = claims.data() + start[p + 1];
    const int64_t wanted = std::max<int64_t>(0, need_of[p]);
    if (wanted >= end - begin) {
      for (Claim* c = begin; c < end; ++c) kept[c->index] = true;
      continue;
    }
    // Claims still undecided share all words so far; `left` of them stay.
    int64_t left = wanted;
    for (size_t w = 0; left > 0; ++w) {
      Claim* cut = begin + left - 1;
      std::nth_element(begin, cut, end,
                       [](const Claim& a, const Claim& b) { return a.first > b.first; });
      const int32_t value = cut->first;
      Claim* equal = std::partition(begin, end, [&](const Claim& c) { return c.first > value; });
      Claim* below = std::partition(equal, end, [&](const Claim& c) { return c.first == value; });
      for (Claim* c = begin; c < equal; ++c) kept[c->index] = true;
      left -= equal - begin;
      if (left == below - equal) {
        for (Claim* c = equal; c < below; ++c) kept[c->index] = true;
        break;
      }
      if (w + 1 == word.size()) {
        tied = true;
        break;
      }
      begin = equal;
      end = below;
      for (Claim* c = begin; c < end; ++c) c->first = word[w + 1][c->index];
    }
  }
  const at::Tensor flag = at::empty({}, pool.options().dtype(at::kBool));
  *flag.mutable_data_ptr<bool>() = tied;
  return {keep, flag};
}

}  // namespace lockstep
