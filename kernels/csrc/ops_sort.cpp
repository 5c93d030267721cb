// sort_by_expert: a stable counting sort of assignments. Two passes over a few thousand integers:
// one thread, because waking a second costs more.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "library.h"

namespace lockstep {

std::tuple<at::Tensor, at::Tensor, at::Tensor> sort_by_expert(const at::Tensor& topk_ids,
                                                              int64_t num_experts) {
  TORCH_CHECK(topk_ids.dim() == 2 && topk_ids.scalar_type() == at::kLong,
              "sort_by_expert: int64 ids [tokens, k] expected, got ", topk_ids.sizes());
  const at::Tensor ids = topk_ids.contiguous();
  const int64_t count = ids.numel(), top_k = ids.size(1);
  const at::Tensor token = at::empty({count}, ids.options()), slot = at::empty_like(ids);
  const at::Tensor load = at::zeros({num_experts}, ids.options());
  const int64_t* expert_of = ids.const_data_ptr<int64_t>();
  int64_t* load_of = load.mutable_data_ptr<int64_t>();
  for (int64_t n = 0; n < count; ++n) {
    TORCH_CHECK(expert_of[n] >= -1 && expert_of[n] < num_experts, "sort_by_expert: expert ",
                expert_of[n], " of ", num_experts);
    if (expert_of[n] >= 0) ++load_of[expert_of[n]];
  }
  std::vector<int64_t> next(num_experts, 0);
  for (int64_t e = 1; e < num_experts; ++e) next[e] = next[e - 1] + load_of[e - 1];
  int64_t *token_at = token.mutable_data_ptr<int64_t>(), *slot_of = slot.mutable_data_ptr<int64_t>();
  for (int64_t t = 0, n = 0; n < count; ++t)
    for (int64_t k = 0; k < top_k; ++k, ++n) {
      if (expert_of[n] < 0) {
        slot_of[n] = -1;
        continue;
      }
      const int64_t at = next[expert_of[n]]++;
      token_at[at] = t;
      slot_of[n] = at;
    }
  // What is no assignment leaves places at the end; they name a token that exists.
  const int64_t used = num_experts ? next[num_experts - 1] : 0;
  std::fill(token_at + used, token_at + count, 0);
  return {token, slot, load};
}

}  // namespace lockstep
