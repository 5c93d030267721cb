// What both forms of attention share (attention_wide.h, attention_narrow.h): the order in which
// keys are taken, the running state of a block of rows, which keys a row sees and where they lie.
//
// A block of rows is (query, head) pairs of one kv head, so a key or value is read once for all of
// them. Keys are taken in tiles of KEYS from position 0 and in chunks of CHUNK whose states are
// merged in order: both stand at fixed positions of the context. Within a tile every sum runs over
// the head dimension or the keys in ascending order, in both forms. So a token's output is the same
// bits in prefill, in chunked prefill and in decode, alone and in any batch. Source: Milakov and
// Gimelshein, Online normalizer calculation for softmax, 2018.

constexpr int64_t KEYS = 32;
constexpr int64_t CHUNK = 1024;
constexpr int64_t SPARE = W > NR ? W : NR;

// The running state of a block: maximum and sum of weights, a row a lane, then the weighted values
// in the order of the form that fills them.
INLINE float* state_max(float* state) { return state; }
INLINE float* state_sum(float* state) { return state + BLOCK; }
INLINE float* state_values(float* state) { return state + 2 * BLOCK; }

int64_t attention_state(const Attention& a) { return (2 + a.value_dim) * BLOCK; }

INLINE void reset(const Attention& a, float* state) {
  for (int64_t i = 0; i < BLOCK; ++i) state_max(state)[i] = -INFINITY;
  for (int64_t i = BLOCK; i < attention_state(a); ++i) state[i] = 0.0f;
}

// A row that has seen no key yet keeps -inf; weights are then taken against 0 and come out 0.
INLINE vf base_of(vf peak) { return peak == splat(-INFINITY) ? vf{} : peak; }

// Joins the maxima and sums of `later` to `state`; returns the factors of the values of both.
INLINE void merge_sums(float* state, float* later, int64_t lane, vf& keep, vf& take) {
  const vf mine = load(state_max(state) + lane), theirs = load(state_max(later) + lane);
  const vf peak = vmax(mine, theirs);
  keep = exp2_of(mine - base_of(peak));
  take = exp2_of(theirs - base_of(peak));
  const vf sum = rounded(load(state_sum(state) + lane) * keep);
  store(state_max(state) + lane, peak);
  store(state_sum(state) + lane, sum + load(state_sum(later) + lane) * take);
}

// Query and output of a row of the block.
INLINE const float* query_of(const Attention& a, const AttentionItem& item, int64_t row) {
  row += item.first_row;
  return a.q + (item.query_start + row / a.group) * a.q_token +
         (item.kv_head * a.group + row % a.group) * a.q_head;
}
INLINE float* out_of(const Attention& a, const AttentionItem& item, int64_t row) {
  row += item.first_row;
  const int64_t head = item.kv_head * a.group + row % a.group;
  return a.out + ((item.query_start + row / a.group) * a.heads + head) * a.value_dim;
}

// Adds the sinks of the rows' heads to their sums. Once, when all keys are in: a sink belongs to no
// chunk. One that is far above every score leaves a sum of 2^126, whose quotients are 0 to float32.
INLINE void add_sinks(const Attention& a, const AttentionItem& item, float* state) {
  for (int64_t lane = 0; lane < item.rows; lane += W) {
    vf sink{};
    for (int64_t i = 0; i < W && lane + i < item.rows; ++i)
      sink[i] = a.sinks[item.kv_head * a.group + (item.first_row + lane + i) % a.group];
    const vf above = sink * splat(1.44269504f) - base_of(load(state_max(state) + lane));
    const vf sum = load(state_sum(state) + lane) + exp2_of(vmin(splat(126.0f), above));
    store(state_sum(state) + lane, sum);
  }
}

// The first key that a query at a position sees; never falls as positions rise.
INLINE int64_t first_key(const Attention& a, int64_t position) {
  const int64_t reached = a.window && position >= a.window ? position - a.window + 1 : 0;
  const int64_t begun = a.span ? position - position % a.span : 0;
  return reached > begun ? reached : begun;
}

// The keys a row sees, [first, last] as positions of the context, for each lane of a block.
template <int MV>
struct Visible {
  vi first[MV], last[MV];
  int64_t lowest, highest;   // some row sees a key in [lowest, highest]
  int64_t all_from, all_to;  // every row sees the keys in [all_from, all_to]

  INLINE Visible(const Attention& a, const AttentionItem& item) {
    const int64_t computed = item.context_len - item.query_len;
    const int64_t top = computed + item.first_row / a.group;
    highest = computed + (item.first_row + item.rows - 1) / a.group;
    lowest = first_key(a, top);
    all_from = first_key(a, highest);
    all_to = top;
    for (int m = 0; m < MV; ++m) {
      for (int i = 0; i < W; ++i) {
        const int64_t row = item.first_row + (m * W + i < item.rows ? m * W + i : item.rows - 1);
        const int64_t position = computed + row / a.group;
        last[m][i] = static_cast<int32_t>(position);
        first[m][i] = static_cast<int32_t>(first_key(a, position));
      }
    }
  }

  // Whether some row does not see one of the `count` keys from position `from`.
  INLINE bool hides(int64_t from, int64_t count) const {
    return from < all_from || from + count - 1 > all_to;
  }
};

// Rows of the cache to bring nearer while the core computes on others.
struct Fetch {
  const float* const* rows;
  int64_t count, floats;

  // Rows first .. last, whole.
  INLINE void operator()(int64_t first, int64_t last) const {
    for (int64_t t = first; t < last && t < count; ++t)
      for (int64_t d = 0; d < floats; d += 16) __builtin_prefetch(rows[t] + d);
  }
};

// Where the keys of one tile and their values lie.
struct Rows {
  int64_t count;
  const float *keys[KEYS + SPARE], *values[KEYS];
};

INLINE void locate(const Attention& a, const AttentionItem& item, int64_t from, int64_t end,
                   Rows& rows) {
  rows.count = end - from < KEYS ? (end > from ? end - from : 0) : KEYS;
  int64_t t = 0, block = from / a.block_size, slot = from % a.block_size;
  for (; t < rows.count; ++block, slot = 0) {
    const float* k = a.k + item.blocks[block] * a.k_block + item.kv_head * a.k_head;
    const float* v = a.v + item.blocks[block] * a.v_block + item.kv_head * a.v_head;
    for (; slot < a.block_size && t < rows.count; ++slot, ++t) {
      rows.keys[t] = k + slot * a.k_slot;
      rows.values[t] = v + slot * a.v_slot;
    }
  }
  // Whoever takes several at a time reads entries past the last: they repeat it.
  const float* const last_key = t > 0 ? rows.keys[t - 1] : a.k;
  const float* const last_value = t > 0 ? rows.values[t - 1] : a.v;
  for (int64_t i = t; i < KEYS + SPARE; ++i) rows.keys[i] = last_key;
  for (int64_t i = t; i < KEYS; ++i) rows.values[i] = last_value;
}
