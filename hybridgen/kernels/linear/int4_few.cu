// int4 weights times up to eight rows of bfloat16, where reading the codes once is what time should be spent on.
//
// The warps of a block share the inputs of a tile of 16 outputs, in turns of 128 inputs; a block takes some tiles one after
// the other. A thread copies its own codes, 16 bytes of two outputs in a step, into shared memory some steps ahead, across
// tiles, and nobody else reads them, so that nobody waits for anybody but at the end of a tile. 32 neighbouring codes are
// the thread's part of the left operand of eight products: which inputs a product takes first is free as long as both
// sides agree, and of a row they are 64 bytes as they lie. Codes become bfloat16 without conversions: bits below those of
// 128 are 128 + code. Scales are applied to the sums of a step, in float32: a step lies in one group.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

constexpr int THREADS = 32 * WARPS, SLOT = THREADS * 16, STAGE = 2 * SLOT + THREADS * 4;

struct Arguments {
  const u8* codes;
  const u16* scales;   // bfloat16
  const u8* zeros;     // none: 8
  const u16* bias;     // bfloat16, or none
  const u16* x;        // bfloat16 [rows, inputs]
  u16* out;            // bfloat16 [rows, outputs]
  int rows, outputs, inputs, columns, group_shift, turns;   // a step is in group `step >> group_shift`
};

DEVICE u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void copy_codes(u32 to, const u8* from) { asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory"); }
DEVICE void copy_word(u32 to, const u8* from) { asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory"); }
DEVICE void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
DEVICE uint4 shared16(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}
DEVICE u32 shared4(u32 at) { u32 v; asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory"); return v; }
// The rows, which another kernel may have written just before: not by way of the cache for constants.
DEVICE uint4 global16(const u16* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
DEVICE u32 pair(u32 word, u32 shift) {   // two codes as numbers: (word & mask) | magic, less the zero
  u32 r;
  asm("lop3.b32 %0, %1, 0x000f000f, 0x43004300, 0xEA;" : "=r"(r) : "r"(word));
  asm("add.rn.bf16x2 %0, %0, %1;" : "+r"(r) : "r"(shift));
  return r;
}
DEVICE void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE u16 rounded(float f) { u16 r; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(f)); return r; }

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) int4_few(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) char shared[];
  __shared__ float parts[2][WARPS][16][8];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, c = lane & 3;
  const int steps = a.inputs >> 7, own = (steps - warp + WARPS - 1) / WARPS, first = blockIdx.x * a.turns;
  const int turns = min(a.turns, (a.outputs + 15) / 16 - first), count = turns * own;
  const u32 ring = address(shared) + tid * 16, words = address(shared) + 2 * SLOT + tid * 4;
  // Of the four threads of an output two copy scales and two copy zeros, each the word that has a step's.
  const int size = c < 2 ? 2 : 1;
  const u8* const table = c < 2 ? (const u8*)a.scales : a.zeros;
  const u8* codes[2];
  const u8* word;
  auto turn_to = [&](int tile) {
    UNROLL for (int o = 0; o < 2; o++) codes[o] = a.codes + (i64)min(tile * 16 + o * 8 + g, a.outputs - 1) * (a.inputs >> 1) + warp * 64 + c * 16;
    word = table + (i64)min(tile * 16 + (c & 1) * 8 + g, a.outputs - 1) * a.columns * size;
  };
  int asked = 0, asked_step = 0, asked_tile = first, to = 0;
  turn_to(first);
  auto ask = [&] {
    if (asked < count) {
      UNROLL for (int o = 0; o < 2; o++) { copy_codes(ring + to * STAGE + o * SLOT, codes[o]); codes[o] += 64 * WARPS; }
      if (c < 2 || a.zeros) copy_word(words + to * STAGE, (const u8*)((u64)(word + ((asked_step * WARPS + warp) >> a.group_shift) * size) & ~3ull));
      asked++;
      if (++asked_step == own) { asked_step = 0; turn_to(++asked_tile); }
      if (++to == STAGES) to = 0;
    }
    copies_end();
  };
  UNROLL for (int i = 0; i < STAGES - 1; i++) ask();
  asm volatile("griddepcontrol.wait;" ::: "memory");   // for the kernel that makes the rows
  const u16* const x = a.x + (i64)min(g, a.rows - 1) * a.inputs + warp * 128 + c * 32;
  int from = 0;
#pragma unroll 1
  for (int turn = 0; turn < turns; turn++) {
    const int tile = first + turn;
    float sums[4] = {};
    const u32 line = (u32)(u64)(table + (i64)min(tile * 16 + (c & 1) * 8 + g, a.outputs - 1) * a.columns * size);
#pragma unroll 2
    for (int s = 0; s < own; s++) {
      uint4 b[4];
      UNROLL for (int w = 0; w < 4; w++) b[w] = global16(x + s * (128 * WARPS) + w * 8);
      asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
      const uint4 p = shared16(ring + from * STAGE), q = shared16(ring + from * STAGE + SLOT);
      const u32 mine = shared4(words + from * STAGE) >> ((line + ((s * WARPS + warp) >> a.group_shift) * size) & 3) * 8;
      if (++from == STAGES) from = 0;
      ask();
      float scale[2];
      u32 shift[2];
      UNROLL for (int o = 0; o < 2; o++) {
        const u32 its = __shfl_sync(~0u, mine, o, 4), zero = __shfl_sync(~0u, mine, 2 + o, 4);
        scale[o] = __uint_as_float(its << 16);
        shift[o] = (a.zeros ? zero & 0xffu : 8u) * 0x10001u | 0xc300c300u;   // less 128 and the zero
      }
      const u32 upper[4] = {p.x, p.y, p.z, p.w}, lower[4] = {q.x, q.y, q.z, q.w};
      float even[4] = {}, odd[4] = {};
      UNROLL for (int w = 0; w < 4; w++) {
        multiply(even, pair(upper[w], shift[0]), pair(lower[w], shift[1]), pair(upper[w] >> 4, shift[0]), pair(lower[w] >> 4, shift[1]), b[w].x, b[w].y);
        multiply(odd, pair(upper[w] >> 8, shift[0]), pair(lower[w] >> 8, shift[1]), pair(upper[w] >> 12, shift[0]), pair(lower[w] >> 12, shift[1]), b[w].z, b[w].w);
      }
      UNROLL for (int k = 0; k < 4; k++) sums[k] = fmaf(even[k] + odd[k], scale[k >> 1], sums[k]);
    }
    float (&side)[WARPS][16][8] = parts[turn & 1];
    UNROLL for (int k = 0; k < 4; k++) side[warp][(k >> 1) * 8 + g][c * 2 + (k & 1)] = sums[k];
    __syncthreads();
    const int n = tile * 16 + (tid & 15), row = tid >> 4;
    if (tid < 128 && row < a.rows && n < a.outputs) {
      float sum = a.bias ? __uint_as_float((u32)a.bias[n] << 16) : 0.f;
      UNROLL for (int v = 0; v < WARPS; v++) sum += side[v][tid & 15][row];
      a.out[(i64)row * a.outputs + n] = rounded(sum);
    }
  }
}
