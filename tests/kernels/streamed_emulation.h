// What `streamed.cu` needs of a GPU, on a CPU: a thread for each of a block's, blocks one after the other. The test puts
// the kernel without its own sections of numbers and memory behind this file.
#include <algorithm>
#include <barrier>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>
using std::max;
using std::min;

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#define DEVICE inline
#define UNROLL
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define __align__(n) alignas(n)

struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(u32 a, u32 b) { return {a, b}; }
inline uint4 make_uint4(u32 a, u32 b, u32 c, u32 d) { return {a, b, c, d}; }
inline float2 make_float2(float a, float b) { return {a, b}; }
inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }

struct Number { int x; };
static Number blockIdx, gridDim;
static thread_local Number threadIdx;
static std::vector<std::unique_ptr<std::barrier<>>> warps;
static std::unique_ptr<std::barrier<>> block;
static u32 handed[WARPS + 2][32][4];
alignas(1024) static u8 stages[1 << 18];

inline int own_warp() { return threadIdx.x >> 5; }
inline int own_lane() { return threadIdx.x & 31; }
inline void __syncwarp() { warps[own_warp()]->arrive_and_wait(); }
inline void __syncthreads() { block->arrive_and_wait(); }
inline void earlier_kernel_ended() {}
inline void __threadfence() {}
inline int add_one(int* p) { return __atomic_fetch_add(p, 1, __ATOMIC_SEQ_CST); }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __shfl_sync(u32, T v, int from) {
  memcpy(handed[own_warp()][own_lane()], &v, sizeof v);
  __syncwarp();
  memcpy(&v, handed[own_warp()][from], sizeof v);
  __syncwarp();
  return v;
}
template <class T> T __shfl_xor_sync(u32 all, T v, int mask) { return __shfl_sync(all, v, own_lane() ^ mask); }
inline u32 __ballot_sync(u32, bool yes) {
  u32 all = 0;
  for (int i = 0; i < 32; i++) all |= (u32)__shfl_sync(~0u, (int)yes, i) << i;
  return all;
}
inline int __ffs(u32 v) { return __builtin_ffs(v); }
inline u32 __byte_perm(u32 a, u32 b, u32 select) {
  u8 bytes[8];
  memcpy(bytes, &a, 4);
  memcpy(bytes + 4, &b, 4);
  u32 r = 0;
  for (int i = 0; i < 4; i++) r |= (u32)bytes[select >> 4 * i & 7] << 8 * i;
  return r;
}

// ---- numbers, bfloat16
inline u16 rounded(float f) {
  u32 w;
  memcpy(&w, &f, 4);
  return f != f ? 0x7fff : (w + 0x7fff + (w >> 16 & 1)) >> 16;
}
inline u32 pack(float a, float b) { return (u32)rounded(a) | (u32)rounded(b) << 16; }
inline float widened(u16 b) {
  const u32 w = (u32)b << 16;
  float f;
  memcpy(&f, &w, 4);
  return f;
}
inline float power(float x) { return exp2f(x); }
inline float logarithm(float x) { return log2f(x); }
inline void multiply(float& c0, float& c1, u32 a0, u32 a2, u32 b0, u32 b1) {
  const u32 own[4] = {a0, a2, b0, b1};
  memcpy(handed[own_warp()][own_lane()], own, sizeof own);
  __syncwarp();
  const auto& all = handed[own_warp()];
  for (int e = 0; e < 2; e++) {
    const int row = own_lane() >> 2, column = 2 * (own_lane() & 3) + e;
    for (int k = 0; k < 16; k++) {
      const int lane = k % 8 / 2, half = k / 8, shift = k % 2 * 16;
      (e ? c1 : c0) += widened(all[row * 4 + lane][half] >> shift) * widened(all[column * 4 + lane][2 + half] >> shift);
    }
  }
  __syncwarp();
}

// ---- memory
inline u32 address(const void* p) { return (u32)((const u8*)p - stages + 0x40000000); }
inline u8* place(u32 a) { return stages + ((i64)a - 0x40000000); }
inline void need(bool holds) { if (!holds) abort(); }
inline uint4 load_shared(u32 a) { need(a % 16 == 0); return *(uint4*)place(a); }
inline uint4 load16(const u16* p) { need((u64)p % 16 == 0); return *(const uint4*)p; }
inline int load(const int* p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
inline float load(const float* p) { return *(const volatile float*)p; }

struct Barrier { u32 at; int count, missing; i64 bytes; u32 phase; };
static std::vector<Barrier> barriers;
static std::mutex of_barriers;
static std::condition_variable turned;
inline Barrier& barrier_at(u32 a) {
  return *std::find_if(barriers.begin(), barriers.end(), [&](const Barrier& b) { return b.at == a; });
}
inline void change(u32 a, int arrives, i64 bytes) {
  std::lock_guard held(of_barriers);
  Barrier& b = barrier_at(a);
  b.missing -= arrives;
  b.bytes += bytes;
  need(b.missing >= 0);
  if (b.missing || b.bytes) return;
  b.phase++;
  b.missing = b.count;
  turned.notify_all();
}
inline void barrier_init(u32 a, u32 n) { barriers.push_back({a, (int)n, (int)n, 0, 0}); }
inline void barrier_arrive(u32 a) { change(a, 1, 0); }
inline void barrier_expect(u32 a, u32 bytes) { change(a, 1, bytes); }
inline void barrier_wait(u32 a, u32 parity) {
  std::unique_lock held(of_barriers);
  turned.wait(held, [&] { return (barrier_at(a).phase & 1) != parity; });
}
inline void copy_in(u32 to, const void* from, u32 bytes, u32 barrier, u64) {
  need(to % 16 == 0 && (u64)from % 16 == 0 && bytes % 16 == 0 && bytes);
  memcpy(place(to), from, bytes);
  change(barrier, 0, -(i64)bytes);
}
