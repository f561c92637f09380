// Chosen experts in MXFP4 for one token, where `experts_few_kernels` is bound by loading first and computing then.
//
// The same sums in the same order as there, so that a token's result does not depend on who else is computed. Four warps
// share the inputs of a tile of 16 outputs: gate and up of eight, or 16 of down. A tile's codes are one piece of memory, or
// two, and a single thread copies them: while a block computes one tile the next one is on its way.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

constexpr int THREADS = 128, ROW = GROUPS * 16, TILE = 16 * ROW, BUFFER = TILE + 16 * PADDED, LENGTH = STEPS * 512;

struct Arguments {
  const uint4* x;      // float16 [GATED ? 1 : pairs, LENGTH], as `arrange_kernel` has it
  const i64* ids;      // of the pairs' experts
  const u8* codes;     // [experts, ALL, GROUPS * 16]
  const u8* scales;    // [experts, ALL, PADDED]
  const u16* bias;     // bfloat16 [experts, ALL], or none
  void* out;           // of gate and up float16 [pairs, OUT_LENGTH] as down reads it, of down float32 [pairs, ALL]
  int tiles, blocks, pairs;   // the first two of a pair
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

// Which row of a tile in shared memory is a thread's: the gate's and up's, or one of two. Rows of 90 groups of codes lie so
// that the eight threads which read at the same time meet no bank twice.
DEVICE int row_of(int g, int o) { return GATED && !INTERLEAVED ? o * 8 + g : 2 * g + o; }

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) experts_one(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) char shared[];   // two tiles with their exponents, then the token's inputs
  __shared__ float parts[2][4][16];
  __shared__ __align__(8) u64 full[2];
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, c = lane & 3;
  const int pair = blockIdx.x / a.blocks;
  // Blocks with a tile more are other ones of each pair.
  const int first = (blockIdx.x + pair * (a.blocks / a.pairs)) % a.blocks;
  const i64 expert = __ldcg(a.ids + pair);   // there since the kernel before the last one ended
  const u32 tiles = address(shared), inputs = tiles + 2 * BUFFER;
  auto ask = [&](int tile, int side) {   // by one thread
    const u32 to = tiles + side * BUFFER, barrier = address(&full[side]);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "n"(BUFFER) : "memory");
    constexpr int PARTS = GATED && !INTERLEAVED ? 2 : 1, ROWS = 16 / PARTS;
    UNROLL for (int i = 0; i < PARTS; i++) {
      const i64 row = expert * ALL + i * (ALL / 2) + tile * ROWS;
      copy(to + i * ROWS * ROW, a.codes + row * ROW, ROWS * ROW, barrier);
      copy(to + TILE + i * ROWS * PADDED, a.scales + row * PADDED, ROWS * PADDED, barrier);
    }
  };
  if (tid == 0) {
    UNROLL for (int i = 0; i < 2; i++) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&full[i])) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
    UNROLL for (int i = 0; i < 2; i++) if (first + i * a.blocks < a.tiles) ask(first + i * a.blocks, i);
  }
  asm volatile("griddepcontrol.wait;" ::: "memory");   // for the kernel that makes the inputs
  const uint4* x = a.x + (GATED ? 0 : (i64)pair * (LENGTH / 8));
  for (int i = tid; i < LENGTH / 8; i += THREADS) {
    const uint4 v = __ldcg(x + i);   // the four threads of an output read neighbours: no bank twice
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(inputs + (i & ~15 | (i & 3) << 2 | i >> 2 & 3) * 16), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
  }
  __syncthreads();
#pragma unroll 1
  for (int tile = first, turn = 0; tile < a.tiles; tile += a.blocks, turn++) {
    const u32 side = turn & 1, codes = tiles + side * BUFFER;
    const bool finishes = warp == (turn & 3) && lane < (GATED ? 8 : 16);
    const int j = tile * 8 + lane;   // of gate and up
    float gate = 0.f, up = 0.f;
    if (GATED && finishes && a.bias) {
      const u16* bias = a.bias + expert * ALL + (INTERLEAVED ? 2 * j : j);
      gate = value(__ldg(bias));
      up = value(__ldg(bias + (INTERLEAVED ? 1 : ALL / 2)));
    }
    wait(address(&full[side]), turn >> 1 & 1);
    u32 factors[STEPS][2], rows[2];
    int largest[2];
    UNROLL for (int o = 0; o < 2; o++) {
      rows[o] = codes + row_of(g, o) * ROW + (warp * 4 + c) * 16;
      const u32 exponents = codes + TILE + row_of(g, o) * PADDED + warp * 4 + c;
      int most = 0, each[STEPS];
      UNROLL for (int s = 0; s < STEPS; s++) {   // behind the last inputs: the last exponent again, times nought
        const int beyond = s * 16 + 16 > GROUPS ? min(GROUPS - 1 - (s * 16 + warp * 4 + c), 0) : 0;
        each[s] = shared1(exponents + s * 16 + beyond);
        most = max(most, each[s]);
      }
      most = max(most, __shfl_xor_sync(~0u, most, 1));
      largest[o] = max(most, __shfl_xor_sync(~0u, most, 2));
      UNROLL for (int s = 0; s < STEPS; s++) factors[s][o] = (u32)(max(each[s] - largest[o], -29) + 30) * 0x04000400u;
    }
    float even[4] = {}, odd[4] = {};
    UNROLL for (int s = 0; s < STEPS; s++) {
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
      parts[side][warp][o * 8 + g] = (even[2 * o] + odd[2 * o]) * factor;
    }
    __syncthreads();
    if (tid == 0 && tile + 2 * a.blocks < a.tiles) ask(tile + 2 * a.blocks, side);   // nobody reads this one any more
    auto sum = [&](int i) { return (parts[side][0][i] + parts[side][2][i]) + (parts[side][1][i] + parts[side][3][i]); };
    if (GATED && finishes) {
      gate = sum(lane) + gate;
      up = sum(8 + lane) + up;
      const int place = (j & ~7) + (j & 1) * 4 + (j & 2) + (j >> 2 & 1);
      ((u16*)a.out)[(i64)pair * OUT_LENGTH + place] = half_of(activated(gate, up) * 0.0625f);
    } else if (!GATED && finishes) {
      ((float*)a.out)[(i64)pair * ALL + tile * 16 + row_of(lane & 7, lane >> 3)] = sum(lane);
    }
  }
}
