// Products with quantised weights (kernels/quantised.py has the layout): few rows multiply what is
// dequantised in registers, many rows share a panel that is dequantised once into scratch in the
// layout of panels.h. A weight is (q - zero) * scale, rounded after each operation, and every element
// the same chain of fused multiply-adds as in matmul.h: the same bits either way.

// Most rows that are multiplied with weights in registers.
constexpr int FEW_QUANTISED = W == 16 ? 8 : W == 8 ? 3 : 1;
// How many words ahead of each panel are fetched.
constexpr int64_t FETCH_WORDS = 32;

// One panel of a matrix.
struct QuantisedPanel {
  const int32_t* words;
  const float *scale, *zero;
};

INLINE QuantisedPanel panel_of(const Quantised& w, int64_t panel) {
  const int64_t words = (w.inputs * w.bits + 31) / 32, groups = (w.inputs + w.group - 1) / w.group;
  return {w.words + panel * words * PANEL, w.scale + panel * groups * PANEL,
          w.zero ? w.zero + panel * groups * PANEL : nullptr};
}

// q of the lowest bits of each word, as a float, less the middle of the range where `Zero` is false.
template <int BITS, bool Zero>
INLINE vf integers(vi words) {
#if !defined(__clang__)
  // The processor takes the lowest four bits of an index: one operation instead of three.
  if constexpr (W == 16 && BITS == 4) {
    vf table;
    for (int i = 0; i < W; ++i) table[i] = static_cast<float>(i - (Zero ? 0 : 8));
    return __builtin_shuffle(table, words);
  }
#endif
  const vf q = __builtin_convertvector(words & ((1 << BITS) - 1), vf);
  return Zero ? q : q - splat(1 << (BITS - 1));
}

// Calls f(k, weights [P][PV]) for every column k of P panels, in order.
template <int BITS, bool Zero, int P, typename F>
INLINE void for_each_column(const QuantisedPanel (&panel)[P], int64_t depth, int64_t group,
                            const F& f) {
  constexpr int COLUMNS = 32 / BITS;
  int64_t k = 0;
  for (int64_t g = 0; k < depth; ++g) {
    const int64_t end = depth - k < group ? depth : k + group;
    vf scale[P][PV], zero[P][PV];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < PV; ++v) {
        scale[p][v] = load(panel[p].scale + g * PANEL + v * W);
        if constexpr (Zero) zero[p][v] = load(panel[p].zero + g * PANEL + v * W);
      }
    const auto column = [&](const vi (&words)[P][PV], int64_t at) {
      vf weight[P][PV];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < PV; ++v) {
          vf q = integers<BITS, Zero>(words[p][v]);
          if constexpr (Zero) q -= zero[p][v];
          weight[p][v] = q * scale[p][v];
        }
      f(at, weight);
    };
    for (; k < end; k += COLUMNS) {
      vi words[P][PV];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const int32_t* from = panel[p].words + k / COLUMNS * PANEL;
        __builtin_prefetch(from + FETCH_WORDS * PANEL, 0, 2);
#pragma GCC unroll 4
        for (int v = 0; v < PV; ++v) words[p][v] = *reinterpret_cast<const vi*>(from + v * W);
      }
      if (end - k >= COLUMNS) {
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; ++j) {
          vi shifted[P][PV];
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
            for (int v = 0; v < PV; ++v) shifted[p][v] = words[p][v] >> (BITS * j);
          column(shifted, k + j);
        }
      } else {
        for (int64_t at = k; at < end; ++at) {
          column(words, at);
          for (int p = 0; p < P; ++p)
            for (int v = 0; v < PV; ++v) words[p][v] >>= BITS;
        }
      }
    }
    k = end;
  }
}

// Calls f(integral_constant BITS, bool_constant Zero) for the kind of the weights.
template <typename F>
INLINE void with_kind(const Quantised& w, const F& f) {
  const auto with_bits = [&](auto bits) {
    if (w.zero)
      f(bits, std::bool_constant<true>{});
    else
      f(bits, std::bool_constant<false>{});
  };
  if (w.bits == 4)
    with_bits(std::integral_constant<int, 4>{});
  else
    with_bits(std::integral_constant<int, 8>{});
}

// acc[p][v][r] = sum over k of weight[p][v] * x[k * step + r].
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
      const vf value = splat(x[k * W + r]);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < PV; ++v) acc[p][v][r] += value * weight[p][v];
    }
  });
}

// to[k][n] <- weights of the PANEL outputs from `first` on, which need not begin a panel; outputs past
// the last are not to be used. `other` holds as much as `to`.
void dequantise(const Quantised& w, int64_t first, float* to, float* other) {
  const auto one = [&](int64_t panel, float* out) {
    with_kind(w, [&](auto bits, auto zero) {
      const QuantisedPanel panels[1] = {panel_of(w, panel)};
      for_each_column<decltype(bits)::value, decltype(zero)::value, 1>(
          panels, w.inputs, w.group, [&](int64_t k, const vf(&weight)[1][PV]) {
            for (int v = 0; v < PV; ++v) store(out + k * PANEL + v * W, weight[0][v]);
          });
    });
  };
  const int64_t panel = first / PANEL, skipped = first % PANEL;
  one(panel, to);
  if (skipped == 0) return;
  const bool more = (panel + 1) * PANEL < w.outputs;
  if (more) one(panel + 1, other);
  for (int64_t k = 0; k < w.inputs; ++k) {
    memmove(to + k * PANEL, to + k * PANEL + skipped, sizeof(float) * (PANEL - skipped));
    if (more)
      memcpy(to + (k + 1) * PANEL - skipped, other + k * PANEL, sizeof(float) * skipped);
  }
}

// out[r][first + i] <- acc of the first `outputs` outputs of a panel.
template <int R>
INLINE void store_panel(const vf (&acc)[PV][R], int64_t outputs, Rows<float> out, int64_t first) {
  for (int r = 0; r < R; ++r) {
    float result[PANEL];
    float* const to = out[r] + first;
    // The sum with 0 is what a product with a bias does: -0 becomes 0.
    for (int v = 0; v < PV; ++v)
      store((outputs == PANEL ? to : result) + v * W, acc[v][r] + vf{});
    if (outputs < PANEL) memcpy(to, result, sizeof(float) * outputs);
  }
}

// Scratch: two panels of floats.
void linear_quantised(const float* packed, int64_t rows, const Quantised& w, int64_t first,
                      int64_t count, Rows<float> out, float* scratch) {
  const int64_t end = first + count, depth = w.inputs;
  if (rows <= FEW_QUANTISED) {
    with_kind(w, [&](auto bits, auto zero) {
      constexpr int BITS = decltype(bits)::value;
      constexpr bool ZERO = decltype(zero)::value;
      with_run<FEW_QUANTISED>(rows, 0, [&](auto run, int64_t) {
        constexpr int R = decltype(run)::value;
        int64_t n0 = first;
        for (; n0 + 2 * PANEL <= end; n0 += 2 * PANEL) {
          const QuantisedPanel panel[2] = {panel_of(w, n0 / PANEL), panel_of(w, n0 / PANEL + 1)};
          vf acc[2][PV][R];
          quantised_tile<BITS, ZERO, 2, R>(panel, depth, w.group, packed, acc);
          for (int p = 0; p < 2; ++p) store_panel<R>(acc[p], PANEL, out, n0 + p * PANEL);
        }
        for (; n0 < end; n0 += PANEL) {
          const QuantisedPanel panel[1] = {panel_of(w, n0 / PANEL)};
          vf acc[1][PV][R];
          quantised_tile<BITS, ZERO, 1, R>(panel, depth, w.group, packed, acc);
          store_panel<R>(acc[0], end - n0 < PANEL ? end - n0 : PANEL, out, n0);
        }
      });
    });
    return;
  }
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
        store_panel<R>(acc[0], outputs, out.from(block + row), n0);
      });
    });
  }
}

// Scratch: three panels of floats.
void gate_up_quantised(const float* packed, int64_t rows, const Quantised& w13, int64_t first,
                       int64_t count, float* hidden, float* scratch) {
  const int64_t end = first + count, depth = w13.inputs, width = w13.outputs / 2;
  if (rows <= FEW_QUANTISED && width % PANEL == 0) {
    with_kind(w13, [&](auto bits, auto zero) {
      with_run<FEW_QUANTISED>(rows, 0, [&](auto run, int64_t) {
        constexpr int R = decltype(run)::value;
        for (int64_t f0 = first; f0 < end; f0 += PANEL) {
          const QuantisedPanel panel[2] = {panel_of(w13, f0 / PANEL),
                                           panel_of(w13, (width + f0) / PANEL)};
          vf acc[2][PV][R];
          quantised_tile<decltype(bits)::value, decltype(zero)::value, 2, R>(panel, depth,
                                                                             w13.group, packed, acc);
          store_hidden<R>(acc[0], acc[1], hidden + f0 * W, W);
        }
      });
    });
    return;
  }
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
