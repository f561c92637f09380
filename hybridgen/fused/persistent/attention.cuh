// Attention of the new token: a block takes GROUP query heads of one kv head and one split of the positions.
#pragma once
#include "projection.cuh"

#define PER_KV (HEADS / KV_HEADS)
#define LOG2E 1.4426950408889634f

DEVICE float dot8(const float* a, const float* b) {
  float s = a[0] * b[0];
  UNROLL for (int i = 1; i < 8; i++) s = fmaf(a[i], b[i], s);
  return s;
}

// How a layer's attention is cut into units of query heads and positions, a block each. The short way has a unit for
// each query head, so that few splits are to be merged; the long way reads the cache once for all query heads of a kv
// head, with tensor cores, and cuts it into more splits.
template <int GROUP_, int SPLITS_, int LEAST_> struct Cut {
  static constexpr int GROUP = GROUP_, SPLITS = SPLITS_, LEAST = LEAST_, UNITS = HEADS / GROUP_ * SPLITS_;
  static_assert(PER_KV % GROUP_ == 0 && UNITS <= BLOCKS, "every unit has a block");
};
typedef Cut<1, SHORT_SPLITS, SHORT_LEAST> Short;
typedef Cut<PER_KV, LONG_SPLITS, LONG_LEAST> Long;

struct Plan {   // of one layer at one position; the same in every block
  int first, begin, per, active;
  bool is_long;
  template <class C> DEVICE void cut(int position) {
    constexpr int ALIGN = Producer::POSITIONS;
    per = max(C::LEAST, (position - begin + C::SPLITS - 1) / C::SPLITS);
    per = (per + ALIGN - 1) / ALIGN * ALIGN;
    active = max(1, (position - begin + per - 1) / per);
  }
  DEVICE Plan(int position, int window) {
    first = window > 0 ? max(0, position + 1 - window) : 0;   // the first position seen
    begin = first / Producer::POSITIONS * Producer::POSITIONS;
    is_long = HAS_LONG && position - begin >= LONG_FROM;
    if (is_long) cut<Long>(position); else cut<Short>(position);
  }
  template <class C> DEVICE Span span_of(int position) const {
    const int unit = blockIdx.x, split = unit % C::SPLITS;
    if (unit >= C::UNITS) return Span{0, 0, 0};
    const int low = min(begin + split * per, position);
    return Span{unit / C::SPLITS * C::GROUP / PER_KV, low, min(low + per, position)};
  }
  DEVICE Span span(int position) const { return is_long ? span_of<Long>(position) : span_of<Short>(position); }
};

struct Step {   // where a step stands
  int position;
  const int* table;   // the row's pages
  const float *cos, *sin;
};

struct ShortAttention {
  static constexpr int LANES = HEAD / 8, GROUPS = 32 / LANES, HALF_HEAD = HEAD / 2;
  static constexpr int AT_ONCE = 4;   // positions
  float cos[8], sin[8], sign, q_scale[8], k_scale[8];
  int page;
  DEVICE void prefetch(const Step& t, const Layer& y) {
    const int d = (threadIdx.x % LANES) * 8;
    if (y.rotates) {
      load_floats(t.cos + (i64)t.position * HALF_HEAD + d % HALF_HEAD, cos);
      load_floats(t.sin + (i64)t.position * HALF_HEAD + d % HALF_HEAD, sin);
    } else UNROLL for (int e = 0; e < 8; e++) { cos[e] = 1.f; sin[e] = 0.f; }
    sign = d < HALF_HEAD ? -1.f : 1.f;   // the loads are not used before the wait
    if (HEAD_NORMS) { load_floats(y.q_norm + d, q_scale); load_floats(y.k_norm + d, k_scale); }
    page = __ldg(t.table + t.position / PAGE);
  }
  // norm over the head, then rotation of its halves against each other
  DEVICE void place(const Words& from, const float* scale, float* o) const {
    float x[8];
    from.values(x);
    if (HEAD_NORMS) {
      float squares = dot8(x, x);
      UNROLL for (int o = LANES / 2; o; o >>= 1) squares += __shfl_xor_sync(~0u, squares, o);
      const float factor = rsqrtf(squares / HEAD + HEAD_EPSILON);
      UNROLL for (int e = 0; e < 8; e++) x[e] *= factor * scale[e];
    }
    UNROLL for (int e = 0; e < 8; e++) o[e] = x[e] * cos[e] + __shfl_xor_sync(~0u, x[e], LANES / 2) * (sign * sin[e]);
  }
  static DEVICE float score(const float* q, const float* k) {
    float s = dot8(q, k);
    UNROLL for (int o = LANES / 2; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
    return s;
  }
  // The new token's key and value as the cache rounds them, eight dimensions a lane; written to the cache by one block.
  DEVICE void append(const Step& t, const Layer& y, const Words& k_new, const Words& v_new, int kv, bool writes, uint4& k, uint4& v) const {
    float f[8];
    place(k_new, k_scale, f);
    k = make_uint4(pack(f[0], f[1]), pack(f[2], f[3]), pack(f[4], f[5]), pack(f[6], f[7]));
    v_new.values(f);
    v = make_uint4(pack(f[0], f[1]), pack(f[2], f[3]), pack(f[4], f[5]), pack(f[6], f[7]));
    if (writes && (threadIdx.x & 31) < LANES) {
      const i64 at = (((i64)page * KV_HEADS + kv) * PAGE + t.position % PAGE) * HEAD + (threadIdx.x % LANES) * 8;
      *(uint4*)(y.keys + at) = k;
      *(uint4*)(y.values + at) = v;
    }
  }
  // Every warp takes every WARPS-th set of GROUPS positions; LANES lanes share one.
  DEVICE void run(const Step& t, const Layer& y, const Plan& plan, const u32* qkv, u32* mixed, u32* sums, u32 number, u32 mixed_number, u32& turn, Watch& watch) {
    Shared* s = shared_state();
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, sub = lane % LANES, group = lane / LANES, d = sub * 8;
    const int head = blockIdx.x / Short::SPLITS, split = blockIdx.x % Short::SPLITS, kv = head / PER_KV;
    const Span span = plan.template span_of<Short>(t.position);
    const bool has_new = split == 0 && warp == 0;
    float q[8], acc[8], top = -1e30f, sum = 0.f;
    Words asked, k_new, v_new;
    u32 stale;
    k_new.assume(number); v_new.assume(number);
    ASK(watch,
      asked.load(qkv + head * HEAD + d);
      if (has_new) { k_new.load(qkv + QUERIES + kv * HEAD + d); v_new.load(qkv + QUERIES + KEYS + kv * HEAD + d); }
      stale = asked.stale(number) | k_new.stale(number) | v_new.stale(number), stale)
    __syncwarp();
    place(asked, q_scale, q);
    UNROLL for (int e = 0; e < 8; e++) { q[e] *= LOG2E * ATTENTION_SCALE; acc[e] = 0.f; }
    if (has_new) {   // attended to from registers
      uint4 kk, vv;
      float k[8];
      append(t, y, k_new, v_new, kv, head % PER_KV == 0, kk, vv);
      unpack(kk, k);
      const float scored = score(q, k);
      if (group == 0) { top = scored; sum = 1.f; unpack(vv, acc); }
    }
    for (int t0 = span.low; t0 < span.high; t0 += Producer::POSITIONS) {
      const u32 slot = turn % STAGES;
      const int count = min(Producer::POSITIONS, span.high - t0), skip = plan.first - t0;
      const u32 keys = shared_address(stages) + slot * STAGE + d * 2, values = keys + STAGE / 2;
      barrier_wait(shared_address(&s->full[slot]), (turn / STAGES) & 1);
      turn++;
#pragma unroll 1
      for (int i0 = warp * GROUPS + group; i0 - group < count; i0 += AT_ONCE * WARPS * GROUPS) {
        float scores[AT_ONCE], higher = top;
        uint4 v[AT_ONCE];
        UNROLL for (int a = 0; a < AT_ONCE; a++) {
          const int i = i0 + a * WARPS * GROUPS;
          const bool inside = i < count && i >= skip;
          const int at = inside ? i : 0;
          float k[8];
          unpack(load_shared(keys + at * (HEAD * 2)), k);
          v[a] = inside ? load_shared(values + at * (HEAD * 2)) : make_uint4(0, 0, 0, 0);
          const float scored = score(q, k);
          scores[a] = inside ? scored : -1e30f;
          higher = fmaxf(higher, scores[a]);
        }
        const float shrink = exp2f(top - higher);
        top = higher; sum *= shrink;
        UNROLL for (int e = 0; e < 8; e++) acc[e] *= shrink;
        UNROLL for (int a = 0; a < AT_ONCE; a++) {
          const float weight = scores[a] > -1e29f ? exp2f(scores[a] - top) : 0.f;
          float f[8];
          unpack(v[a], f);
          sum += weight;
          UNROLL for (int e = 0; e < 8; e++) acc[e] = fmaf(weight, f[e], acc[e]);
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(shared_address(&s->empty[slot]));
    }
    UNROLL for (int o = LANES; o < 32; o <<= 1) {   // over the lanes' groups, then over the warps
      const float top_2 = __shfl_xor_sync(~0u, top, o), sum_2 = __shfl_xor_sync(~0u, sum, o);
      const float higher = fmaxf(top, top_2), c1 = exp2f(top - higher), c2 = exp2f(top_2 - higher);
      sum = sum * c1 + sum_2 * c2; top = higher;
      UNROLL for (int e = 0; e < 8; e++) acc[e] = acc[e] * c1 + c2 * __shfl_xor_sync(~0u, acc[e], o);
    }
    if (group == 0) {
      float* row = s->scratch + warp * HEAD + d;
      UNROLL for (int e = 0; e < 8; e += 4) *(float4*)(row + e) = make_float4(acc[e], acc[e + 1], acc[e + 2], acc[e + 3]);
      if (sub == 0) { s->softmax[warp][0][0] = top; s->softmax[warp][0][1] = sum; }
    }
    consumers_meet();
    if (tid < HEAD) merge_warps(0, s->scratch + tid, HEAD, mixed + split * QUERIES + head * HEAD + tid, sums + (split * HEADS + head) * 8, tid == 0, mixed_number);
  }
  // One dimension of a head over the warps' shares, into a word. Units without positions write too: a word that is
  // skipped once could pass for a new one later.
  static DEVICE void merge_warps(int row, const float* shares, int stride, u32* mixed, u32* sum_word, bool writes_sum, u32 number) {
    const Shared* s = shared_state();
    float higher = -1e30f, total = 0.f, o = 0.f;
    UNROLL for (int i = 0; i < WARPS; i++) higher = fmaxf(higher, s->softmax[i][row][0]);
    UNROLL for (int i = 0; i < WARPS; i++) {
      const float c = exp2f(s->softmax[i][row][0] - higher);
      total += c * s->softmax[i][row][1];
      o += c * shares[i * stride];
    }
    store_word(mixed, total > 0.f ? o / total : 0.f, number);
    if (writes_sum) store_word(sum_word, total > 0.f ? higher + log2f(total) : -1e30f, number);
  }
};

// The output of attention, merged from few splits while it is read into the registers of the next projection.
DEVICE void read_merged(const u32* mixed, const u32* sums, u32 number, int active, Watch& watch, float (&x)[Layout<QUERIES>::PER_WARP][8]) {
  using L = Layout<QUERIES>;
  constexpr int AT_ONCE = 4;
  UNROLL for (int j = 0; j < L::PER_WARP; j++) {
    UNROLL for (int e = 0; e < 8; e++) x[j][e] = 0.f;
    if (L::has(j)) {
      const int column = L::column(j), head = column / HEAD;
      float higher = -1e30f, total = 0.f;
#pragma unroll 1
      for (int b = 0; b < active; b += AT_ONCE) {
        u32 logs[AT_ONCE];
        Words v[AT_ONCE];
        u32 stale;
        ASK(watch,
          stale = 0;
          UNROLL for (int i = 0; i < AT_ONCE; i++) {
            const int k = min(b + i, active - 1);
            logs[i] = load_relaxed(sums + (k * HEADS + head) * 8);
            v[i].load(mixed + k * QUERIES + column);
          }
          UNROLL for (int i = 0; i < AT_ONCE; i++) stale |= ((logs[i] ^ number) & 255u) | v[i].stale(number), stale)
        float now = higher;
        UNROLL for (int i = 0; i < AT_ONCE; i++) now = fmaxf(now, value_of(logs[i]));
        const float shrink = exp2f(higher - now);
        higher = now; total *= shrink;
        UNROLL for (int e = 0; e < 8; e++) x[j][e] *= shrink;
        UNROLL for (int i = 0; i < AT_ONCE; i++) {
          float f[8];
          v[i].values(f);
          const float weight = b + i < active ? exp2f(value_of(logs[i]) - higher) : 0.f;
          total += weight;
          UNROLL for (int e = 0; e < 8; e++) x[j][e] = fmaf(weight, f[e], x[j][e]);
        }
      }
      const float inverse = 1.f / total;
      UNROLL for (int e = 0; e < 8; e++) x[j][e] *= inverse;
    }
  }
}

// This block's dimensions of all heads, put together from many splits for everybody; eight lanes share one.
DEVICE void merge_splits(const u32* mixed, const u32* sums, u32* merged, u32 number, int active, Watch& watch) {
  constexpr int LANES = 8, EACH = (LONG_SPLITS + LANES - 1) / LANES;
  const int first = first_row(QUERIES), count = row_count(QUERIES), sub = threadIdx.x % LANES;
  for (int r = threadIdx.x / LANES; r / (32 / LANES) * (32 / LANES) < count; r += THREADS / LANES) {   // whole warps
    const int at = first + min(r, count - 1);
    u32 logs[EACH], words[EACH], stale;
    ASK(watch,
      stale = 0;
      UNROLL for (int i = 0; i < EACH; i++) {
        const int k = min(sub + i * LANES, active - 1);
        logs[i] = load_relaxed(sums + (k * HEADS + at / HEAD) * 8);
        words[i] = load_relaxed(mixed + k * QUERIES + at);
      }
      UNROLL for (int i = 0; i < EACH; i++) stale |= ((logs[i] ^ number) | (words[i] ^ number)) & 255u, stale)
    __syncwarp();
    float higher = -1e30f, total = 0.f, sum = 0.f;
    UNROLL for (int i = 0; i < EACH; i++) higher = fmaxf(higher, value_of(logs[i]));
    UNROLL for (int o = LANES / 2; o; o >>= 1) higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, o));
    UNROLL for (int i = 0; i < EACH; i++) {
      const float weight = sub + i * LANES < active ? exp2f(value_of(logs[i]) - higher) : 0.f;
      total += weight;
      sum = fmaf(weight, value_of(words[i]), sum);
    }
    UNROLL for (int o = LANES / 2; o; o >>= 1) { total += __shfl_xor_sync(~0u, total, o); sum += __shfl_xor_sync(~0u, sum, o); }
    if (sub == 0 && r < count) store_word(merged + at, sum / total, number);
  }
}
