// The ring: a producer thread streams this block's share of every weight and its part of the cache, in the order of
// use, through stages of shared memory. It never waits for activations, so that memory stays busy while they travel.
#pragma once
#include "barriers.cuh"

#define BATCH 64   // rows of a projection that a block finishes at once
#define QUERIES (HEADS * HEAD)
#define KEYS (KV_HEADS * HEAD)

struct Shared {   // beside the stages
  u64 full[STAGES], empty[STAGES];
  float squares[WARPS];
  float softmax[WARPS][8][2];
  u32 given_up;
  __align__(16) float part[2][2 * BATCH][WARPS];
  __align__(16) float scratch[WARPS * 256];   // of attention
};
static_assert(sizeof(Shared) <= SHARED, "the launcher reserves SHARED bytes beside the stages");
extern __shared__ __align__(128) u8 stages[];
DEVICE Shared* shared_state() { return (Shared*)(stages + (i64)STAGES * STAGE); }

__host__ __device__ constexpr int power_of_two_below(int n) { int r = 1; while (r * 2 <= n) r *= 2; return r; }

// How rows of K weights lie in a stage and over the warps: a chunk is 256 columns, eight for each lane of a warp.
template <int K> struct Layout {
  static constexpr int CHUNKS = (K + 255) / 256;
  static constexpr int FIT = power_of_two_below(STAGE / (K * 2));
  static constexpr int ROWS = FIT > 8 ? 8 : FIT;                                               // rows of a stage
  static constexpr int ACROSS = (CHUNKS % 8 == 0 || CHUNKS > 32 || ROWS < 2) ? 8 : 4;          // warps along a row
  static constexpr int DOWN = WARPS / ACROSS;                                                  // rows at once
  static constexpr int PER_WARP = (CHUNKS + ACROSS - 1) / ACROSS;                              // chunks of a warp
  static constexpr int PER_ROWS = ROWS / DOWN;
  static_assert(K % 8 == 0 && K * 2 <= STAGE && ROWS >= DOWN, "a row of weights fits a stage");
  static DEVICE int across() { return (threadIdx.x >> 5) % ACROSS; }
  static DEVICE int down() { return (threadIdx.x >> 5) / ACROSS; }
  // first column of this lane's eight in the j-th chunk of its warp, and whether the row has them
  static DEVICE int column(int j) { return (across() + j * ACROSS) * 256 + (threadIdx.x & 31) * 8; }
  static DEVICE bool has(int j) { return (K % 256 == 0 && CHUNKS % ACROSS == 0) || column(j) < K; }
};

// This block's rows of a projection of `rows` rows.
DEVICE int first_row(int rows) { return (int)((i64)blockIdx.x * rows / BLOCKS); }
DEVICE int row_count(int rows) { return (int)((i64)(blockIdx.x + 1) * rows / BLOCKS) - first_row(rows); }

struct Layer {
  const float *norm_1, *norm_2, *q_norm, *k_norm;
  const u16 *qkv, *out, *gate_up, *down;
  const u16 *qkv_bias, *out_bias, *gate_up_bias, *down_bias;
  u16 *keys, *values;
  int window, rotates;
#if SEPARATE   // projections of the same input that lie apart: `qkv` is that of queries, `gate_up` the gate
  const u16 *k, *v, *up, *k_bias, *v_bias, *up_bias;
#endif
};

// Positions that a block attends to in a layer.
struct Span {
  int kv_head, low, high;
};

struct Producer {
  u32 turn;
  u64 policy;
  DEVICE u32 begin(u32 bytes) {
    Shared* s = shared_state();
    const u32 slot = turn % STAGES;
    barrier_wait(shared_address(&s->empty[slot]), ((turn / STAGES) & 1) ^ 1);
    // Deep queues in the memory system would only delay the activations.
    if (IN_FLIGHT < STAGES && turn >= IN_FLIGHT) {
      const u32 earlier = turn - IN_FLIGHT;
      barrier_wait(shared_address(&s->full[earlier % STAGES]), (earlier / STAGES) & 1);
    }
    barrier_expect(shared_address(&s->full[slot]), bytes);
    turn++;
    return slot;
  }
  DEVICE void copy(u32 slot, u32 offset, const void* from, u32 bytes) {
    copy_in(shared_address(stages) + slot * STAGE + offset, from, bytes, shared_address(&shared_state()->full[slot]), policy);
  }
  // Rows of a [rows, K] weight; a gated projection takes the same rows of `twin` as well.
  template <int K, bool GATED> DEVICE void projection(const u16* weight, int rows, const u16* twin) {
    constexpr int STEP = GATED ? Layout<K>::ROWS / 2 : Layout<K>::ROWS;
    static_assert(STEP > 0, "a stage holds a row of both halves of a gated weight");
    const int first = first_row(rows), count = row_count(rows);
    for (int r = 0; r < count; r += STEP) {
      const u32 bytes = min(STEP, count - r) * K * 2;
      const u32 slot = begin(GATED ? 2 * bytes : bytes);
      const u16* from = weight + (i64)(first + r) * K;
      copy(slot, 0, from, bytes);
      if (GATED) copy(slot, STEP * K * 2, twin + (i64)(first + r) * K, bytes);
    }
  }
#if SEPARATE
  // The same for rows of queries, keys and values in a weight each: a stage may hold rows of several.
  template <int K> DEVICE void projection_of_three(const Layer& y) {
    constexpr int STEP = Layout<K>::ROWS, ALL = QUERIES + 2 * KEYS;
    const int first = first_row(ALL), count = row_count(ALL);
    for (int r = 0; r < count; r += STEP) {
      const int last = first + min(r + STEP, count);
      const u32 slot = begin((last - first - r) * K * 2);
      u32 offset = 0;
      for (int row = first + r; row < last;) {
        const bool query = row < QUERIES, key = row < QUERIES + KEYS;
        const int start = query ? 0 : key ? QUERIES : QUERIES + KEYS;
        const u16* weight = query ? y.qkv : key ? y.k : y.v;
        const int rows = min(last, query ? QUERIES : key ? QUERIES + KEYS : ALL) - row;
        copy(slot, offset, weight + (i64)(row - start) * K, rows * K * 2);
        offset += rows * K * 2;
        row += rows;
      }
    }
  }
#endif
  // Keys and values of a span: a stage has POSITIONS of both, from one page or from several.
  static constexpr int POSITIONS = STAGE / (4 * HEAD);
  static constexpr int PIECE = POSITIONS < PAGE ? POSITIONS : PAGE;
  DEVICE void cache(const Layer& y, const int* table, Span span) {
    for (int t = span.low; t < span.high; t += POSITIONS) {
      const int count = min(POSITIONS, span.high - t);
      int page = __ldg(table + t / PAGE);
      const u32 slot = begin(count * HEAD * 4);
      UNROLL for (int i = 0; i < POSITIONS / PIECE; i++) {
        const int at = t + i * PIECE;
        if (at >= span.high) break;
        if (i) page = __ldg(table + at / PAGE);
        const u32 bytes = min(PIECE, span.high - at) * HEAD * 2;
        const i64 from = (((i64)page * KV_HEADS + span.kv_head) * PAGE + at % PAGE) * HEAD;
        copy(slot, i * PIECE * HEAD * 2, y.keys + from, bytes);
        copy(slot, STAGE / 2 + i * PIECE * HEAD * 2, y.values + from, bytes);
      }
    }
  }
};
static_assert(PAGE % Producer::PIECE == 0 && Producer::POSITIONS % Producer::PIECE == 0, "pages and stages divide each other");
