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

// The first `count` floats at p, the other lanes `rest`.
INLINE vf load_padded(const float* p, int64_t count, float rest) {
  if (count >= W) return load(p);
  vf v = splat(rest);
  memcpy(&v, p, sizeof(float) * count);
  return v;
}
INLINE void store_part(float* p, int64_t count, vf v) {
  if (count >= W) return store(p, v);
  memcpy(p, &v, sizeof(float) * count);
}

// A logit of -inf has weight 0; NaN, or nothing but -inf, makes the whole row NaN.
void softmax(const float* x, int64_t count, float* out) {
  constexpr int PARTS = 16;  // as in rms_norm
  float peak = -INFINITY;
  for (int64_t i = 0; i < count; ++i) peak = x[i] > peak ? x[i] : peak;
  for (int64_t i = 0; i < count; i += W) {
    const vf scaled = (load_padded(x + i, count - i, peak) - splat(peak)) * splat(1.44269504f);
    store_part(out + i, count - i, exp2_of(scaled));
  }
  float part[PARTS] = {};
  int64_t i = 0;
  for (; i + PARTS <= count; i += PARTS)
    for (int j = 0; j < PARTS; ++j) part[j] += out[i + j];
  for (int j = 0; i + j < count; ++j) part[j] += out[i + j];
  for (int width = PARTS / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) part[j] += part[j + width];
  for (int64_t j = 0; j < count; ++j) out[j] /= part[0];
}

void sigmoid(const float* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += W) {
    // In this order NaN stays.
    const vf minus = vmin(splat(126.0f), load_padded(x + i, count - i, 0.0f) * splat(-1.44269504f));
    store_part(out + i, count - i, splat(1.0f) / (splat(1.0f) + exp2_of(minus)));
  }
}
