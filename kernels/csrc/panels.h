// Products with weights in panels: PANEL rows of a matrix at a time lie transposed, [depth][PANEL],
// and rows past the last whole panel stay row-major. `to_panels` brings them there once, in place.
// A panel is one stream of memory, and a lane is a row of weights, so a product of few rows of x
// costs what they need and no whole vector of them. Every element is the same chain of fused
// multiply-adds as in matmul.h: the same bits.

constexpr int PV = PANEL / W;  // vectors of a panel
// Rows of x at a time, for one panel and for two: as many accumulators as registers allow.
constexpr int ONE = W == 16 ? 16 : W == 8 ? 6 : 3, TWO = W == 16 ? 12 : W == 8 ? 3 : 1;
// Most rows for which four panels are read side by side, and how many columns ahead each is fetched.
// Memory sets the pace of so few rows, and a core can get more of it from four places than from
// one (an Intel Xeon a third more).
constexpr int FEW = W == 16 ? 6 : 1;
constexpr int64_t FETCH_FEW = 128;

// Whether the tiles of matmul.h, whose lanes are rows of x, are faster: most lanes have one. They
// read a panel several times, which several vectors of rows are worth.
template <int MV>
INLINE bool fills(int64_t rows) {
  return MV == MAX_MV && rows * 8 > MV * W * 7;
}

// acc[p][v][r] = sum over k of panel[p][k][v] * x[k * step + r]. AHEAD: columns to fetch ahead.
template <int P, int R, int64_t AHEAD = FETCH>
INLINE void panel_tile(const float* const (&panel)[P], const float* x, int64_t step, int64_t depth,
                       vf (&acc)[P][PV][R]) {
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < PV; ++v)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[p][v][r] = vf{};
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    vf weight[P][PV];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      // Hint 2, the second-level cache: memory sets the pace here, and a core can wait for more lines
      // of that level than of the first.
      __builtin_prefetch(panel[p] + (k + AHEAD) * PANEL, 0, 2);
#pragma GCC unroll 4
      for (int v = 0; v < PV; ++v) weight[p][v] = load(panel[p] + k * PANEL + v * W);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf value = splat(x[k * step + r]);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < PV; ++v) acc[p][v][r] += value * weight[p][v];
    }
  }
}

// to[i * step + r] <- silu(gate) * up of output i and row r, of the first `outputs` of a panel and the
// first `rows`.
template <int R>
INLINE void store_hidden(const vf (&gate)[PV][R], const vf (&up)[PV][R], float* to, int64_t step,
                         int64_t outputs = PANEL, int64_t rows = R) {
  float result[R][PANEL];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < PV; ++v) store(result[r] + v * W, silu(gate[v][r]) * up[v][r]);
  for (int64_t i = 0; i < outputs; ++i)
    for (int64_t r = 0; r < rows; ++r) to[i * step + r] = result[r][i];
}

// Calls f(integral_constant R, first) for runs of at most MOST of `rows` rows, all about as long.
template <int MOST, int R = MOST, typename F>
INLINE void with_run(int64_t rows, int64_t first, const F& f) {
  if constexpr (R > 1) {
    if (rows < R) return with_run<MOST, R - 1>(rows, first, f);
  }
  f(std::integral_constant<int, R>{}, first);
}
template <int MOST, typename F>
INLINE void for_each_run(int64_t rows, const F& f) {
  const int64_t runs = (rows + MOST - 1) / MOST;
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t first = rows * run / runs, end = rows * (run + 1) / runs;
    with_run<MOST>(end - first, first, f);
  }
}

// For at most FEW rows: outputs first .. end in whole panels, read side by side from four places,
// `jump` outputs apart. Returns the first output that is left, where the panels do not divide.
INLINE int64_t linear_few(const float* packed, int64_t rows, int64_t depth, const float* weight,
                          const float* bias, int64_t first, int64_t end, Rows<float> out) {
  const int64_t jump = (end - first) / PANEL / 4 * PANEL;
  for (int64_t n0 = first; n0 < first + jump; n0 += PANEL) {
    with_run<FEW>(rows, 0, [&](auto run, int64_t) {
      constexpr int R = decltype(run)::value;
      const float* panel[4];
      for (int p = 0; p < 4; ++p) panel[p] = weight + (n0 + p * jump) * depth;
      vf acc[4][PV][R];
      panel_tile<4, R, FETCH_FEW>(panel, packed, W, depth, acc);
      for (int p = 0; p < 4; ++p)
        for (int v = 0; v < PV; ++v) {
          const int64_t n = n0 + p * jump + v * W;
          const vf b = bias ? load(bias + n) : vf{};
          for (int r = 0; r < R; ++r) store(out[r] + n, acc[p][v][r] + b);
        }
    });
  }
  return first + 4 * jump;
}

// The same for hidden columns, from two places of both matrices.
INLINE int64_t gate_up_few(const float* packed, int64_t rows, int64_t depth, const float* w1,
                           const float* w3, int64_t first, int64_t end, float* hidden) {
  const int64_t jump = (end - first) / PANEL / 2 * PANEL;
  for (int64_t f0 = first; f0 < first + jump; f0 += PANEL) {
    with_run<FEW>(rows, 0, [&](auto run, int64_t) {
      constexpr int R = decltype(run)::value;
      const int64_t here = f0 * depth, there = (f0 + jump) * depth;
      const float* const panel[4] = {w1 + here, w1 + there, w3 + here, w3 + there};
      vf acc[4][PV][R];
      panel_tile<4, R, FETCH_FEW>(panel, packed, W, depth, acc);
      store_hidden<R>(acc[0], acc[2], hidden + f0 * W, W);
      store_hidden<R>(acc[1], acc[3], hidden + (f0 + jump) * W, W);
    });
  }
  return first + 2 * jump;
}

// A panel's outputs of a full block.
template <int MV>
INLINE void linear_full(const float* panel, const float* packed, int64_t rows, int64_t depth,
                        const float* bias, Rows<float> out, int64_t first) {
  float result[PANEL * MV * W];  // [output][row]
  for (int i = 0; i < PANEL; i += NR) {
    const float* row[NR];
    for (int n = 0; n < NR; ++n) row[n] = panel + i + n;
    vf acc[NR][MV];
    tile<MV, PANEL>(row, packed, depth, {nullptr, nullptr}, acc);
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n)
#pragma GCC unroll 4
      for (int m = 0; m < MV; ++m)
        store(result + ((i + n) * MV + m) * W, acc[n][m] + splat(bias ? bias[i + n] : 0.0f));
  }
  store_rows<MV>(result, PANEL, rows, out, first);
}

// Two panels' hidden columns of a full block.
template <int MV>
INLINE void gate_up_full(const float* gate, const float* up, const float* packed, int64_t depth,
                         float* hidden) {
  constexpr int HALF = NR / 2;
  for (int f = 0; f < PANEL; f += HALF) {
    const float* row[NR];
    for (int i = 0; i < HALF; ++i) row[i] = gate + f + i, row[HALF + i] = up + f + i;
    vf acc[NR][MV];
    tile<MV, PANEL>(row, packed, depth, {nullptr, nullptr}, acc);
    for (int i = 0; i < HALF; ++i)
      for (int m = 0; m < MV; ++m)
        store(hidden + ((f + i) * MV + m) * W, silu(acc[i][m]) * acc[HALF + i][m]);
  }
}

void linear_panels(const float* packed, int64_t rows, int64_t depth, const float* weight,
                   int64_t outputs, const float* bias, int64_t first, int64_t count,
                   Rows<float> out) {
  const int64_t end = first + count, whole = outputs / PANEL * PANEL;
  int64_t n0 = first;
  if (rows <= FEW && first < whole)
    n0 = linear_few(packed, rows, depth, weight, bias, first, end < whole ? end : whole, out);
  for (; n0 < end && n0 < whole; n0 += PANEL) {
    const float* const panel[1] = {weight + n0 * depth};
    for_each_block(rows, [&](auto mv, int64_t block, int64_t block_rows) {
      constexpr int MV = decltype(mv)::value;
      constexpr int64_t STEP = MV * W;
      if (fills<MV>(block_rows))
        return linear_full<MV>(panel[0], packed + block * depth, block_rows, depth,
                               bias ? bias + n0 : nullptr, out.from(block), n0);
      for_each_run<ONE>(block_rows, [&](auto run, int64_t row) {
        constexpr int R = decltype(run)::value;
        vf acc[1][PV][R];
        panel_tile<1, R>(panel, packed + block * depth + row, STEP, depth, acc);
        for (int v = 0; v < PV; ++v) {
          const vf b = bias ? load(bias + n0 + v * W) : vf{};
          for (int r = 0; r < R; ++r)
            store(out[block + row + r] + n0 + v * W, acc[0][v][r] + b);
        }
      });
    });
  }
  if (end > whole) {
    const int64_t rest = first > whole ? first : whole;
    linear(packed, rows, depth, weight, depth, bias, rest, end - rest, out);
  }
}

void gate_up_panels(const float* packed, int64_t rows, int64_t depth, const float* w1,
                    const float* w3, int64_t first, int64_t count, float* hidden, int64_t width) {
  const int64_t end = first + count, whole = width / PANEL * PANEL;
  int64_t f0 = first;
  if (rows <= FEW && first < whole)
    f0 = gate_up_few(packed, rows, depth, w1, w3, first, end < whole ? end : whole, hidden);
  for (; f0 < end && f0 < whole; f0 += PANEL) {
    const float* const panel[2] = {w1 + f0 * depth, w3 + f0 * depth};
    for_each_block(rows, [&](auto mv, int64_t block, int64_t block_rows) {
      constexpr int MV = decltype(mv)::value;
      constexpr int64_t STEP = MV * W;
      float* const block_hidden = hidden + block * width + f0 * STEP;
      if (fills<MV>(block_rows))
        return gate_up_full<MV>(panel[0], panel[1], packed + block * depth, depth, block_hidden);
      for_each_run<ONE>(block_rows, [&](auto run, int64_t row) {
        constexpr int R = decltype(run)::value;
        const float* const x = packed + block * depth + row;
        vf acc[2][PV][R];
        if constexpr (R <= TWO) {
          panel_tile<2, R>(panel, x, STEP, depth, acc);
        } else {
          panel_tile<1, R>({panel[0]}, x, STEP, depth, reinterpret_cast<vf(&)[1][PV][R]>(acc[0]));
          panel_tile<1, R>({panel[1]}, x, STEP, depth, reinterpret_cast<vf(&)[1][PV][R]>(acc[1]));
        }
        store_hidden<R>(acc[0], acc[1], block_hidden + row, STEP);
      });
    });
  }
  if (end > whole) {
    const int64_t rest = first > whole ? first : whole;
    gate_up(packed, rows, depth, w1, w3, rest, end - rest, hidden, width);
  }
}
