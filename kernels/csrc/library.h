// Shared by the torch-facing sources: the chosen table of kernels, work distribution, thread
// scratch.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace lockstep {

// The table of kernels in use; set once, when Python selects it.
const Kernels& kernels();

// Scratch of the calling thread, 64-byte aligned, kept for the next call.
float* scratch(int64_t floats);

// Calls f(i) for every i < items on torch's own threads. An idle thread takes the next item, so a
// core that is slower than the others takes fewer of them.
template <typename F>
void for_each_item(int64_t items, const F& f) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), items);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < items; i = next++) f(i);
  });
}

// The same for f(i, next): the thread takes its next item before it works on this one, so that it
// can fetch what that one reads; `next` is -1 where there is none, and where items are so few that
// one held back would leave a thread idle.
template <typename F>
void for_each_item_ahead(int64_t items, const F& f) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), items);
  if (items < 8 * threads) return for_each_item(items, [&](int64_t i) { f(i, -1); });
  std::atomic<int64_t> counter{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = counter++, next; i < items; i = next) {
      next = counter++;
      f(i, next < items ? next : -1);
    }
  });
}

// Calls f(first, last) over ranges of rows worth at least a thread's wake-up.
template <typename F>
void for_each_row(int64_t rows, int64_t floats_per_row, const F& f) {
  constexpr int64_t GRAIN = 32768;
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, floats_per_row)), f);
}

void to_panels(const at::Tensor& weight);
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias, bool panels);
at::Tensor grouped_ffn(const at::Tensor& x, const at::Tensor& w13, const at::Tensor& w2,
                       at::IntArrayRef counts, const std::optional<at::Tensor>& into, bool panels,
                       const std::optional<at::Tensor>& index);
at::Tensor grouped_ffn_quantised(const at::Tensor& x, const at::Tensor& packed13,
                                 const at::Tensor& scale13, const std::optional<at::Tensor>& zero13,
                                 at::IntArrayRef sizes13, const at::Tensor& packed2,
                                 const at::Tensor& scale2, const std::optional<at::Tensor>& zero2,
                                 at::IntArrayRef sizes2, at::IntArrayRef counts,
                                 const std::optional<at::Tensor>& into,
                                 const std::optional<at::Tensor>& index);
at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                           const at::Tensor& block_table, at::IntArrayRef query_lens,
                           at::IntArrayRef context_lens, double scale, int64_t window,
                           const std::optional<at::Tensor>& sinks, int64_t span);
void store_kv(const at::Tensor& k, const at::Tensor& v, const at::Tensor& k_cache,
              const at::Tensor& v_cache, const at::Tensor& slots);
at::Tensor silu_and_mul(const at::Tensor& gate_up);
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);
at::Tensor add_rms_norm(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight,
                        double eps);
void apply_rotary(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                  const at::Tensor& sin);
std::tuple<at::Tensor, at::Tensor, at::Tensor> sort_by_expert(const at::Tensor& topk_ids,
                                                              int64_t num_experts);
std::tuple<at::Tensor, at::Tensor> select_top(at::TensorList words, const at::Tensor& pool,
                                              const at::Tensor& need);
std::tuple<at::Tensor, at::Tensor, at::Tensor> select_experts(
    const at::Tensor& logits, const std::optional<at::Tensor>& bias, int64_t top_k, int64_t score,
    bool normalize, double eps, double least, double scale);
at::Tensor combine_rows(const at::Tensor& rows, const at::Tensor& slot, const at::Tensor& weights);
at::Tensor split_rows(const at::Tensor& packed, const at::Tensor& load,
                      const std::optional<at::Tensor>& speeds,
                      const std::optional<at::Tensor>& limit, bool fewest_moved);
at::Tensor split_optimum(const at::Tensor& packed, const at::Tensor& loads);
at::Tensor cut(const at::Tensor& packed, const at::Tensor& expert, const at::Tensor& limit);
at::Tensor order_claims(at::TensorList words);
at::Tensor level_rows(const at::Tensor& load, const at::Tensor& rows, const at::Tensor& home,
                      const at::Tensor& copies, const at::Tensor& times, int64_t sweeps);

// The rank's end of a group in shared memory (lane.h), by its address.
int64_t lane_open(int64_t rank, int64_t ring, int64_t spin_ns, std::vector<int64_t> segments,
                  std::vector<int64_t> processes);
void lane_close(int64_t lane);
int64_t lane_start(int64_t lane, int64_t kind, const at::Tensor& send, std::vector<int64_t> send_at,
                   std::vector<int64_t> send_bytes, const at::Tensor& into,
                   std::vector<int64_t> recv_bytes);
void lane_wait(int64_t lane, int64_t number, int64_t timeout_ns);

}  // namespace lockstep
