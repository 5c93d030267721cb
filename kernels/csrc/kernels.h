// What the compiled kernels offer to library.cpp: plain functions on raw float pointers, one table
// an instruction set. The same sources (simd.h, matmul.h, panels.h, bfloat16.h, quantised.h,
// attention.h, elementwise.h) are compiled once a set, in isa_*.cpp, and the table is picked when the
// library is loaded, so a library built on one host of a cluster runs on every other.
//
// Rows travel packed: a block of up to `block_rows` rows of x lies transposed, [depth][rows of the
// block], so that one vector holds the same column of `lanes` rows. Every output element is then
// one chain of fused multiply-adds over the depth in ascending order, whatever the number of rows,
// the block a row falls in and the number of threads: a row's result never depends on its
// neighbours. The bfloat16 dot products of avx512_bf16 take two columns a step, in the same order.
#pragma once
#include <stdint.h>

namespace lockstep {

// Rows of weights that lie transposed together where weights are in panels (panels.h).
constexpr int PANEL = 16;

// Rows of a matrix: one after the other, or those that `index` names, where it is not null.
template <typename T>
struct Rows {
  T* base;
  int64_t stride;
  const int64_t* index;

  T* operator[](int64_t row) const { return base + (index ? index[row] : row) * stride; }
  Rows from(int64_t row) const {
    return index ? Rows{base, stride, index + row} : Rows{base + row * stride, stride, nullptr};
  }
};

// Quantised weights of one matrix in panels (kernels/quantised.py): words [panel][word][PANEL], scales
// and zero points [panel][group][PANEL]; zero is null where it is the middle of the range.
struct Quantised {
  const int32_t* words;
  const float *scale, *zero;
  int64_t bits, group, outputs, inputs;  // group: a multiple of 8, or all inputs
};

// bfloat16 weights of one matrix: in panels (bfloat16.h; stride is inputs), or row-major.
struct Bfloat16 {
  const uint16_t* weight;
  int64_t outputs, inputs, stride;
  bool panels;
};

// One call of paged attention. Strides count floats; the last dimension of q, k and v is
// contiguous.
struct Attention {
  const float* q;
  const float* k;
  const float* v;
  float* out;                                // [T, H, value_dim], contiguous
  int64_t q_token, q_head;                   // strides of q
  int64_t k_block, k_head, k_slot;           // strides of k
  int64_t v_block, v_head, v_slot;           // strides of v
  int64_t heads, group, key_dim, value_dim;  // group: query heads a kv head
  int64_t block_size, window, span;          // 0: unlimited; span: of chunked attention
  float scale;
  const float* sinks;  // a logit per head that weighs in each of its sums, without a value; or null
};

// A block of (query, head of the group) rows of one sequence and one kv head, over keys in
// [first_chunk, last_chunk) chunks. `state` receives the running maximum, sum and values.
struct AttentionItem {
  const int32_t* blocks;  // the sequence's row of the block table
  int64_t query_start, query_len, context_len;
  int64_t kv_head, first_row, rows;
  int64_t first_chunk, last_chunk;
  float* state;
  const AttentionItem* next;  // what the same thread will work on after this, or null
};

struct Kernels {
  const char* name;
  int64_t lanes, block_rows;

  // packed <- rows of x, transposed in blocks; lanes past the last row are zero.
  void (*pack)(Rows<const float> x, int64_t rows, int64_t depth, float* packed);
  // out[:, first : first + count] <- x weight^T + bias for those rows of weight; bias may be null.
  void (*linear)(const float* packed, int64_t rows, int64_t depth, const float* weight,
                 int64_t weight_stride, const float* bias, int64_t first, int64_t count,
                 Rows<float> out);
  // hidden (packed, `width` deep) rows first .. first + count <- silu(x w1^T) * (x w3^T).
  void (*gate_up)(const float* packed, int64_t rows, int64_t depth, const float* w1, const float* w3,
                  int64_t first, int64_t count, float* hidden, int64_t width);

  // The same for weights in panels (panels.h); `outputs` rows of weights in all.
  void (*linear_panels)(const float* packed, int64_t rows, int64_t depth, const float* weight,
                        int64_t outputs, const float* bias, int64_t first, int64_t count,
                        Rows<float> out);
  void (*gate_up_panels)(const float* packed, int64_t rows, int64_t depth, const float* w1,
                         const float* w3, int64_t first, int64_t count, float* hidden,
                         int64_t width);

  // The same for quantised weights (quantised_products.h). `scratch` holds three panels of floats.
  void (*linear_quantised)(const float* packed, int64_t rows, const Quantised& w, int64_t first,
                           int64_t count, Rows<float> out, float* scratch);
  void (*gate_up_quantised)(const float* packed, int64_t rows, const Quantised& w13, int64_t first,
                            int64_t count, float* hidden, float* scratch);

  // The same for bfloat16 weights (bfloat16.h), on rows from pack_bfloat16; `own` holds three panels
  // of floats. pairs: rows are packed as pairs of bfloat16, two columns in a float's place.
  bool pairs;
  void (*pack_bfloat16)(Rows<const float> x, int64_t rows, int64_t depth, float* packed);
  void (*linear_bfloat16)(const float* packed, int64_t rows, const Bfloat16& w, const float* bias,
                          int64_t first, int64_t count, Rows<float> out, float* own);
  void (*gate_up_bfloat16)(const float* packed, int64_t rows, const Bfloat16& w1,
                           const Bfloat16& w3, int64_t first, int64_t count, float* hidden,
                           float* own);

  int64_t chunk;  // keys of one chunk of a context
  int64_t (*attention_state)(const Attention&);    // floats of one state
  int64_t (*attention_scratch)(const Attention&);  // floats a thread needs besides
  void (*attend)(const Attention&, const AttentionItem&, float* scratch);
  void (*attention_merge)(const Attention&, const AttentionItem&, float* later);
  void (*attention_finish)(const Attention&, const AttentionItem&);

  void (*silu_and_mul)(const float* gate, const float* up, float* out, int64_t count);
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t dim, float* out);
  void (*add)(const float* x, const float* y, int64_t dim, float* out);
  void (*rotate)(float* x, const float* cos, const float* sin, int64_t half);
  void (*add_scaled)(const float* x, float weight, int64_t dim, float* out);
  void (*softmax)(const float* x, int64_t count, float* out);
  void (*sigmoid)(const float* x, int64_t count, float* out);
};

const Kernels* generic_kernels();
// Null where the compiler does not target x86-64.
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();

}  // namespace lockstep
