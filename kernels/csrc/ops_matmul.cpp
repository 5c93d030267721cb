// linear and grouped_ffn with float32 weights, as they are or in panels.
#include "matmul_work.h"

namespace lockstep {
namespace {

at::Tensor rows_of(const at::Tensor& x, int64_t depth) {
  const at::Tensor rows = x.reshape({-1, depth});
  return rows.stride(1) == 1 ? rows : rows.contiguous();
}

}  // namespace

void to_panels(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() >= 2 && weight.is_contiguous() && weight.scalar_type() == at::kFloat,
              "to_panels: contiguous float32 weights [..., N, K] expected, got ", weight.sizes());
  const int64_t outputs = weight.size(-2), depth = weight.size(-1), panels = outputs / PANEL;
  if (weight.numel() == 0) return;
  float* data = weight.mutable_data_ptr<float>();
  for_each_item(weight.numel() / (outputs * depth) * panels, [&](int64_t i) {
    float* panel = data + (i / panels * outputs + i % panels * PANEL) * depth;
    float* rows = scratch(PANEL * depth);
    std::copy_n(panel, PANEL * depth, rows);
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t n = 0; n < PANEL; ++n) panel[k * PANEL + n] = rows[n * depth + k];
  });
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias, bool panels) {
  const int64_t outputs = weight.size(0), depth = weight.size(1);
  TORCH_CHECK(x.size(-1) == depth && weight.stride(1) == 1, "linear: x [..., ", depth,
              "] and a row-major weight expected, got ", x.sizes(), " and ", weight.sizes());
  TORCH_CHECK(!panels || weight.is_contiguous(), "linear: contiguous panels expected");
  TORCH_CHECK(!bias || (bias->numel() == outputs && bias->is_contiguous()), "linear: bias");
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = outputs;
  const at::Tensor out = at::empty(shape, x.options());
  const int64_t rows = out.numel() / std::max<int64_t>(1, outputs);
  if (rows == 0 || outputs == 0) return out;
  const at::Tensor in = rows_of(x, depth);
  const int64_t wave = std::min(rows_within(WAVE_BYTES, depth), round_up(rows, kernels().lanes));
  float* packed = scratch(wave * depth);
  const Rows<float> to = {out.mutable_data_ptr<float>(), outputs, nullptr};
  for (int64_t first = 0; first < rows; first += wave) {
    const std::vector<Segment> segment = {{0, first, std::min(wave, rows - first), 0}};
    pack_segments(segment, {in.const_data_ptr<float>(), in.stride(0), nullptr}, depth, packed);
    const std::vector<Piece> pieces = cut(segment, depth, outputs);
    run(pieces.size(), segment[0].rows * outputs * depth, [&](int64_t i) {
      const Piece& p = pieces[i];
      const auto product = panels ? kernels().linear_panels : kernels().linear;
      product(packed + p.row * depth, p.rows, depth, weight.const_data_ptr<float>(),
              panels ? outputs : weight.stride(0), bias ? bias->const_data_ptr<float>() : nullptr,
              p.first, p.count, to.from(first + p.row));
    });
  }
  return out;
}

at::Tensor grouped_ffn(const at::Tensor& x, const at::Tensor& w13, const at::Tensor& w2,
                       at::IntArrayRef counts, const std::optional<at::Tensor>& into, bool panels,
                       const std::optional<at::Tensor>& index) {
  const int64_t experts = w2.size(0), depth = w2.size(1), width = w2.size(2);
  TORCH_CHECK(x.dim() == 2 && x.size(1) == depth && w13.size(0) == experts &&
                  w13.size(1) == 2 * width && w13.size(2) == depth && w13.is_contiguous() &&
                  w2.is_contiguous() && static_cast<int64_t>(counts.size()) == experts,
              "grouped_ffn: shapes x ", x.sizes(), ", w13 ", w13.sizes(), ", w2 ", w2.sizes());
  const float* w13_data = w13.const_data_ptr<float>();
  const float* w2_data = w2.const_data_ptr<float>();
  const auto gate_up = panels ? kernels().gate_up_panels : kernels().gate_up;
  const auto product = panels ? kernels().linear_panels : kernels().linear;
  return ffn_in_waves(
      "grouped_ffn", x, depth, width, counts, into, index, 0,
      [&](const Piece& p, const float* packed, float* hidden, float*) {
        const float* w1 = w13_data + p.segment->expert * 2 * width * depth;
        gate_up(packed, p.rows, depth, w1, w1 + width * depth, p.first, p.count, hidden, width);
      },
      [&](const Piece& p, const float* hidden, Rows<float> out, float*) {
        product(hidden, p.rows, width, w2_data + p.segment->expert * depth * width,
                panels ? depth : width, nullptr, p.first, p.count, out);
      });
}

}  // namespace lockstep
