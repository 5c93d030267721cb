// select_experts: scores, top-k and combine weights of every token in one pass. A decode step has a
// few dozen logits: what it costs elsewhere is six calls, not arithmetic.
#include <ATen/ops/empty.h>

#include <cmath>

#include "library.h"

namespace lockstep {
namespace {

// Whether a comes before b; NaN before every number.
bool better(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

// The top_k largest of choice, best first; of equal ones the first. top_k <= count.
void top_of(const float* choice, int64_t count, int64_t top_k, int64_t* ids) {
  int64_t held = 0;
  for (int64_t e = 0; e < count; ++e) {
    if (held == top_k && !better(choice[e], choice[ids[held - 1]])) continue;
    int64_t place = held < top_k ? held++ : held - 1;
    for (; place > 0 && better(choice[e], choice[ids[place - 1]]); --place) ids[place] = ids[place - 1];
    ids[place] = e;
  }
}

// The number of `select_experts`'s argument `score`, as in SCORES of select_experts.py.
enum Score : int64_t { kSoftmax, kSigmoid, kSqrtSoftplus };

void sqrt_softplus(const float* x, int64_t count, float* out) {
  // From 20 on softplus is the identity in float32, as in torch.
  for (int64_t i = 0; i < count; ++i)
    out[i] = std::sqrt(x[i] > 20.0f ? x[i] : std::log1p(std::exp(x[i])));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> select_experts(
    const at::Tensor& logits_in, const std::optional<at::Tensor>& bias_in, int64_t top_k,
    int64_t score, bool normalize, double eps, double least, double scale) {
  TORCH_CHECK(logits_in.dim() == 2 && top_k >= 1 && top_k <= logits_in.size(1),
              "select_experts: top_k ", top_k, " of logits ", logits_in.sizes());
  TORCH_CHECK(score >= kSoftmax && score <= kSqrtSoftplus, "select_experts: score ", score);
  const at::Tensor logits = logits_in.contiguous();
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  TORCH_CHECK(!bias_in || (bias_in->dim() == 1 && bias_in->size(0) == experts),
              "select_experts: a bias of ", experts, " experts expected");
  const at::Tensor bias_held = bias_in ? bias_in->contiguous() : at::Tensor();
  const float* bias = bias_in ? bias_held.const_data_ptr<float>() : nullptr;
  const at::Tensor scores = at::empty({tokens, experts}, logits.options());
  const at::Tensor ids = at::empty({tokens, top_k}, logits.options().dtype(at::kLong));
  const at::Tensor weights = at::empty({tokens, top_k}, logits.options());
  const float* x = logits.const_data_ptr<float>();
  float *score_of = scores.mutable_data_ptr<float>(), *weight_of = weights.mutable_data_ptr<float>();
  int64_t* id_of = ids.mutable_data_ptr<int64_t>();
  const auto score_row = score == kSoftmax   ? kernels().softmax
                         : score == kSigmoid ? kernels().sigmoid
                                             : &sqrt_softplus;
  // A score costs about what a dozen floats that are only moved do.
  for_each_row(tokens, 12 * experts, [&](int64_t first, int64_t last) {
    float* biased = bias ? scratch(experts) : nullptr;
    for (int64_t t = first; t < last; ++t) {
      float *score_e = score_of + t * experts, *weight = weight_of + t * top_k;
      int64_t* id = id_of + t * top_k;
      score_row(x + t * experts, experts, score_e);
      if (bias)
        for (int64_t e = 0; e < experts; ++e) biased[e] = score_e[e] + bias[e];
      // Logits have the order of their scores and stay apart where those round to one number.
      top_of(bias ? biased : x + t * experts, experts, top_k, id);
      float sum = 0.0f;
      for (int64_t k = 0; k < top_k; ++k) sum += score_e[id[k]];
      sum += static_cast<float>(eps);
      if (sum < static_cast<float>(least)) sum = static_cast<float>(least);  // NaN stays
      for (int64_t k = 0; k < top_k; ++k) {
        weight[k] = normalize ? score_e[id[k]] / sum : score_e[id[k]];
        if (scale != 1.0) weight[k] *= static_cast<float>(scale);
      }
    }
  });
  return {scores, ids, weights};
}

}  // namespace lockstep
