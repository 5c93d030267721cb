// Attention on the paged cache, decode and prefill alike: walks the chunks and tiles of one block
// of rows in the form that suits its number of rows. What both forms agree on stands in
// attention_state.h.

int64_t attention_scratch(const Attention& a) {
  return (a.key_dim + KEYS) * BLOCK + attention_state(a);
}

// Calls f(form, width in vectors) for a block of rows.
template <typename F>
INLINE void with_form(const Attention& a, const AttentionItem& item, float* scratch, F&& f) {
  const auto narrow = [&](auto rows) {
    f(Narrow<decltype(rows)::value>(a, item, scratch), std::integral_constant<int, 1>{});
  };
  switch (item.rows) {
    case 1: return narrow(std::integral_constant<int, 1>{});
    case 2: return narrow(std::integral_constant<int, 2>{});
    case 3: return narrow(std::integral_constant<int, 3>{});
    case 4: return narrow(std::integral_constant<int, 4>{});
  }
  for_each_block(item.rows, [&](auto width, int64_t, int64_t) {
    f(Wide<decltype(width)::value>(a, item, scratch), width);
  });
}

// The first tile of another item: only to be fetched.
INLINE void locate_first(const Attention& a, const AttentionItem& item, Rows& rows) {
  const Visible<1> visible(a, item);
  const int64_t from = visible.lowest / KEYS * KEYS;
  locate(a, item, from, visible.highest + 1, rows);
}

void attend(const Attention& a, const AttentionItem& item, float* scratch) {
  with_form(a, item, scratch, [&](auto form, auto width) {
    float* chunk_state = scratch + (a.key_dim + KEYS) * BLOCK;
    const Visible<decltype(width)::value> visible(a, item);
    form.pack_queries();
    reset(a, item.state);
    Rows rows[2];
    bool first = true;
    for (int64_t chunk = item.first_chunk; chunk < item.last_chunk; ++chunk) {
      const int64_t from = chunk * CHUNK;
      const int64_t begin = from > visible.lowest ? from : visible.lowest / KEYS * KEYS;
      const int64_t end = from + CHUNK <= visible.highest ? from + CHUNK : visible.highest + 1;
      if (begin >= end) continue;
      float* state = first ? item.state : chunk_state;
      if (!first) reset(a, state);
      locate(a, item, begin, end, rows[0]);
      for (int64_t key = begin, now = 0; key < end; key += KEYS, now = 1 - now) {
        if (key + KEYS < end || !item.next || chunk + 1 < item.last_chunk)
          locate(a, item, key + KEYS, end, rows[1 - now]);
        else
          locate_first(a, *item.next, rows[1 - now]);
        form.take(rows[now], rows[1 - now], key, visible, state);
      }
      if (!first) form.merge(item.state, state);
      first = false;
    }
  });
}

void attention_merge(const Attention& a, const AttentionItem& item, float* later) {
  with_form(a, item, nullptr, [&](auto form, auto) { form.merge(item.state, later); });
}

void attention_finish(const Attention& a, const AttentionItem& item) {
  if (a.sinks) add_sinks(a, item, item.state);
  with_form(a, item, nullptr, [&](auto form, auto) { form.finish(item.state); });
}
