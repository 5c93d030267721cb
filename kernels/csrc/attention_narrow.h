// Attention of a block of one to four rows, which is decode with small groups: scores take one key
// a lane (narrow.h) and weighted values one column a lane. Every single sum keeps the order that it
// has in attention_wide.h. Queries lie as [row][key_dim], scores as [row][key], values of a state
// as [row][value_dim].

template <int R>
struct Narrow {
  static constexpr int COLUMNS = NR / 2;  // vectors of values in flight: R of each are accumulators
  const Attention& a;
  const AttentionItem& item;
  float *queries, *scores;

  INLINE Narrow(const Attention& call, const AttentionItem& block, float* scratch)
      : a(call), item(block), queries(scratch), scores(scratch + call.key_dim * BLOCK) {}

  INLINE void pack_queries() {
    const float scale = a.scale * 1.44269504f;
    for (int r = 0; r < R; ++r) {
      const float* q = query_of(a, item, r);
      for (int64_t d = 0; d < a.key_dim; ++d) queries[r * a.key_dim + d] = q[d] * scale;
    }
  }

  INLINE void take(const Rows& now, const Rows& next, int64_t from, const Visible<1>& visible,
                   float* state) {
    float shrink[W];
    score(now, next, from, visible);
    soften(now.count, state, shrink);
    weigh(now, next, shrink, state_values(state));
  }

  // Fetches the keys of the next tile into the second-level cache (a core can wait for more lines of
  // that one than of the first), as `weigh` does its values: half of the lines each, for all at once
  // are more than it can wait for. W keys of one block lie in a row, so the lines are those behind
  // the first; of keys that do not, wrong lines are fetched, which costs time only.
  INLINE void score(const Rows& rows, const Rows& next, int64_t from, const Visible<1>& visible) {
    const bool mask = visible.hides(from, rows.count);
    vi lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    for (int64_t t = 0; t < rows.count; t += W) {
      const float* const keys = next.keys[t];
      vf acc[R];
      narrow_dot<R>(
          rows.keys + t, a.key_dim, queries, 1, a.key_dim,
          [&](int64_t d) {
#pragma GCC unroll 16
            for (int j = 0; j < W * W; j += 16) __builtin_prefetch(keys + d * W + j, 0, 2);
          },
          acc);
      const vi key = lane + static_cast<int32_t>(from + t);
      const vi past = lane >= static_cast<int32_t>(rows.count - t) - vi{};
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        vi hidden = past;
        if (mask) hidden |= (key < visible.first[0][r]) | (key > visible.last[0][r]);
        store(scores + r * KEYS + t, hidden ? splat(-INFINITY) : acc[r]);
      }
    }
  }

  INLINE void soften(int64_t count, float* state, float (&shrink)[W]) {
    const vf before = load(state_max(state));
    vf peak = before;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      vf most = splat(before[r]);
      for (int64_t t = 0; t < count; t += W) most = vmax(load(scores + r * KEYS + t), most);
      float top = most[0];
      for (int i = 1; i < W; ++i) top = most[i] > top ? most[i] : top;
      peak[r] = top;
    }
    const vf base = base_of(peak);
    const vf factor = exp2_of(before - base);
    vf sum = rounded(load(state_sum(state)) * factor);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      float* row = scores + r * KEYS;
      for (int64_t t = 0; t < count; t += W) store(row + t, exp2_of(load(row + t) - splat(base[r])));
    }
    float sums[W];
    store(sums, sum);
    for (int64_t t = 0; t < count; ++t)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r] += scores[r * KEYS + t];
    store(state_max(state), peak);
    store(state_sum(state), load(sums));
    store(shrink, factor);
  }

  INLINE void weigh(const Rows& rows, const Rows& next, const float (&shrink)[W], float* sums) {
    int64_t column = 0;
    for (; column + COLUMNS * W <= a.value_dim; column += COLUMNS * W)
      weigh_columns<COLUMNS, W>(rows, next, column, shrink, sums);
    for (; column + W <= a.value_dim; column += W)
      weigh_columns<1, W>(rows, next, column, shrink, sums);
    for (; column < a.value_dim; ++column) weigh_columns<1, 1>(rows, next, column, shrink, sums);
  }

  // COUNT vectors of columns, of which LANES floats each exist.
  template <int COUNT, int LANES>
  INLINE void weigh_columns(const Rows& rows, const Rows& next, int64_t column,
                            const float (&shrink)[W], float* sums) {
    vf acc[R][COUNT];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < COUNT; ++j) {
        const vf sum = load_some<LANES>(sums + r * a.value_dim + column + j * W);
        acc[r][j] = rounded(sum * splat(shrink[r]));
      }
    }
    for (int64_t t = 0; t < rows.count; ++t) {
#pragma GCC unroll 4
      for (int j = 0; j < COUNT * W; j += 16) __builtin_prefetch(next.values[t] + column + j, 0, 2);
      vf value[COUNT];
#pragma GCC unroll 4
      for (int j = 0; j < COUNT; ++j)
        value[j] = load_some<LANES>(rows.values[t] + column + j * W);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const vf weight = splat(scores[r * KEYS + t]);
#pragma GCC unroll 4
        for (int j = 0; j < COUNT; ++j) acc[r][j] += value[j] * weight;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < COUNT; ++j)
        store_some<LANES>(sums + r * a.value_dim + column + j * W, acc[r][j]);
  }

  INLINE void merge(float* state, float* later) {
    vf keep, take;
    merge_sums(state, later, 0, keep, take);
    for (int r = 0; r < R; ++r) {
      float* mine = state_values(state) + r * a.value_dim;
      const float* theirs = state_values(later) + r * a.value_dim;
      for (int64_t d = 0; d < a.value_dim; ++d) {
        const vf kept = rounded(splat(mine[d]) * splat(keep[r]));
        mine[d] = (kept + splat(theirs[d]) * splat(take[r]))[0];
      }
    }
  }

  INLINE void finish(float* state) {
    for (int r = 0; r < R; ++r) {
      const float sum = state_sum(state)[r];
      float* out = out_of(a, item, r);
      for (int64_t d = 0; d < a.value_dim; ++d)
        out[d] = state_values(state)[r * a.value_dim + d] / sum;
    }
  }
};
