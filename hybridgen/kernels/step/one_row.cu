// One row times a weight in bfloat16, bound by reading the weight once.
//
// A warp has whole outputs, ROWS of them, and a thread copies its own parts of them into shared memory, as many as there
// is room for, before the block waits for the kernel that makes the row: nearly all of a weight may be under way
// meanwhile. Products and sums are float32.
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

constexpr int THREADS = WARPS * 32, PARTS = INPUTS / 8, EACH = (PARTS + 31) / 32;   // parts of 16 bytes; of a thread
constexpr int COUNT = EACH * ROWS;                                                  // in the order: part, output

struct Arguments {
  const u16* x;
  const u16* weight;   // [outputs, INPUTS]
  const u16* bias;     // or none
  u16* out;
  int outputs;
};

DEVICE u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void copy_part(u32 to, const void* from) { asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory"); }
DEVICE uint4 shared16(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}
DEVICE float low(u32 two) { return __uint_as_float(two << 16); }
DEVICE float high(u32 two) { return __uint_as_float(two & 0xFFFF0000u); }
DEVICE u16 rounded(float f) { u16 r; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(f)); return r; }

extern "C" __global__ void __launch_bounds__(THREADS, 1) one_row(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) char shared[];   // slots of all threads, then the row
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int first = (blockIdx.x * WARPS + warp) * ROWS;
  const u32 ring = address(shared) + tid * 16, row = address(shared) + DEPTH * THREADS * 16;
  auto ask = [&](int t) {   // outputs behind the last: the last one again
    const int part = min(t / ROWS * 32 + lane, PARTS - 1), n = min(first + t % ROWS, a.outputs - 1);
    copy_part(ring + t % DEPTH * (THREADS * 16), a.weight + (u64)n * INPUTS + part * 8);
  };
  UNROLL for (int t = 0; t < DEPTH; t++) {
    if (t < COUNT) ask(t);
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  constexpr int TAKEN = (PARTS + THREADS - 1) / THREADS;
  UNROLL for (int k = 0; k < TAKEN; k++) {
    const int part = k * THREADS + tid;
    if (part < PARTS) {
      uint4 v;
      asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(a.x + part * 8) : "memory");
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(row + part * 16), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
    }
  }
  __syncthreads();
  float sums[ROWS] = {};
  UNROLL for (int i = 0; i < EACH; i++) {
    const int part = i * 32 + lane;
    const bool real = PARTS % 32 == 0 || i + 1 < EACH || part < PARTS;
    uint4 x = shared16(row + min(part, PARTS - 1) * 16);
    if (!real) x = make_uint4(0, 0, 0, 0);
    const u32 xs[4] = {x.x, x.y, x.z, x.w};
    UNROLL for (int r = 0; r < ROWS; r++) {
      const int t = i * ROWS + r;
      asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
      const uint4 w = shared16(ring + t % DEPTH * (THREADS * 16));
      const u32 ws[4] = {w.x, w.y, w.z, w.w};
      UNROLL for (int j = 0; j < 4; j++) {
        sums[r] = fmaf(low(ws[j]), low(xs[j]), sums[r]);
        sums[r] = fmaf(high(ws[j]), high(xs[j]), sums[r]);
      }
      if (t + DEPTH < COUNT) ask(t + DEPTH);
      asm volatile("cp.async.commit_group;" ::: "memory");   // empty ones behind the last part
    }
  }
  UNROLL for (int r = 0; r < ROWS; r++) {
    UNROLL for (int d = 16; d; d >>= 1) sums[r] += __shfl_xor_sync(~0u, sums[r], d);
    const int n = first + r;
    if (lane == r && n < a.outputs) {
      const float bias = a.bias ? low(__ldg(a.bias + n)) : 0.f;
      a.out[n] = rounded(sums[r] + bias);
    }
  }
}
