// The row kernels: activation, norms, rotary embedding and the weighted combine of expert rows.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cstring>
#include <vector>

#include "library.h"

namespace lockstep {
namespace {

at::Tensor dense(const at::Tensor& x) { return x.is_contiguous() ? x : x.contiguous(); }

int64_t leading(const at::Tensor& x) { return x.numel() / std::max<int64_t>(1, x.size(-1)); }

void check_norm(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 1 && weight.is_contiguous() && weight.size(0) == x.size(-1),
              "rms_norm: x ", x.sizes(), ", weight ", weight.sizes());
}

// Heads of x [T, H, D] turned in place by the angles of their token.
void rotate_heads(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  TORCH_CHECK(x.dim() == 3 && x.stride(2) == 1 && x.size(2) >= cos.size(1) &&
                  x.size(0) == cos.size(0),
              "apply_rotary: x ", x.sizes(), ", cos ", cos.sizes());
  const int64_t dims = cos.size(1);
  float* data = x.mutable_data_ptr<float>();
  const float *cos_data = cos.const_data_ptr<float>(), *sin_data = sin.const_data_ptr<float>();
  for_each_row(x.size(0), x.size(1) * dims, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      for (int64_t h = 0; h < x.size(1); ++h)
        kernels().rotate(data + t * x.stride(0) + h * x.stride(1), cos_data + t * dims,
                         sin_data + t * dims, dims / 2);
  });
}

}  // namespace

at::Tensor silu_and_mul(const at::Tensor& gate_up) {
  TORCH_CHECK(gate_up.size(-1) % 2 == 0, "silu_and_mul: x ", gate_up.sizes());
  const at::Tensor in = dense(gate_up);
  const int64_t width = in.size(-1) / 2;
  std::vector<int64_t> shape = in.sizes().vec();
  shape.back() = width;
  const at::Tensor out = at::empty(shape, in.options());
  const float* data = in.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  for_each_row(leading(out), width, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      kernels().silu_and_mul(data + 2 * r * width, data + (2 * r + 1) * width, to + r * width, width);
  });
  return out;
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check_norm(x, weight);
  const at::Tensor in = dense(x), out = at::empty_like(in);
  const int64_t dim = in.size(-1);
  const float *data = in.const_data_ptr<float>(), *scale = weight.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  for_each_row(leading(in), dim, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      kernels().rms_norm(data + r * dim, scale, static_cast<float>(eps), dim, to + r * dim);
  });
  return out;
}

at::Tensor add_rms_norm(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight,
                        double eps) {
  check_norm(x, weight);
  TORCH_CHECK(x.sizes() == residual.sizes() && residual.is_contiguous(), "add_rms_norm: x ",
              x.sizes(), ", residual ", residual.sizes(), " with strides ", residual.strides());
  const at::Tensor in = dense(x), out = at::empty_like(in);
  const int64_t dim = in.size(-1);
  const float *data = in.const_data_ptr<float>(), *scale = weight.const_data_ptr<float>();
  float *sums = residual.mutable_data_ptr<float>(), *to = out.mutable_data_ptr<float>();
  for_each_row(leading(in), dim, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      kernels().add(data + r * dim, sums + r * dim, dim, sums + r * dim);
      kernels().rms_norm(sums + r * dim, scale, static_cast<float>(eps), dim, to + r * dim);
    }
  });
  return out;
}

void apply_rotary(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos_in,
                  const at::Tensor& sin_in) {
  TORCH_CHECK(cos_in.dim() == 2 && cos_in.sizes() == sin_in.sizes() && cos_in.size(1) % 2 == 0,
              "apply_rotary: cos ", cos_in.sizes(), ", sin ", sin_in.sizes());
  const at::Tensor cos = dense(cos_in), sin = dense(sin_in);
  rotate_heads(q, cos, sin);
  rotate_heads(k, cos, sin);
}

at::Tensor combine_rows(const at::Tensor& rows, const at::Tensor& slot_in,
                        const at::Tensor& weights_in) {
  const at::Tensor slot = dense(slot_in), weights = dense(weights_in);
  TORCH_CHECK(rows.dim() == 2 && rows.stride(1) == 1 && slot.dim() == 2 &&
                  slot.scalar_type() == at::kLong && slot.sizes() == weights.sizes(),
              "combine_rows: rows ", rows.sizes(), ", slot ", slot.sizes(), ", weights ",
              weights.sizes());
  const int64_t tokens = slot.size(0), top_k = slot.size(1), dim = rows.size(1);
  const at::Tensor out = at::empty({tokens, dim}, rows.options());
  const int64_t* slots = slot.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < tokens * top_k; ++i)
    TORCH_CHECK(slots[i] >= -1 && slots[i] < rows.size(0), "combine_rows: slot ", slots[i], " of ",
                rows.size(0));
  const float* data = rows.const_data_ptr<float>();
  const float* weight = weights.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  for_each_row(tokens, top_k * dim, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      std::memset(to + t * dim, 0, sizeof(float) * dim);
      for (int64_t k = t * top_k; k < (t + 1) * top_k; ++k)
        if (slots[k] >= 0)
          kernels().add_scaled(data + slots[k] * rows.stride(0), weight[k], dim, to + t * dim);
    }
  });
  return out;
}

}  // namespace lockstep
