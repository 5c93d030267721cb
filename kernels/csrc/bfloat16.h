// bfloat16 weights in panels of pairs, and rows to multiply with them: PANEL rows of a matrix lie
// together, [depth / 2][PANEL][2], so that a line of memory holds two columns of all of them, and after
// those the last column of an odd depth, [PANEL]. Row-major weights, and rows past the last whole panel,
// are brought into that layout on the way, a panel at a time.
//
// A pair of columns is multiplied in one of two ways, the same for any number of rows:
// - by the processor's dot product (LOCKSTEP_BFLOAT16_PRODUCTS): rows of x, and the hidden rows
//   between the two products of an expert, are rounded to bfloat16 and packed as pairs too,
//   [depth / 2][rows of the block]; products are exact and sums are float32;
// - widened to float in registers, or in scratch where many rows share a panel: the chain of fused
//   multiply-adds of matmul.h, so the same bits as with the weights in float32.

#if defined(LOCKSTEP_BFLOAT16_PRODUCTS)
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif

// Most rows of x at a time for P panels side by side, as registers allow.
constexpr int most_rows(int panels) {
  return W == 16 ? (panels == 4 ? 6 : panels == 2 ? 12 : 16) : W == 8 ? 6 : 3;
}
// Most rows that are multiplied with weights widened in registers.
constexpr int64_t FEW_WIDENED = W == 16 ? 12 : W == 8 ? 6 : 3;
// Panels side by side for more rows than FEW.
constexpr int SIDE = W == 16 ? 2 : 1;
// Floats of packed rows for so many columns.
INLINE int64_t packed_words(int64_t columns) { return PAIRS ? (columns + 1) / 2 : columns; }

typedef uint16_t vh __attribute__((vector_size(2 * LOCKSTEP_LANES)));

INLINE vi load_pairs(const uint16_t* p) { return *reinterpret_cast<const vi*>(p); }
// The last column of an odd depth, as pairs with 0.
INLINE vi load_last(const uint16_t* p) {
  vh v;
  memcpy(&v, p, sizeof(v));
  return (vi)__builtin_convertvector(v, vi);
}
INLINE vf even_column(vi pairs) { return (vf)(pairs << 16); }
INLINE vf odd_column(vi pairs) { return (vf)(pairs & -65536); }

// Calls f(first row, rows, step) for each packed block, `step` floats from column to column: what
// for_each_block does, without a copy of f for every width.
template <typename F>
INLINE void for_each_packed(int64_t rows, const F& f) {
  for (int64_t first = 0; first < rows; first += BLOCK) {
    const int64_t count = rows - first < BLOCK ? rows - first : BLOCK;
    f(first, count, (count + W - 1) / W * W);
  }
}

#if defined(LOCKSTEP_BFLOAT16_PRODUCTS)
// acc[p][v][r] += weight[p][v] * x[r] of a pair of columns.
template <bool Both, int P, int R>
INLINE void multiply(const vi (&weight)[P][PV], const float* x, int64_t, vf (&acc)[P][PV][R]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const __m512bh pair = (__m512bh)splat(x[r]);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
      acc[p][0][r] = (vf)_mm512_dpbf16_ps((__m512)acc[p][0][r], (__m512bh)weight[p][0], pair);
  }
}
#else
template <bool Both, int P, int R>
INLINE void multiply(const vi (&weight)[P][PV], const float* x, int64_t step,
                     vf (&acc)[P][PV][R]) {
#pragma GCC unroll 2
  for (int column = 0; column < (Both ? 2 : 1); ++column) {
    vf wide[P][PV];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < PV; ++v)
        wide[p][v] = column ? odd_column(weight[p][v]) : even_column(weight[p][v]);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf value = splat(x[column * step + r]);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < PV; ++v) acc[p][v][r] += value * wide[p][v];
    }
  }
}
#endif

// acc[p][v][r] = sum over k of panel[p][k][v] * x[k][r]; packed columns of x are `step` apart.
template <int P, int R>
INLINE void pair_tile(const uint16_t* const (&panel)[P], const float* x, int64_t step,
                      int64_t depth, vf (&acc)[P][PV][R]) {
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < PV; ++v)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[p][v][r] = vf{};
  vi weight[P][PV];
  int64_t pair = 0;
  for (; pair < depth / 2; ++pair) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      __builtin_prefetch(panel[p] + (pair + FETCH) * 2 * PANEL, 0, 2);
#pragma GCC unroll 4
      for (int v = 0; v < PV; ++v) weight[p][v] = load_pairs(panel[p] + (pair * PANEL + v * W) * 2);
    }
    multiply<true>(weight, x, step, acc);
    x += PAIRS ? step : 2 * step;
  }
  if (depth % 2 == 0) return;
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < PV; ++v) weight[p][v] = load_last(panel[p] + pair * 2 * PANEL + v * W);
  multiply<false>(weight, x, step, acc);
}

// The panel that begins at output n0: where it lies, or made in `own`, with zeros past the last.
INLINE const uint16_t* pair_panel(const Bfloat16& w, int64_t n0, uint16_t* own) {
  const uint16_t* const first = w.weight + n0 * w.stride;
  if (w.panels && n0 + PANEL <= w.outputs) return first;
  const int64_t outputs = w.outputs - n0 < PANEL ? w.outputs - n0 : PANEL, pairs = w.inputs / 2;
  float* const to = reinterpret_cast<float*>(own);
  for (int64_t n = 0; n < PANEL; n += W)
    for (int64_t pair = 0; pair < pairs; pair += W) {
      vf v[W];
      const auto row = [&](int i) {
        return reinterpret_cast<const float*>(first + (n + i) * w.stride + 2 * pair);
      };
      load_transposed(row, outputs - n, pairs - pair, v);
      for (int64_t i = 0; i < W && pair + i < pairs; ++i) store(to + (pair + i) * PANEL + n, v[i]);
    }
  if (w.inputs % 2)
    for (int64_t n = 0; n < PANEL; ++n)
      own[pairs * 2 * PANEL + n] = n < outputs ? first[n * w.stride + w.inputs - 1] : 0;
  return own;
}

// to [depth][PANEL] <- the panel in float.
INLINE void widen(const uint16_t* panel, int64_t depth, float* to) {
  int64_t k = 0;
  for (; k + 2 <= depth; k += 2)
    for (int v = 0; v < PV; ++v) {
      const vi pairs = load_pairs(panel + k * PANEL + v * W * 2);
      store(to + k * PANEL + v * W, even_column(pairs));
      store(to + (k + 1) * PANEL + v * W, odd_column(pairs));
    }
  if (k < depth)
    for (int v = 0; v < PV; ++v)
      store(to + k * PANEL + v * W, even_column(load_last(panel + k * PANEL + v * W)));
}

#if defined(LOCKSTEP_BFLOAT16_PRODUCTS)
// Up to 2 W columns of a row, rounded to bfloat16, as W pairs; columns out of range are zero.
INLINE vf pairs_of(const float* x, int64_t columns) {
  float in[2 * W] = {};
  if (columns < 2 * W) {
    memcpy(in, x, sizeof(float) * columns);
    x = in;
  }
  return (vf)_mm512_cvtne2ps_pbh((__m512)load(x + W), (__m512)load(x));
}

void pack_bfloat16(Rows<const float> x, int64_t rows, int64_t depth, float* packed) {
  const int64_t words = packed_words(depth);
  for_each_block(rows, [&](auto mv, int64_t first, int64_t count) {
    constexpr int MV = decltype(mv)::value;
    float* const block = packed + first * words;
    for (int m = 0; m < MV; ++m)
      for (int64_t pair = 0; pair < words; pair += W) {
        vf v[W];
        for (int64_t i = 0; i < W; ++i)
          v[i] = m * W + i < count
                     ? pairs_of(x[first + m * W + i] + 2 * pair, depth - 2 * pair)
                     : vf{};
        transpose(v);
        for (int64_t i = 0; i < W && pair + i < words; ++i)
          store(block + ((pair + i) * MV + m) * W, v[i]);
      }
  });
}
#endif
