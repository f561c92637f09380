// Attention of the new tokens: a block takes UNIT_HEADS query heads of one kv head for one column, and one split of the
// positions; a warp takes 16 positions at a time.
//
// Scores are Q K^T as m16n8k16 products: the query heads are rows (eight at most, the others are zero), positions are
// columns, and keys are the right operand as they lie: a lane's 16 bytes are eight of the dimensions of two products.
// Scores are, as they come, the left operand of P V; there a lane has eight neighbouring dimensions of its positions, and
// column n of the j-th product is dimension 8 n + j. Keys and values of this step come from words: the column's own is added
// behind all others; those of its request before it lie in shared memory as the cache would have them, and take the same
// way as cached ones, so that a token's bits do not depend on which steps fed the ones before it.
#pragma once
#include "products.cuh"

#define LOG2E 1.4426950408889634f

struct Attention {
  static constexpr int PARTS = HEAD / 32, HALF_HEAD = HEAD / 2, HALVES = HEAD / 64, G = UNIT_HEADS;
  static_assert((HEAD == 64 || HEAD == 128) && G <= 8 && PER_KV % G == 0, "shape of a unit");

  // Before waiting: the rotary factors of the column, and the gains of the norms of queries and keys.
  static DEVICE void prefetch(const Layer& y, const float* cos, const float* sin, int position) {
    Shared* s = shared_state();
    const int tid = thread_index();
    if (tid < HALF_HEAD) {
      s->cos[tid] = y.rotates ? __ldg(cos + (i64)position * HALF_HEAD + tid) : 1.f;
      s->sin[tid] = y.rotates ? __ldg(sin + (i64)position * HALF_HEAD + tid) : 0.f;
    }
    if (HEAD_NORMS && tid < HEAD) { s->gains[0][tid] = __ldg(y.q_norm + tid); s->gains[1][tid] = __ldg(y.k_norm + tid); }
  }
  // Norm over the head, then rotation of its halves against each other. Lane t of four has dimensions 32 c + 8 t + e.
  static DEVICE void place(const Words (&x)[PARTS], int gain, const float* cos, const float* sin, float (&o)[PARTS][8]) {
    const Shared* s = shared_state();
    const int t = threadIdx.x & 3;
    float squares = 0.f;
    UNROLL for (int c = 0; c < PARTS; c++) {
      x[c].values(o[c]);
      if (HEAD_NORMS) UNROLL for (int e = 0; e < 8; e++) squares = fmaf(o[c][e], o[c][e], squares);
    }
    if (HEAD_NORMS) {
      squares += __shfl_xor_sync(~0u, squares, 1);
      squares += __shfl_xor_sync(~0u, squares, 2);
      const float factor = rsqrtf(squares / HEAD + HEAD_EPSILON);
      UNROLL for (int c = 0; c < PARTS; c++) UNROLL for (int e = 0; e < 8; e++) o[c][e] *= factor * s->gains[gain][c * 32 + t * 8 + e];
    }
    UNROLL for (int c = 0; c < PARTS / 2; c++) UNROLL for (int e = 0; e < 8; e++) {
      const float cs = cos ? cos[c * 32 + t * 8 + e] : 1.f, sn = cos ? sin[c * 32 + t * 8 + e] : 0.f;
      const float a = o[c][e], b = o[c + PARTS / 2][e];
      o[c][e] = a * cs - b * sn;
      o[c + PARTS / 2][e] = b * cs + a * sn;
    }
  }
  // Where a unit's result goes: a word for each pair of dimensions of each head, or, of a split, floats and its softmax.
  template <class Emit> static DEVICE void each_pair(Emit emit) {
    for (int e = thread_index() * 2; e < G * HEAD; e += THREADS * 2) emit(e / HEAD, e % HEAD);
  }
  static DEVICE void nothing(u32* mixed, const Unit& unit, u32 number) {
    each_pair([&](int h, int d) { Pairs<FORMAT>::store(mixed + Pairs<FORMAT>::index((unit.head + h) * HEAD + d, unit.column), 0.f, 0.f, Pairs<FORMAT>::mark(number)); });
  }

  struct Buffers {
    const u32* qkv;       // words [COLUMNS][QUERIES + 2 KEYS]
    u32* mixed;           // pair words, the next projection's input
    float* partial;       // [units][UNIT_HEADS][HEAD + 2]
    u32* tickets;         // [COLUMNS][HEAD_GROUPS]: splits that are done
    const float *cos, *sin;
  };
  static DEVICE void run(const Layer& y, const Buffers& to, const Unit& unit, int index, Ring& ring, u32 number, Watch& watch) {
    Shared* s = shared_state();
    const int tid = thread_index(), lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3, kv = unit.head / PER_KV;
    const int column = unit.column;
    const int cached = s->cached[column];
    const u32 low8 = number & 255u, others = others_of(unit), takes = others | (unit.split == 0 ? 1u << column : 0u);
    const int fresh = __popc(takes);
    float out[HALVES][8][4], top = -1e30f, total = 0.f;
    u32 query[PARTS][4];
    {
      Words x[PARTS], own[PARTS];
      float placed[PARTS][8];
      // Two warps take a token of this step, one its key and one its value, from the last warps down.
      int nth = (WARPS - 1 - warp) / 2, source = column_of(takes, nth);
      const bool takes_value = (WARPS - 1 - warp) & 1;
      const u32* from = to.qkv + QUERIES + (takes_value ? KEYS : 0) + kv * HEAD + t * 8;
      u32 stale;
      UNROLL for (int c = 0; c < PARTS; c++) own[c].assume(low8);
      ASK(watch,
        stale = 0;
        UNROLL for (int c = 0; c < PARTS; c++) x[c].load(to.qkv + column * (QUERIES + 2 * KEYS) + (unit.head + min(g, G - 1)) * HEAD + c * 32 + t * 8);
        if (nth < fresh) UNROLL for (int c = 0; c < PARTS; c++) own[c].load(from + source * (QUERIES + 2 * KEYS) + c * 32);
        UNROLL for (int c = 0; c < PARTS; c++) stale |= x[c].stale(low8) | own[c].stale(low8), stale)
      __syncwarp();
      place(x, 0, s->cos, s->sin, placed);
      const float by = g < G ? LOG2E * ATTENTION_SCALE : 0.f;
      UNROLL for (int c = 0; c < PARTS; c++) UNROLL for (int e = 0; e < 4; e++) query[c][e] = pack(placed[c][2 * e] * by, placed[c][2 * e + 1] * by);
#pragma unroll 1
      while (nth < fresh) {
        take(y, to, unit, own, query, source, takes_value);
        nth += WARPS / 2;
        if (nth >= fresh) break;
        source = column_of(takes, nth);
        ASK(watch,
          stale = 0;
          UNROLL for (int c = 0; c < PARTS; c++) { own[c].load(from + source * (QUERIES + 2 * KEYS) + c * 32); stale |= own[c].stale(low8); }, stale)
        __syncwarp();
      }
    }
    if (others) consumers_meet();
    UNROLL for (int h = 0; h < HALVES; h++) UNROLL for (int j = 0; j < 8; j++) UNROLL for (int e = 0; e < 4; e++) out[h][j][e] = 0.f;
    int tile = 0;
    for (int t0 = unit.low; t0 < unit.high; t0 += Cut::POSITIONS) {
      const int n = min(Cut::POSITIONS, unit.high - t0), skip = max(0, unit.first - t0);
      const u32 keys = ring.wait(), values = keys + Cut::POSITIONS * HEAD * 2;
      const int here = cached - t0;   // of the stage's positions those that are in the cache
      auto row = [&](u32 stage, int which, int at) { return at < here ? stage + at * (HEAD * 2) : shared_address(&s->fresh[which][at - here]); };
#pragma unroll 1
      for (int i = skip & ~15; i < n; i += 16, tile++) if (tile % WARPS == warp) {
        float c[2][4] = {};
        const u32 rows[2] = {row(keys, 0, i + g), row(keys, 0, i + 8 + g)};
        UNROLL for (int d = 0; d < PARTS; d++) {
          uint4 k[2];
          UNROLL for (int a = 0; a < 2; a++) k[a] = load_shared(rows[a] + d * 64 + t * 16);
          UNROLL for (int a = 0; a < 2; a++) {
            multiply<HALF>(c[a], query[d][0], 0u, query[d][1], 0u, k[a].x, k[a].y);
            multiply<HALF>(c[a], query[d][2], 0u, query[d][3], 0u, k[a].z, k[a].w);
          }
        }
        float higher = top;   // scores of head g at positions i + 2t, i + 2t + 1, and eight further
        UNROLL for (int a = 0; a < 2; a++) UNROLL for (int e = 0; e < 2; e++) {
          const int at = i + 8 * a + 2 * t + e;
          if (at >= n || at < skip) c[a][e] = -1e30f;
          higher = fmaxf(higher, c[a][e]);
        }
        higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 1));
        higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 2));
        const float shrink = exp2f(top - higher);
        top = higher; total *= shrink;
        u32 weights[2];
        UNROLL for (int a = 0; a < 2; a++) { weights[a] = pack(exp2f(c[a][0] - higher), exp2f(c[a][1] - higher)); total += low(weights[a]) + high(weights[a]); }
        UNROLL for (int h = 0; h < HALVES; h++) {
          uint4 v[4];
          UNROLL for (int a = 0; a < 4; a++) {
            const int at = i + 2 * t + (a & 1) + 8 * (a >> 1);
            v[a] = at < n ? load_shared(row(values, 1, at) + h * 128 + g * 16) : make_uint4(0, 0, 0, 0);
          }
          UNROLL for (int j = 0; j < 8; j++) {
            const u32 a0 = (&v[0].x)[j / 2], a1 = (&v[1].x)[j / 2], a2 = (&v[2].x)[j / 2], a3 = (&v[3].x)[j / 2];
            out[h][j][0] *= shrink; out[h][j][1] *= shrink;
            multiply<HALF>(out[h][j], weights[0], 0u, weights[1], 0u, __byte_perm(a0, a1, j & 1 ? 0x7632 : 0x5410), __byte_perm(a2, a3, j & 1 ? 0x7632 : 0x5410));
          }
        }
      }
      ring.done();
    }
    total += __shfl_xor_sync(~0u, total, 1); total += __shfl_xor_sync(~0u, total, 2);
    float* shared_out = &s->part[0][0][0][0][0];   // [WARPS][G][HEAD]; nobody else uses it between two meetings
    if (g < G) {
      UNROLL for (int h = 0; h < HALVES; h++) UNROLL for (int c = 0; c < 2; c++) UNROLL for (int j = 0; j < 8; j += 4)
        *(float4*)&shared_out[(warp * G + g) * HEAD + h * 64 + 16 * t + 8 * c + j] = make_float4(out[h][j][c], out[h][j + 1][c], out[h][j + 2][c], out[h][j + 3][c]);
      if (t == 0) { s->softmax[warp][g][0] = top; s->softmax[warp][g][1] = total; }
    }
    consumers_meet();
    const u32 mark = Pairs<FORMAT>::mark(number);
    float* partial = to.partial + (i64)index * G * (HEAD + 2);
    each_pair([&](int h, int d) {
      float higher = -1e30f, sum = 0.f, o0 = 0.f, o1 = 0.f;
      if (unit.split == 0) higher = s->own_scores[h];
      UNROLL for (int i = 0; i < WARPS; i++) higher = fmaxf(higher, s->softmax[i][h][0]);
      if (unit.split == 0) {
        sum = exp2f(s->own_scores[h] - higher);
        o0 = sum * s->own_value[d]; o1 = sum * s->own_value[d + 1];
      }
      UNROLL for (int i = 0; i < WARPS; i++) {
        const float w = exp2f(s->softmax[i][h][0] - higher);
        const float2 v = *(float2*)&shared_out[(i * G + h) * HEAD + d];
        sum += w * s->softmax[i][h][1]; o0 = fmaf(w, v.x, o0); o1 = fmaf(w, v.y, o1);
      }
      if (unit.splits > 1) {
        *(float2*)(partial + h * (HEAD + 2) + d) = make_float2(o0, o1);
        if (d == 0) *(float2*)(partial + h * (HEAD + 2) + HEAD) = make_float2(higher, sum);
      } else Pairs<FORMAT>::store(to.mixed + Pairs<FORMAT>::index((unit.head + h) * HEAD + d, column), o0 / sum, o1 / sum, mark);
    });
    if (unit.splits > 1) merge(to, unit, index, mark);
  }

 private:
  static DEVICE u32 others_of(const Unit& unit) {   // columns of the same request at this unit's positions
    const Shared* s = shared_state();
    u32 found = s->peers[unit.column] & ~(1u << unit.column);
    if (found) UNROLL for (int j = 0; j < COLUMNS; j++) if (s->position[j] < unit.low || s->position[j] >= unit.high) found &= ~(1u << j);
    return found;
  }
  static DEVICE int column_of(u32 takes, int nth) {   // of the nth token that a unit takes from words
    for (int i = 0; i < nth; i++) takes &= takes - 1;
    return max(0, __ffs(takes) - 1);
  }
  // The key or the value of a token of this step. The column's own: its score against this unit's queries, or the value for
  // all to weigh; the unit of the kv head's first group writes it to the cache. Another's: rounded as that one writes it.
  static DEVICE void take(const Layer& y, const Buffers& to, const Unit& unit, const Words (&own)[PARTS], const u32 (&query)[PARTS][4], int source, bool takes_value) {
    Shared* s = shared_state();
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, kv = unit.head / PER_KV, position = s->position[source];
    const bool is_own = source == unit.column, writes = g == 0 && is_own && unit.head % PER_KV == 0;
    const int place_of = position - s->cached[unit.column];
    const i64 at = (((i64)__ldg(s->table[source] + position / PAGE) * KV_HEADS + kv) * PAGE + position % PAGE) * HEAD + t * 8;
    float x[PARTS][8];
    u32 packed[4];
    if (takes_value) {
      UNROLL for (int c = 0; c < PARTS; c++) {
        own[c].values(x[c]);
        UNROLL for (int e = 0; e < 4; e++) {
          packed[e] = pack(x[c][2 * e], x[c][2 * e + 1]);
          if (g == 0 && is_own) *(float2*)&s->own_value[c * 32 + t * 8 + 2 * e] = make_float2(low(packed[e]), high(packed[e]));
        }
        if (g == 0 && !is_own) *(uint4*)&s->fresh[1][place_of][c * 32 + t * 8] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
        if (writes) *(uint4*)(y.values + at + c * 32) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
      }
      return;
    }
    const i64 turn = (i64)position * HALF_HEAD;
    if (is_own) place(own, 1, s->cos, s->sin, x);
    else place(own, 1, y.rotates ? to.cos + turn : nullptr, to.sin + turn, x);
    float score = 0.f;
    UNROLL for (int c = 0; c < PARTS; c++) {
      UNROLL for (int e = 0; e < 4; e++) {
        packed[e] = pack(x[c][2 * e], x[c][2 * e + 1]);
        score = fmaf(low(query[c][e]), low(packed[e]), score);
        score = fmaf(high(query[c][e]), high(packed[e]), score);
      }
      if (g == 0 && !is_own) *(uint4*)&s->fresh[0][place_of][c * 32 + t * 8] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
      if (writes) *(uint4*)(y.keys + at + c * 32) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    }
    score += __shfl_xor_sync(~0u, score, 1);
    score += __shfl_xor_sync(~0u, score, 2);
    if (g < G && t == 0 && is_own) s->own_scores[g] = score;
  }
  // Who is the last of a column's splits puts them together, in their order. Only here are fences needed: how many splits
  // there are changes from step to step, so that words could not tell what is new.
  static DEVICE void merge(const Buffers& to, const Unit& unit, int index, u32 mark) {
    Shared* s = shared_state();
    consumers_meet();
    if (threadIdx.x == 0) {
      u32* ticket = to.tickets + unit.column * HEAD_GROUPS + unit.head / G;
      __threadfence();
      s->is_last = atomicAdd(ticket, 1u) == unit.splits - 1;
      if (s->is_last) *(volatile u32*)ticket = 0;
      __threadfence();
    }
    consumers_meet();
    if (!s->is_last) return;
    const float* partial = to.partial + (i64)(index - unit.split * HEAD_GROUPS) * G * (HEAD + 2);   // of the first split
    constexpr i64 STEP = (i64)HEAD_GROUPS * G * (HEAD + 2);
    each_pair([&](int h, int d) {
      float higher = -1e30f, sum = 0.f, o0 = 0.f, o1 = 0.f;
#pragma unroll 4
      for (int k = 0; k < unit.splits; k++) {
        const float2 v = __ldcg((const float2*)(partial + k * STEP + h * (HEAD + 2) + d)), m = __ldcg((const float2*)(partial + k * STEP + h * (HEAD + 2) + HEAD));
        const float now = fmaxf(higher, m.x), old = exp2f(higher - now), w = exp2f(m.x - now);
        higher = now;
        sum = sum * old + m.y * w; o0 = o0 * old + v.x * w; o1 = o1 * old + v.y * w;
      }
      Pairs<FORMAT>::store(to.mixed + Pairs<FORMAT>::index((unit.head + h) * HEAD + d, unit.column), o0 / sum, o1 / sum, mark);
    });
  }
};
