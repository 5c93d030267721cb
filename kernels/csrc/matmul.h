// Matrix products on packed rows: one register tile, NR weight rows by MV vectors of x rows, reads
// each weight once by broadcast while the packed rows stream from the second-level cache. Blocks of
// a few rows go to narrow.h, which has the same results. Weights lie as the checkpoint stores them
// ([out, in], row-major), or in panels (panels.h).

constexpr int MAX_MV = 3;
constexpr int64_t BLOCK = MAX_MV * W;
// How many columns ahead weights in panels are fetched: the processor does not look that far.
constexpr int64_t FETCH = 64;
// Outputs transposed at a time: whole tiles and whole vectors.
constexpr int OUT = W > NR ? W : NR;

// Where the weights of the next tile lie: two runs of NR / 2 rows each, or null. A core on its own
// reads NR rows side by side at half of what memory gives; fetching the next tile ahead doubles
// that.
struct Ahead {
  const float *first, *second;
};

// KS: floats from one column of a weight row to the next.
template <int MV, int KS>
INLINE void tile_step(const float* const* row, const float* x, int64_t k, vf (&acc)[NR][MV]) {
  vf column[MV];
#pragma GCC unroll 4
  for (int m = 0; m < MV; ++m) column[m] = load(x + (k * MV + m) * W);
#pragma GCC unroll 8
  for (int n = 0; n < NR; ++n) {
    const vf weight = splat(row[n][k * KS]);
#pragma GCC unroll 4
    for (int m = 0; m < MV; ++m) acc[n][m] += weight * column[m];
  }
}

// acc[n][m] = sum over k of rows[n][k] * x[k][m].
template <int MV, int KS = 1>
INLINE void tile(const float* const* rows, const float* x, int64_t depth, Ahead ahead,
                 vf (&acc)[NR][MV]) {
  constexpr int64_t HALF = NR / 2, LINE = 16, STEPS = LINE / HALF;  // HALF rows a line of STEPS each
  const float* row[NR];
#pragma GCC unroll 8
  for (int n = 0; n < NR; ++n) row[n] = rows[n];
#pragma GCC unroll 8
  for (int n = 0; n < NR; ++n)
#pragma GCC unroll 4
    for (int m = 0; m < MV; ++m) acc[n][m] = vf{};
  int64_t k = 0;
  if (ahead.first) {
    for (; k + STEPS <= depth; k += STEPS) {
      __builtin_prefetch(ahead.first + k * HALF);
      __builtin_prefetch(ahead.second + k * HALF);
#pragma GCC unroll 8
      for (int64_t step = 0; step < STEPS; ++step) tile_step<MV, KS>(row, x, k + step, acc);
    }
  }
  for (; k < depth; ++k) {
    if constexpr (KS > 1) __builtin_prefetch(row[0] + (k + FETCH) * KS);
    tile_step<MV, KS>(row, x, k, acc);
  }
}

// Calls f(mv, first row, rows) for each packed block of `rows` rows, mv its width in vectors.
template <typename F>
INLINE void for_each_block(int64_t rows, F&& f) {
  for (int64_t first = 0; first < rows; first += BLOCK) {
    const int64_t count = rows - first < BLOCK ? rows - first : BLOCK;
    if (count > 2 * W)
      f(std::integral_constant<int, 3>{}, first, count);
    else if (count > W)
      f(std::integral_constant<int, 2>{}, first, count);
    else
      f(std::integral_constant<int, 1>{}, first, count);
  }
}

// W columns of the rows that begin at row(0), row(1), ..., transposed; rows and columns out of range
// are zero.
template <typename F>
INLINE void load_transposed(const F& row, int64_t rows, int64_t columns, vf (&v)[W]) {
  if (rows >= W && columns >= W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = load(row(i));
  } else {
    for (int i = 0; i < W; ++i) {
      v[i] = vf{};
      if (i < rows) memcpy(&v[i], row(i), sizeof(float) * (columns < W ? columns : W));
    }
  }
  transpose(v);
}

void pack(Rows<const float> x, int64_t rows, int64_t depth, float* packed) {
  for_each_block(rows, [&](auto mv, int64_t first, int64_t count) {
    constexpr int MV = decltype(mv)::value;
    float* block = packed + first * depth;
    for (int m = 0; m < MV; ++m) {
      const int64_t lanes = count - m * W < W ? count - m * W : W;
      const float* row[W];
      for (int64_t i = 0; i < lanes; ++i) row[i] = x[first + m * W + i];
      for (int64_t k = 0; k < depth; k += W) {
        vf v[W];
        load_transposed([&](int i) { return row[i] + k; }, lanes, depth - k, v);
        const int64_t columns = depth - k < W ? depth - k : W;
        for (int64_t i = 0; i < columns; ++i) store(block + ((k + i) * MV + m) * W, v[i]);
      }
    }
  });
}

// out[r][first + c] <- result[c][r] of `columns` outputs and `rows` rows of a block.
template <int MV>
INLINE void store_rows(const float* result, int64_t columns, int64_t rows, Rows<float> out,
                       int64_t first) {
  for (int64_t c = 0; c < columns; c += W) {
    const int64_t width = columns - c < W ? columns - c : W;
    for (int m = 0; m < MV; ++m) {
      vf v[W];
      const float* from = result + (c * MV + m) * W;
      load_transposed([&](int i) { return from + i * MV * W; }, width, W, v);
      for (int64_t r = 0; r < W && m * W + r < rows; ++r) {
        float* to = out[m * W + r] + first + c;
        if (width == W)
          store(to, v[r]);
        else
          memcpy(to, &v[r], sizeof(float) * width);
      }
    }
  }
}

void linear(const float* packed, int64_t rows, int64_t depth, const float* weight,
            int64_t weight_stride, const float* bias, int64_t first, int64_t count,
            Rows<float> out) {
  const int64_t end = first + count;
  const bool done = with_narrow(rows, [&](auto r) {
    linear_narrow<decltype(r)::value>(packed, depth, weight, weight_stride, bias, first, end, out);
  });
  if (done) return;
  for (int64_t n0 = first; n0 < end; n0 += OUT) {
    const int64_t columns = end - n0 < OUT ? end - n0 : OUT;
    const float* row[OUT];  // past the end the last row again: computed, never stored
    for (int64_t i = 0; i < OUT; ++i)
      row[i] = weight + (n0 + (i < columns ? i : columns - 1)) * weight_stride;
    for_each_block(rows, [&](auto mv, int64_t block, int64_t block_rows) {
      constexpr int MV = decltype(mv)::value;
      float result[OUT * MV * W];  // [output][row]
      for (int64_t i = 0; i < columns; i += NR) {
        Ahead ahead = {nullptr, nullptr};
        if (block == 0 && n0 + i + 2 * NR <= end && weight_stride == depth)
          ahead = {row[i] + NR * depth, row[i] + (NR + NR / 2) * depth};
        vf acc[NR][MV];
        tile<MV>(row + i, packed + block * depth, depth, ahead, acc);
#pragma GCC unroll 8
        for (int n = 0; n < NR; ++n) {
          const vf b = splat(bias && i + n < columns ? bias[n0 + i + n] : 0.0f);
#pragma GCC unroll 4
          for (int m = 0; m < MV; ++m) store(result + ((i + n) * MV + m) * W, acc[n][m] + b);
        }
      }
      store_rows<MV>(result, columns, block_rows, out.from(block), n0);
    });
  }
}

void gate_up(const float* packed, int64_t rows, int64_t depth, const float* w1, const float* w3,
             int64_t first, int64_t count, float* hidden, int64_t width) {
  constexpr int HALF = NR / 2;
  const int64_t end = first + count;
  const bool done = with_narrow(rows, [&](auto r) {
    gate_up_narrow<decltype(r)::value>(packed, depth, w1, w3, first, end, hidden);
  });
  if (done) return;
  for (int64_t f0 = first; f0 < end; f0 += HALF) {
    const int64_t columns = end - f0 < HALF ? end - f0 : HALF;
    const float* row[NR];
    for (int i = 0; i < HALF; ++i) {
      const int64_t f = f0 + (i < columns ? i : columns - 1);
      row[i] = w1 + f * depth;
      row[HALF + i] = w3 + f * depth;
    }
    for_each_block(rows, [&](auto mv, int64_t block, int64_t) {
      constexpr int MV = decltype(mv)::value;
      Ahead ahead = {nullptr, nullptr};
      if (block == 0 && f0 + NR <= end) ahead = {row[0] + HALF * depth, row[HALF] + HALF * depth};
      vf acc[NR][MV];
      tile<MV>(row, packed + block * depth, depth, ahead, acc);
      float* to = hidden + block * width;
      for (int i = 0; i < columns; ++i)
        for (int m = 0; m < MV; ++m)
          store(to + ((f0 + i) * MV + m) * W, silu(acc[i][m]) * acc[HALF + i][m]);
    });
  }
}
