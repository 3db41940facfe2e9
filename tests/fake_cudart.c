/* Stands in for the CUDA runtime on a machine without a GPU: does copies at once, notes every call. A "graph" is a
   number, and its launch adds it to *fake_sum; graph 13 fails. Events are done once fake_hold is 0. */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static char text[65536];
static size_t used;
static int current, next_event = 100;
static double recorded[100000];
long fake_sum;
volatile int fake_hold;

static atomic_flag noting = ATOMIC_FLAG_INIT; /* the loop and whoever is told call at the same time */

static int note(const char *name, long a, long b) {
  while (atomic_flag_test_and_set(&noting)) {}
  if (used + 64 < sizeof text) used += (size_t)snprintf(text + used, 64, "%s %ld %ld\n", name, a, b);
  atomic_flag_clear(&noting);
  return 0;
}
const char *fake_log(void) { return text; }
static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}

int cudaSetDevice(int device) { current = device; return note("device", device, 0); }
int cudaGetDevice(int *device) { *device = current; return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
  memcpy(to, from, bytes);
  return note("copy", (long)bytes, (long)stream + kind - 4);
}
int cudaGraphLaunch(void *graph, void *stream) {
  if ((long)graph == 13) return 719;
  fake_sum += (long)graph;
  return note("launch", (long)graph, (long)stream);
}
int cudaEventCreateWithFlags(void **event, unsigned flags) {
  *event = (void *)(long)next_event++;
  return note("create", (long)*event, (long)flags);
}
int cudaEventDestroy(void *event) { return note("destroy", (long)event, 0); }
int cudaEventRecord(void *event, void *stream) {
  recorded[(long)event] = now();
  return note("record", (long)event, (long)stream);
}
int cudaEventQuery(void *event) { (void)event; return fake_hold ? 600 : 0; }
int cudaEventSynchronize(void *event) {
  struct timespec nap = {0, 1000000};
  while (fake_hold) nanosleep(&nap, NULL);
  return note("synchronize", (long)event, 0);
}
int cudaEventElapsedTime(float *ms, void *from, void *to) {
  *ms = (float)(recorded[(long)to] - recorded[(long)from]);
  return 0;
}
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) {
  return note("wait", (long)event, (long)stream + (long)flags);
}
const char *cudaGetErrorString(int status) { return status == 719 ? "unspecified launch failure" : "other"; }
