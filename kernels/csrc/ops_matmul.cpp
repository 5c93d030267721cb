// linear and grouped_ffn: cuts the work into strips of weights by passes of rows and spreads the
// pieces over the cores, so that every weight is read from memory once a wave and all cores work
// even when an expert has one row.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <vector>

#include "library.h"

namespace lockstep {
namespace {

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

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

int64_t rows_within(int64_t bytes, int64_t depth) {
  const int64_t block = kernels().block_rows;
  const int64_t rows = bytes / static_cast<int64_t>(sizeof(float)) / std::max<int64_t>(1, depth);
  return std::max(block, rows / block * block);
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
std::vector<Piece> cut(const std::vector<Segment>& segments, int64_t depth, int64_t outputs) {
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

void pack_segments(const std::vector<Segment>& segments, Rows<const float> x, int64_t depth,
                   float* packed) {
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
    kernels().pack(x.from(p.segment->first + p.row), p.rows, depth,
                   packed + (p.segment->packed + p.row) * depth);
  });
}

at::Tensor rows_of(const at::Tensor& x, int64_t depth) {
  const at::Tensor rows = x.reshape({-1, depth});
  return rows.stride(1) == 1 ? rows : rows.contiguous();
}

}  // namespace

void to_panels(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() >= 2 && weight.is_contiguous() && weight.scalar_type() == at::kFloat,
              "to_panels: contiguous float32 weights [..., N, K] expected, got ", weight.sizes());
  const int64_t outputs = weight.size(-2), depth = weight.size(-1), panels = outputs / PANEL;
  if (weight.numel() == 0) return;
  float* data = weight.mutable_data_ptr<float>();
  for_each_item(weight.numel() / (outputs * depth) * panels, [&](int64_t i) {
    float* panel = data + (i / panels * outputs + i % panels * PANEL) * depth;
    float* rows = scratch(PANEL * depth);
    std::copy_n(panel, PANEL * depth, rows);
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t n = 0; n < PANEL; ++n) panel[k * PANEL + n] = rows[n * depth + k];
  });
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias, bool panels) {
  const int64_t outputs = weight.size(0), depth = weight.size(1);
  TORCH_CHECK(x.size(-1) == depth && weight.stride(1) == 1, "linear: x [..., ", depth,
              "] and a row-major weight expected, got ", x.sizes(), " and ", weight.sizes());
  TORCH_CHECK(!panels || weight.is_contiguous(), "linear: contiguous panels expected");
  TORCH_CHECK(!bias || (bias->numel() == outputs && bias->is_contiguous()), "linear: bias");
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = outputs;
  const at::Tensor out = at::empty(shape, x.options());
  const int64_t rows = out.numel() / std::max<int64_t>(1, outputs);
  if (rows == 0 || outputs == 0) return out;
  const at::Tensor in = rows_of(x, depth);
  const int64_t wave = std::min(rows_within(WAVE_BYTES, depth), round_up(rows, kernels().lanes));
  float* packed = scratch(wave * depth);
  const Rows<float> to = {out.mutable_data_ptr<float>(), outputs, nullptr};
  for (int64_t first = 0; first < rows; first += wave) {
    const std::vector<Segment> segment = {{0, first, std::min(wave, rows - first), 0}};
    pack_segments(segment, {in.const_data_ptr<float>(), in.stride(0), nullptr}, depth, packed);
    const std::vector<Piece> pieces = cut(segment, depth, outputs);
    run(pieces.size(), segment[0].rows * outputs * depth, [&](int64_t i) {
      const Piece& p = pieces[i];
      const auto product = panels ? kernels().linear_panels : kernels().linear;
      product(packed + p.row * depth, p.rows, depth, weight.const_data_ptr<float>(),
              panels ? outputs : weight.stride(0), bias ? bias->const_data_ptr<float>() : nullptr,
              p.first, p.count, to.from(first + p.row));
    });
  }
  return out;
}

at::Tensor grouped_ffn(const at::Tensor& x, const at::Tensor& w13, const at::Tensor& w2,
                       at::IntArrayRef counts, const std::optional<at::Tensor>& into, bool panels,
                       const std::optional<at::Tensor>& index) {
  const int64_t experts = w2.size(0), depth = w2.size(1), width = w2.size(2);
  TORCH_CHECK(x.dim() == 2 && x.size(1) == depth && w13.size(0) == experts &&
                  w13.size(1) == 2 * width && w13.size(2) == depth && w13.is_contiguous() &&
                  w2.is_contiguous() && static_cast<int64_t>(counts.size()) == experts,
              "grouped_ffn: shapes x ", x.sizes(), ", w13 ", w13.sizes(), ", w2 ", w2.sizes());
  const at::Tensor in = x.stride(1) == 1 ? x : x.contiguous();
  TORCH_CHECK(!into || (into->sizes() == x.sizes() && into->is_contiguous() &&
                        into->scalar_type() == at::kFloat),
              "grouped_ffn: out of shape ", x.sizes(), " expected");
  const at::Tensor out = into ? *into : at::empty({x.size(0), depth}, x.options());
  const int64_t* places = nullptr;
  if (index) {
    TORCH_CHECK(index->dim() == 1 && index->size(0) == x.size(0) && index->is_contiguous() &&
                    index->scalar_type() == at::kLong,
                "grouped_ffn: index ", index->sizes(), " of rows ", x.sizes());
    places = index->const_data_ptr<int64_t>();
    for (int64_t i = 0; i < x.size(0); ++i)
      TORCH_CHECK(places[i] >= 0 && places[i] < x.size(0), "grouped_ffn: index ", places[i], " of ",
                  x.size(0));
  }
  const int64_t lanes = kernels().lanes, wave = rows_within(WAVE_BYTES, depth + width);

  // Greedy waves of at most `wave` packed rows; an expert with more rows continues in the next one.
  std::vector<std::vector<Segment>> waves;
  int64_t row = 0, filled = wave, largest = 0;
  for (int64_t expert = 0; expert < experts; ++expert) {
    TORCH_CHECK(counts[expert] >= 0, "grouped_ffn: negative count");
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
  TORCH_CHECK(row == x.size(0), "grouped_ffn: counts sum to ", row, ", x has ", x.size(0), " rows");

  float* packed = scratch(largest * (depth + width));
  float* hidden = packed + largest * depth;
  const Rows<const float> from = {in.const_data_ptr<float>(), in.stride(0), places};
  const Rows<float> to = {out.mutable_data_ptr<float>(), depth, places};
  const float* w13_data = w13.const_data_ptr<float>();
  const float* w2_data = w2.const_data_ptr<float>();
  const auto gate_up = panels ? kernels().gate_up_panels : kernels().gate_up;
  const auto product = panels ? kernels().linear_panels : kernels().linear;
  for (const std::vector<Segment>& segments : waves) {
    int64_t rows = 0;
    for (const Segment& segment : segments) rows += segment.rows;
    const int64_t work = rows * depth * width;
    pack_segments(segments, from, depth, packed);
    const std::vector<Piece> up = cut(segments, depth, width);
    run(up.size(), work, [&](int64_t i) {
      const Piece& p = up[i];
      const float* w1 = w13_data + p.segment->expert * 2 * width * depth;
      const int64_t at = p.segment->packed + p.row;
      gate_up(packed + at * depth, p.rows, depth, w1, w1 + width * depth, p.first, p.count,
              hidden + at * width, width);
    });
    const std::vector<Piece> down = cut(segments, width, depth);
    run(down.size(), work, [&](int64_t i) {
      const Piece& p = down[i];
      product(hidden + (p.segment->packed + p.row) * width, p.rows, width,
              w2_data + p.segment->expert * depth * width, panels ? depth : width, nullptr, p.first,
              p.count, to.from(p.segment->first + p.row));
    });
  }
  return out;
}

}  // namespace lockstep
