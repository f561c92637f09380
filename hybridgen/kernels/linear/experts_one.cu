// Chosen experts in MXFP4 for one token: gate and up, and down, in one kernel whose blocks all run at once.
//
// The same sums in the same order as in `experts_few_kernels`, so that a token's result does not depend on who else is
// computed. Four warps share the inputs of a tile of 16 outputs: gate and up of eight, or 16 of down. A block has some tiles
// of one expert, first of gate and up, then of down. A tile's codes are one piece of memory, or two, and a single thread
// copies them, two tiles ahead: those of down travel while gate and up are computed. Between the two a block waits until
// all of its expert's activations are counted.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

template <int ALL_, int INPUTS_, int PADDED_, bool GATED_> struct Part {
  static constexpr int ALL = ALL_, GROUPS = INPUTS_ / 32, PADDED = PADDED_, STEPS = (INPUTS_ + 511) / 512, LENGTH = STEPS * 512;
  static constexpr bool GATED = GATED_;
  static constexpr int ROW = GROUPS * 16, TILE = 16 * ROW, BYTES = TILE + 16 * PADDED, TILES = ALL / 16;
  // Which row of a tile in shared memory is a thread's: the gate's and up's, or one of two. Rows of 90 groups of codes lie
  // so that the eight threads which read at the same time meet no bank twice.
  static constexpr bool APART = GATED && !INTERLEAVED;
  static __device__ __forceinline__ int row_of(int g, int o) { return APART ? o * 8 + g : 2 * g + o; }
};
typedef Part<2 * WIDTH, HIDDEN, UP_PADDED, true> Up;
typedef Part<HIDDEN, WIDTH, DOWN_PADDED, false> Down;
constexpr int THREADS = 128, BUFFER = Up::BYTES > Down::BYTES ? Up::BYTES : Down::BYTES;

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

// Sums of a tile over a warp's inputs. `codes`: the tile in shared memory, behind it its exponents.
template <class P> DEVICE void multiply_tile(u32 codes, u32 inputs, float (&to)[16]) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
  u32 factors[P::STEPS][2], rows[2];
  int largest[2];
  UNROLL for (int o = 0; o < 2; o++) {
    rows[o] = codes + P::row_of(g, o) * P::ROW + (warp * 4 + c) * 16;
    const u32 exponents = codes + P::TILE + P::row_of(g, o) * P::PADDED + warp * 4 + c;
    int most = 0, each[P::STEPS];
    UNROLL for (int s = 0; s < P::STEPS; s++) {   // behind the last inputs: the last exponent again, times nought
      const int beyond = s * 16 + 16 > P::GROUPS ? min(P::GROUPS - 1 - (s * 16 + warp * 4 + c), 0) : 0;
      each[s] = shared1(exponents + s * 16 + beyond);
      most = max(most, each[s]);
    }
    most = max(most, __shfl_xor_sync(~0u, most, 1));
    largest[o] = max(most, __shfl_xor_sync(~0u, most, 2));
    UNROLL for (int s = 0; s < P::STEPS; s++) factors[s][o] = (u32)(max(each[s] - largest[o], -29) + 30) * 0x04000400u;
  }
  float even[4] = {}, odd[4] = {};
  UNROLL for (int s = 0; s < P::STEPS; s++) {
    const uint4 p = shared16(rows[0] + s * 256), q = shared16(rows[1] + s * 256);
    const u32 upper[4] = {p.x, p.y, p.z, p.w}, lower[4] = {q.x, q.y, q.z, q.w};
    UNROLL for (int w = 0; w < 4; w++) {
      const uint4 b = shared16(inputs + (s * 4 + warp) * 256 + w * 64 + c * 16);
      u32 m[4], n[4];
      unpack(m, upper[w], factors[s][0]);
      unpack(n, lower[w], factors[s][1]);
      multiply(even, m[0], n[0], m[1], n[1], b.x, b.y);
      multiply(odd, m[2], n[2], m[3], n[3], b.z, b.w);
    }
  }
  if (c == 0) UNROLL for (int o = 0; o < 2; o++) {
    const float factor = __uint_as_float((u32)min(largest[o] + 3, 254) << 23);
    to[o * 8 + g] = (even[2 * o] + odd[2 * o]) * factor;
  }
}
// Inputs into shared memory; the four threads of an output read neighbours there: no bank twice.
template <class P> DEVICE void bring_inputs(u32 to, const uint4* x) {
  for (int i = threadIdx.x; i < P::LENGTH / 8; i += THREADS) {
    const uint4 v = __ldcg(x + i);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to + (i & ~15 | (i & 3) << 2 | i >> 2 & 3) * 16), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
  }
}
// A tile's codes and exponents, by one thread.
template <class P> DEVICE void ask(u32 to, u32 barrier, const u8* codes, const u8* scales, i64 expert, int tile) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "n"(P::BYTES) : "memory");
  constexpr int PIECES = P::APART ? 2 : 1, ROWS = 16 / PIECES;
  UNROLL for (int i = 0; i < PIECES; i++) {
    const i64 row = expert * P::ALL + i * (P::ALL / 2) + tile * ROWS;
    copy(to + i * ROWS * P::ROW, codes + row * P::ROW, ROWS * P::ROW, barrier);
    copy(to + P::TILE + i * ROWS * P::PADDED, scales + row * P::PADDED, ROWS * P::PADDED, barrier);
  }
}
#ifdef TRACE
#define MARK(i) if (threadIdx.x == 0) { i64 now; asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); a.trace[blockIdx.x * 16 + (i)] = now; }
#else
#define MARK(i)
#endif

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) experts_one(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) char shared[];   // two tiles with their exponents, then the inputs
  __shared__ float parts[2][4][16];
  __shared__ __align__(8) u64 full[2];
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  MARK(0)
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, pair = blockIdx.x / a.blocks;
  // Blocks with a tile more of gate and up are other ones of each pair, and have no tile more of down.
  const int own = (blockIdx.x + pair * (a.blocks / a.pairs)) % a.blocks, own_down = a.blocks - 1 - own;
  const int ups = (Up::TILES - own + a.blocks - 1) / a.blocks, count = ups + (Down::TILES - own_down + a.blocks - 1) / a.blocks;
  const i64 expert = __ldcg(a.ids + pair);   // there since the kernel before the last one ended
  const u32 tiles = address(shared), inputs = tiles + 2 * BUFFER;
  auto ask_for = [&](int i) {
    if (i >= count) return;
    const u32 to = tiles + (i & 1) * BUFFER, barrier = address(&full[i & 1]);
    if (i < ups) ask<Up>(to, barrier, a.up_codes, a.up_scales, expert, own + i * a.blocks);
    else ask<Down>(to, barrier, a.down_codes, a.down_scales, expert, own_down + (i - ups) * a.blocks);
  };
  if (tid == 0) {
    UNROLL for (int i = 0; i < 2; i++) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&full[i])) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
    UNROLL for (int i = 0; i < 2; i++) ask_for(i);
  }
  MARK(1)
  asm volatile("griddepcontrol.wait;" ::: "memory");   // for the kernel that makes the inputs, and sets counts to nought
  MARK(2)
  bring_inputs<Up>(inputs, a.x);
  __syncthreads();
  MARK(3)
  auto sum = [&](int i, int side) { return (parts[side][0][i] + parts[side][2][i]) + (parts[side][1][i] + parts[side][3][i]); };
#pragma unroll 1
  for (int i = 0; i < ups; i++) {
    const int side = i & 1, j = (own + i * a.blocks) * 8 + lane;
    const bool finishes = warp == (i & 3) && lane < 8;
    float gate = 0.f, up = 0.f;
    if (finishes && a.bias) {
      const u16* bias = a.bias + expert * Up::ALL + (INTERLEAVED ? 2 * j : j);
      gate = value(__ldg(bias));
      up = value(__ldg(bias + (INTERLEAVED ? 1 : WIDTH)));
    }
    wait(address(&full[side]), i >> 1 & 1);
    if (i < 3) { MARK(4 + 2 * i) }
    multiply_tile<Up>(tiles + side * BUFFER, inputs, parts[side][warp]);
    __syncthreads();
    if (tid == 0) ask_for(i + 2);   // nobody reads this tile any more
    if (finishes) {
      gate = sum(lane, side) + gate;
      up = sum(8 + lane, side) + up;
      const int place = (j & ~7) + (j & 1) * 4 + (j & 2) + (j >> 2 & 1);
      a.acts[(i64)pair * Down::LENGTH + place] = half_of(activated(gate, up) * 0.0625f);
    }
    if (warp == (i & 3)) {
      __syncwarp();
      if (lane == 0) {
        __threadfence();
        atomicAdd(a.counts + pair, 1u);
      }
    }
    if (i < 3) { MARK(5 + 2 * i) }
  }
  if (count == ups) return;
  if (tid == 0) {
    u32 done;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(done) : "l"(a.counts + pair) : "memory"); while (done < Up::TILES);
  }
  MARK(10)
  __syncthreads();
  bring_inputs<Down>(inputs, (const uint4*)(a.acts + (i64)pair * Down::LENGTH));
  __syncthreads();
  MARK(11)
#pragma unroll 1
  for (int i = ups; i < count; i++) {
    const int side = i & 1;
    wait(address(&full[side]), i >> 1 & 1);
    if (i < ups + 2) { MARK(12 + 2 * (i - ups)) }
    multiply_tile<Down>(tiles + side * BUFFER, inputs, parts[side][warp]);
    __syncthreads();
    if (tid == 0) ask_for(i + 2);
    if (warp == (i & 3) && lane < 16) a.out[(i64)pair * HIDDEN + (own_down + (i - ups) * a.blocks) * 16 + Down::row_of(lane & 7, lane >> 3)] = sum(lane, side);
    if (i < ups + 2) { MARK(13 + 2 * (i - ups)) }
  }
}
