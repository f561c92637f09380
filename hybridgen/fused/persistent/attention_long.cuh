// The long way of attention: all query heads of a kv head against one split of the positions, with tensor cores.
//
// A warp takes tiles of 16 positions. Scores are Q K^T as m16n8k16 products whose 16 rows are the query heads (eight of
// them at most, the others are zero) and whose columns are positions; their accumulators are, as they lie, the left
// operand of P V. What the instruction calls dimension k or n is ours to choose as long as both operands agree, so keys
// and values come from shared memory in 16-byte loads, without ldmatrix: lane 4n + q has the q-th quarter of the
// dimensions of position n as keys, and eight neighbouring dimensions of four positions as values.
#pragma once
#include "attention.cuh"

DEVICE void multiply(float* c, u32 a0, u32 a2, u32 b0, u32 b1) {   // rows 8 to 15 are zero
  asm volatile(
#if HALF
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, {%7,%8}, {%0,%1,%2,%3};"
#else
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, {%7,%8}, {%0,%1,%2,%3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(0), "r"(a2), "r"(b0), "r"(b1));
}

#if HAS_LONG
struct LongAttention {
  static constexpr int TILE = 16, OWN = HEAD / 4, CHUNKS = HEAD / 64, HALF_HEAD = HEAD / 2;   // OWN: dimensions of q a lane has
  static constexpr int TILES = Producer::POSITIONS / TILE;                                    // of a stage
  static constexpr int AT_ONCE = 256 / HEAD;                                                  // heads that merge at once
  static_assert(PER_KV <= 8 && (HEAD == 64 || HEAD == 128) && Producer::POSITIONS % TILE == 0, "shape of the long way");
  ShortAttention placing;   // for the new token's key and value
  // Where the i-th 16 bytes of this lane's keys lie in a row: permuted, so that the lanes of a load meet other banks.
  static DEVICE int key_chunk(int i) {
    const int q = threadIdx.x & 3;
    return HEAD == 128 ? q * 4 + (i ^ (q >> 1)) : q * 2 + i;
  }
  float cos[OWN], sin[OWN];
  DEVICE void prefetch(const Step& t, const Layer& y) {
    placing.prefetch(t, y);
    UNROLL for (int i = 0; i < OWN / 8; i++) {
      const int d = key_chunk(i) * 8;
      if (y.rotates) {
        load_floats(t.cos + (i64)t.position * HALF_HEAD + d % HALF_HEAD, cos + 8 * i);
        load_floats(t.sin + (i64)t.position * HALF_HEAD + d % HALF_HEAD, sin + 8 * i);
      } else UNROLL for (int e = 0; e < 8; e++) { cos[8 * i + e] = 1.f; sin[8 * i + e] = 0.f; }
      if (d < HALF_HEAD) UNROLL for (int e = 0; e < 8; e++) sin[8 * i + e] = -sin[8 * i + e];
    }
  }
  // Queries as the left operand: two registers for each 16 dimensions, in the order of key_chunk.
  DEVICE void place_queries(const Layer& y, const Words (&w)[OWN / 8], u32 (&a)[HEAD / 16][2]) const {
    const int row = (threadIdx.x & 31) >> 2;
    float x[OWN];
    float squares = 0.f;
    UNROLL for (int i = 0; i < OWN / 8; i++) {
      w[i].values(x + 8 * i);
      if (HEAD_NORMS) squares += dot8(x + 8 * i, x + 8 * i);
    }
    float factor = 1.f;
    if (HEAD_NORMS) {   // a head's four lanes
      squares += __shfl_xor_sync(~0u, squares, 1);
      squares += __shfl_xor_sync(~0u, squares, 2);
      factor = rsqrtf(squares / HEAD + HEAD_EPSILON);
    }
    if (HEAD_NORMS)
      UNROLL for (int i = 0; i < OWN / 8; i++) {
        float scale[8];
        load_floats(y.q_norm + key_chunk(i) * 8, scale);
        UNROLL for (int e = 0; e < 8; e++) x[8 * i + e] *= factor * scale[e];
      }
    UNROLL for (int i = 0; i < OWN / 8; i++) {
      float turned[8];
      UNROLL for (int e = 0; e < 8; e++) {
        // the other half of the head is two lanes away; there it is the chunk with the other permutation
        const float other = __shfl_xor_sync(~0u, x[8 * (HEAD == 128 ? i ^ 1 : i) + e], 2);
        turned[e] = x[8 * i + e] * cos[8 * i + e] + other * sin[8 * i + e];
      }
      UNROLL for (int e = 0; e < 8; e += 4) {
        const float f = LOG2E * ATTENTION_SCALE;
        a[2 * i + e / 4][0] = row < PER_KV ? pack(turned[e] * f, turned[e + 1] * f) : 0;
        a[2 * i + e / 4][1] = row < PER_KV ? pack(turned[e + 2] * f, turned[e + 3] * f) : 0;
      }
    }
  }

  struct Sums {   // of this lane's head, over the tiles of its warp
    float top, sum, acc[CHUNKS][8][4];
  };
  // Attend to 16 positions whose keys and values begin at these addresses; those outside [low, high) count for nothing.
  static DEVICE void tile(const u32 (&a)[HEAD / 16][2], u32 keys, u32 values, int low, int high, Sums& o) {
    const int lane = threadIdx.x & 31, n = lane >> 2, q = lane & 3;
    float c[2][4];
    UNROLL for (int h = 0; h < 2; h++) {
      UNROLL for (int e = 0; e < 4; e++) c[h][e] = 0.f;
      UNROLL for (int i = 0; i < OWN / 8; i++) {
        const uint4 k = load_shared(keys + (8 * h + n) * (HEAD * 2) + key_chunk(i) * 16);
        multiply(c[h], a[2 * i][0], a[2 * i][1], k.x, k.y);
        multiply(c[h], a[2 * i + 1][0], a[2 * i + 1][1], k.z, k.w);
      }
    }
    float higher = o.top;
    UNROLL for (int h = 0; h < 2; h++)
      UNROLL for (int e = 0; e < 2; e++) {
        const int i = 8 * h + 2 * q + e;
        if (i < low || i >= high) c[h][e] = -1e30f;
        higher = fmaxf(higher, c[h][e]);
      }
    higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 1));
    higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 2));
    const float shrink = exp2f(o.top - higher);
    o.top = higher; o.sum *= shrink;
    u32 p[2];
    UNROLL for (int h = 0; h < 2; h++) {
      float w[2];
      UNROLL for (int e = 0; e < 2; e++) w[e] = c[h][e] > -1e29f ? exp2f(c[h][e] - higher) : 0.f;
      p[h] = pack(w[0], w[1]);
      o.sum += low_high_sum(p[h]);   // of the weights as rounded
    }
    UNROLL for (int j = 0; j < CHUNKS; j++) {
      UNROLL for (int i = 0; i < 8; i++) { o.acc[j][i][0] *= shrink; o.acc[j][i][1] *= shrink; }
      uint4 v[4];
      UNROLL for (int r = 0; r < 4; r++) {
        const int i = 2 * q + (r & 1) + (r >> 1) * 8;
        v[r] = i >= low && i < high ? load_shared(values + i * (HEAD * 2) + j * 128 + n * 16) : make_uint4(0, 0, 0, 0);
      }
      const u32* rows[4] = {&v[0].x, &v[1].x, &v[2].x, &v[3].x};
      UNROLL for (int i = 0; i < 8; i++) {
        const u32 select = i & 1 ? 0x7632 : 0x5410;
        multiply(o.acc[j][i], p[0], p[1], __byte_perm(rows[0][i / 2], rows[1][i / 2], select), __byte_perm(rows[2][i / 2], rows[3][i / 2], select));
      }
    }
  }
  static DEVICE float low_high_sum(u32 w) { return low(w) + high(w); }

  DEVICE void run(const Step& t, const Layer& y, const Plan& plan, const u32* qkv, u32* mixed, u32* sums, u32 number, u32 mixed_number, u32& turn, Watch& watch) {
    Shared* s = shared_state();
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int kv = blockIdx.x / Long::SPLITS, split = blockIdx.x % Long::SPLITS, head = kv * PER_KV;
    const Span span = plan.template span_of<Long>(t.position);
    const bool has_new = split == 0 && warp == 0;
    const int d = (lane % ShortAttention::LANES) * 8;
    Words asked[OWN / 8], k_new, v_new;
    u32 stale;
    UNROLL for (int i = 0; i < OWN / 8; i++) asked[i].assume(number);
    k_new.assume(number); v_new.assume(number);
    ASK(watch,
      stale = 0;
      UNROLL for (int i = 0; i < OWN / 8; i++) if (lane >> 2 < PER_KV) asked[i].load(qkv + (head + (lane >> 2)) * HEAD + key_chunk(i) * 8);
      if (has_new) { k_new.load(qkv + QUERIES + kv * HEAD + d); v_new.load(qkv + QUERIES + KEYS + kv * HEAD + d); }
      UNROLL for (int i = 0; i < OWN / 8; i++) stale |= asked[i].stale(number);
      stale |= k_new.stale(number) | v_new.stale(number), stale)
    __syncwarp();
    u32 a[HEAD / 16][2];
    place_queries(y, asked, a);
    Sums o;
    o.top = -1e30f; o.sum = 0.f;
    UNROLL for (int j = 0; j < CHUNKS; j++) UNROLL for (int i = 0; i < 8; i++) UNROLL for (int e = 0; e < 4; e++) o.acc[j][i][e] = 0.f;
    if (has_new) {   // a tile with one position
      uint4 k, v;
      placing.append(t, y, k_new, v_new, kv, true, k, v);
      u16* row = (u16*)s->scratch;
      if (lane < ShortAttention::LANES) { *(uint4*)(row + d) = k; *(uint4*)(row + 8 * HEAD + d) = v; }
      __syncwarp();
      // Other keys of the tile are whatever lies there; they count for nothing.
      tile(a, shared_address(row), shared_address(row + 8 * HEAD), 0, 1, o);
    }
    int number_of_tile = 0;
    for (int t0 = span.low; t0 < span.high; t0 += Producer::POSITIONS) {
      const u32 slot = turn % STAGES;
      const int count = min(Producer::POSITIONS, span.high - t0), skip = plan.first - t0;
      const u32 keys = shared_address(stages) + slot * STAGE, values = keys + STAGE / 2;
      // Warps without a tile wait too: who arrives early twice would open the stage too soon.
      barrier_wait(shared_address(&s->full[slot]), (turn / STAGES) & 1);
      turn++;
#pragma unroll 1
      for (int i = 0; i < TILES; i++, number_of_tile++)
        if (number_of_tile % WARPS == warp && i * TILE < count)
          tile(a, keys + i * TILE * HEAD * 2, values + i * TILE * HEAD * 2, skip - i * TILE, count - i * TILE, o);
      __syncwarp();
      if (lane == 0) barrier_arrive(shared_address(&s->empty[slot]));
    }
    o.sum += __shfl_xor_sync(~0u, o.sum, 1);
    o.sum += __shfl_xor_sync(~0u, o.sum, 2);
    const int row = lane >> 2, q = lane & 3;
    if (row < PER_KV && q == 0) { s->softmax[warp][row][0] = o.top; s->softmax[warp][row][1] = o.sum; }
    UNROLL for (int g0 = 0; g0 < PER_KV; g0 += AT_ONCE) {   // as many heads at once as scratch holds
      consumers_meet();
      if (row >= g0 && row < min(PER_KV, g0 + AT_ONCE)) {
        float* to = s->scratch + warp * 256 + (row - g0) * HEAD;
        UNROLL for (int j = 0; j < CHUNKS; j++)
          UNROLL for (int i = 0; i < 8; i++) {
            to[j * 64 + 2 * q * 8 + i] = o.acc[j][i][0];
            to[j * 64 + (2 * q + 1) * 8 + i] = o.acc[j][i][1];
          }
      }
      consumers_meet();
      const int g = g0 + tid / HEAD, d = tid % HEAD;
      if (g < PER_KV) ShortAttention::merge_warps(g, s->scratch + tid, 256, mixed + split * QUERIES + (head + g) * HEAD + d, sums + (split * HEADS + head + g) * 8, d == 0, mixed_number);
    }
  }
};
#endif
