// Chosen experts in MXFP4 for one token, where `experts_few_kernels` is bound by loading first and computing then.
//
// The same sums in the same order as there, so that a token's result does not depend on who else is computed. Four warps
// share the inputs of a tile of 16 outputs: gate and up of eight, or 16 of down. A block takes some tiles one after the
// other, and a thread copies its own codes into shared memory some steps ahead, across tiles, so that copies and products
// overlap without registers for what is under way.
//
// With AHEAD the token's inputs are there since the kernel before the last one ended, and its experts are what the last
// one chooses: inputs are read before the wait, when no codes are on their way yet that they would queue behind.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

constexpr int THREADS = 128, SLOT = THREADS * 16, STAGE = 2 * SLOT, LENGTH = STEPS * 512;

struct Arguments {
  const uint4* x;      // float16 [GATED ? 1 : pairs, LENGTH], as `arrange_kernel` has it
  const i64* ids;      // of the pairs' experts
  const u8* codes;     // [experts, ALL, GROUPS * 16]
  const u8* scales;    // [experts, ALL, PADDED]
  const u16* bias;     // bfloat16 [experts, ALL], or none
  void* out;           // of gate and up float16 [pairs, OUT_LENGTH] as down reads it, of down float32 [pairs, ALL]
  int blocks, turns;   // of a pair; tiles of a block
};

DEVICE u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void copy_codes(u32 to, const u8* from) { asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory"); }
DEVICE void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
DEVICE uint4 shared16(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}
DEVICE uint4 global16(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
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

// A thread's output of a tile: with gate and up the gate's and up's, else one of the first eight and one of the others.
DEVICE int output_of(int tile, int g, int o) {
  if (!GATED) return min(tile * 16 + o * 8 + g, ALL - 1);
  const int j = min(tile * 8 + g, ALL / 2 - 1);
  return INTERLEAVED ? 2 * j + o : j + o * (ALL / 2);
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) experts_one(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) char shared[];   // stages, then the token's inputs
  __shared__ float parts[2][4][16];
  if (!AHEAD) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, c = lane & 3;
  const int pair = blockIdx.x / a.blocks, first = blockIdx.x % a.blocks * a.turns;
  const u32 ring = address(shared) + tid * 16, inputs = address(shared) + STAGES * STAGE;
  const uint4* x = a.x + (GATED ? 0 : (i64)pair * (LENGTH / 8));
  // By way of the L1 cache, which blocks of a multiprocessor share: else all of them queue for a few lines of the L2 cache.
  constexpr int COUNT = LENGTH / 8, EACH = (COUNT + THREADS - 1) / THREADS;
  auto take_inputs = [&] {
    uint4 v[EACH];
    UNROLL for (int k = 0; k < EACH; k++) if (COUNT % THREADS == 0 || k * THREADS + tid < COUNT) v[k] = global16(x + k * THREADS + tid);
    UNROLL for (int k = 0; k < EACH; k++) if (COUNT % THREADS == 0 || k * THREADS + tid < COUNT) {
      const int i = k * THREADS + tid;   // the four threads of an output read neighbours: no bank twice
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(inputs + (i & ~15 | (i & 3) << 2 | i >> 2 & 3) * 16), "r"(v[k].x), "r"(v[k].y), "r"(v[k].z), "r"(v[k].w) : "memory");
    }
  };
  if (AHEAD) {
    asm volatile("fence.acq_rel.gpu;" ::: "memory");   // nothing old from the L1 cache
    take_inputs();
    asm volatile("griddepcontrol.wait;" ::: "memory");   // for the choice, which what comes next reads before it waits
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  }
  const i64 expert = __ldcg(a.ids + pair);   // without AHEAD there since the kernel before the last one ended
  const u8* codes = a.codes + expert * ALL * (GROUPS * 16);
  const u8* scales = a.scales + expert * ALL * PADDED;
  const int count = a.turns * STEPS;
  int group[STEPS];   // behind the last inputs: the last ones again, times nought
  UNROLL for (int s = 0; s < STEPS; s++) group[s] = min(s * 16 + warp * 4 + c, GROUPS - 1);
  int asked_tile = first, asked_step = 0, asked = 0, to = 0;
  u32 rows[2];
  auto turn_to = [&](int tile) { UNROLL for (int o = 0; o < 2; o++) rows[o] = output_of(tile, g, o) * (GROUPS * 16); };
  turn_to(first);
  auto ask = [&] {
    if (asked < count) {
      const u32 at = min(asked_step * 16 + warp * 4 + c, GROUPS - 1) * 16;
      UNROLL for (int o = 0; o < 2; o++) copy_codes(ring + to * STAGE + o * SLOT, codes + (rows[o] + at));
      asked++;
      if (++asked_step == STEPS) { asked_step = 0; turn_to(++asked_tile); }
      if (++to == STAGES) to = 0;
    }
    copies_end();
  };
  u32 exponents[STEPS][2];
  auto ask_exponents = [&](int tile) {
    UNROLL for (int o = 0; o < 2; o++) {
      const u8* line = scales + (u32)(output_of(tile, g, o) * PADDED);
      UNROLL for (int s = 0; s < STEPS; s++) exponents[s][o] = __ldg(line + group[s]);
    }
  };
  UNROLL for (int i = 0; i < STAGES - 1; i++) ask();
  ask_exponents(first);
  if (!AHEAD) {
    asm volatile("griddepcontrol.wait;" ::: "memory");   // for the kernel that makes the inputs
    take_inputs();
  }
  __syncthreads();
  int from = 0;
#pragma unroll 1
  for (int turn = 0; turn < a.turns; turn++) {
    const int tile = first + turn;
    int largest[2];
    u32 factors[STEPS][2];
    UNROLL for (int o = 0; o < 2; o++) {
      int most = exponents[0][o];
      UNROLL for (int s = 1; s < STEPS; s++) most = max(most, (int)exponents[s][o]);
      most = max(most, __shfl_xor_sync(~0u, most, 1));
      largest[o] = max(most, __shfl_xor_sync(~0u, most, 2));
      UNROLL for (int s = 0; s < STEPS; s++) factors[s][o] = (u32)(max((int)exponents[s][o] - largest[o], -29) + 30) * 0x04000400u;
    }
    if (turn + 1 < a.turns) ask_exponents(tile + 1);
    float even[4] = {}, odd[4] = {};
    UNROLL for (int s = 0; s < STEPS; s++) {
      asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
      const uint4 p = shared16(ring + from * STAGE), q = shared16(ring + from * STAGE + SLOT);
      if (++from == STAGES) from = 0;
      ask();
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
    float (&side)[4][16] = parts[turn & 1];
    if (c == 0) UNROLL for (int o = 0; o < 2; o++) {
      const float factor = __uint_as_float((u32)min(largest[o] + 3, 254) << 23);
      side[warp][o * 8 + g] = (even[2 * o] + odd[2 * o]) * factor;
    }
    __syncthreads();
    auto sum = [&](int i) { return (side[0][i] + side[2][i]) + (side[1][i] + side[3][i]); };
    if (GATED && tid < 8) {
      const int j = tile * 8 + tid;
      if (j < ALL / 2) {
        float gate = sum(tid), up = sum(8 + tid);
        if (a.bias) {
          const u16* bias = a.bias + expert * ALL + (INTERLEAVED ? 2 * j : j);
          gate += value(__ldg(bias));
          up += value(__ldg(bias + (INTERLEAVED ? 1 : ALL / 2)));
        }
        const int place = (j & ~7) + (j & 1) * 4 + (j & 2) + (j >> 2 & 1);
        ((u16*)a.out)[(i64)pair * OUT_LENGTH + place] = half_of(activated(gate, up) * 0.0625f);
      }
    } else if (!GATED && tid < 16) {
      const int n = tile * 16 + tid;
      if (n < ALL) ((float*)a.out)[(i64)pair * ALL + n] = sum(tid);
    }
  }
}
