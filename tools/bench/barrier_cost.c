/* What cores lose by waiting for each other: equal pieces of work with a barrier after each, against
 * the same work taken in turns by any core that is free.
 *
 *     barrier_cost MILLISECONDS SECONDS CORE CORE ...
 *
 * prints the seconds of the second over those of the first. MILLISECONDS: work of one core between
 * two barriers.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define PARTS 16   /* per piece, taken one by one where no core waits */
#define PIECES 10  /* of each kind in turn */
#define MOST 1024  /* cores */

typedef float vec __attribute__((vector_size(32)));

static long loops; /* of a part */
static int cores[MOST], num_cores;
static double seconds_limit;
static atomic_long arrived, taken;
static double lockstep_s, shared_s;
static atomic_int over;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static float work(long n) {
  vec acc[8];
  for (int i = 0; i < 8; i++) acc[i] = (vec){0} + 0.1f * i;
  const vec x = (vec){0} + 0.999f, y = (vec){0} + 1e-6f;
  for (; n > 0; n--)
    for (int i = 0; i < 8; i++) acc[i] = acc[i] * x + y;
  float total = 0;
  for (int i = 0; i < 8; i++) total += acc[i][0];
  return total;
}

/* Spin until every core has called it as often. */
static void barrier(long *barriers) {
  const long all = ++*barriers * num_cores;
  atomic_fetch_add(&arrived, 1);
  while (atomic_load(&arrived) < all) {
  }
}

static void *run(void *argument) {
  const long core = (long)argument;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cores[core], &set);
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
  long barriers = 0;
  volatile float sink = 0;
  const double begin = now();
  do {
    barrier(&barriers);
    double from = now();
    for (int piece = 0; piece < PIECES; piece++) {
      sink += work(loops * PARTS);
      barrier(&barriers);
    }
    if (core == 0) lockstep_s += now() - from;
    if (core == 0) atomic_store(&taken, 0);
    barrier(&barriers);
    from = now();
    while (atomic_fetch_add(&taken, 1) < (long)PIECES * PARTS * num_cores) sink += work(loops);
    barrier(&barriers);
    if (core == 0) shared_s += now() - from;
    if (core == 0) atomic_store(&over, now() - begin >= seconds_limit);
    barrier(&barriers);
  } while (!atomic_load(&over));
  return NULL;
}

int main(int argc, char **argv) {
  if (argc < 4 || argc - 3 > MOST) return 2;
  seconds_limit = atof(argv[2]);
  num_cores = argc - 3;
  for (int i = 0; i < num_cores; i++) cores[i] = atoi(argv[3 + i]);
  volatile float sink = 0;
  double fastest = 1e9;
  for (int i = 0; i < 20; i++) {
    const double from = now();
    sink += work(100000);
    if (now() - from < fastest) fastest = now() - from;
  }
  loops = (long)(100000 * atof(argv[1]) * 1e-3 / fastest / PARTS);
  pthread_t threads[MOST];
  for (long i = 1; i < num_cores; i++) pthread_create(&threads[i], NULL, run, (void *)i);
  run((void *)0);
  for (long i = 1; i < num_cores; i++) pthread_join(threads[i], NULL);
  printf("%.4f\n", shared_s / lockstep_s);
  return 0;
}
