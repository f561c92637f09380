// Chosen experts in MXFP4 for one token: gate and up, and down, in one kernel whose blocks all run at once.
//
// The same sums in the same order as in `experts_few_kernels`, so that a token's result does not depend on who else is
// computed. Four warps share the inputs of a tile of 16 outputs: gate and up of eight, or 16 of down. A block has some tiles
// of one expert, first of gate and up, then of down; two of them are there or on their way, each in two pieces. Between
// gate and up, and down, a block waits until all of its expert's activations are counted.
//
// What time went to in forms before this one: little may be asked for before the inputs are there, because what is small
// waits behind what is large; and little code, because it is cold in each layer anew.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

template <int ALL_, int INPUTS_, int PADDED_, bool APART_> struct Part {
  static constexpr int ALL = ALL_, GROUPS = INPUTS_ / 32, PADDED = PADDED_, STEPS = (INPUTS_ + 511) / 512, LENGTH = STEPS * 512;
  static constexpr bool APART = APART_;   // a tile's rows are eight of the gate and eight of up
  static constexpr int ROW = GROUPS * 16, TILE = 16 * ROW, TILES = ALL / 16, HALF = (STEPS + 1) / 2;   // steps of the first piece
};
typedef Part<2 * WIDTH, HIDDEN, UP_PADDED, !INTERLEAVED> Up;
typedef Part<HIDDEN, WIDTH, DOWN_PADDED, false> Down;
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int THREADS = 128, BUFFER = larger(Up::TILE + 16 * Up::PADDED, Down::TILE + 16 * Down::PADDED);

struct Arguments {
  const uint4* x;      // float16 [Up::LENGTH], as `arrange_kernel` has it
  const i64* ids;      // of the pairs' experts
  const u8 *up_codes, *up_scales;       // [experts, ALL, GROUPS * 16] and [experts, ALL, PADDED]
  const u16* bias;     // bfloat16 [experts, 2 * WIDTH], or none
  u16* acts;           // float16 [pairs, Down::LENGTH], noughts behind WIDTH
  const u8 *down_codes, *down_scales;
  float* out;          // [pairs, HIDDEN]
  u32* counts;         // [pairs], noughts: tiles of gate and up that are done
  int blocks, pairs;   // blocks of a pair
#ifdef TRACE
  i64* trace;
#endif
};

DEVICE u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void copy(u32 to, const u8* from, int bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
DEVICE void wait(u32 barrier, u32 parity) {
  asm volatile("{ .reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra WAIT; }" ::"r"(barrier), "r"(parity) : "memory");
}
DEVICE uint4 shared16(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}
DEVICE int shared1(u32 at) { u32 v; asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(at) : "memory"); return v; }
DEVICE u32 halves(u32 a, u32 b) { u32 r; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
// Eight codes as float16 numbers times 2^-14 times the factor: codes 0 and 4, 2 and 6, 1 and 5, 3 and 7.
DEVICE void unpack(u32 (&to)[4], u32 word, u32 factor) {
  u32 even, odd;
  asm("lop3.b32 %0, %1, 0x80808080, %2, 0xEA;" : "=r"(even) : "r"(word << 4), "r"((word << 1) & 0x0E0E0E0Eu));
  asm("lop3.b32 %0, %1, 0x80808080, %2, 0xEA;" : "=r"(odd) : "r"(word), "r"((word >> 3) & 0x0E0E0E0Eu));
  to[0] = halves(__byte_perm(even, 0, 0x2404), factor);
  to[1] = halves(even & 0xFF00FF00u, factor);
  to[2] = halves(__byte_perm(odd, 0, 0x2404), factor);
  to[3] = halves(odd & 0xFF00FF00u, factor);
}
DEVICE void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE float value(u16 bits) { return __uint_as_float((u32)bits << 16); }
DEVICE float power(float x) { float r; asm("ex2.approx.f32 %0, %1;" : "=f"(r) : "f"(x * 1.4426950408889634f)); return r; }
DEVICE float over(float a, float b) { float r; asm("div.full.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
DEVICE float activated(float gate, float up) {
  if (CLAMPED) {   // what is no number stays that
    gate = gate > LIMIT ? LIMIT : gate;
    up = up > LIMIT ? LIMIT : up < -LIMIT ? -LIMIT : up;
    return (up + 1.f) * over(gate, 1.f + power(-ALPHA * gate));
  }
  return up * over(gate, 1.f + power(-gate));
}
DEVICE u16 half_of(float f) { u16 r; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(f)); return r; }

// Inputs into shared memory, all asked for at once; the four threads of an output read neighbours there: no bank twice.
template <class P> DEVICE void bring_inputs(u32 to, const uint4* x) {
  constexpr int COUNT = P::LENGTH / 8, EACH = (COUNT + THREADS - 1) / THREADS;
  uint4 v[EACH];
  UNROLL for (int k = 0; k < EACH; k++) if (COUNT % THREADS == 0 || k * THREADS + (int)threadIdx.x < COUNT) v[k] = __ldcg(x + k * THREADS + threadIdx.x);
  UNROLL for (int k = 0; k < EACH; k++) if (COUNT % THREADS == 0 || k * THREADS + (int)threadIdx.x < COUNT) {
    const int i = k * THREADS + threadIdx.x;
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to + (i & ~15 | (i & 3) << 2 | i >> 2 & 3) * 16), "r"(v[k].x), "r"(v[k].y), "r"(v[k].z), "r"(v[k].w) : "memory");
  }
}
struct Block {   // what a block has: tiles of gate and up, then tiles of down, each `blocks` apart
  i64 expert;
  u32 tiles, barriers;
  int own, own_down, ups, count;
};
// The first warp asks for a piece of the i-th tile: a row's codes for each of 16 lanes, and with the first piece exponents.
__device__ __noinline__ void ask(const Arguments& a, const Block& own, int i, int piece) {
  if (i >= own.count) return;
  const bool is_up = i < own.ups;
  const int row = is_up ? Up::ROW : Down::ROW, padded = is_up ? Up::PADDED : Down::PADDED, all = is_up ? Up::ALL : Down::ALL;
  const int first = min((is_up ? Up::HALF : Down::HALF) * 256, row), rows = Up::APART && is_up ? 8 : 16;
  const int lane = threadIdx.x & 31, begin = piece ? first : 0, bytes = piece ? row - first : first;
  const u32 to = own.tiles + (i & 1) * BUFFER, barrier = own.barriers + ((i & 1) * 2 + piece) * 8;
  if (lane == 0) asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(16 * bytes + (piece ? 0 : 16 * padded)) : "memory");
  __syncwarp();
  const int tile = is_up ? own.own + i * a.blocks : own.own_down + (i - own.ups) * a.blocks;
  const i64 from = own.expert * all + (rows == 8 && lane >= 8 ? all / 2 - 8 : 0) + tile * rows + lane;
  if (lane < 16 && bytes) copy(to + lane * row + begin, (is_up ? a.up_codes : a.down_codes) + from * row + begin, bytes, barrier);
  if (piece == 0 && lane < 16 && lane % rows == 0) copy(to + 16 * row + lane * padded, (is_up ? a.up_scales : a.down_scales) + from * padded, rows * padded, barrier);
}
#ifdef TRACE
#define MARK(i) if (threadIdx.x == 0) { i64 now; asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); a.trace[blockIdx.x * 16 + (i)] = now; }
#else
#define MARK(i)
#endif

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) experts_one(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) char shared[];   // two tiles with their exponents, then the inputs
  __shared__ float parts[2][4][16];
  __shared__ __align__(8) u64 full[2][2];
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  MARK(0)
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, c = lane & 3, pair = blockIdx.x / a.blocks;
  // Blocks with a tile more of gate and up are other ones of each pair, and have no tile more of down.
  const int own = (blockIdx.x + pair * (a.blocks / a.pairs)) % a.blocks, own_down = a.blocks - 1 - own;
  const int ups = (Up::TILES - own + a.blocks - 1) / a.blocks, count = ups + (Down::TILES - own_down + a.blocks - 1) / a.blocks;
  const i64 expert = __ldcg(a.ids + pair);   // there since the kernel before the last one ended
  const u32 tiles = address(shared), inputs = tiles + 2 * BUFFER;
  const Block block = {expert, tiles, address(&full[0][0]), own, own_down, ups, count};
  if (warp == 0) {
    if (lane < 4) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&full[0][0]) + lane * 8) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncwarp();
#pragma unroll 1
    for (int k = 0; k < EARLY; k++) ask(a, block, k >> 1, k & 1);
  }
  MARK(1)
  asm volatile("griddepcontrol.wait;" ::: "memory");   // for the kernel that makes the inputs, and sets counts to nought
  MARK(2)
  bring_inputs<Up>(inputs, a.x);
  __syncthreads();
  if (warp == 0)
#pragma unroll 1
    for (int k = EARLY; k < 4; k++) ask(a, block, k >> 1, k & 1);
  MARK(3)
#pragma unroll 1
  for (int i = 0; i < count; i++) {
    const bool is_up = i < ups;
    if (i == ups) {
      if (tid == 0) {
        u32 done;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(done) : "l"(a.counts + pair) : "memory"); while (done < Up::TILES);
      }
      MARK(10)
      __syncthreads();
      bring_inputs<Down>(inputs, (const uint4*)(a.acts + (i64)pair * Down::LENGTH));
      __syncthreads();
      MARK(11)
    }
    const int side = i & 1, parity = i >> 1 & 1;
    const bool finishes = warp == (i & 3);
    const int j = (own + i * a.blocks) * 8 + lane;   // of gate and up
    float gate = 0.f, up = 0.f;
    if (is_up && finishes && lane < 8 && a.bias) {
      const u16* bias = a.bias + expert * Up::ALL + (INTERLEAVED ? 2 * j : j);
      gate = value(__ldg(bias));
      up = value(__ldg(bias + (INTERLEAVED ? 1 : WIDTH)));
    }
    // Of both projections, which are alike as a rule: then these are constants. Rows of 90 groups of codes lie so that the
    // eight threads which read at the same time meet no bank twice.
    const int row = is_up ? Up::ROW : Down::ROW, padded = is_up ? Up::PADDED : Down::PADDED, groups = is_up ? Up::GROUPS : Down::GROUPS;
    const int steps = is_up ? Up::STEPS : Down::STEPS, half = is_up ? Up::HALF : Down::HALF;
    const bool apart = Up::APART && is_up;
    const int row_0 = apart ? g : 2 * g, row_1 = apart ? 8 + g : 2 * g + 1;
    const u32 codes = tiles + side * BUFFER, upper_row = codes + row_0 * row + (warp * 4 + c) * 16, lower_row = codes + row_1 * row + (warp * 4 + c) * 16;
    const u32 exponents = codes + 16 * row, upper_line = exponents + row_0 * padded, lower_line = exponents + row_1 * padded;
    wait(address(&full[side][0]), parity);
    if (i < 3) { MARK(4 + 2 * i) }
    if (i >= ups && i < ups + 2) { MARK(12 + 2 * (i - ups)) }
    int largest_0 = 0, largest_1 = 0;
#pragma unroll 2
    for (int s = 0; s < steps; s++) {   // behind the last inputs: the last exponent again, times nought
      const int group = min(s * 16 + warp * 4 + c, groups - 1);
      largest_0 = max(largest_0, shared1(upper_line + group));
      largest_1 = max(largest_1, shared1(lower_line + group));
    }
    UNROLL for (int o = 1; o < 4; o *= 2) {
      largest_0 = max(largest_0, __shfl_xor_sync(~0u, largest_0, o));
      largest_1 = max(largest_1, __shfl_xor_sync(~0u, largest_1, o));
    }
    float even[4] = {}, odd[4] = {};
#pragma unroll 1
    for (int s = 0; s < steps; s++) {
      if (s == half) wait(address(&full[side][1]), parity);
      const int group = min(s * 16 + warp * 4 + c, groups - 1);
      const u32 factor_0 = (u32)(max(shared1(upper_line + group) - largest_0, -29) + 30) * 0x04000400u;
      const u32 factor_1 = (u32)(max(shared1(lower_line + group) - largest_1, -29) + 30) * 0x04000400u;
      const uint4 p = shared16(upper_row + s * 256), q = shared16(lower_row + s * 256);
      const u32 upper[4] = {p.x, p.y, p.z, p.w}, lower[4] = {q.x, q.y, q.z, q.w};
      UNROLL for (int w = 0; w < 4; w++) {
        const uint4 b = shared16(inputs + (s * 4 + warp) * 256 + w * 64 + c * 16);
        u32 m[4], n[4];
        unpack(m, upper[w], factor_0);
        unpack(n, lower[w], factor_1);
        multiply(even, m[0], n[0], m[1], n[1], b.x, b.y);
        multiply(odd, m[2], n[2], m[3], n[3], b.z, b.w);
      }
    }
    if (c == 0) {
      parts[side][warp][g] = (even[0] + odd[0]) * __uint_as_float((u32)min(largest_0 + 3, 254) << 23);
      parts[side][warp][8 + g] = (even[2] + odd[2]) * __uint_as_float((u32)min(largest_1 + 3, 254) << 23);
    }
    __syncthreads();
    if (warp == 0)   // nobody reads this tile any more
#pragma unroll 1
      for (int piece = 0; piece < 2; piece++) ask(a, block, i + 2, piece);
    auto sum = [&](int n) { return (parts[side][0][n] + parts[side][2][n]) + (parts[side][1][n] + parts[side][3][n]); };
    if (!finishes) continue;
    if (is_up) {
      if (lane < 8) {
        gate = sum(lane) + gate;
        up = sum(8 + lane) + up;
        const int place = (j & ~7) + (j & 1) * 4 + (j & 2) + (j >> 2 & 1);
        a.acts[(i64)pair * Down::LENGTH + place] = half_of(activated(gate, up) * 0.0625f);
      }
      __syncwarp();
      if (lane == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(a.counts + pair) : "memory");
    } else if (lane < 16) {
      a.out[(i64)pair * HIDDEN + (own_down + (i - ups) * a.blocks) * 16 + 2 * (lane & 7) + (lane >> 3)] = sum(lane);
    }
  }
  MARK(15)
}
