// Products with quantised weights: few rows multiply what is dequantised in registers, many rows
// share a panel that is dequantised once into scratch, in the layout of panels.h. Every element is
// the same chain of fused multiply-adds as in matmul.h: the same bits either way.

// Most rows that are multiplied with weights in registers at a time, and in all: two runs of 16
// read packed words twice, which is less than a panel of floats.
constexpr int RUN_QUANTISED = W == 16 ? 16 : W == 8 ? 4 : 1;
constexpr int FEW_QUANTISED = W == 16 ? 32 : RUN_QUANTISED;
// Panels side by side for so many rows: enough sums that do not wait for each other, as registers
// allow.
constexpr int side_by_side(int rows) {
  return W == 16 ? (rows <= 2 ? 4 : rows <= 8 ? 2 : 1) : W == 8 && rows == 1 ? 2 : 1;
}

// acc[p][v][r] = sum over k of weight[p][v] * x[k * R + r].
template <int BITS, bool Zero, int P, int R>
INLINE void quantised_tile(const QuantisedPanel (&panel)[P], int64_t depth, int64_t group,
                           const float* x, vf (&acc)[P][PV][R]) {
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < PV; ++v)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[p][v][r] = vf{};
  for_each_column<BITS, Zero, P>(panel, depth, group, [&](int64_t k, const vf(&weight)[P][PV]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf value = splat(x[k * R + r]);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < PV; ++v) acc[p][v][r] += value * weight[p][v];
    }
  });
}

// out[r][first + i] <- acc of the first `rows` rows and the first `outputs` outputs of a panel.
template <int R>
INLINE void store_panel(const vf (&acc)[PV][R], int64_t rows, int64_t outputs, Rows<float> out,
                        int64_t first) {
  // A constant index keeps the sums in registers.
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (r >= rows) continue;
    float result[PANEL];
    float* const to = out[r] + first;
    // The sum with 0 is what a product with a bias does: -0 becomes 0.
    for (int v = 0; v < PV; ++v)
      store((outputs == PANEL ? to : result) + v * W, acc[v][r] + vf{});
    if (outputs < PANEL) memcpy(to, result, sizeof(float) * outputs);
  }
}

// Calls f(integral_constant R) for the least R compiled that holds `rows`.
template <int R, typename F>
INLINE void with_padded(int64_t rows, const F& f) {
  if constexpr (R < RUN_QUANTISED) {
    constexpr int next = R < 4 ? 2 * R : R == 4 ? 6 : R == 6 ? 8 : R == 8 ? 12 : 16;
    if (rows > R) return with_padded<next>(rows, f);
  }
  f(std::integral_constant<int, R>{});
}

// Calls f(bits, zero, R, x, row, count) for runs of few packed rows: x [depth][R] holds them
// without the lanes between, which would push the weights out of the first-level cache, and zeros
// past `count`.
template <typename F>
INLINE void with_few(const float* packed, int64_t rows, const Quantised& w, float* x, const F& f) {
  const int64_t step = (rows + W - 1) / W * W;
  const int64_t runs = (rows + RUN_QUANTISED - 1) / RUN_QUANTISED;
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t row = rows * run / runs, count = rows * (run + 1) / runs - row;
    with_padded<1>(count, [&](auto padded) {
      constexpr int R = decltype(padded)::value;
      for (int64_t k = 0; k < w.inputs; ++k)
        for (int64_t r = 0; r < R; ++r) x[k * R + r] = r < count ? packed[k * step + row + r] : 0;
      with_kind(w, [&](auto bits, auto zero) { f(bits, zero, padded, x, row, count); });
    });
  }
}

// Few rows. Panels side by side are `jump` outputs apart, so that each place is read as a stream.
INLINE void linear_few_quantised(const float* packed, int64_t rows, const Quantised& w,
                                 int64_t first, int64_t end, Rows<float> out, float* scratch) {
  with_few(packed, rows, w, scratch, [&](auto bits, auto zero, auto padded, const float* x,
                                           int64_t row, int64_t count) {
    constexpr int BITS = decltype(bits)::value, R = decltype(padded)::value, P = side_by_side(R);
    constexpr bool ZERO = decltype(zero)::value;
    const int64_t jump = P == 1 ? 0 : (end - first) / PANEL / P * PANEL;
    for (int64_t n0 = first; n0 < first + jump; n0 += PANEL) {
      QuantisedPanel panel[P];
      for (int p = 0; p < P; ++p) panel[p] = panel_of(w, (n0 + p * jump) / PANEL);
      vf acc[P][PV][R];
      quantised_tile<BITS, ZERO, P, R>(panel, w.inputs, w.group, x, acc);
      for (int p = 0; p < P; ++p)
        store_panel<R>(acc[p], count, PANEL, out.from(row), n0 + p * jump);
    }
    for (int64_t n0 = first + P * jump; n0 < end; n0 += PANEL) {
      const QuantisedPanel panel[1] = {panel_of(w, n0 / PANEL)};
      vf acc[1][PV][R];
      quantised_tile<BITS, ZERO, 1, R>(panel, w.inputs, w.group, x, acc);
      const int64_t outputs = end - n0 < PANEL ? end - n0 : PANEL;
      store_panel<R>(acc[0], count, outputs, out.from(row), n0);
    }
  });
}

// The same for hidden columns, where both halves of w13 are whole panels.
INLINE void gate_up_few_quantised(const float* packed, int64_t rows, const Quantised& w13,
                                  int64_t first, int64_t end, float* hidden, float* scratch) {
  with_few(packed, rows, w13, scratch, [&](auto bits, auto zero, auto padded, const float* x,
                                           int64_t row, int64_t count) {
    constexpr int BITS = decltype(bits)::value, R = decltype(padded)::value, P = side_by_side(R);
    constexpr bool ZERO = decltype(zero)::value;
    const int64_t step = (rows + W - 1) / W * W;
    const int64_t up = w13.outputs / 2 / PANEL, depth = w13.inputs, group = w13.group;
    const int64_t jump = P < 4 ? 0 : (end - first) / PANEL / 2 * PANEL;
    if constexpr (P == 4) {
      for (int64_t f0 = first; f0 < first + jump; f0 += PANEL) {
        const int64_t here = f0 / PANEL, there = (f0 + jump) / PANEL;
        const QuantisedPanel panel[4] = {panel_of(w13, here), panel_of(w13, there),
                                         panel_of(w13, up + here), panel_of(w13, up + there)};
        vf acc[4][PV][R];
        quantised_tile<BITS, ZERO, 4, R>(panel, depth, group, x, acc);
        store_hidden<R>(acc[0], acc[2], hidden + f0 * step + row, step, PANEL, count);
        store_hidden<R>(acc[1], acc[3], hidden + (f0 + jump) * step + row, step, PANEL, count);
      }
    }
    for (int64_t f0 = first + 2 * jump; f0 < end; f0 += PANEL) {
      const QuantisedPanel panel[2] = {panel_of(w13, f0 / PANEL), panel_of(w13, up + f0 / PANEL)};
      vf acc[2][PV][R];
      if constexpr (P > 1) {
        quantised_tile<BITS, ZERO, 2, R>(panel, depth, group, x, acc);
      } else {
        for (int p = 0; p < 2; ++p)
          quantised_tile<BITS, ZERO, 1, R>({panel[p]}, depth, group, x,
                                           reinterpret_cast<vf(&)[1][PV][R]>(acc[p]));
      }
      store_hidden<R>(acc[0], acc[1], hidden + f0 * step + row, step, PANEL, count);
    }
  });
}

void linear_quantised(const float* packed, int64_t rows, const Quantised& w, int64_t first,
                      int64_t count, Rows<float> out, float* scratch) {
  const int64_t end = first + count, depth = w.inputs;
  if (rows <= FEW_QUANTISED)
    return linear_few_quantised(packed, rows, w, first, end, out, scratch);
  for (int64_t n0 = first; n0 < end; n0 += PANEL) {
    const int64_t outputs = end - n0 < PANEL ? end - n0 : PANEL;
    dequantise(w, n0, scratch, scratch + PANEL * depth);
    for_each_block(rows, [&](auto mv, int64_t block, int64_t block_rows) {
      constexpr int MV = decltype(mv)::value;
      const float* const x = packed + block * depth;
      if (outputs == PANEL && fills<MV>(block_rows))
        return linear_full<MV>(scratch, x, block_rows, depth, nullptr, out.from(block), n0);
      for_each_run<ONE>(block_rows, [&](auto run, int64_t row) {
        constexpr int R = decltype(run)::value;
        const float* const panel[1] = {scratch};
        vf acc[1][PV][R];
        panel_tile<1, R>(panel, x + row, MV * W, depth, acc);
        store_panel<R>(acc[0], R, outputs, out.from(block + row), n0);
      });
    });
  }
}

void gate_up_quantised(const float* packed, int64_t rows, const Quantised& w13, int64_t first,
                       int64_t count, float* hidden, float* scratch) {
  const int64_t end = first + count, depth = w13.inputs, width = w13.outputs / 2;
  if (rows <= FEW_QUANTISED && width % PANEL == 0)
    return gate_up_few_quantised(packed, rows, w13, first, end, hidden, scratch);
  float *const gate = scratch, *const up = gate + PANEL * depth, *const other = up + PANEL * depth;
  for (int64_t f0 = first; f0 < end; f0 += PANEL) {
    const int64_t outputs = end - f0 < PANEL ? end - f0 : PANEL;
    dequantise(w13, f0, gate, other);
    dequantise(w13, width + f0, up, other);
    for_each_block(rows, [&](auto mv, int64_t block, int64_t block_rows) {
      constexpr int MV = decltype(mv)::value;
      const float* const x = packed + block * depth;
      float* const to = hidden + block * width + f0 * MV * W;
      if (outputs == PANEL && fills<MV>(block_rows))
        return gate_up_full<MV>(gate, up, x, depth, to);
      for_each_run<ONE>(block_rows, [&](auto run, int64_t row) {
        constexpr int R = decltype(run)::value;
        vf acc[2][PV][R];
        panel_tile<1, R>({gate}, x + row, MV * W, depth, reinterpret_cast<vf(&)[1][PV][R]>(acc[0]));
        panel_tile<1, R>({up}, x + row, MV * W, depth, reinterpret_cast<vf(&)[1][PV][R]>(acc[1]));
        store_hidden<R>(acc[0], acc[1], to + row, MV * W, outputs);
      });
    });
  }
}
