// level_rows: rows of experts with copies move between hosts until ranks are level, many steps at a
// time. One thread: the search for a placement runs layers side by side.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "library.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// Without FMA, whose rounding would make a plan depend on the processor that it was made on.
#define LOCKSTEP_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define LOCKSTEP_CLONES
#endif

namespace lockstep {
namespace {

LOCKSTEP_CLONES
void move_rows(float* __restrict load_a, float* __restrict load_b, float* __restrict rows_a,
               float* __restrict rows_b, float weight_a, float weight_b, int64_t steps) {
  for (int64_t s = 0; s < steps; ++s) {
    float moved = weight_a * load_a[s] - weight_b * load_b[s];
    moved = moved < -rows_b[s] ? -rows_b[s] : moved;
    moved = moved > rows_a[s] ? rows_a[s] : moved;
    load_a[s] -= moved;
    load_b[s] += moved;
    rows_a[s] -= moved;
    rows_b[s] += moved;
  }
}

LOCKSTEP_CLONES
void raise_to(float* __restrict most, const float* __restrict load, float time, int64_t steps) {
  for (int64_t s = 0; s < steps; ++s) {
    const float value = load[s] * time;
    most[s] = most[s] < value ? value : most[s];
  }
}

struct Pair {
  int64_t first, second;  // instances
  int64_t a, b;           // their ranks
  float weight_a, weight_b;
};

}  // namespace

at::Tensor level_rows(const at::Tensor& load, const at::Tensor& rows, const at::Tensor& home,
                      const at::Tensor& copies, const at::Tensor& times, int64_t sweeps) {
  TORCH_CHECK(load.dim() == 2 && load.scalar_type() == at::kFloat && load.is_contiguous(),
              "level_rows: contiguous float32 loads [ranks, steps] expected");
  TORCH_CHECK(rows.dim() == 2 && rows.scalar_type() == at::kFloat && rows.is_contiguous() &&
                  rows.size(1) == load.size(1) && rows.size(0) == home.numel() + copies.size(0),
              "level_rows: contiguous float32 rows [homes and copies, steps] expected");
  TORCH_CHECK(home.scalar_type() == at::kLong && home.is_contiguous() &&
                  copies.scalar_type() == at::kLong && copies.is_contiguous() &&
                  copies.dim() == 2 && copies.size(1) == 2,
              "level_rows: contiguous int64 homes [experts] and copies [copies, 2] expected");
  TORCH_CHECK(times.scalar_type() == at::kFloat && times.is_contiguous() &&
                  times.numel() == load.size(0),
              "level_rows: a float32 time per rank expected");
  const int64_t steps = load.size(1), ranks = load.size(0), experts = home.numel();
  const int64_t* home_of = home.const_data_ptr<int64_t>();
  const int64_t* copy_of = copies.const_data_ptr<int64_t>();
  const float* time_of = times.const_data_ptr<float>();
  float* load_of = load.mutable_data_ptr<float>();
  float* rows_of = rows.mutable_data_ptr<float>();
  std::vector<Pair> pairs;
  const auto add = [&](int64_t first, int64_t second, int64_t a, int64_t b) {
    TORCH_CHECK(a >= 0 && a < ranks && b >= 0 && b < ranks && a != b, "level_rows: ranks ", a,
                " and ", b, " of ", ranks);
    const float sum = time_of[a] + time_of[b];
    pairs.push_back({first, second, a, b, time_of[a] / sum, time_of[b] / sum});
  };
  for (int64_t c = 0; c < copies.size(0); ++c) {
    const int64_t expert = copy_of[2 * c], rank = copy_of[2 * c + 1];
    TORCH_CHECK(expert >= 0 && expert < experts, "level_rows: expert ", expert, " of ", experts);
    add(expert, experts + c, home_of[expert], rank);
    for (int64_t other = 0; other < c; ++other)
      if (copy_of[2 * other] == expert)
        add(experts + other, experts + c, copy_of[2 * other + 1], rank);
  }
  const auto apply = [&](const Pair& pair) {
    move_rows(load_of + pair.a * steps, load_of + pair.b * steps, rows_of + pair.first * steps,
              rows_of + pair.second * steps, pair.weight_a, pair.weight_b, steps);
  };
  for (int64_t sweep = 0; sweep < sweeps; ++sweep)
    if (sweep % 2 == 0)
      std::for_each(pairs.begin(), pairs.end(), apply);
    else
      std::for_each(pairs.rbegin(), pairs.rend(), apply);
  const at::Tensor most = at::empty({steps}, load.options());
  float* most_of = most.mutable_data_ptr<float>();
  std::fill(most_of, most_of + steps, std::numeric_limits<float>::lowest());
  for (int64_t rank = 0; rank < ranks; ++rank)
    raise_to(most_of, load_of + rank * steps, time_of[rank], steps);
  return most;
}

}  // namespace lockstep
