// The torch library `lockstep_cpu`: names, schemas and the choice of the instruction set.
#include "lane.h"
#include "library.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <torch/library.h>
#include <torch/version.h>

#include <cstdlib>
#include <memory>
#include <string>

namespace lockstep {
namespace {

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}

// By the bit itself: not every compiler knows the name.
bool has_bfloat16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
#endif

const Kernels* supported(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (name == "avx512_bf16" && has_avx512() && has_bfloat16()) return avx512_bf16_kernels();
  if (name == "avx512" && has_avx512()) return avx512_kernels();
  if (name == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return avx2_kernels();
#endif
  return name == "generic" ? generic_kernels() : nullptr;
}

const Kernels* chosen = nullptr;

// Chooses `isa`, or the best the processor has when it is empty; returns its name.
std::string select(std::string_view isa) {
  const Kernels* found = nullptr;
  for (const char* name : {"avx512_bf16", "avx512", "avx2", "generic"})
    if (!found && (isa.empty() || isa == name)) found = supported(name);
  TORCH_CHECK(found, "this processor has no ", std::string(isa));
  chosen = found;
  return chosen->name;
}

#define LOCKSTEP_TEXT(x) #x
#define LOCKSTEP_QUOTE(x) LOCKSTEP_TEXT(x)

// "torch version, digest of the sources": what native.py compares with what it finds.
std::string built_from() { return TORCH_VERSION " " LOCKSTEP_QUOTE(LOCKSTEP_SOURCES); }

bool has_bfloat16_products() { return kernels().pairs; }

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

}  // namespace

const Kernels& kernels() {
  TORCH_CHECK(chosen, "call lockstep_cpu::select first");
  return *chosen;
}

float* scratch(int64_t floats) {
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t capacity = 0;
  if (floats > capacity) {
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    TORCH_CHECK(memory, "out of memory: ", bytes, " bytes of kernel scratch");
    capacity = floats;
  }
  return memory.get();
}

}  // namespace lockstep

TORCH_LIBRARY(lockstep_cpu, m) {
  m.def("select(str isa) -> str", &lockstep::select);
  m.def("has_bfloat16_products() -> bool", &lockstep::has_bfloat16_products);
  m.def("built_from() -> str", &lockstep::built_from);
  m.def("to_panels(Tensor(a!) weight) -> ()");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, bool panels=False) -> Tensor");
  m.def(
      "grouped_ffn(Tensor x, Tensor w13, Tensor w2, int[] counts, Tensor(a!)? into=None, bool "
      "panels=False, Tensor? index=None) -> Tensor(a!)");
  m.def(
      "grouped_ffn_quantised(Tensor x, Tensor packed13, Tensor scale13, Tensor? zero13, "
      "int[] sizes13, Tensor packed2, Tensor scale2, Tensor? zero2, int[] sizes2, int[] counts, "
      "Tensor(a!)? into=None, Tensor? index=None) -> Tensor(a!)");
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, "
      "int[] query_lens, int[] context_lens, float scale, int window, "
      "Tensor? sinks=None, int span=0) -> Tensor");
  m.def(
      "store_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()");
  m.def("silu_and_mul(Tensor gate_up) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor");
  m.def("apply_rotary(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> ()");
  m.def("sort_by_expert(Tensor topk_ids, int num_experts) -> (Tensor, Tensor, Tensor)");
  m.def("select_top(Tensor[] words, Tensor pool, Tensor need) -> (Tensor, Tensor)");
  m.def(
      "select_experts(Tensor logits, Tensor? bias, int top_k, int score, bool normalize, "
      "float eps, float least, float scale) -> (Tensor, Tensor, Tensor)");
  m.def("combine_rows(Tensor rows, Tensor slot, Tensor weights) -> Tensor");
  m.def(
      "split_rows(Tensor hosts, Tensor load, Tensor? speeds, Tensor? limit, bool fewest_moved) -> "
      "Tensor");
  m.def("split_optimum(Tensor hosts, Tensor loads) -> Tensor");
  m.def("cut(Tensor hosts, Tensor expert, Tensor limit) -> Tensor");
  m.def("order_claims(Tensor[] words) -> Tensor");
  m.def(
      "level_rows(Tensor(a!) load, Tensor(b!) rows, Tensor home, Tensor copies, Tensor times, "
      "int sweeps) -> Tensor");
  m.def("lane_segment_bytes(int size, int ring) -> int", &lockstep::Lane::segment_bytes);
  m.def("lane_open(int rank, int ring, int spin_ns, int[] segments, int[] processes) -> int",
        &lockstep::lane_open);
  m.def("lane_close(int lane) -> ()", &lockstep::lane_close);
  m.def(
      "lane_start(int lane, int kind, Tensor send, int[] send_at, int[] send_bytes, "
      "Tensor(a!) into, int[] recv_bytes) -> int",
      &lockstep::lane_start);
  m.def("lane_wait(int lane, int number, int timeout_ns) -> ()", &lockstep::lane_wait);
}

TORCH_LIBRARY_IMPL(lockstep_cpu, CPU, m) {
  m.impl("to_panels", &lockstep::to_panels);
  m.impl("linear", &lockstep::linear);
  m.impl("grouped_ffn", &lockstep::grouped_ffn);
  m.impl("grouped_ffn_quantised", &lockstep::grouped_ffn_quantised);
  m.impl("paged_attention", &lockstep::paged_attention);
  m.impl("store_kv", &lockstep::store_kv);
  m.impl("silu_and_mul", &lockstep::silu_and_mul);
  m.impl("rms_norm", &lockstep::rms_norm);
  m.impl("add_rms_norm", &lockstep::add_rms_norm);
  m.impl("apply_rotary", &lockstep::apply_rotary);
  m.impl("sort_by_expert", &lockstep::sort_by_expert);
  m.impl("select_top", &lockstep::select_top);
  m.impl("select_experts", &lockstep::select_experts);
  m.impl("combine_rows", &lockstep::combine_rows);
  m.impl("split_rows", &lockstep::split_rows);
  m.impl("split_optimum", &lockstep::split_optimum);
  m.impl("cut", &lockstep::cut);
  m.impl("order_claims", &lockstep::order_claims);
  m.impl("level_rows", &lockstep::level_rows);
}
