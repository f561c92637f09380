// Attention of the new tokens: a block takes UNIT_HEADS query heads of one kv head for one column, and one split of the
// positions; a warp takes 32 positions at a time.
//
// Scores are K Q^T as m16n8k16 products: positions are rows, the query heads are columns (those that a unit does not have
// are zero). A lane reads 16 bytes of a key, which are eight of the dimensions of two products. The values come transposed
// (ldmatrix.trans) and are the left operand of V^T P: dimensions are rows, query heads are columns again, so that each
// lane's softmax is of its own two heads. Keys and values lie swizzled in a stage (tiles.cuh), and the eight rows of a product
// take positions in an order in which neither way of reading meets a bank twice. Keys and values of this step come from
// words: the column's own is added behind all others; those of its request before it lie in shared memory as the cache would
// have them, and take the same way as cached ones, so that a token's bits do not depend on which steps fed the ones before it.
//
// With KV8 the cache has e4m3, which becomes fp16 in registers, and queries and weights are fp16 too. A transposed value is then
// a pair of dimensions, so that even and odd ones are multiplied apart.
#pragma once
#include "products.cuh"

#define LOG2E 1.4426950408889634f

struct Attention {
  static constexpr int PARTS = HEAD / 32, HALF_HEAD = HEAD / 2, G = UNIT_HEADS;
  static constexpr bool AS_HALF = HALF || KV8;   // what scores and weighed values are products of
  static_assert((HEAD == 64 || HEAD == 128) && G <= 8 && PER_KV % G == 0, "shape of a unit");

  // Before waiting: the rotary factors of the column, the gains of the norms of queries and keys, the page of its token.
  static DEVICE void prefetch(const Layer& y, const float* cos, const float* sin, int column) {
    Shared* s = shared_state();
    const int tid = thread_index() - THREADS / 2, position = s->position[column];   // not of the warp that asks for arrivals
    if (tid < 0) return;
    if (tid == THREADS / 2 - 1) s->page = __ldg(s->table[column] + position / PAGE);
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
      UNROLL for (int c = 0; c < PARTS; c++) UNROLL for (int h = 0; h < 2; h++) {
        const float4 f = *(const float4*)&s->gains[gain][c * 32 + t * 8 + 4 * h];
        UNROLL for (int e = 0; e < 4; e++) o[c][4 * h + e] *= factor * (&f.x)[e];
      }
    }
    UNROLL for (int c = 0; c < PARTS / 2; c++) UNROLL for (int h = 0; h < 2; h++) {
      float4 cs = make_float4(1.f, 1.f, 1.f, 1.f), sn = make_float4(0.f, 0.f, 0.f, 0.f);
      if (cos) { cs = *(const float4*)&cos[c * 32 + t * 8 + 4 * h]; sn = *(const float4*)&sin[c * 32 + t * 8 + 4 * h]; }
      UNROLL for (int e = 0; e < 4; e++) {
        const float a = o[c][4 * h + e], b = o[c + PARTS / 2][4 * h + e];
        o[c][4 * h + e] = a * (&cs.x)[e] - b * (&sn.x)[e];
        o[c + PARTS / 2][4 * h + e] = b * (&cs.x)[e] + a * (&sn.x)[e];
      }
    }
  }
  // Where a unit's result goes: a word for each pair of dimensions of each head, or, of a split, floats and its softmax.
  template <class Emit> static DEVICE void each_pair(Emit emit) {
    for (int e = thread_index() * 2; e < G * HEAD; e += THREADS * 2) emit(e / HEAD, e % HEAD);
  }
  static DEVICE void nothing(const Layer& y, u32* mixed, const Unit& unit, u32 number) {
    each_pair([&](int h, int d) { LayerPairs::store(mixed + Out::reader(y).index((unit.head + h) * HEAD + d, unit.column), 0.f, 0.f, LayerPairs::mark(number)); });
  }

  struct Buffers {
    const u32* qkv;       // words [COLUMNS][QUERIES + 2 KEYS]
    u32* mixed;           // pair words, the next projection's input
    float* partial;       // [units][UNIT_HEADS][HEAD + 2]
    u32* tickets;         // [COLUMNS][HEAD_GROUPS]: splits that are done
    const float *cos, *sin;
  };
  static DEVICE void run(const Layer& y, const Buffers& to, const Unit& unit, Ring& ring, Arrivals& arrivals, u32 number, Watch& watch) {
    Shared* s = shared_state();
    const int tid = thread_index(), lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3, kv = unit.head / PER_KV;
    const int column = unit.column;
    const int cached = s->cached[column];
    const u32 low8 = number & 255u, others = others_of(unit), takes = others | (unit.split == 0 ? 1u << column : 0u);
    const int fresh = __popc(takes);
    float out[HEAD / 16][4], top[2] = {-1e30f, -1e30f}, total[2] = {0.f, 0.f};   // of heads 2 t and 2 t + 1
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
      MARK(16)
      place(x, 0, s->cos, s->sin, placed);
      const float by = g < G ? LOG2E * ATTENTION_SCALE : 0.f;
      UNROLL for (int c = 0; c < PARTS; c++) UNROLL for (int e = 0; e < 4; e++) query[c][e] = query_of(placed[c][2 * e] * by, placed[c][2 * e + 1] * by);
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
    MARK(17)
    UNROLL for (int d = 0; d < HEAD / 16; d++) UNROLL for (int e = 0; e < 4; e++) out[d][e] = 0.f;
    int nth = 0;
    for (int t0 = unit.low; t0 < unit.high; t0 += Cut::POSITIONS) {
      const int n = min(Cut::POSITIONS, unit.high - t0), skip = max(0, unit.first - t0);
      const int here = cached - t0;   // of the stage's positions those that are in the cache
      const u32 keys = ring.wait(), values = keys + Cut::POSITIONS * Cut::EACH;
      // 32 positions from the i-th on, two tiles of 16. `all`: they are all cached and seen.
      auto attend = [&](auto all, int i) {
        constexpr bool ALL = decltype(all)::value;
        float score[2][4];
        UNROLL for (int j = 0; j < 2; j++) {
          const Row first = row<ALL>(keys, 0, i + 16 * j, order(g), here, n), second = row<ALL>(keys, 0, i + 16 * j, 8 + order(g), here, n);
          float c[2][4] = {};
          UNROLL for (int d = 0; d < PARTS; d++) if (KV8) {
            const uint2 a = load_codes(first.chunk(2 * d + (t >> 1)) + (t & 1) * 8), b = load_codes(second.chunk(2 * d + (t >> 1)) + (t & 1) * 8);
            multiply<true>(c[0], fp8_low(a.x), fp8_low(b.x), fp8_high(a.x), fp8_high(b.x), query[d][0], query[d][1]);
            multiply<true>(c[1], fp8_low(a.y), fp8_low(b.y), fp8_high(a.y), fp8_high(b.y), query[d][2], query[d][3]);
          } else {
            const uint4 a = load_shared(first.chunk(4 * d + t)), b = load_shared(second.chunk(4 * d + t));
            multiply<AS_HALF>(c[0], a.x, b.x, a.y, b.y, query[d][0], query[d][1]);
            multiply<AS_HALF>(c[1], a.z, b.z, a.w, b.w, query[d][2], query[d][3]);
          }
          UNROLL for (int e = 0; e < 4; e++) {
            const int at = i + 16 * j + order(g) + 4 * (e & 2);
            score[j][e] = ALL || (at < n && at >= skip) ? c[0][e] + c[1][e] : -1e30f;
          }
        }
        float shrink[2];
        UNROLL for (int e = 0; e < 2; e++) {
          float higher = fmaxf(fmaxf(score[0][e], score[0][2 + e]), fmaxf(score[1][e], score[1][2 + e]));
          UNROLL for (int o = 4; o < 32; o *= 2) higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, o));
          higher = fmaxf(higher, top[e]);
          shrink[e] = power(top[e] - higher);
          top[e] = higher;
          total[e] *= shrink[e];
        }
        u32 p[2][2];
        UNROLL for (int j = 0; j < 2; j++) UNROLL for (int h = 0; h < 2; h++) {
          const u32 w = pair_of(power(score[j][2 * h] - top[0]), power(score[j][2 * h + 1] - top[1]));
          total[0] += first_of(w); total[1] += second_of(w);
          p[j][h] = transposed(w);
        }
        const int mine = order(lane & 7) + 8 * (lane >> 4);
        const Row from[2] = {row<ALL>(values, 1, i, mine, here, n), row<ALL>(values, 1, i + 16, mine, here, n)};
        if (KV8) UNROLL for (int d = 0; d < HEAD / 32; d++) {
          UNROLL for (int o = 2 * d; o < 2 * d + 2; o++) UNROLL for (int e = 0; e < 4; e++) out[o][e] *= shrink[e & 1];
          UNROLL for (int j = 0; j < 2; j++) {
            u32 v[4], odd[4];
            load_transposed(v, from[j].chunk(2 * d + ((lane >> 3) & 1)));
            UNROLL for (int i = 0; i < 4; i++) {   // of two positions, two dimensions each: both first ones, both second ones
              const u32 q = __byte_perm(v[i], 0, 0x3120);
              v[i] = fp8_low(q); odd[i] = fp8_high(q);
            }
            multiply<true>(out[2 * d], v[0], v[1], v[2], v[3], p[j][0], p[j][1]);
            multiply<true>(out[2 * d + 1], odd[0], odd[1], odd[2], odd[3], p[j][0], p[j][1]);
          }
        } else UNROLL for (int d = 0; d < HEAD / 16; d++) {
          UNROLL for (int e = 0; e < 4; e++) out[d][e] *= shrink[e & 1];
          UNROLL for (int j = 0; j < 2; j++) {
            u32 v[4];
            load_transposed(v, from[j].chunk(2 * d + ((lane >> 3) & 1)));
            multiply<AS_HALF>(out[d], v[0], v[1], v[2], v[3], p[j][0], p[j][1]);
          }
        }
      };
#pragma unroll 1
      for (int i = skip & ~31; i < n; i += 32, nth++) if (nth % WARPS == warp) {
        if (i >= skip && i + 32 <= min(n, here)) attend(Is<true>(), i);
        else attend(Is<false>(), i);
      }
      ring.done();
    }
    MARK(18)
    UNROLL for (int e = 0; e < 2; e++) UNROLL for (int o = 4; o < 32; o *= 2) total[e] += __shfl_xor_sync(~0u, total[e], o);
    float* shared_out = &s->part[0][0][0][0][0];   // [WARPS][G][HEAD]; nobody else uses it between two meetings
    UNROLL for (int e = 0; e < 2; e++) {
      const int head = 2 * t + e;
      if (head >= G) continue;
      UNROLL for (int d = 0; d < HEAD / 8; d++) shared_out[(warp * G + head) * HEAD + apart(head, dimension_of(d, g))] = out[d / 2][2 * (d & 1) + e];
      if (g == 0) { s->softmax[warp][head][0] = top[e]; s->softmax[warp][head][1] = total[e]; }
    }
    consumers_meet();
    if (EARLY && unit.splits == 1 && tid == 0) arrivals.arrive();
    const u32 mark = LayerPairs::mark(number);
    const int index = unit.splits > 1 ? Cut::index(unit, (int)y.window) : 0;
    float* partial = to.partial + (i64)index * G * (HEAD + 2);
    each_pair([&](int h, int d) {
      float2 of[WARPS], part[WARPS];   // of each warp: the highest score and the sum of weights; what they weigh
      UNROLL for (int i = 0; i < WARPS; i++) {
        of[i] = *(const float2*)s->softmax[i][h];
        part[i] = *(const float2*)&shared_out[(i * G + h) * HEAD + apart(h, d)];
      }
      float higher = unit.split == 0 ? s->own_scores[h] : -1e30f, sum = 0.f, o0 = 0.f, o1 = 0.f;
      const float own = higher;
      UNROLL for (int i = 0; i < WARPS; i++) higher = fmaxf(higher, of[i].x);
      if (unit.split == 0) {
        sum = power(own - higher);
        o0 = sum * s->own_value[d]; o1 = sum * s->own_value[d + 1];
      }
      UNROLL for (int i = 0; i < WARPS; i++) {
        const float w = power(of[i].x - higher);
        sum += w * of[i].y; o0 = fmaf(w, part[i].x, o0); o1 = fmaf(w, part[i].y, o1);
      }
      if (unit.splits > 1) {
        *(float2*)(partial + h * (HEAD + 2) + d) = make_float2(o0, o1);
        if (d == 0) *(float2*)(partial + h * (HEAD + 2) + HEAD) = make_float2(higher, sum);
      } else LayerPairs::store(to.mixed + Out::reader(y).index((unit.head + h) * HEAD + d, column), o0 / sum, o1 / sum, mark);
    });
    if (unit.splits > 1) merge(y, to, unit, index, mark);
    if (!EARLY || unit.splits > 1) { consumers_meet(); if (tid == 0) arrivals.arrive(); }
  }

 private:
  // Which of eight positions is the i-th row of a product: lanes that read at the same time have 0 and 4, 1 and 5 and so on.
  static DEVICE int order(int i) {
    if (!KV8) return (i >> 1) | ((i & 1) << 2);
    return HEAD == 128 ? ((i & 3) << 1) | (i >> 2) : (i & 1) | ((i & 2) << 1) | ((i & 4) >> 1);   // other reads meet, of 8 bytes
  }
  // The dimension of row g of the d-th eight rows of the weighed values.
  static DEVICE int dimension_of(int d, int g) { return KV8 ? 32 * (d / 4) + 16 * (d & 1) + 2 * g + (d / 2 & 1) : 8 * d + g; }
  // Where dimension d of a head lies among those that warps put together, so that lanes of several heads meet no bank twice.
  static DEVICE int apart(int head, int d) { return d ^ ((head >> 1 & 3) << 3); }
  static DEVICE float power(float x) { float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x)); return r; }   // of 2
  static DEVICE u32 pair_of(float a, float b) { return AS_HALF ? pack_half(a, b) : pack_bf16(a, b); }
  static DEVICE u32 query_of(float a, float b) { return KV8 ? pack_half(a, b) : pack(a, b); }
  static DEVICE float first_of(u32 w) { return KV8 ? of_half(w) : low(w); }
  static DEVICE float second_of(u32 w) { return KV8 ? of_half(w >> 16) : high(w); }
  static DEVICE uint2 load_codes(u32 a) { uint2 v; asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(a)); return v; }
  // Eight dimensions as the cache keeps them.
  struct Kept {
    u32 w[KV8 ? 2 : 4];
    DEVICE explicit Kept(const float (&x)[8]) {
      if (KV8) UNROLL for (int i = 0; i < 2; i++) {
        u32 low, high;
        asm("{ .reg .b16 r; cvt.rn.satfinite.e4m3x2.f32 r, %2, %1; cvt.u32.u16 %0, r; }" : "=r"(low) : "f"(x[4 * i]), "f"(x[4 * i + 1]));
        asm("{ .reg .b16 r; cvt.rn.satfinite.e4m3x2.f32 r, %2, %1; cvt.u32.u16 %0, r; }" : "=r"(high) : "f"(x[4 * i + 2]), "f"(x[4 * i + 3]));
        w[i] = low | high << 16;
      } else UNROLL for (int i = 0; i < 4; i++) w[i % (KV8 ? 2 : 4)] = pack(x[2 * i], x[2 * i + 1]);
    }
    DEVICE u32 pair(int e) const {   // two of them, as they are multiplied
      return KV8 ? (e & 1 ? fp8_high(w[e / 2 % 2]) : fp8_low(w[e / 2 % 2])) : w[e % (KV8 ? 2 : 4)];
    }
    DEVICE void put(u8* to) const {
      if (KV8) *(uint2*)to = make_uint2(w[0], w[1]);
      else *(uint4*)to = make_uint4(w[0], w[1], w[KV8 ? 0 : 2], w[KV8 ? 0 : 3]);
    }
  };
  template <bool B> struct Is { static constexpr bool value = B; };
  static DEVICE u32 transposed(u32 w) { u32 r; asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(w)); return r; }
  static DEVICE void load_transposed(u32 (&r)[4], u32 a) { asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory"); }
  // A key or a value in shared memory: 128 bytes for 64 dimensions, the other 64 in another block, chunks of 16 bytes swizzled.
  // With KV8 a row of 128 bytes has one of them, or two of 64 dimensions.
  struct Row {
    u32 at, key, half;
    DEVICE u32 chunk(int c) const { return KV8 ? at + ((half + (c << 4)) ^ key) : at + (c >> 3) * half + (((c & 7) << 4) ^ key); }
  };
  static DEVICE Row row_at(u32 base, int i, u32 block) {   // the i-th of a block of so many bytes
    constexpr int IN_ROW = KV8 ? 128 / HEAD : 1;
    return {base + i / IN_ROW * 128, (u32)(i / IN_ROW & 7) << 4, KV8 ? (u32)(i % IN_ROW * HEAD) : block};
  }
  // Of the position `from` (a multiple of 16) + `offset` of a stage: cached, made by this step, or, behind all of them, zeros:
  // weights of zero meet numbers. `ALL`: it is cached.
  template <bool ALL> static DEVICE Row row(u32 stage, int which, int from, int offset, int here, int n) {
    Row cached = {stage + (from + offset) * 128, (u32)(offset & 7) << 4, (u32)Cut::POSITIONS * 128};
    if (KV8) cached = row_at(stage, from + offset, 0);
    const int at = from + offset, i = at - here;
    if (ALL || at < min(here, n)) return cached;
    if (at < n) return row_at(shared_address(shared_state()->fresh[which]), i, COLUMNS * 128);
    return {shared_address(shared_state()->zeros), 0, 0};
  }
  // Where dimensions 8 c to 8 c + 7 of the i-th token of this step lie.
  static DEVICE u8* fresh_place(int which, int i, int c) {
    if (!KV8) return (u8*)&shared_state()->fresh[which][c >> 3][i][((c & 7) ^ (i & 7)) * 8];
    const Row r = row_at(0, i, 0);
    return (u8*)shared_state()->fresh[which] + r.chunk(c >> 1) + (c & 1) * 8;
  }
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
    const i64 at = ((((i64)s->page * KV_HEADS + kv) * PAGE + position % PAGE) * HEAD + t * 8) * (KV8 ? 1 : 2);   // bytes
    constexpr int PART = KV8 ? 32 : 64;
    float x[PARTS][8];
    if (takes_value) {
      UNROLL for (int c = 0; c < PARTS; c++) {
        own[c].values(x[c]);
        const Kept kept(x[c]);
        if (g == 0 && is_own) UNROLL for (int e = 0; e < 4; e++) *(float2*)&s->own_value[c * 32 + t * 8 + 2 * e] = make_float2(first_of(kept.pair(e)), second_of(kept.pair(e)));
        if (g == 0 && !is_own) kept.put(fresh_place(1, place_of, 4 * c + t));
        if (writes) kept.put((u8*)y.values + at + c * PART);
      }
      return;
    }
    const i64 turn = (i64)position * HALF_HEAD;
    if (is_own) place(own, 1, s->cos, s->sin, x);
    else place(own, 1, y.rotates ? to.cos + turn : nullptr, to.sin + turn, x);
    float score = 0.f;
    UNROLL for (int c = 0; c < PARTS; c++) {
      const Kept kept(x[c]);
      UNROLL for (int e = 0; e < 4; e++) {
        score = fmaf(first_of(query[c][e]), first_of(kept.pair(e)), score);
        score = fmaf(second_of(query[c][e]), second_of(kept.pair(e)), score);
      }
      if (g == 0 && !is_own) kept.put(fresh_place(0, place_of, 4 * c + t));
      if (writes) kept.put((u8*)y.keys + at + c * PART);
    }
    score += __shfl_xor_sync(~0u, score, 1);
    score += __shfl_xor_sync(~0u, score, 2);
    if (g < G && t == 0 && is_own) s->own_scores[g] = score;
  }
  // Who is the last of a column's splits puts them together, in their order. Only here are fences needed: how many splits
  // there are changes from step to step, so that words could not tell what is new.
  static DEVICE void merge(const Layer& y, const Buffers& to, const Unit& unit, int index, u32 mark) {
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
      LayerPairs::store(to.mixed + Out::reader(y).index((unit.head + h) * HEAD + d, unit.column), o0 / sum, o1 / sum, mark);
    });
  }
};
