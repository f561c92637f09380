// What `latent_row.cu` asks of a multiprocessor, on a CPU: threads of a block take turns as fibers, blocks run one after
// another. Copies are made where they are begun, so that a tile that is overwritten too early shows; what kernels in
// front write is there from `wait_for_kernels` on, so that what is read too early shows.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE inline
#define KERNEL(threads, blocks) static void
#define SHARED_MEMORY(name) alignas(128) static u8 name[232448];
#define __shared__ static
#define __align__(n) alignas(n)

struct Pair { float x, y; };
struct Four { float x, y, z, w; };

struct Fiber { ucontext_t context; std::vector<u8> stack; bool done; };
static std::vector<Fiber> fibers;
static ucontext_t outside;
static int current, block, threads, arrived, generation, warps_arrived, warps_generation;
struct Warp { int arrived, generation; const void* addresses[32]; float values[32]; u32 a[32][4], b[32][2]; };
static Warp warps[32];
static const u8* late_from; static u8* late_to; static size_t late_bytes;

static void next_fiber() {
  const int from = current;
  for (int i = 1; i <= threads; i++) {
    const int to = (from + i) % threads;
    if (fibers[to].done) continue;
    if (to == from) return;
    current = to;
    swapcontext(&fibers[from].context, &fibers[to].context);
    return;
  }
  setcontext(&outside);
}
static int thread_index() { return current; }
static int block_index() { return block; }
static void sync_block() {
  const int mine = generation;
  if (++arrived == threads) arrived = 0, generation++;
  else while (generation == mine) next_fiber();
}
static void sync_warps() {   // the eight that compute
  const int mine = warps_generation;
  if (++warps_arrived == 256) warps_arrived = 0, warps_generation++;
  else while (warps_generation == mine) next_fiber();
}
static Warp& sync_warp() {
  Warp& warp = warps[current / 32];
  const int mine = warp.generation;
  if (++warp.arrived == 32) warp.arrived = 0, warp.generation++;
  else while (warp.generation == mine) next_fiber();
  return warp;
}
static float from_lane(float value, int lane) {
  warps[current / 32].values[current % 32] = value;
  const float found = sync_warp().values[lane];
  sync_warp();
  return found;
}
static void wait_for_kernels() {
  if (late_bytes) memcpy(late_to, late_from, late_bytes);
  late_bytes = 0;
}
static void release_kernels() {}

// Arrivals, and how many make a phase.
static void make_barrier(u64* barrier, u32 count) { *barrier = (u64)count << 32; }
static void publish_barriers() {}
static u32 phase_of(u64 barrier) { return (u32)barrier / (u32)(barrier >> 32); }
static void arrive(u64* barrier) { ++*barrier; }
static void expect_bytes(u64* barrier, u32) { ++*barrier; }
static void wait_barrier(u64* barrier, u32 parity) { while ((phase_of(*barrier) & 1) == parity) next_fiber(); }
static void ask_for(const void*, u32) {}
static void copy_in(u8* target, const void* from, u32 bytes, u64*) {
  if (bytes % 16 || (size_t)target % 16 || (size_t)from % 16) printf("a copy is not of lines of 16 bytes\n"), abort();
  memcpy(target, from, bytes);
}

static void matrices(u32* to, const u8* from, int count, bool turned) {
  warps[current / 32].addresses[current % 32] = from;
  Warp& warp = sync_warp();
  const int row = current % 32 / 4, pair = current % 4 * 2;
  for (int i = 0; i < count; i++) {
    u16 both[2];
    for (int j = 0; j < 2; j++) {
      const int line = turned ? pair + j : row, column = turned ? row : pair + j;
      both[j] = ((const u16*)warp.addresses[i * 8 + line])[column];
    }
    to[i] = both[0] | (u32)both[1] << 16;
  }
  sync_warp();
}
static void load_matrices(u32 (&to)[4], const u8* from) { matrices(to, from, 4, false); }
static void load_two_matrices(u32 (&to)[2], const u8* from) { matrices(to, from, 2, false); }
static void load_turned_matrices(u32 (&to)[4], const u8* from) { matrices(to, from, 4, true); }

static float number(u16 bits) { const u32 all = (u32)bits << 16; float value; memcpy(&value, &all, 4); return value; }
static u16 rounded(float value) {   // to bfloat16
  u32 bits;
  memcpy(&bits, &value, 4);
  return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static u32 rounded_pair(float low, float high) { return rounded(low) | (u32)rounded(high) << 16; }
static float half_of(u32 both, int which) { return number((u16)(which ? both >> 16 : both)); }
static void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  Warp& warp = warps[current / 32];
  const int lane = current % 32, row = lane / 4, pair = lane % 4 * 2;
  memcpy(warp.a[lane], a, sizeof a);
  warp.b[lane][0] = b0, warp.b[lane][1] = b1;
  sync_warp();
  for (int i = 0; i < 4; i++) {
    const int line = row + i / 2 * 8, column = pair + i % 2;
    for (int k = 0; k < 16; k++) {
      const u32 left = warp.a[line % 8 * 4 + k % 8 / 2][line / 8 + k / 8 * 2];
      const u32 right = warp.b[column * 4 + k % 8 / 2][k / 8];
      sum[i] += half_of(left, k % 2) * half_of(right, k % 2);
    }
  }
  sync_warp();
}
static float power_of_2(float x) { return exp2f(x); }
static float logarithm_of_2(float x) { return log2f(x); }
static void store_pair(float* to, float x, float y) { to[0] = x, to[1] = y; }
static Pair load_pair(const float* from) { return {from[0], from[1]}; }
static Four load_four(const float* from) { return {from[0], from[1], from[2], from[3]}; }

static void (*body)();
static void run_fiber() {
  body();
  fibers[current].done = true;
  next_fiber();
}
static void run_blocks(int blocks, int count, void (*what)()) {
  body = what, threads = count;
  for (block = 0; block < blocks; block++) {
    fibers.assign(threads, Fiber());
    memset(warps, 0, sizeof warps);
    arrived = generation = warps_arrived = warps_generation = current = 0;
    for (Fiber& fiber : fibers) {
      getcontext(&fiber.context);
      fiber.stack.resize(1 << 15);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &outside;
      makecontext(&fiber.context, run_fiber, 0);
    }
    volatile bool begun = false;
    getcontext(&outside);
    if (!begun) {
      begun = true;
      setcontext(&fibers[0].context);
    }
  }
}
