// The body of one isa_*.cpp: compiles every kernel for the instruction set in force and fills a
// table. The including file defines LOCKSTEP_ISA (a namespace), LOCKSTEP_LANES and LOCKSTEP_TILE.

namespace lockstep {
namespace LOCKSTEP_ISA {
namespace {

#include "simd.h"
#include "narrow.h"
#include "matmul.h"
#include "panels.h"
#include "bfloat16.h"
#include "bfloat16_products.h"
#include "quantised.h"
#include "quantised_products.h"
#include "attention_state.h"
#include "attention_narrow.h"
#include "attention_wide.h"
#include "attention.h"
#include "elementwise.h"

}  // namespace

#define LOCKSTEP_TEXT(x) #x
#define LOCKSTEP_NAME(x) LOCKSTEP_TEXT(x)

const Kernels table = {
    LOCKSTEP_NAME(LOCKSTEP_ISA),
    W,
    BLOCK,
    pack,
    linear,
    gate_up,
    linear_panels,
    gate_up_panels,
    linear_quantised,
    gate_up_quantised,
    PAIRS,
    pack,
    linear_bfloat16,
    gate_up_bfloat16,
    CHUNK,
    attention_state,
    attention_scratch,
    attend,
    attention_merge,
    attention_finish,
    silu_and_mul,
    rms_norm,
    add,
    rotate,
    add_scaled,
    softmax,
    sigmoid,
};

}  // namespace LOCKSTEP_ISA
}  // namespace lockstep
