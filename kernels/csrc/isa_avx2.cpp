// The kernels for x86-64 with AVX2 and FMA: 8 lanes, 16 registers (12 of them accumulators). The
// pragma comes after every standard header: nothing inline from there may be compiled for this set.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define LOCKSTEP_ISA avx2
#define LOCKSTEP_LANES 8
#define LOCKSTEP_TILE 4
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

const lockstep::Kernels* lockstep::avx2_kernels() { return &avx2::table; }
#else
const lockstep::Kernels* lockstep::avx2_kernels() { return nullptr; }
#endif
