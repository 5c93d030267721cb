// The kernels for x86-64 with AVX-512: 16 lanes, 32 registers (24 of them accumulators). The pragma
// comes after every standard header: nothing inline from there may be compiled for this set.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif
#define LOCKSTEP_ISA avx512
#define LOCKSTEP_LANES 16
#define LOCKSTEP_TILE 8
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

const lockstep::Kernels* lockstep::avx512_kernels() { return &avx512::table; }
#else
const lockstep::Kernels* lockstep::avx512_kernels() { return nullptr; }
#endif
