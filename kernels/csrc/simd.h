// One vector of `W` floats and the few operations on it, in the compiler's own vector types: no
// intrinsics, so the same text serves AVX-512, AVX2, NEON and SSE. Included inside a namespace an
// instruction set, after LOCKSTEP_LANES (W) and LOCKSTEP_TILE (rows of a weight tile) are set.

constexpr int W = LOCKSTEP_LANES;
constexpr int NR = LOCKSTEP_TILE;

typedef float vf __attribute__((vector_size(4 * LOCKSTEP_LANES), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * LOCKSTEP_LANES), aligned(4), may_alias));

#define INLINE inline __attribute__((always_inline))

INLINE vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
INLINE void store(float* p, vf v) { *reinterpret_cast<vf*>(p) = v; }
// The first N floats of a vector, the others 0. Whole vectors never go through memcpy: the compiler
// takes some of those through the stack, in halves, and waits for them.
template <int N>
INLINE vf load_some(const float* p) {
  if constexpr (N == W) return load(p);
  vf v = vf{};
  memcpy(&v, p, sizeof(float) * N);
  return v;
}
template <int N>
INLINE void store_some(float* p, vf v) {
  if constexpr (N == W)
    store(p, v);
  else
    memcpy(p, &v, sizeof(float) * N);
}
INLINE vf splat(float x) { return x - vf{}; }
// x itself, rounded to float. Where two products meet in a sum the compiler may fuse either one
// into the addition, and not the same one in every copy of the code; this says which one is rounded
// first.
INLINE vf rounded(vf x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }

// 2^x for x <= 127; exactly 0 below -125.5 (and for -inf), NaN for NaN. Rounds x to an integer n
// and takes a polynomial of degree 6 on x - n in [-0.5, 0.5]; relative error below 2e-7.
INLINE vf exp2_of(vf x) {
  const vf bounded = vmax(x, splat(-126.0f));
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const vf shifted = bounded + magic;
  const vf f = bounded - (shifted - magic);
  vf p = splat(1.537070482e-4f);
  p = p * f + splat(1.339984829e-3f);
  p = p * f + splat(9.618373251e-3f);
  p = p * f + splat(5.550329035e-2f);
  p = p * f + splat(2.402264846e-1f);
  p = p * f + splat(6.931472056e-1f);
  p = p * f + splat(1.0f);
  const vi exponent = (vi)shifted << 23;
  const vf result = (vf)((vi)p + exponent);
  const vf flushed = x < splat(-125.5f) ? vf{} : result;
  return x == x ? flushed : x;
}

INLINE vf silu(vf x) {
  const vf minus = vmin(x * splat(-1.44269504f), splat(126.0f));
  return x / (splat(1.0f) + exp2_of(minus));
}

// Lane j of a shuffle of two vectors comes from lane pick(j) of the first, or pick(j) - W of the
// second.
template <typename Pick, int... I>
INLINE vf shuffled(vf a, vf b, Pick, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Pick::lane(I)...);
#else
  return __builtin_shuffle(a, b, vi{Pick::lane(I)...});
#endif
}
template <typename Pick>
INLINE vf shuffled(vf a, vf b, Pick pick) {
  return shuffled(a, b, pick, std::make_integer_sequence<int, W>{});
}

// Interleaves runs of N floats from the low (High = 0) or high halves of each quarter of two
// vectors.
template <int N, int High>
struct Interleave {
  static constexpr int lane(int j) {
    const int run = j % 4 / N, within = j % N;
    return j / 4 * 4 + 2 * High + run / 2 * N + within + run % 2 * W;
  }
};
// Runs of N floats, in turn from the first and the second vector: the even or the odd ones of both.
template <int N, int Odd>
struct Exchange {
  static constexpr int lane(int j) {
    const int second = j / N % 2;
    return j + (Odd - second) * N + second * W;
  }
};

template <int N>
INLINE void exchange_rows(vf (&v)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & N) continue;
    const vf a = v[i], b = v[i + N];
    v[i] = shuffled(a, b, Exchange<N, 0>{});
    v[i + N] = shuffled(a, b, Exchange<N, 1>{});
  }
}

// Transposes W vectors in registers: squares of 4 inside each quarter, then the squares.
INLINE void transpose(vf (&v)[W]) {
#pragma GCC unroll 4
  for (int i = 0; i < W; i += 4) {
    const vf a = shuffled(v[i], v[i + 1], Interleave<1, 0>{});
    const vf b = shuffled(v[i], v[i + 1], Interleave<1, 1>{});
    const vf c = shuffled(v[i + 2], v[i + 3], Interleave<1, 0>{});
    const vf d = shuffled(v[i + 2], v[i + 3], Interleave<1, 1>{});
    v[i] = shuffled(a, c, Interleave<2, 0>{});
    v[i + 1] = shuffled(a, c, Interleave<2, 1>{});
    v[i + 2] = shuffled(b, d, Interleave<2, 0>{});
    v[i + 3] = shuffled(b, d, Interleave<2, 1>{});
  }
  if constexpr (W >= 8) exchange_rows<4>(v);
  if constexpr (W >= 16) exchange_rows<8>(v);
}
