// How the products cut their work: into strips of weights by passes of rows, spread over the cores,
// so that every weight is read from memory once a wave and all cores work even when an expert has
// one row.
#pragma once
#include <ATen/ops/empty.h>

#include <vector>

#include "library.h"

namespace lockstep {

// Packed rows one strip of weights passes over at a time: they stay in the second-level cache.
constexpr int64_t PASS_BYTES = 512 * 1024;
// Packed rows and hidden rows that exist at a time: bounds the memory, and keeps both in a shared
// cache.
constexpr int64_t WAVE_BYTES = 8 * 1024 * 1024;
// Most weight rows of one piece of work. Inside a piece each tile fetches the next one ahead.
constexpr int64_t STRIP = 256;
// Pieces a thread, at least: what one core falls behind, the others take over.
constexpr int64_t PIECES = 8;
// Multiply-adds below which one thread is faster than waking a second.
constexpr int64_t SERIAL_WORK = 1 << 18;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline int64_t rows_within(int64_t bytes, int64_t depth) {
  const int64_t block = kernels().block_rows;
  const int64_t rows = bytes / static_cast<int64_t>(sizeof(float)) / std::max<int64_t>(1, depth);
  return std::max(block, rows / block * block);
}

// How rows are packed for products with float32 or quantised weights, or with bfloat16 weights.
struct Packing {
  void (*pack)(Rows<const float> x, int64_t rows, int64_t depth, float* packed);
  bool pairs;

  // Floats that so many columns of a row take.
  int64_t words(int64_t columns) const { return pairs ? (columns + 1) / 2 : columns; }
};

inline Packing packing_for(at::ScalarType weights) {
  if (weights == at::kBFloat16) return {kernels().pack_bfloat16, kernels().pairs};
  return {kernels().pack, false};
}

// Consecutive rows of one expert inside a wave. `packed` counts rows before it in the packed
// buffer, where every segment starts on a whole vector.
struct Segment {
  int64_t expert, first, rows, packed;
};

struct Piece {
  const Segment* segment;
  int64_t row, rows, first, count;
};

// Pieces of every segment for weights of `outputs` rows, cut finer until all threads have work.
inline std::vector<Piece> cut(const std::vector<Segment>& segments, int64_t depth, int64_t outputs) {
  const int64_t pass = rows_within(PASS_BYTES, depth), lanes = kernels().lanes;
  int64_t passes = 0;
  for (const Segment& segment : segments) passes += (segment.rows + pass - 1) / pass;
  int64_t strip = STRIP;
  while (strip > std::max<int64_t>(lanes, PANEL) && passes * ((outputs + strip - 1) / strip) < PIECES * at::get_num_threads())
    strip /= 2;
  std::vector<Piece> pieces;
  for (const Segment& segment : segments)
    for (int64_t row = 0; row < segment.rows; row += pass)
      for (int64_t first = 0; first < outputs; first += strip)
        pieces.push_back({&segment, row, std::min(pass, segment.rows - row), first,
                          std::min(strip, outputs - first)});
  return pieces;
}

template <typename F>
void run(int64_t items, int64_t work, const F& f) {
  if (work < SERIAL_WORK)
    for (int64_t i = 0; i < items; ++i) f(i);
  else
    for_each_item(items, f);
}

inline void pack_segments(const std::vector<Segment>& segments, Rows<const float> x, int64_t depth,
                          const Packing& packing, float* packed) {
  const int64_t block = kernels().block_rows;
  std::vector<Piece> pieces;
  int64_t rows = 0;
  for (const Segment& segment : segments) {
    rows += segment.rows;
    for (int64_t row = 0; row < segment.rows; row += block)
      pieces.push_back({&segment, row, std::min(block, segment.rows - row), 0, 0});
  }
  // Packing moves a float where the products do a multiply-add an output: weigh it alike.
  run(pieces.size(), rows * depth, [&](int64_t i) {
    const Piece& p = pieces[i];
    packing.pack(x.from(p.segment->first + p.row), p.rows, depth,
                 packed + (p.segment->packed + p.row) * packing.words(depth));
  });
}

// The gated FFN of every expert over its rows: up(piece, packed, hidden) computes hidden columns of
// a piece, down(piece, hidden, out) its outputs; `packed`, `hidden` and `out` begin at the piece's
// rows. Both also get the calling thread's own scratch of `own` floats. An index may name some of
// the rows: the others are neither read nor written.
template <typename Up, typename Down>
at::Tensor ffn_in_waves(const char* name, const at::Tensor& x, int64_t depth, int64_t width,
                        at::IntArrayRef counts, const std::optional<at::Tensor>& into,
                        const std::optional<at::Tensor>& index, const Packing& packing, int64_t own,
                        const Up& up, const Down& down) {
  const at::Tensor in = x.stride(1) == 1 ? x : x.contiguous();
  TORCH_CHECK(!into || (into->sizes() == x.sizes() && into->is_contiguous() &&
                        into->scalar_type() == at::kFloat),
              name, ": out of shape ", x.sizes(), " expected");
  const at::Tensor out = into ? *into : at::empty({x.size(0), depth}, x.options());
  const int64_t* places = nullptr;
  const int64_t total = index ? index->size(0) : x.size(0);
  if (index) {
    TORCH_CHECK(index->dim() == 1 && total <= x.size(0) && index->is_contiguous() &&
                    index->scalar_type() == at::kLong,
                name, ": index ", index->sizes(), " of rows ", x.sizes());
    places = index->const_data_ptr<int64_t>();
    for (int64_t i = 0; i < total; ++i)
      TORCH_CHECK(places[i] >= 0 && places[i] < x.size(0), name, ": index ", places[i], " of ",
                  x.size(0));
  }
  const int64_t in_words = packing.words(depth), hidden_words = packing.words(width);
  const int64_t lanes = kernels().lanes, wave = rows_within(WAVE_BYTES, in_words + hidden_words);

  // Greedy waves of at most `wave` packed rows; an expert with more rows continues in the next one.
  std::vector<std::vector<Segment>> waves;
  int64_t row = 0, filled = wave, largest = 0;
  for (int64_t expert = 0; expert < static_cast<int64_t>(counts.size()); ++expert) {
    TORCH_CHECK(counts[expert] >= 0, name, ": negative count");
    for (int64_t left = counts[expert]; left > 0;) {
      if (filled >= wave) {
        waves.emplace_back();
        filled = 0;
      }
      const int64_t rows = std::min(left, wave - filled);
      waves.back().push_back({expert, row, rows, filled});
      filled += round_up(rows, lanes);
      largest = std::max(largest, filled);
      row += rows;
      left -= rows;
    }
  }
  TORCH_CHECK(row == total, name, ": counts sum to ", row, " of ", total, " rows");

  const int64_t rows_floats = round_up(largest * (in_words + hidden_words), 16);
  own = round_up(own, 16);
  float* packed = scratch(rows_floats + own * at::get_num_threads());
  float* hidden = packed + largest * in_words;
  const auto own_scratch = [&] { return packed + rows_floats + own * at::get_thread_num(); };
  const Rows<const float> from = {in.const_data_ptr<float>(), in.stride(0), places};
  const Rows<float> to = {out.mutable_data_ptr<float>(), depth, places};
  for (const std::vector<Segment>& segments : waves) {
    int64_t rows = 0;
    for (const Segment& segment : segments) rows += segment.rows;
    const int64_t work = rows * depth * width;
    pack_segments(segments, from, depth, packing, packed);
    const std::vector<Piece> up_pieces = cut(segments, in_words, width);
    run(up_pieces.size(), work, [&](int64_t i) {
      const Piece& p = up_pieces[i];
      const int64_t at = p.segment->packed + p.row;
      up(p, packed + at * in_words, hidden + at * hidden_words, own_scratch());
    });
    const std::vector<Piece> down_pieces = cut(segments, hidden_words, depth);
    run(down_pieces.size(), work, [&](int64_t i) {
      const Piece& p = down_pieces[i];
      const int64_t at = p.segment->packed + p.row;
      down(p, hidden + at * hidden_words, to.from(p.segment->first + p.row), own_scratch());
    });
  }
  return out;
}

}  // namespace lockstep
