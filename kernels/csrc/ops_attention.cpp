// paged_attention and store_kv: one piece of work a (sequence, kv head, block of rows), and a chunk
// of the context besides when there are too few sequences to occupy every core.
#include <ATen/ops/empty.h>

#include <cstring>
#include <vector>

#include "library.h"

namespace lockstep {
namespace {

bool rows_contiguous(const at::Tensor& x) { return x.size(-1) <= 1 || x.stride(-1) == 1; }

void check_cache(const char* op, const at::Tensor& k_cache, const at::Tensor& v_cache) {
  TORCH_CHECK(k_cache.dim() == 4 && v_cache.dim() == 4 && rows_contiguous(k_cache) &&
                  rows_contiguous(v_cache) && k_cache.size(0) == v_cache.size(0) &&
                  k_cache.size(1) == v_cache.size(1) && k_cache.size(2) == v_cache.size(2),
              op, ": caches ", k_cache.sizes(), " and ", v_cache.sizes());
}

// Every query block of every sequence, the longest first within a sequence.
std::vector<AttentionItem> blocks_of(const Attention& a, int64_t kv_heads,
                                     const at::Tensor& block_table, int64_t num_blocks,
                                     at::IntArrayRef query_lens, at::IntArrayRef context_lens) {
  const int64_t block_rows = kernels().block_rows, chunk = kernels().chunk;
  std::vector<AttentionItem> items;
  int64_t start = 0;
  for (size_t s = 0; s < query_lens.size(); ++s) {
    const int64_t queries = query_lens[s], context = context_lens[s];
    const int64_t columns = (context + a.block_size - 1) / a.block_size;
    TORCH_CHECK(queries >= 0 && queries <= context && columns <= block_table.size(1),
                "paged_attention: sequence ", s, " has ", queries, " queries, a context of ", context,
                " and ", block_table.size(1), " blocks of ", a.block_size);
    const int32_t* table = block_table.const_data_ptr<int32_t>() + s * block_table.stride(0);
    for (int64_t b = 0; b < columns; ++b)
      TORCH_CHECK(table[b] >= 0 && table[b] < num_blocks, "paged_attention: sequence ", s,
                  " names block ", table[b], " of ", num_blocks);
    const int64_t rows = queries * a.group;
    for (int64_t first = (rows - 1) / block_rows * block_rows; rows > 0 && first >= 0;
         first -= block_rows)
      for (int64_t g = 0; g < kv_heads; ++g)
        items.push_back({table, start, queries, context, g, first,
                         std::min(block_rows, rows - first), 0, (context + chunk - 1) / chunk,
                         nullptr, nullptr});
    start += queries;
  }
  return items;
}

}  // namespace

at::Tensor paged_attention(const at::Tensor& q_in, const at::Tensor& k_cache,
                           const at::Tensor& v_cache, const at::Tensor& block_table,
                           at::IntArrayRef query_lens, at::IntArrayRef context_lens, double scale,
                           int64_t window, const std::optional<at::Tensor>& sinks,
                           int64_t span) {
  check_cache("paged_attention", k_cache, v_cache);
  const at::Tensor q = rows_contiguous(q_in) ? q_in : q_in.contiguous();
  const int64_t kv_heads = k_cache.size(1);
  TORCH_CHECK(q.dim() == 3 && q.size(1) % kv_heads == 0 && q.size(2) == k_cache.size(3) &&
                  block_table.scalar_type() == at::kInt && block_table.dim() == 2 &&
                  (block_table.numel() == 0 || block_table.size(1) == 1 ||
                   block_table.stride(1) == 1) &&
                  query_lens.size() == context_lens.size() &&
                  static_cast<int64_t>(query_lens.size()) == block_table.size(0),
              "paged_attention: q ", q.sizes(), ", k_cache ", k_cache.sizes(), ", block_table ",
              block_table.sizes());
  int64_t tokens = 0;
  for (const int64_t queries : query_lens) tokens += queries;
  TORCH_CHECK(tokens == q.size(0), "paged_attention: query_lens sum to ", tokens, ", q has ",
              q.size(0), " tokens");
  TORCH_CHECK(!sinks || (sinks->dim() == 1 && sinks->size(0) == q.size(1) &&
                         sinks->scalar_type() == at::kFloat && sinks->is_contiguous()),
              "paged_attention: sinks must be ", q.size(1), " contiguous float32 numbers, one per head");
  const at::Tensor out = at::empty({q.size(0), q.size(1), v_cache.size(3)}, q.options());
  const Attention a = {q.const_data_ptr<float>(),
                       k_cache.const_data_ptr<float>(),
                       v_cache.const_data_ptr<float>(),
                       out.mutable_data_ptr<float>(),
                       q.stride(0),
                       q.stride(1),
                       k_cache.stride(0),
                       k_cache.stride(1),
                       k_cache.stride(2),
                       v_cache.stride(0),
                       v_cache.stride(1),
                       v_cache.stride(2),
                       q.size(1),
                       q.size(1) / kv_heads,
                       k_cache.size(3),
                       v_cache.size(3),
                       k_cache.size(2),
                       window,
                       span,
                       static_cast<float>(scale),
                       sinks ? sinks->const_data_ptr<float>() : nullptr};
  std::vector<AttentionItem> items =
      blocks_of(a, kv_heads, block_table, k_cache.size(0), query_lens, context_lens);
  const int64_t state = kernels().attention_state(a), work = kernels().attention_scratch(a);

  int64_t chunks = 0;
  for (const AttentionItem& item : items) chunks += item.last_chunk;
  const int64_t threads = at::get_num_threads(), whole = items.size();
  if (whole >= 2 * threads || chunks == whole) {
    for_each_item_ahead(whole, [&](int64_t i, int64_t next) {
      float* memory = scratch(state + work);
      AttentionItem item = items[i];
      item.state = memory;
      item.next = next < 0 ? nullptr : &items[next];
      kernels().attend(a, item, memory + state);
      kernels().attention_finish(a, item);
    });
    return out;
  }

  // Few sequences, long contexts: the chunks of a block run apart and merge in the order that one
  // thread would have merged them, so the split does not show in the result.
  const at::Tensor states = at::empty({chunks * state}, q.options());
  std::vector<AttentionItem> parts;
  for (AttentionItem& item : items) {
    item.state = states.mutable_data_ptr<float>() + parts.size() * state;
    for (int64_t c = 0; c < item.last_chunk; ++c) {
      AttentionItem part = item;
      part.first_chunk = c;
      part.last_chunk = c + 1;
      part.state = item.state + c * state;
      parts.push_back(part);
    }
  }
  for_each_item(chunks, [&](int64_t i) { kernels().attend(a, parts[i], scratch(work)); });
  for_each_item(whole, [&](int64_t i) {
    const AttentionItem& item = items[i];
    for (int64_t c = 1; c < item.last_chunk; ++c)
      kernels().attention_merge(a, item, item.state + c * state);
    kernels().attention_finish(a, item);
  });
  return out;
}

void store_kv(const at::Tensor& k, const at::Tensor& v, const at::Tensor& k_cache,
              const at::Tensor& v_cache, const at::Tensor& slots) {
  check_cache("store_kv", k_cache, v_cache);
  const int64_t block_size = k_cache.size(2), capacity = k_cache.size(0) * block_size;
  const int64_t tokens = slots.size(0), heads = k_cache.size(1);
  TORCH_CHECK(slots.scalar_type() == at::kLong && slots.is_contiguous() && k.dim() == 3 &&
                  v.dim() == 3 && rows_contiguous(k) && rows_contiguous(v) && k.size(0) == tokens &&
                  v.size(0) == tokens && k.size(1) == heads && v.size(1) == heads &&
                  k.size(2) == k_cache.size(3) && v.size(2) == v_cache.size(3),
              "store_kv: k ", k.sizes(), ", v ", v.sizes(), ", caches ", k_cache.sizes(), " and ",
              v_cache.sizes());
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < tokens; ++t)
    TORCH_CHECK(slot[t] >= 0 && slot[t] < capacity, "store_kv: slot ", slot[t], " of ", capacity);
  const auto copy = [&](const at::Tensor& x, const at::Tensor& cache, int64_t t) {
    const float* from = x.const_data_ptr<float>() + t * x.stride(0);
    float* to = cache.mutable_data_ptr<float>() + slot[t] / block_size * cache.stride(0) +
                slot[t] % block_size * cache.stride(2);
    for (int64_t g = 0; g < heads; ++g)
      std::memcpy(to + g * cache.stride(1), from + g * x.stride(1), sizeof(float) * x.size(2));
  };
  for_each_row(tokens, heads * (k.size(2) + v.size(2)), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      copy(k, k_cache, t);
      copy(v, v_cache, t);
    }
  });
}

}  // namespace lockstep
