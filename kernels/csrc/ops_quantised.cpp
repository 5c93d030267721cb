// grouped_ffn with quantised weights, in the layout of kernels/quantised.py.
#include "matmul_work.h"

namespace lockstep {
namespace {

// All experts' matrices of one kind; `sizes` is bits, group, outputs, inputs.
struct Matrices {
  Quantised first;
  int64_t experts, words, groups;

  Matrices(const char* name, const at::Tensor& packed, const at::Tensor& scale,
           const std::optional<at::Tensor>& zero, at::IntArrayRef sizes) {
    TORCH_CHECK(sizes.size() == 4 && (sizes[0] == 4 || sizes[0] == 8) && sizes[1] > 0 &&
                    (sizes[1] % 8 == 0 || sizes[1] >= sizes[3]),
                "grouped_ffn_quantised: sizes of ", name, " ", sizes);
    const int64_t panels = (sizes[2] + PANEL - 1) / PANEL;
    experts = packed.size(0);
    words = panels * ((sizes[3] * sizes[0] + 31) / 32) * PANEL;
    groups = panels * ((sizes[3] + sizes[1] - 1) / sizes[1]) * PANEL;
    TORCH_CHECK(packed.scalar_type() == at::kInt && packed.is_contiguous() &&
                    packed.numel() == experts * words,
                "grouped_ffn_quantised: words of ", name, " ", packed.sizes(), " of sizes ", sizes);
    const auto check = [&](const at::Tensor& t) {
      TORCH_CHECK(t.scalar_type() == at::kFloat && t.is_contiguous() &&
                      t.numel() == experts * groups,
                  "grouped_ffn_quantised: scales of ", name, " ", t.sizes(), " of sizes ", sizes);
    };
    check(scale);
    if (zero) check(*zero);
    first = {packed.const_data_ptr<int32_t>(),
             scale.const_data_ptr<float>(),
             zero ? zero->const_data_ptr<float>() : nullptr,
             sizes[0],
             sizes[1],
             sizes[2],
             sizes[3]};
  }

  Quantised of(int64_t expert) const {
    Quantised w = first;
    w.words += expert * words;
    w.scale += expert * groups;
    if (w.zero) w.zero += expert * groups;
    return w;
  }
};

}  // namespace

at::Tensor grouped_ffn_quantised(const at::Tensor& x, const at::Tensor& packed13,
                                 const at::Tensor& scale13, const std::optional<at::Tensor>& zero13,
                                 at::IntArrayRef sizes13, const at::Tensor& packed2,
                                 const at::Tensor& scale2, const std::optional<at::Tensor>& zero2,
                                 at::IntArrayRef sizes2, at::IntArrayRef counts,
                                 const std::optional<at::Tensor>& into,
                                 const std::optional<at::Tensor>& index) {
  const Matrices w13("w13", packed13, scale13, zero13, sizes13);
  const Matrices w2("w2", packed2, scale2, zero2, sizes2);
  const int64_t depth = w2.first.outputs, width = w2.first.inputs;
  TORCH_CHECK(x.dim() == 2 && x.size(1) == depth && w13.first.inputs == depth &&
                  w13.first.outputs == 2 * width && w13.experts == w2.experts &&
                  static_cast<int64_t>(counts.size()) == w2.experts,
              "grouped_ffn_quantised: x ", x.sizes(), ", w13 of ", w13.experts, " experts ",
              sizes13, ", w2 of ", w2.experts, " ", sizes2, ", counts of ", counts.size());
  return ffn_in_waves(
      "grouped_ffn_quantised", x, depth, width, counts, into, index, packing_for(at::kFloat),
      3 * PANEL * std::max(depth, width),
      [&](const Piece& p, const float* packed, float* hidden, float* own) {
        kernels().gate_up_quantised(packed, p.rows, w13.of(p.segment->expert), p.first, p.count,
                                    hidden, own);
      },
      [&](const Piece& p, const float* hidden, Rows<float> out, float* own) {
        kernels().linear_quantised(hidden, p.rows, w2.of(p.segment->expert), p.first, p.count, out,
                                   own);
      });
}

}  // namespace lockstep
