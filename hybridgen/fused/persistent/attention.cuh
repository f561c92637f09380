// Attention of the new token: a block takes GROUP query heads of one kv head and one split of the positions.
#pragma once
#include "projection.cuh"

#define QUERIES (HEADS * HEAD)
#define KEYS (KV_HEADS * HEAD)
#define PER_KV (HEADS / KV_HEADS)
#define LOG2E 1.4426950408889634f

DEVICE float dot8(const float* a, const float* b) {
  float s = a[0] * b[0];
  UNROLL for (int i = 1; i < 8; i++) s = fmaf(a[i], b[i], s);
  return s;
}

// How a layer's attention is cut. The short way has a block for each query head, so that merging few splits is cheap;
// the long way reads the cache once for all query heads of a kv head and cuts it into more splits.
template <int GROUP_, int SPLITS_> struct Cut {
  static constexpr int GROUP = GROUP_, SPLITS = SPLITS_, UNITS = HEADS / GROUP_ * SPLITS_;
  static_assert(PER_KV % GROUP_ == 0 && UNITS <= BLOCKS, "every unit has a block");
};
typedef Cut<1, SHORT_SPLITS> Short;
typedef Cut<PER_KV, LONG_SPLITS> Long;

struct Plan {   // of one layer at one position; the same in every block
  int first, begin, per, active;
  bool is_long;
  template <class C> DEVICE void cut(int position) {
    constexpr int ALIGN = Producer::POSITIONS;
    per = max(LEAST, (position - begin + C::SPLITS - 1) / C::SPLITS);
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

template <class C> struct Attention {
  static constexpr int LANES = HEAD / 8, GROUPS = 32 / LANES, HALF_HEAD = HEAD / 2, G = C::GROUP;
  static constexpr int AT_ONCE = G == 1 ? 4 : G <= 4 ? 2 : 1;   // positions, as registers allow
  float cos[8], sin[8], q_scale[8], k_scale[8];
  int page;
  DEVICE void prefetch(const Step& t, const Layer& y) {
    const int d = (threadIdx.x % LANES) * 8;
    if (y.rotates) {
      load_floats(t.cos + (i64)t.position * HALF_HEAD + d % HALF_HEAD, cos);
      load_floats(t.sin + (i64)t.position * HALF_HEAD + d % HALF_HEAD, sin);
    } else UNROLL for (int e = 0; e < 8; e++) { cos[e] = 1.f; sin[e] = 0.f; }
    if (d < HALF_HEAD) UNROLL for (int e = 0; e < 8; e++) sin[e] = -sin[e];
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
    UNROLL for (int e = 0; e < 8; e++) o[e] = x[e] * cos[e] + __shfl_xor_sync(~0u, x[e], LANES / 2) * sin[e];
  }
  static DEVICE float score(const float* q, const float* k) {
    float s = dot8(q, k);
    UNROLL for (int o = LANES / 2; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
    return s;
  }
  // Each warp has all query heads of the block and every WARPS-th set of GROUPS positions; LANES lanes share one.
  DEVICE void run(const Step& t, const Layer& y, const Plan& plan, const u32* qkv, u32* mixed, u32* sums, u32 number, u32 mixed_number, u32& turn, Watch& watch) {
    Shared* s = shared_state();
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, sub = lane % LANES, group = lane / LANES, d = sub * 8;
    const int head = blockIdx.x / C::SPLITS * G, split = blockIdx.x % C::SPLITS, kv = head / PER_KV;
    const Span span = plan.template span_of<C>(t.position);
    const bool has_new = split == 0 && warp == 0;
    float q[G][8], acc[G][8], top[G], sum[G];
    Words asked[G], k_new, v_new;
    u32 stale;
    k_new.assume(number); v_new.assume(number);
    ASK(watch,
      stale = 0;
      UNROLL for (int g = 0; g < G; g++) asked[g].load(qkv + (head + g) * HEAD + d);
      if (has_new) { k_new.load(qkv + QUERIES + kv * HEAD + d); v_new.load(qkv + QUERIES + KEYS + kv * HEAD + d); }
      UNROLL for (int g = 0; g < G; g++) stale |= asked[g].stale(number);
      stale |= k_new.stale(number) | v_new.stale(number), stale)
    __syncwarp();
    UNROLL for (int g = 0; g < G; g++) {
      place(asked[g], q_scale, q[g]);
      top[g] = -1e30f; sum[g] = 0.f;
      UNROLL for (int e = 0; e < 8; e++) { q[g][e] *= LOG2E * ATTENTION_SCALE; acc[g][e] = 0.f; }
    }
    if (has_new) {   // the new token's key and value: attended to from registers, as rounded, and into the cache
      float k[8], v[8];
      place(k_new, k_scale, k);
      v_new.values(v);
      const uint4 kk = make_uint4(pack(k[0], k[1]), pack(k[2], k[3]), pack(k[4], k[5]), pack(k[6], k[7]));
      const uint4 vv = make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
      unpack(kk, k); unpack(vv, v);
      UNROLL for (int g = 0; g < G; g++) {
        const float scored = score(q[g], k);
        if (group == 0) {
          top[g] = scored; sum[g] = 1.f;
          UNROLL for (int e = 0; e < 8; e++) acc[g][e] = v[e];
        }
      }
      if (group == 0 && head % PER_KV == 0) {
        const i64 at = (((i64)page * KV_HEADS + kv) * PAGE + t.position % PAGE) * HEAD + d;
        *(uint4*)(y.keys + at) = kk;
        *(uint4*)(y.values + at) = vv;
      }
    }
    for (int t0 = span.low; t0 < span.high; t0 += Producer::POSITIONS) {
      const u32 slot = turn % STAGES;
      const int count = min(Producer::POSITIONS, span.high - t0), skip = plan.first - t0;
      const u32 keys = shared_address(stages) + slot * STAGE + d * 2, values = keys + STAGE / 2;
      barrier_wait(shared_address(&s->full[slot]), (turn / STAGES) & 1);
      turn++;
#pragma unroll 1
      for (int i0 = warp * GROUPS + group; i0 - group < count; i0 += AT_ONCE * WARPS * GROUPS) {
        float scores[AT_ONCE][G];
        uint4 v[AT_ONCE];
        UNROLL for (int a = 0; a < AT_ONCE; a++) {
          const int i = i0 + a * WARPS * GROUPS;
          const bool inside = i < count && i >= skip;
          const int at = inside ? i : 0;
          float k[8];
          unpack(load_shared(keys + at * (HEAD * 2)), k);
          v[a] = inside ? load_shared(values + at * (HEAD * 2)) : make_uint4(0, 0, 0, 0);
          UNROLL for (int g = 0; g < G; g++) { const float scored = score(q[g], k); scores[a][g] = inside ? scored : -1e30f; }
        }
        UNROLL for (int g = 0; g < G; g++) {
          float higher = top[g];
          UNROLL for (int a = 0; a < AT_ONCE; a++) higher = fmaxf(higher, scores[a][g]);
          const float shrink = exp2f(top[g] - higher);
          top[g] = higher; sum[g] *= shrink;
          UNROLL for (int e = 0; e < 8; e++) acc[g][e] *= shrink;
        }
        UNROLL for (int a = 0; a < AT_ONCE; a++) {
          float f[8];
          unpack(v[a], f);
          UNROLL for (int g = 0; g < G; g++) {
            const float weight = scores[a][g] > -1e29f ? exp2f(scores[a][g] - top[g]) : 0.f;
            sum[g] += weight;
            UNROLL for (int e = 0; e < 8; e++) acc[g][e] = fmaf(weight, f[e], acc[g][e]);
          }
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(shared_address(&s->empty[slot]));
    }
    UNROLL for (int g = 0; g < G; g++) {   // over the lanes' groups, then over the warps
      UNROLL for (int o = LANES; o < 32; o <<= 1) {
        const float top_2 = __shfl_xor_sync(~0u, top[g], o), sum_2 = __shfl_xor_sync(~0u, sum[g], o);
        const float higher = fmaxf(top[g], top_2), c1 = exp2f(top[g] - higher), c2 = exp2f(top_2 - higher);
        sum[g] = sum[g] * c1 + sum_2 * c2; top[g] = higher;
        UNROLL for (int e = 0; e < 8; e++) acc[g][e] = acc[g][e] * c1 + c2 * __shfl_xor_sync(~0u, acc[g][e], o);
      }
      if (g) consumers_meet();   // the heads take turns in shared memory
      if (group == 0) {
        UNROLL for (int e = 0; e < 8; e += 4) *(float4*)&s->mixed[warp][d + e] = make_float4(acc[g][e], acc[g][e + 1], acc[g][e + 2], acc[g][e + 3]);
        if (sub == 0) { s->softmax[warp][0] = top[g]; s->softmax[warp][1] = sum[g]; }
      }
      consumers_meet();
      if (tid < HEAD) {
        float higher = -1e30f, total = 0.f, o = 0.f;
        UNROLL for (int i = 0; i < WARPS; i++) higher = fmaxf(higher, s->softmax[i][0]);
        UNROLL for (int i = 0; i < WARPS; i++) {
          const float c = exp2f(s->softmax[i][0] - higher);
          total += c * s->softmax[i][1];
          o += c * s->mixed[i][tid];
        }
        // Units without positions write too: a word that is skipped once could pass for a new one later.
        store_word(mixed + split * QUERIES + (head + g) * HEAD + tid, total > 0.f ? o / total : 0.f, mixed_number);
        if (tid == 0) store_word(sums + (split * HEADS + head + g) * 8, total > 0.f ? higher + log2f(total) : -1e30f, mixed_number);
      }
    }
  }
};

// The output of attention, merged from its splits while it is read into the registers of the next projection.
template <int AT_ONCE>
DEVICE void read_merged(const u32* mixed, const u32* sums, u32 number, int active, Watch& watch, float (&x)[Layout<QUERIES>::PER_WARP][8]) {
  using L = Layout<QUERIES>;
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
