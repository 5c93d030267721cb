// Quantised weights in panels (kernels/quantised.py has the layout), brought to floats in
// registers or in scratch. A weight is (q - zero) * scale, rounded after each operation: the same
// bits everywhere.

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

// q of the lowest bits of each word, as a float, less the middle of the range where `Zero` is
// false.
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

// to[k][n] <- weights of the PANEL outputs from `first` on, which need not begin a panel; outputs
// past the last are not to be used. `other` holds as much as `to`.
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
