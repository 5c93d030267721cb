// The kernels for whatever the compiler targets by default: NEON on aarch64 (32 registers), SSE2 on
// x86-64 (16 registers, no FMA: only hosts older than AVX2 land here).
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#include "kernels.h"

#define LOCKSTEP_ISA generic
#define LOCKSTEP_LANES 4
#if defined(__aarch64__)
#define LOCKSTEP_TILE 8
#else
#define LOCKSTEP_TILE 4
#endif
#include "isa.h"

const lockstep::Kernels* lockstep::generic_kernels() { return &generic::table; }
