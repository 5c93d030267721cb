// linear and grouped_ffn with float32 or bfloat16 weights, as they are or in panels.
#include "matmul_work.h"

namespace lockstep {
namespace {

at::Tensor rows_of(const at::Tensor& x, int64_t depth) {
  const at::Tensor rows = x.reshape({-1, depth});
  return rows.stride(1) == 1 ? rows : rows.contiguous();
}

// One matrix of float32 or bfloat16 weights.
struct Matrix {
  const void* data;
  int64_t outputs, inputs, stride;
  bool bfloat16, panels;

  Matrix(const at::Tensor& weight, int64_t outputs, int64_t inputs, int64_t stride, bool panels)
      : data(weight.const_data_ptr()),
        outputs(outputs),
        inputs(inputs),
        stride(stride),
        bfloat16(weight.scalar_type() == at::kBFloat16),
        panels(panels) {
    TORCH_CHECK(bfloat16 || weight.scalar_type() == at::kFloat,
                "float32 or bfloat16 weights expected, got ", weight.scalar_type());
  }

  // The weights that begin so many rows further on, in panels of their own.
  const float* wide(int64_t rows) const { return static_cast<const float*>(data) + rows * stride; }
  Bfloat16 half(int64_t rows) const {
    return {static_cast<const uint16_t*>(data) + rows * stride, outputs, inputs, stride, panels};
  }
  // Floats that a thread needs besides.
  int64_t own() const { return bfloat16 ? 3 * PANEL * inputs : 0; }

  void linear(int64_t rows_before, const float* packed, const Piece& p, const float* bias,
              Rows<float> out, float* own) const {
    if (bfloat16)
      kernels().linear_bfloat16(packed, p.rows, half(rows_before), bias, p.first, p.count, out, own);
    else if (panels)
      kernels().linear_panels(packed, p.rows, inputs, wide(rows_before), outputs, bias, p.first,
                              p.count, out);
    else
      kernels().linear(packed, p.rows, inputs, wide(rows_before), stride, bias, p.first, p.count,
                       out);
  }
};

// Brings PANEL rows of `depth` weights into a panel: columns `Group` by `Group`, those left alone.
template <int Group, typename T>
void to_panel(T* panel, int64_t depth) {
  T* rows = reinterpret_cast<T*>(scratch(PANEL * depth));
  std::copy_n(panel, PANEL * depth, rows);
  const int64_t whole = depth / Group * Group;
  for (int64_t k = 0; k < whole; k += Group)
    for (int64_t n = 0; n < PANEL; ++n)
      for (int64_t i = 0; i < Group; ++i) *panel++ = rows[n * depth + k + i];
  for (int64_t k = whole; k < depth; ++k)
    for (int64_t n = 0; n < PANEL; ++n) *panel++ = rows[n * depth + k];
}

}  // namespace

void to_panels(const at::Tensor& weight) {
  const bool bfloat16 = weight.scalar_type() == at::kBFloat16;
  TORCH_CHECK(weight.dim() >= 2 && weight.is_contiguous() &&
                  (bfloat16 || weight.scalar_type() == at::kFloat),
              "to_panels: contiguous float32 or bfloat16 weights [..., N, K] expected, got ",
              weight.scalar_type(), " ", weight.sizes());
  const int64_t outputs = weight.size(-2), depth = weight.size(-1), panels = outputs / PANEL;
  if (weight.numel() == 0) return;
  void* data = weight.mutable_data_ptr();
  for_each_item(weight.numel() / (outputs * depth) * panels, [&](int64_t i) {
    const int64_t first = (i / panels * outputs + i % panels * PANEL) * depth;
    if (bfloat16)
      to_panel<2>(static_cast<uint16_t*>(data) + first, depth);
    else
      to_panel<1>(static_cast<float*>(data) + first, depth);
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
  const Matrix matrix(weight, outputs, depth, panels ? depth : weight.stride(0), panels);
  const Packing packing = packing_for(weight.scalar_type());
  const int64_t words = packing.words(depth), own = round_up(matrix.own(), 16);
  const int64_t wave = std::min(rows_within(WAVE_BYTES, words), round_up(rows, kernels().lanes));
  const int64_t rows_floats = round_up(wave * words, 16);
  float* packed = scratch(rows_floats + own * at::get_num_threads());
  const float* bias_data = bias ? bias->const_data_ptr<float>() : nullptr;
  const Rows<float> to = {out.mutable_data_ptr<float>(), outputs, nullptr};
  for (int64_t first = 0; first < rows; first += wave) {
    const std::vector<Segment> segment = {{0, first, std::min(wave, rows - first), 0}};
    pack_segments(segment, {in.const_data_ptr<float>(), in.stride(0), nullptr}, depth, packing,
                  packed);
    const std::vector<Piece> pieces = cut(segment, words, outputs);
    run(pieces.size(), segment[0].rows * outputs * depth, [&](int64_t i) {
      const Piece& p = pieces[i];
      matrix.linear(0, packed + p.row * words, p, bias_data, to.from(first + p.row),
                    packed + rows_floats + own * at::get_thread_num());
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
                  w2.is_contiguous() && w13.scalar_type() == w2.scalar_type() && static_cast<int64_t>(counts.size()) == experts,
              "grouped_ffn: weights of one dtype and shapes expected, got x ", x.sizes(), ", w13 ", w13.sizes(), ", w2 ", w2.sizes());
  const Matrix up(w13, width, depth, depth, panels), down(w2, depth, width, width, panels);
  return ffn_in_waves(
      "grouped_ffn", x, depth, width, counts, into, index, packing_for(w13.scalar_type()),
      std::max(up.own(), down.own()),
      [&](const Piece& p, const float* packed, float* hidden, float* own) {
        const int64_t w1 = p.segment->expert * 2 * width, w3 = w1 + width;
        if (up.bfloat16)
          kernels().gate_up_bfloat16(packed, p.rows, up.half(w1), up.half(w3), p.first, p.count,
                                     hidden, own);
        else
          (panels ? kernels().gate_up_panels : kernels().gate_up)(
              packed, p.rows, depth, up.wide(w1), up.wide(w3), p.first, p.count, hidden, width);
      },
      [&](const Piece& p, const float* hidden, Rows<float> out, float* own) {
        down.linear(p.segment->expert * depth, hidden, p, nullptr, out, own);
      });
}

}  // namespace lockstep
