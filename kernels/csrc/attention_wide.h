// Attention of a block of many rows: one row a lane, as in matmul.h, so that scores and weighted
// values are the register tiles of a matrix product and softmax runs down the keys without crossing
// lanes. Queries lie as [key_dim][rows], scores as [key][rows], values of a state as
// [value_dim][rows].

template <int COLUMNS, int MV>
INLINE void weigh_columns(const Rows& rows, int64_t column, const float* weights,
                          const vf (&shrink)[MV], float* sums) {
  vf acc[COLUMNS][MV];
#pragma GCC unroll 8
  for (int n = 0; n < COLUMNS; ++n)
#pragma GCC unroll 4
    for (int m = 0; m < MV; ++m)
      acc[n][m] = rounded(load(sums + ((column + n) * MV + m) * W) * shrink[m]);
  for (int64_t t = 0; t < rows.count; ++t) {
    const float* value = rows.values[t] + column;
    vf weight[MV];
#pragma GCC unroll 4
    for (int m = 0; m < MV; ++m) weight[m] = load(weights + (t * MV + m) * W);
#pragma GCC unroll 8
    for (int n = 0; n < COLUMNS; ++n) {
      const vf x = splat(value[n]);
#pragma GCC unroll 4
      for (int m = 0; m < MV; ++m) acc[n][m] += x * weight[m];
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < COLUMNS; ++n)
#pragma GCC unroll 4
    for (int m = 0; m < MV; ++m) store(sums + ((column + n) * MV + m) * W, acc[n][m]);
}

template <int MV>
struct Wide {
  const Attention& a;
  const AttentionItem& item;
  float *queries, *scores;

  INLINE Wide(const Attention& call, const AttentionItem& block, float* scratch)
      : a(call), item(block), queries(scratch), scores(scratch + call.key_dim * BLOCK) {}

  // Scaled so that softmax can use powers of two.
  INLINE void pack_queries() {
    const vf scale = splat(a.scale * 1.44269504f);
    for (int m = 0; m < MV; ++m) {
      for (int64_t d = 0; d < a.key_dim; d += W) {
        const int64_t columns = a.key_dim - d < W ? a.key_dim - d : W;
        vf v[W];
        for (int i = 0; i < W; ++i) {
          v[i] = vf{};
          if (m * W + i < item.rows)
            memcpy(&v[i], query_of(a, item, m * W + i) + d, sizeof(float) * columns);
        }
        transpose(v);
        for (int64_t i = 0; i < columns; ++i)
          store(queries + ((d + i) * MV + m) * W, v[i] * scale);
      }
    }
  }

  // One tile of keys, from position `from`; `next` is the tile after it.
  INLINE void take(const Rows& now, const Rows& next, int64_t from, const Visible<MV>& visible,
                   float* state) {
    vf shrink[MV];
    score(now, from, visible);
    soften(now.count, state, shrink);
    // One vector of rows: memory sets the pace. More of them are prefill, which finds keys in
    // cache.
    weigh(now, {next.keys, MV == 1 ? next.count : 0, a.key_dim}, shrink, state_values(state));
  }

  INLINE void score(const Rows& rows, int64_t from, const Visible<MV>& visible) {
    const bool mask = visible.hides(from, rows.count);
    const Fetch fetch = {rows.values, MV == 1 ? rows.count : 0, a.value_dim};
    for (int64_t t = 0; t < rows.count; t += NR) {
      fetch(t, t + NR);
      vf acc[NR][MV];
      tile<MV>(rows.keys + t, queries, a.key_dim, {nullptr, nullptr}, acc);
      for (int n = 0; n < NR; ++n) {
        for (int m = 0; m < MV; ++m) {
          if (mask) {
            const vi key = static_cast<int32_t>(from + t + n) - vi{};
            const vi hidden = (key < visible.first[m]) | (key > visible.last[m]);
            acc[n][m] = hidden ? splat(-INFINITY) : acc[n][m];
          }
          store(scores + ((t + n) * MV + m) * W, acc[n][m]);
        }
      }
    }
  }

  // Turns scores into weights in place; shrink: the factor of what was summed before.
  INLINE void soften(int64_t count, float* state, vf (&shrink)[MV]) {
#pragma GCC unroll 4
    for (int m = 0; m < MV; ++m) {
      const vf before = load(state_max(state) + m * W);
      vf peak = before;
      for (int64_t t = 0; t < count; ++t) peak = vmax(load(scores + (t * MV + m) * W), peak);
      const vf base = base_of(peak);
      shrink[m] = exp2_of(before - base);
      vf sum = rounded(load(state_sum(state) + m * W) * shrink[m]);
      for (int64_t t = 0; t < count; ++t) {
        float* at = scores + (t * MV + m) * W;
        const vf weight = exp2_of(load(at) - base);
        store(at, weight);
        sum += weight;
      }
      store(state_max(state) + m * W, peak);
      store(state_sum(state) + m * W, sum);
    }
  }

  // sums <- sums * shrink + values^T weights.
  INLINE void weigh(const Rows& rows, const Fetch& fetch, const vf (&shrink)[MV], float* sums) {
    const int64_t fetch_rows = fetch.count * NR / a.value_dim + 1;
    int64_t column = 0, fetched = 0;
    for (; column + NR <= a.value_dim; column += NR, fetched += fetch_rows) {
      fetch(fetched, fetched + fetch_rows);
      weigh_columns<NR>(rows, column, scores, shrink, sums);
    }
    for (; column < a.value_dim; ++column) weigh_columns<1>(rows, column, scores, shrink, sums);
  }

  INLINE void merge(float* state, float* later) {
    vf keep[MV], take[MV];
    for (int m = 0; m < MV; ++m) merge_sums(state, later, m * W, keep[m], take[m]);
    for (int64_t d = 0; d < a.value_dim; ++d) {
      for (int m = 0; m < MV; ++m) {
        float* at = state_values(state) + (d * MV + m) * W;
        const vf mine = rounded(load(at) * keep[m]);
        store(at, mine + load(state_values(later) + (d * MV + m) * W) * take[m]);
      }
    }
  }

  INLINE void finish(float* state) {
    for (int m = 0; m < MV; ++m) {
      const vf sum = load(state_sum(state) + m * W);
      for (int64_t d = 0; d < a.value_dim; d += W) {
        const int64_t columns = a.value_dim - d < W ? a.value_dim - d : W;
        vf v[W];
        for (int i = 0; i < W; ++i)
          v[i] = i < columns ? load(state_values(state) + ((d + i) * MV + m) * W) / sum : vf{};
        transpose(v);
        for (int i = 0; i < W && m * W + i < item.rows; ++i)
          memcpy(out_of(a, item, m * W + i) + d, &v[i], sizeof(float) * columns);
      }
    }
  }
};
