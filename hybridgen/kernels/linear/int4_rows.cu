// int4 weights times up to 8 or up to 64 rows of bfloat16, on tensor cores of compute capability 9.0.
//
// A block has 256 outputs and a part of the inputs. Sixteen warps have 16 outputs each; four of them are a warpgroup,
// which multiplies 64 outputs by all rows with `wgmma`. In a step of 128 inputs a thread has 16 bytes of two outputs: 32
// neighbouring codes each. It copies them into shared memory itself, some steps ahead, and nobody else reads them, so
// that nobody waits for anybody. Of a word's four pairs two are the thread's part of a product's left operand: which
// inputs a product takes first is free as long as both sides agree, and rows come in that order (`rows_image`).
// Codes become bfloat16 in registers as Marlin does it, without conversions: bits below those of 128 are 128 + code.
// While the tensor cores multiply what one warpgroup has unpacked, the others unpack.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

#ifndef ROWS   // of a block: 8 or 64
#define ROWS 64
#endif
#ifndef STAGES   // steps whose codes and rows are under way
#define STAGES 6
#endif
#ifndef BLOCKS   // on a multiprocessor
#define BLOCKS 1
#endif
constexpr int WARPS = 16, TILE = 16 * WARPS, CODES_BYTES = 16384, HALF = CODES_BYTES / 2, ROWS_BYTES = 256 * ROWS;
constexpr int WORDS_BYTES = 4 * 32 * WARPS, SUMS = ROWS / 2;   // of a thread
// A scale is applied where it costs least: to the sums of a step where they are few, else to each value, which is what
// the reference rounds to.
constexpr bool ON_SUMS = ROWS == 8;

struct Arguments {
  const uint4* codes;
  const u16* scales;   // bfloat16
  const u8* zeros;     // none: 8
  const u16* bias;     // bfloat16, or none
  const char* x;       // the rows' image
  void* out;           // bfloat16 [rows, outputs], or with several splits float32 [splits, rows, outputs]
  int rows, outputs, inputs, columns, group_steps, splits;
};

DEVICE u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void barrier_init(u32 b, u32 count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(count) : "memory"); }
DEVICE void barrier_arrive(u32 b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b) : "memory"); }
DEVICE bool barrier_passed(u32 b, u32 parity) {
  u32 passed;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(passed) : "r"(b), "r"(parity) : "memory");
  return passed;
}
DEVICE void barrier_wait(u32 b, u32 parity) {
#ifdef PATIENCE   // a trial ends where a kernel would wait for ever
  for (u32 tries = 0; !barrier_passed(b, parity); tries++) if (tries > PATIENCE) __trap();
#else
  while (!barrier_passed(b, parity)) {}
#endif
}
DEVICE void copy_step(u32 to, const char* from, u32 full) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full), "r"(ROWS_BYTES) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(ROWS_BYTES), "r"(full) : "memory");
}
DEVICE void copy_codes(u32 to, const uint4* from) { asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory"); }
DEVICE void copy_word(u32 to, const char* from) { asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory"); }
DEVICE u32 own_word(u32 at) { u32 v; asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory"); return v; }
DEVICE void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
DEVICE uint4 own_codes(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}
DEVICE u32 add(u32 a, u32 b) { u32 r; asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
DEVICE u32 times(u32 a, u32 b) { u32 r; asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
// A pair of codes as numbers: (word & mask) | magic, less the zero, times the scale.
DEVICE u32 pair(u32 word, u32 shift, u32 scale) {
  u32 r;
  asm("lop3.b32 %0, %1, 0x000f000f, 0x43004300, 0xEA;" : "=r"(r) : "r"(word));
  return ON_SUMS ? add(r, shift) : times(add(r, shift), scale);
}
struct Operand { u32 of[16]; };   // of four products of 16 inputs
// The left operand of half a step: two words of both outputs.
DEVICE void unpack(Operand& a, u32 first0, u32 first1, u32 second0, u32 second1, const u32 (&shift)[2], const u32 (&scale)[2]) {
  u32 words[2][2] = {{first0, first1}, {second0, second1}};   // [word][output]
  UNROLL for (int w = 0; w < 2; w++)
    UNROLL for (int p = 0; p < 4; p++)
      UNROLL for (int o = 0; o < 2; o++)
        a.of[8 * w + 4 * (p >> 1) + 2 * (p & 1) + o] = pair(words[w][o] >> (4 * p), shift[o], scale[o]);
}
// Keeps the compiler from unpacking between the products, which would then wait for one another.
DEVICE void settle(Operand& a) { UNROLL for (int i = 0; i < 16; i++) asm volatile("" : "+r"(a.of[i])::"memory"); }
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
DEVICE void products_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
template <int ADDS> DEVICE void multiply(float (&d)[32], const u32* a, u64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, %37, 1, 1, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADDS));
}
template <int ADDS> DEVICE void multiply(float (&d)[4], const u32* a, u64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, %9, 1, 1, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADDS));
}
// Of 16 inputs of the rows: parts of 8 rows by 16 bytes, 128 bytes from one to the next, behind them those of the upper
// 8 inputs.
constexpr u64 PARTS = (u64)(ROWS_BYTES / 16 >> 4) << 16 | (u64)(128 >> 4) << 32;
DEVICE u64 right_operand(u32 at) { return (u64)((at & 0x3ffff) >> 4) | PARTS; }
DEVICE u16 rounded(float f) { u16 r; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(f)); return r; }

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) int4_rows(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) char shared[];
  __shared__ u64 barriers[2 * STAGES];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int tiles = gridDim.x / a.splits, tile = blockIdx.x % tiles, split = blockIdx.x / tiles;
  const int steps = a.inputs >> 7, begin = steps * split / a.splits, count = steps * (split + 1) / a.splits - begin;
  const u32 rows_at = address(shared), codes_at = rows_at + STAGES * ROWS_BYTES + tid * 16;
  const u32 words_at = rows_at + STAGES * (ROWS_BYTES + CODES_BYTES) + tid * 4;
  const u32 full = address(barriers), empty = full + 8 * STAGES;
  int output[2];
  const uint4* codes[2];
  UNROLL for (int o = 0; o < 2; o++) {
    output[o] = tile * TILE + warp * 16 + o * 8 + (lane >> 2);
    codes[o] = a.codes + (i64)min(output[o], a.outputs - 1) * (a.inputs >> 5) + begin * 4 + (lane & 3);
  }
  // Of the four threads of an output two copy scales and two copy zeros, each the word that has a step's.
  const int role = lane & 3, size = role < 2 ? 2 : 1;
  const bool copies = role < 2 || a.zeros;
  const i64 place = (i64)min(role & 1 ? output[1] : output[0], a.outputs - 1) * a.columns + begin / a.group_steps;
  const char* word = role < 2 ? (const char*)(a.scales + place) : (const char*)(a.zeros + place);   // of the step to ask for
  u32 shift_at = (u32)(u64)word;   // of this step
  int left = a.group_steps - begin % a.group_steps, asked_left = left;   // steps of their groups
  auto ask = [&](int s) {
    UNROLL for (int o = 0; o < 2; o++) { copy_codes(codes_at + s * CODES_BYTES + o * HALF, codes[o]); codes[o] += 4; }
    if (copies) copy_word(words_at + s * WORDS_BYTES, (const char*)((u64)word & ~3ull));
    if (--asked_left == 0) { asked_left = a.group_steps; word += size; }
  };
  UNROLL for (int i = 0; i < STAGES - 1; i++) {
    if (i < count) ask(i);
    copies_end();
  }
  if (tid == 0) {
    for (int i = 0; i < STAGES; i++) { barrier_init(full + 8 * i, 1); barrier_init(empty + 8 * i, WARPS); }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const char* x = a.x + (i64)begin * ROWS_BYTES;
  if (tid == 0) {
    asm volatile("griddepcontrol.wait;" ::: "memory");   // for the kernel that makes the rows' image
    for (int i = 0; i < STAGES && i < count; i++) copy_step(rows_at + i * ROWS_BYTES, x + (i64)i * ROWS_BYTES, full + 8 * i);
  }
  __syncwarp();
  float sums[SUMS], own[SUMS];
  UNROLL for (int i = 0; i < SUMS; i++) sums[i] = own[i] = 0.f;
  Operand even, odd;
  u32 scale[2], shift[2];
  int stage = 0, parity = 0, next = STAGES - 1;   // of this step; where the codes of STAGES - 1 steps later go
#pragma unroll 1
  for (int i = 0; i < count; i++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    const uint4 p = own_codes(codes_at + stage * CODES_BYTES), q = own_codes(codes_at + stage * CODES_BYTES + HALF);
    const u32 mine = own_word(words_at + stage * WORDS_BYTES) >> (shift_at & 3) * 8;
    if (i + STAGES - 1 < count) ask(next);
    copies_end();
    if (--left == 0) { left = a.group_steps; shift_at += size; }
    UNROLL for (int o = 0; o < 2; o++) {
      const u32 s = __shfl_sync(~0u, mine, o, 4), z = __shfl_sync(~0u, mine, 2 + o, 4);
      scale[o] = ON_SUMS ? s << 16 : (s & 0xffffu) * 0x10001u;
      shift[o] = (a.zeros ? z & 0xffu : 8u) * 0x10001u | 0xc300c300u;   // less 128 and the zero
    }
    const u64 b = right_operand(rows_at + stage * ROWS_BYTES);
    unpack(even, p.x, q.x, p.y, q.y, shift, scale);
    unpack(odd, p.z, q.z, p.w, q.w, shift, scale);
    settle(even);
    settle(odd);
    barrier_wait(full + 8 * stage, parity);
    float (&to)[SUMS] = ON_SUMS ? own : sums;
    products_begin();
    multiply<!ON_SUMS>(to, even.of, b);
    UNROLL for (int j = 1; j < 8; j++) multiply<1>(to, j < 4 ? even.of + 4 * j : odd.of + 4 * j - 16, b + j * (ROWS_BYTES / 128));   // 16 bytes count as one
    products_end();
    products_wait();
    if (ON_SUMS) UNROLL for (int k = 0; k < SUMS; k++) sums[k] = fmaf(own[k], __uint_as_float(scale[k >> 1 & 1]), sums[k]);
    if (lane == 0) barrier_arrive(empty + 8 * stage);
    if (tid == 0 && i > 0 && i - 1 + STAGES < count) {   // where the rows of the step before were
      const int s = stage ? stage - 1 : STAGES - 1;
      barrier_wait(empty + 8 * s, stage ? parity : parity ^ 1);
      copy_step(rows_at + s * ROWS_BYTES, x + (i64)(i - 1 + STAGES) * ROWS_BYTES, full + 8 * s);
    }
    __syncwarp();
    next = stage;
    if (++stage == STAGES) { stage = 0; parity ^= 1; }
  }
  UNROLL for (int o = 0; o < 2; o++) {
    if (output[o] >= a.outputs) continue;
    const float bias = a.bias && a.splits == 1 ? __uint_as_float((u32)a.bias[output[o]] << 16) : 0.f;
    UNROLL for (int i = 0; i < ROWS / 8; i++)
      UNROLL for (int e = 0; e < 2; e++) {
        const int row = 8 * i + (lane & 3) * 2 + e;
        const float sum = sums[4 * i + 2 * o + e] + bias;
        if (row >= a.rows) continue;
        const i64 place = ((i64)split * a.rows + row) * a.outputs + output[o];
        if (a.splits == 1) ((u16*)a.out)[place] = rounded(sum);
        else ((float*)a.out)[place] = sum;
      }
  }
}
