// Products of a few rows (one to four), where memory sets the pace: W rows of weights (or keys) are
// transposed on the fly so that a lane is one of them, instead of a row of x that would leave most
// lanes idle. Every element is the same chain of fused multiply-adds as in matmul.h: the same bits.

// Calls f(integral_constant R) where this path is the faster one: a single row. With 2 to 4 rows, cold
// weights and all cores reading, the tiles of matmul.h were 20% faster in decode.
template <typename F>
INLINE bool with_narrow(int64_t rows, F&& f) {
  if (rows != 1) return false;
  f(std::integral_constant<int, 1>{});
  return true;
}

// acc[r] = sum over d of rows[lane][d] * x[d * column + r * row]; ahead(d) fetches what comes next.
template <int R, typename F>
INLINE void narrow_dot(const float* const* rows, int64_t depth, const float* x, int64_t column,
                       int64_t row, const F& ahead, vf (&acc)[R]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) acc[r] = vf{};
  int64_t d = 0;
  for (; d + W <= depth; d += W) {
    // Read the row pointers again each time: held in registers, they push vectors out to the stack.
    asm volatile("" : : : "memory");
    ahead(d);
    vf v[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = load(rows[i] + d);
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r] += splat(x[(d + i) * column + r * row]) * v[i];
  }
  if (d == depth) return;
  vf v[W];
  for (int i = 0; i < W; ++i) {
    v[i] = vf{};
    memcpy(&v[i], rows[i] + d, sizeof(float) * (depth - d));
  }
  transpose(v);
  for (int64_t i = 0; d + i < depth; ++i)
    for (int r = 0; r < R; ++r) acc[r] += splat(x[(d + i) * column + r * row]) * v[i];
}

// The same for rows of a matrix and packed x. Fetches a little ahead in every row, and near the end
// of them the W rows that follow at `next` (or null): whole rows ahead would not fit the first-
// level cache.
template <int R>
INLINE void narrow_tile(const float* const* rows, int64_t depth, const float* packed,
                        const float* next, vf (&acc)[R]) {
  constexpr int64_t LINE = 16, DISTANCE = 8 * LINE;
  narrow_dot<R>(
      rows, depth, packed, W, 1,
      [&](int64_t d) {
        if (d % LINE) return;
        if (d + DISTANCE < depth) {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) __builtin_prefetch(rows[i] + d + DISTANCE);
        } else if (next) {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) __builtin_prefetch(next + i * depth + d + DISTANCE - depth);
        }
      },
      acc);
}

// Up to W of `count` consecutive rows of a matrix; past the end the last row again.
INLINE void rows_from(const float* matrix, int64_t stride, int64_t count, const float* (&rows)[W]) {
  for (int64_t i = 0; i < W; ++i) rows[i] = matrix + (i < count ? i : count - 1) * stride;
}

template <int R>
INLINE void linear_narrow(const float* packed, int64_t depth, const float* weight,
                          int64_t weight_stride, const float* bias, int64_t first, int64_t end,
                          Rows<float> out) {
  for (int64_t n = first; n < end; n += W) {
    const int64_t columns = end - n < W ? end - n : W;
    const float* rows[W];
    rows_from(weight + n * weight_stride, weight_stride, columns, rows);
    const bool more = n + 2 * W <= end && weight_stride == depth;
    vf acc[R];
    narrow_tile<R>(rows, depth, packed, more ? rows[0] + W * depth : nullptr, acc);
    vf b = vf{};
    if (bias) memcpy(&b, bias + n, sizeof(float) * columns);
    for (int r = 0; r < R; ++r) {
      const vf result = acc[r] + b;
      memcpy(out[r] + n, &result, sizeof(float) * columns);
    }
  }
}

template <int R>
INLINE void gate_up_narrow(const float* packed, int64_t depth, const float* w1, const float* w3,
                           int64_t first, int64_t end, float* hidden) {
  for (int64_t f = first; f < end; f += W) {
    const int64_t columns = end - f < W ? end - f : W;
    const float *gate_rows[W], *up_rows[W];
    rows_from(w1 + f * depth, depth, columns, gate_rows);
    rows_from(w3 + f * depth, depth, columns, up_rows);
    vf gate[R], up[R];
    narrow_tile<R>(gate_rows, depth, packed, up_rows[0], gate);
    narrow_tile<R>(up_rows, depth, packed, f + 2 * W <= end ? w1 + (f + W) * depth : nullptr, up);
    for (int r = 0; r < R; ++r) {
      const vf result = silu(gate[r]) * up[r];
      for (int64_t i = 0; i < columns; ++i) hidden[(f + i) * W + r] = result[i];
    }
  }
}
