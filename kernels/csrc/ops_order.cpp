// order_claims: all claims from the best to the last. A radix sort of the first word, and of the
// others only where claims share all words before.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "library.h"

namespace lockstep {
namespace {

struct Claim {
  uint32_t word;  // the word turned over: the smallest is the best
  uint32_t index;
};

uint32_t turned(int32_t word) { return ~(static_cast<uint32_t>(word) ^ 0x80000000u); }

bool better(const Claim& a, const Claim& b) { return a.word < b.word; }

// Stable sort by `word`, BITS a pass; digits that all claims share cost no pass.
template <int BITS>
void radix(Claim* claims, Claim* other, int64_t count) {
  constexpr int PASSES = (32 + BITS - 1) / BITS, SIZE = 1 << BITS;
  static thread_local std::array<std::array<uint32_t, SIZE>, PASSES> starts;
  for (auto& start : starts) start.fill(0);
  for (int64_t n = 0; n < count; ++n)
    for (int pass = 0; pass < PASSES; ++pass)
      ++starts[pass][(claims[n].word >> (pass * BITS)) & (SIZE - 1)];
  Claim *from = claims, *into = other;
  for (int pass = 0; pass < PASSES; ++pass) {
    auto& start = starts[pass];
    const int shift = pass * BITS;
    if (start[(claims[0].word >> shift) & (SIZE - 1)] == count) continue;
    uint32_t sum = 0;
    for (uint32_t& entry : start) sum += std::exchange(entry, sum);
    for (int64_t n = 0; n < count; ++n)
      into[start[(from[n].word >> shift) & (SIZE - 1)]++] = from[n];
    std::swap(from, into);
  }
  if (from != claims) std::memcpy(claims, from, count * sizeof(Claim));
}

void sort(Claim* claims, Claim* other, int64_t count) {
  if (std::is_sorted(claims, claims + count, better)) return;
  if (count < 512) return std::stable_sort(claims, claims + count, better);
  // Beyond the caches fewer places to write to at once are worth a pass more.
  if (count < 65536) return radix<11>(claims, other, count);
  radix<8>(claims, other, count);
}

}  // namespace

at::Tensor order_claims(at::TensorList words) {
  TORCH_CHECK(!words.empty(), "order_claims: at least one word expected");
  const int64_t count = words[0].numel();
  std::vector<at::Tensor> held;
  std::vector<const int32_t*> word;
  for (const at::Tensor& tensor : words) {
    TORCH_CHECK(tensor.numel() == count && tensor.scalar_type() == at::kInt,
                "order_claims: int32 words of ", count, " claims expected, got ", tensor.sizes());
    held.push_back(tensor.contiguous());
    word.push_back(held.back().const_data_ptr<int32_t>());
  }
  Claim* const claims = reinterpret_cast<Claim*>(scratch(2 * count * sizeof(Claim) / sizeof(float)));
  Claim* const other = claims + count;
  for (int64_t n = 0; n < count; ++n)
    claims[n] = {turned(word[0][n]), static_cast<uint32_t>(n)};
  // Runs of claims that share all words so far, and the number of those words.
  struct Run {
    int64_t begin, end;
    size_t depth;
  };
  std::vector<Run> runs;
  if (count > 1) runs.push_back({0, count, 0});
  while (!runs.empty()) {
    const Run run = runs.back();
    runs.pop_back();
    Claim* const begin = claims + run.begin;
    const int64_t length = run.end - run.begin;
    if (run.depth)
      for (int64_t n = 0; n < length; ++n) begin[n].word = turned(word[run.depth][begin[n].index]);
    sort(begin, other, length);
    if (run.depth + 1 == word.size()) continue;
    for (int64_t n = 0, last; n < length; n = last) {
      for (last = n + 1; last < length && begin[last].word == begin[n].word;) ++last;
      if (last - n > 1) runs.push_back({run.begin + n, run.begin + last, run.depth + 1});
    }
  }
  const at::Tensor result = at::empty({count}, words[0].options().dtype(at::kLong));
  int64_t* out = result.mutable_data_ptr<int64_t>();
  for (int64_t n = 0; n < count; ++n) out[n] = claims[n].index;
  return result;
}

}  // namespace lockstep
