// Products of a tile of weights with the activations of up to eight columns: mma.sync m16n8k16, the tile as its 16 rows.
//
// The warps split the inputs: each needs other activations, keeps them in registers, and nothing is read twice by a
// block. The order of the inputs inside a product is free as long as both operands agree, so one ldmatrix feeds one
// product of bf16 weights, two of 8 bits and four of int4, without shuffles.
#pragma once
#include "tiles.cuh"

DEVICE void load_matrix(u32 (&r)[4], u32 a) { asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory"); }
template <bool AS_HALF> DEVICE void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if (AS_HALF)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Activations as right operands. Words are asked for and checked apart, so that a chunk travels during the one before. Lanes
// of columns that a step does not have read the first one's words: nothing has to be told apart, and nobody reads what comes
// of them.
template <class T> struct Activations {
  typedef Pairs<T::F> P;
  static constexpr int EACH = T::WORDS_OF_STAGE / 4;   // loads of a stage
  u32 words[T::WORDS];
  static DEVICE const u32* place(const u32* x, int chunk, int columns) {   // of this lane's first words
    const u32 tid = thread_index(), column = (tid & 31) >> 2;
    return x + ((chunk * (T::CHUNK / 32) + (tid >> 5) * (T::OF_WARP / 32)) * COLUMNS + ((int)column < columns ? column : 0)) * 16 + (tid & 3) * 4;
  }
  DEVICE void ask(const u32* from) {
    UNROLL for (int i = 0; i < T::WORDS / 4; i++) {
      const uint4 v = Words::load4(from + (i / EACH * (T::INPUTS / 32) + i % EACH) * (COLUMNS * 16));
      words[4 * i] = v.x; words[4 * i + 1] = v.y; words[4 * i + 2] = v.z; words[4 * i + 3] = v.w;
    }
  }
  DEVICE u32 stale(u32 mark) const {
    u32 r[4] = {};   // apart: each waits for the one before
    UNROLL for (int i = 0; i < T::WORDS; i++) r[i % 4] |= words[i] ^ mark;
    return (r[0] | r[1] | r[2] | r[3]) & P::MASK;
  }
  DEVICE void check(const u32* from, u32 mark, Watch& watch) {
    u32 tries = 0;
    while (stale(mark) && !watch.dead && !watch.gives_up(tries)) ask(from);
    __syncwarp();   // products want whole warps
  }
  DEVICE void decode(const u32 (&raw)[T::WORDS]) {
    UNROLL for (int i = 0; i < T::WORDS; i++) {
      words[i] = P::number(raw[i]);
      if (from_half(T::F)) words[i] = pack_bf16(of_half(words[i]), of_half(words[i] >> 16));
      if (T::OFFSETS && (i & 1)) {   // upper codes come 16 times, with the lower ones on them: see Offsets
        asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(words[i]) : "r"(0x2c002c00u));
        asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(words[i - 1]) : "r"(words[i]));
      }
      if (T::E2M1 && (i & 3) == 3) {   // inputs 0 and 2, 4 and 6, then 1 and 3, 5 and 7: see e2m1_even
        const u32 w0 = words[i - 3], w1 = words[i - 2], w2 = words[i - 1], w3 = words[i];
        words[i - 3] = __byte_perm(w0, w1, 0x5410); words[i - 2] = __byte_perm(w2, w3, 0x5410);
        words[i - 1] = __byte_perm(w0, w1, 0x7632); words[i] = __byte_perm(w2, w3, 0x7632);
      }
    }
  }
  DEVICE void load(const u32* x, u32 number, int columns, Watch& watch) {
    const u32 mark = P::mark(number);
    const u32* from = place(x, 0, columns);
    ask(from);
    check(from, mark, watch);
    decode(words);
  }
};

// int4: codes are multiplied as 1024 + q and, two in a byte, as 1024 + q + 16 q', which takes a single instruction each. The
// activation of q' counts a sixteenth, and that of q has as much less: q a + q' a' = q (a - a' / 16) + (q + 16 q') a' / 16.
// What 1024 and the zero point of 8 add to a product is the same for all rows, so a group's sum begins at minus it, for this
// lane's two columns. Where groups have zero points of their own, a row adds what 8 is above its own, times the sum of the
// group's activations.
template <class T> struct Offsets {
  static constexpr int PER_GROUP = T::GROUP / 8, COUNT = T::OFFSETS ? T::WORDS / PER_GROUP : 1;
  float of[COUNT][2], sums[T::ZEROS ? COUNT : 1][2];
  DEVICE void set(const Activations<T>& a) {
    // -(1024 + 8), and -(1024 + 8 + 16 * 8); in the lower eight rows what gives the sum of the activations, 1 and 17.
    constexpr u32 LOW = T::ZEROS ? 0x3c003c00u : 0xe408e408u, HIGH = T::ZEROS ? 0x4c404c40u : 0xe488e488u;
    if (T::OFFSETS) UNROLL for (int i = 0; i < COUNT; i++) {
      float c[4] = {};
      UNROLL for (int j = 0; j < PER_GROUP; j += 2) multiply<true>(c, 0xe408e408u, LOW, 0xe488e488u, HIGH, a.words[PER_GROUP * i + j], a.words[PER_GROUP * i + j + 1]);
      of[i][0] = c[0]; of[i][1] = c[1];
      if (T::ZEROS) { sums[i][0] = c[2]; sums[i][1] = c[3]; }
    }
  }
};
DEVICE u32 fp8_low(u32 q) { u32 r; asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, l; }" : "=r"(r) : "r"(q)); return r; }
DEVICE u32 fp8_high(u32 q) { u32 r; asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, h; }" : "=r"(r) : "r"(q)); return r; }
// Two signed integers of 8 bits as fp16: 1024 + 128 + q has all their values, and 1152 goes off it without rounding.
template <u32 BYTES> DEVICE u32 int8_pair(u32 q) {
  u32 r = __byte_perm(q ^ 0x80808080u, 0x64646464u, BYTES);
  asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(r) : "r"(0x64806480u));
  return r;
}
template <int F> DEVICE u32 low_pair(u32 q) { return integers(F) ? int8_pair<0x4140>(q) : fp8_low(q); }
template <int F> DEVICE u32 high_pair(u32 q) { return integers(F) ? int8_pair<0x4342>(q) : fp8_high(q); }
DEVICE u32 int4_low(u32 q) { return lop3<0xEA>(q, 0x000f000fu, 0x64006400u); }       // (q & mask) | magic: 1024 + q
DEVICE u32 int4_bytes(u32 q) { return __byte_perm(q, 0x64646464u, 0x4240); }          // 1024 + q + 16 q'
DEVICE u32 int4_next_bytes(u32 q) { return __byte_perm(q, 0x64646464u, 0x4341); }     // the same of the other two bytes
// What a group of a row is multiplied with, and 8 less its zero point.
struct Scale {
  float by, above;
};
DEVICE u32 load_short(u32 a) { u16 h; asm volatile("ld.shared.u16 %0, [%1];" : "=h"(h) : "r"(a)); return h; }
template <class T> DEVICE Scale load_scale(u32 a) {
  u32 w;
  if (T::SCALE_BYTES == 4) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(w) : "r"(a));
  else w = load_short(a);
  if (T::SCALE_BYTES == 4 && !T::ZEROS) return {__uint_as_float(w), 0.f};
  if (T::F & 256) return {of_half(w), T::ZEROS ? of_half(w >> 16) : 0.f};
  return {__uint_as_float(w << 16), T::ZEROS ? __uint_as_float(w & 0xffff0000u) : 0.f};
}
// e2m1: a code, its sign at bit 7 and the others at bits 3 to 1 of a byte, is the upper half of an fp16 number that is 2^-14
// times its value, exact, zeros and the subnormal 0.5 too. The lower codes of four bytes have even inputs, the upper odd ones.
DEVICE u32 e2m1_even(u32 q) { return lop3<0xEA>(q << 4, 0x80808080u, q << 1 & 0x0e0e0e0eu); }   // (q & mask) | others
DEVICE u32 e2m1_odd(u32 q) { return lop3<0xEA>(q, 0x80808080u, q >> 3 & 0x0e0e0e0eu); }
DEVICE u32 low_bytes(u32 q) { return __byte_perm(q, 0, 0x1404); }    // of four bytes the lower two, each above a byte of zeros
DEVICE u32 high_bytes(u32 q) { return __byte_perm(q, 0, 0x3424); }
template <int K> DEVICE float e8m0(u32 pair) { return __uint_as_float(pair << (K ? 15 : 23) & 0x7f800000u); }   // 2^-127 counts as 0

// A group's products, times its scales, to the sums of rows lane / 4 and lane / 4 + 8. Returns bits of the scales.
template <class T> DEVICE u32 add_group(float (&sum)[4], const float (&c)[2][4], const float (&activations)[2], u32 tile, int group) {
  u32 read = 0;
  UNROLL for (int h = 0; h < 2; h++) {
    const Scale scale = load_scale<T>(tile + (((threadIdx.x & 31) >> 2) + 8 * h) * T::PITCH + T::DATA + group * T::SCALE_BYTES);
    read |= __float_as_uint(scale.by);
    UNROLL for (int e = 2 * h; e < 2 * h + 2; e++) {
      float of_group = c[0][e] + c[1][e];
      if (T::ZEROS) of_group = fmaf(scale.above, activations[e & 1], of_group);
      sum[e] = fmaf(scale.by, of_group, sum[e]);
    }
  }
  return read;
}
// 16 rows by 32 bytes of codes; `o`: the first of their activations.
template <class T> DEVICE void multiply_bytes(float (&sum)[2][4], const u32 (&q)[4], const Activations<T>& a, const int o) {
  multiply<true>(sum[0], low_pair<T::F>(q[0]), low_pair<T::F>(q[1]), high_pair<T::F>(q[0]), high_pair<T::F>(q[1]), a.words[o], a.words[o + 1]);
  multiply<true>(sum[1], low_pair<T::F>(q[2]), low_pair<T::F>(q[3]), high_pair<T::F>(q[2]), high_pair<T::F>(q[3]), a.words[o + 2], a.words[o + 3]);
}
// One stage: 16 rows by this warp's inputs, times the activations of the chunk's `index`-th stage. Returns bits of the
// scales that it read, for `Ring::done`: products use the codes at once, and scales last.
template <class T> DEVICE u32 multiply_stage(float (&sum)[2][4], const Activations<T>& a, const Offsets<T>& offsets, const int index, u32 tile) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 base = tile + (lane & 15) * T::PITCH + (lane >> 4) * 16 + warp * T::BYTES_OF_WARP;
  u32 q[4], read = 0;
  if (T::BITS == 16) {
    UNROLL for (int i = 0; i < T::BYTES_OF_WARP / 32; i++) {
      load_matrix(q, base + 32 * i);
      const int o = index * T::WORDS_OF_STAGE + 2 * i;
      multiply<HALF>(sum[i & 1], q[0], q[1], q[2], q[3], a.words[o], a.words[o + 1]);
    }
  } else if (T::BITS == 8 && !T::GROUPED) {
    UNROLL for (int i = 0; i < T::BYTES_OF_WARP / 32; i++) {
      load_matrix(q, base + 32 * i);
      multiply_bytes<T>(sum, q, a, index * T::WORDS_OF_STAGE + 4 * i);
    }
  } else if (T::BITS == 8) {
    constexpr int GROUPS = T::OF_WARP / T::GROUP;
    UNROLL for (int g = 0; g < GROUPS; g++) {
      float c[2][4] = {};
      UNROLL for (int j = 0; j < T::GROUP / 32; j++) {
        const int i = g * (T::GROUP / 32) + j;
        load_matrix(q, base + 32 * i);
        multiply_bytes<T>(c, q, a, index * T::WORDS_OF_STAGE + 4 * i);
      }
      read |= add_group<T>(sum[0], c, offsets.sums[0], tile, warp * GROUPS + g);
    }
  } else if (T::E2M1) {
    constexpr int GROUPS = T::OF_WARP / 32;   // of 16 bytes of a row: a read brings two
    UNROLL for (int i = 0; i < GROUPS / 2; i++) {
      load_matrix(q, base + 32 * i);
      u32 scales[2];
      UNROLL for (int h = 0; h < 2; h++) scales[h] = load_short(tile + ((lane >> 2) + 8 * h) * T::PITCH + T::DATA + warp * GROUPS + 2 * i);
      read |= scales[0] | scales[1];
      UNROLL for (int k = 0; k < 2; k++) {
        const int o = index * T::WORDS_OF_STAGE + 4 * (2 * i + k);
        const u32 even_p = e2m1_even(q[2 * k]), even_r = e2m1_even(q[2 * k + 1]), odd_p = e2m1_odd(q[2 * k]), odd_r = e2m1_odd(q[2 * k + 1]);
        float c[2][4] = {};
        multiply<true>(c[0], low_bytes(even_p), low_bytes(even_r), high_bytes(even_p), high_bytes(even_r), a.words[o], a.words[o + 1]);
        multiply<true>(c[1], low_bytes(odd_p), low_bytes(odd_r), high_bytes(odd_p), high_bytes(odd_r), a.words[o + 2], a.words[o + 3]);
        UNROLL for (int e = 0; e < 4; e++) sum[0][e] = fmaf(k ? e8m0<1>(scales[e / 2]) : e8m0<0>(scales[e / 2]), c[0][e] + c[1][e], sum[0][e]);
      }
    }
  } else {
    constexpr int GROUPS = T::OF_WARP / T::GROUP, PARTS = T::GROUP / 32;   // a part: 16 bytes of a row
    UNROLL for (int g = 0; g < GROUPS; g++) {
      const int at = index * GROUPS + g;
      float c[2][4] = {{offsets.of[at][0], offsets.of[at][1], offsets.of[at][0], offsets.of[at][1]}, {0.f, 0.f, 0.f, 0.f}};
      UNROLL for (int j = 0; j < PARTS; j++) {
        const int part = g * PARTS + j, k = part & 1, o = index * T::WORDS_OF_STAGE + 4 * part;
        if (!k) load_matrix(q, base + 16 * part);
        const u32 p = q[2 * k], r = q[2 * k + 1];
        multiply<true>(c[0], int4_low(p), int4_low(r), int4_bytes(p), int4_bytes(r), a.words[o], a.words[o + 1]);
        const u32 next_p = int4_next_bytes(p), next_r = int4_next_bytes(r);
        multiply<true>(c[1], int4_low(next_p), int4_low(next_r), next_p, next_r, a.words[o + 2], a.words[o + 3]);
      }
      read |= add_group<T>(sum[0], c, offsets.sums[T::ZEROS ? at : 0], tile, warp * GROUPS + g);
    }
  }
  return read;
}
template <class T> DEVICE void keep(const float (&sum)[2][4], u32 side, int t) {
  Shared* s = shared_state();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = (lane & 3) * 2;
  constexpr float BY = T::E2M1 ? 16384.f : 1.f;   // what its codes are multiplied without
  *(float2*)&s->part[side][warp][t][g][c] = make_float2((sum[0][0] + sum[1][0]) * BY, (sum[0][1] + sum[1][1]) * BY);
  *(float2*)&s->part[side][warp][t][g + 8][c] = make_float2((sum[0][2] + sum[1][2]) * BY, (sum[0][3] + sum[1][3]) * BY);
}

struct Outputs {   // two neighbouring rows of one column; of a gated projection those of the gate and of up
  int at, column;   // the first one's place in the share
  bool on;
  float y0, y1, up0, up1;
};
// What belongs to this thread's outputs, scales and biases, asked for before a phase waits. A batch of tiles is finished
// by a group of the threads, the next batch by the next group, while the others go on.
template <class T> struct Constants {
  static constexpr int PAIRS = T::ROWS / 2, GROUP_THREADS = BATCH * PAIRS * 8, GROUPS = THREADS / GROUP_THREADS;
  static constexpr bool OWN_SCALES = T::BITS == 8 && !T::GROUPED;   // of each output
  static_assert(BATCH * PAIRS <= THREADS / 8, "a pair of rows a thread");
  int at;        // of this thread's next outputs: the first one's place in the share
  bool on;
  float2 scale, up_scale;
  u32 bias, up_bias;
  static DEVICE int pair() { return thread_index() % GROUP_THREADS >> 3; }
  static DEVICE bool finishes(int nth) { return thread_index() / GROUP_THREADS == nth % GROUPS; }
  DEVICE void begin(const Matrix& m, const Share& share, i64 twin) { ask(m, share, thread_index() / GROUP_THREADS * BATCH * T::ROWS, twin); }
  DEVICE void ask(const Matrix& m, const Share& share, int batch, i64 twin) {   // of the batch that begins at that row
    const int p = pair();
    at = batch + p / PAIRS * T::ROWS + p % PAIRS * 2;
    on = at < share.count;
    bias = up_bias = 0u;
    scale = up_scale = make_float2(1.f, 1.f);
    if (!on) return;
    const i64 row = share.first + at;
    if (OWN_SCALES) {
      scale = __ldg((const float2*)((const float*)m.scales + row));
      if (T::GATED) up_scale = __ldg((const float2*)((const float*)m.scales + twin + row));
    }
    if (m.bias) {
      bias = __ldg((const u32*)(m.bias + row));
      if (T::GATED) up_bias = __ldg((const u32*)(m.bias + twin + row));
    }
  }
};
// Behind the nth batch of tiles: sums over the warps in their order.
template <class T, class Finish> DEVICE void finish_batch(const Constants<T>& k, int nth, u32& side, Finish finish) {
  const Shared* s = shared_state();
  consumers_meet();
  if (Constants<T>::finishes(nth)) {
    const int column = thread_index() & 7, p = Constants<T>::pair(), t = p / Constants<T>::PAIRS, r = p % Constants<T>::PAIRS * 2;
    Outputs o = {k.at, column, k.on, 0.f, 0.f, 0.f, 0.f};
    if (k.on) {
      UNROLL for (int i = 0; i < WARPS; i++) {
        o.y0 += s->part[side][i][t][r][column];
        o.y1 += s->part[side][i][t][r + 1][column];
        if (T::GATED) { o.up0 += s->part[side][i][t][8 + r][column]; o.up1 += s->part[side][i][t][9 + r][column]; }
      }
      if (Constants<T>::OWN_SCALES) { o.y0 *= k.scale.x; o.y1 *= k.scale.y; o.up0 *= k.up_scale.x; o.up1 *= k.up_scale.y; }
    }
    finish(o, k);
  }
  side ^= 1;
}
// A projection whose activations are all in registers. `arrive` tells the next phase that this block is done: before the
// last sums are put together, or, with EARLY = 0, behind the last words. It is a hint; words prove themselves.
template <class T, class Arrive, class Finish> DEVICE void project(const Activations<T>& a, Constants<T>& constants, const Matrix& m, const Share& share, i64 twin, Ring& ring, u32& side, Arrive arrive, Finish finish) {
  static_assert(T::CHUNKS == 1, "the launcher checks sizes");
  Offsets<T> offsets;
  offsets.set(a);
  for (int batch = 0, nth = 0; batch < share.count; batch += BATCH * T::ROWS, nth++) {
    for (int t = 0; t < BATCH && batch + t * T::ROWS < share.count; t++) {
      float sum[2][4] = {};
      UNROLL for (int i = 0; i < T::STAGES_OF_CHUNK; i++) {
        const u32 tile = ring.wait();
        ring.done(multiply_stage<T>(sum, a, offsets, i, tile));
      }
      keep<T>(sum, side, t);
    }
    if (EARLY && batch + BATCH * T::ROWS >= share.count) arrive();
    finish_batch<T>(constants, nth, side, finish);
    if (Constants<T>::finishes(nth)) constants.ask(m, share, batch + Constants<T>::GROUPS * BATCH * T::ROWS, twin);
  }
  if (!EARLY || share.count <= 0) arrive();
}
// A projection to the residual stream (a batch of tiles for 128 of its owners) whose activations come in chunks.
// Two buffers take turns: copying words that are on their way would wait for them.
template <class T, class Arrive, class Finish> DEVICE void project_in_chunks(const u32* x, u32 number, int columns, const Constants<T>& constants, const Share& share, Ring& ring, u32& side, Watch& watch, Arrive arrive, Finish finish) {
  const u32 mark = Pairs<T::F>::mark(number);
  constexpr int TILES = OWNERS / 128 * BATCH;
  float sums[TILES][2][4] = {};
  constexpr int STEP = T::CHUNK / 32 * COLUMNS * 16;   // words of a chunk
  const u32* from = Activations<T>::place(x, 0, columns);
  constexpr bool TURNS = T::CHUNK <= 2048;   // a large chunk is as long as two, and there are no registers for two
  Activations<T> even, odd, a;
  Offsets<T> offsets;
  auto chunk = [&](Activations<T>& raw, int c) {
    raw.check(from + c * STEP, mark, watch);
    a.decode(raw.words);
    constexpr int AHEAD = TURNS ? 2 : 1;
    if (c + AHEAD < T::CHUNKS) raw.ask(from + (c + AHEAD) * STEP);
    offsets.set(a);
    UNROLL for (int t = 0; t < TILES; t++) if (t * T::ROWS < share.count)
      UNROLL for (int i = 0; i < T::STAGES_OF_CHUNK; i++) {
        const u32 tile = ring.wait();
        ring.done(multiply_stage<T>(sums[t], a, offsets, i, tile));
      }
  };
  even.ask(from);
  if (TURNS && T::CHUNKS > 1) odd.ask(from + STEP);
#pragma unroll 1
  for (int c = 0; c < T::CHUNKS; c += TURNS ? 2 : 1) {
    chunk(even, c);
    if (TURNS && c + 1 < T::CHUNKS) chunk(odd, c + 1);
  }
  UNROLL for (int nth = 0; nth < TILES / BATCH; nth++) {
    UNROLL for (int t = nth * BATCH; t < (nth + 1) * BATCH; t++) if (t * T::ROWS < share.count) keep<T>(sums[t], side, t % BATCH);
    if (EARLY && nth + 1 == TILES / BATCH) arrive();
    finish_batch<T>(constants, nth, side, finish);
  }
  if (!EARLY) arrive();
}
