// The kernels of AVX-512 with the dot products of AVX512-BF16 for bfloat16 weights: everything else is
// the table of isa_avx512.cpp. The pragma comes after every standard header: nothing inline from
// there may be compiled for this set.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#include "kernels.h"

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(                                                   \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#endif
// The float32 products that those of bfloat16 share helpers with are compiled in isa_avx512.cpp.
#pragma GCC diagnostic ignored "-Wunused-function"
#define LOCKSTEP_BFLOAT16_PRODUCTS
#define LOCKSTEP_LANES 16
#define LOCKSTEP_TILE 8

namespace lockstep {
namespace avx512_bf16 {
namespace {

#include "simd.h"
#include "narrow.h"
#include "matmul.h"
#include "panels.h"
#include "bfloat16.h"
#include "bfloat16_products.h"

Kernels make_table() {
  Kernels table = *avx512_kernels();
  table.name = "avx512_bf16";
  table.pairs = PAIRS;
  table.pack_bfloat16 = pack_bfloat16;
  table.linear_bfloat16 = linear_bfloat16;
  table.gate_up_bfloat16 = gate_up_bfloat16;
  return table;
}

}  // namespace
}  // namespace avx512_bf16
}  // namespace lockstep
#if defined(__clang__)
#pragma clang attribute pop
#endif

const lockstep::Kernels* lockstep::avx512_bf16_kernels() {
  static const Kernels table = avx512_bf16::make_table();
  return &table;
}
#else
const lockstep::Kernels* lockstep::avx512_bf16_kernels() { return nullptr; }
#endif
