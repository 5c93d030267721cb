/* What one core can do at most: fused multiply-adds in registers, or reads of memory.
 *
 *     peak flops SECONDS | peak read SECONDS       prints operations, or bytes, a second
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* One register of this processor: a wider vector would be cut into pieces that do not fit in the
 * registers, and the figure would be that of spills. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define CHAINS 12 /* independent of each other, to cover the latency of an addition */
typedef float vec __attribute__((vector_size(4 * LANES)));

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static float sum(vec v) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  const double limit = atof(argv[2]), begin = now();
  vec acc[CHAINS];
  for (int i = 0; i < CHAINS; i++) acc[i] = (vec){0} + 0.1f * i;
  double done = 0;
  if (strcmp(argv[1], "flops") == 0) {
    const vec x = (vec){0} + 0.999f, y = (vec){0} + 1e-6f;
    do {
      for (int n = 0; n < 1000000; n++)
        for (int i = 0; i < CHAINS; i++) acc[i] = acc[i] * x + y;
      done += 1e6 * CHAINS * LANES * 2;
    } while (now() - begin < limit);
  } else {
    const size_t vectors = (size_t)(256 << 20) / sizeof(vec) / CHAINS * CHAINS;
    vec *data = aligned_alloc(sizeof(vec), vectors * sizeof(vec));
    if (data == NULL) return 1;
    memset(data, 1, vectors * sizeof(vec));
    const double first = now();
    do {
      for (size_t n = 0; n < vectors; n += CHAINS)
        for (int i = 0; i < CHAINS; i++) acc[i] += data[n + i];
      done += (double)vectors * sizeof(vec);
    } while (now() - first < limit);
    done *= (now() - begin) / (now() - first);
  }
  const double seconds = now() - begin;
  float check = 0;
  for (int i = 0; i < CHAINS; i++) check += sum(acc[i]);
  printf("%.6g %g\n", done / seconds, check);
  return 0;
}
