// Row kernels around the matrix products: each takes one row (or one head) at a time.

void silu_and_mul(const float* gate, const float* up, float* out, int64_t count) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(out + i, silu(load(gate + i)) * load(up + i));
  if (i < count) {
    vf g = vf{}, u = vf{};
    memcpy(&g, gate + i, sizeof(float) * (count - i));
    memcpy(&u, up + i, sizeof(float) * (count - i));
    const vf result = silu(g) * u;
    memcpy(out + i, &result, sizeof(float) * (count - i));
  }
}

void rms_norm(const float* x, const float* weight, float eps, int64_t dim, float* out) {
  // Sixteen partial sums whatever the vector width: the same bits on every instruction set with
  // FMA.
  constexpr int PARTS = 16;
  float part[PARTS] = {};
  int64_t i = 0;
  for (; i + PARTS <= dim; i += PARTS)
    for (int j = 0; j < PARTS; ++j) part[j] += x[i + j] * x[i + j];
  for (int j = 0; i + j < dim; ++j) part[j] += x[i + j] * x[i + j];
  for (int width = PARTS / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) part[j] += part[j + width];
  const float scale = 1.0f / sqrtf(part[0] / static_cast<float>(dim) + eps);
  for (int64_t j = 0; j < dim; ++j) out[j] = x[j] * scale * weight[j];
}

void add(const float* x, const float* y, int64_t dim, float* out) {
  for (int64_t i = 0; i < dim; ++i) out[i] = x[i] + y[i];
}

void rotate(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cos[i] - second * sin[i];
    x[i + half] = second * cos[i + half] + first * sin[i + half];
  }
}

void add_scaled(const float* x, float weight, int64_t dim, float* out) {
  for (int64_t i = 0; i < dim; ++i) out[i] += x[i] * weight;
}
