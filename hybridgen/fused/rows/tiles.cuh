// The ring of tiles: four producer threads stream this block's share of every weight and of the cache, in the order of
// use, and never wait for activations.
//
// A stage is a tile of 16 rows of a weight by some of their inputs, a bulk copy a row (and one for the scales of its groups).
// Rows lie an odd multiple of 16 bytes apart in shared memory, so that ldmatrix meets no bank twice; in global memory a
// weight stays as the checkpoint's loader left it, so that any row can begin a share and prefill reads the same bytes.
// One thread issues a copy in about 46 ns, too slow for pieces of 1 or 2 KB: hence four.
#pragma once
#include "pairs.cuh"
#include "barriers.cuh"
#include "units.cuh"

#define PRODUCERS 4
#define QUERIES (HEADS * HEAD)
#define WIDE (HIDDEN > 4096 || QUERIES > 4096)
#ifndef WIDEST   // inputs whose activations are in registers at once, where a weight has no more
#define WIDEST (BITS == 4 && !WIDE ? 4096 : 8192)
#endif
#define LARGEST_CHUNK (WIDE ? 4096 : 2048)   // where it has more
#define KEYS (KV_HEADS * HEAD)
#define PER_KV (HEADS / KV_HEADS)
#define BATCH 2   // tiles that meet at once
#define OWNERS (HIDDEN > 32 * BLOCKS ? 256 : 128)   // threads that have the residual stream: two rows of a column each
#ifndef EARLY
#define EARLY (RANKS == 1)   // whether a block arrives before it puts its last sums together; not where those wait for other ranks
#endif

__host__ __device__ constexpr int largest(int unit, int most, int of) {   // multiple of `unit` that divides `of`
  int found = unit;
  for (int i = unit; i <= most && i <= of; i += unit) if (of % i == 0) found = i;
  return found;
}

// Stages of so many bytes that are filled at once: as many bytes as IN_FLIGHT whole stages have.
__host__ __device__ constexpr int largest_flight(int bytes) {
  const int n = IN_FLIGHT * STAGE / bytes;
  return n < 1 ? 1 : n < STAGES ? n : STAGES;
}

// How a weight of K inputs in format F goes through the ring; a gated one has eight rows of the gate and eight of up a tile.
template <int K_, int F_, bool GATED_> struct Tiles {
  static constexpr int K = K_, F = F_, BITS = bits_of(F);
  static constexpr bool GATED = GATED_, GROUPED = has_groups(F);
  static constexpr int GROUP = group_of(F), SCALE_BYTES = scale_bytes(F);
  static constexpr bool ZEROS = has_zeros(F), E2M1 = is_e2m1(F), OFFSETS = BITS == 4 && !E2M1;   // see Offsets
  static constexpr int UNIT = E2M1 ? 512 : GROUPED && GROUP > 32 ? 8 * GROUP : 256;   // inputs: eight warps, whole groups each
  static constexpr int CHUNK = K <= WIDEST ? K : largest(UNIT, LARGEST_CHUNK, K);   // inputs whose activations are in registers at once
  static constexpr int CHUNKS = K / CHUNK;
  static constexpr int DATA = largest(UNIT * BITS / 8, PIECE, CHUNK * BITS / 8);   // bytes of a row in a stage
  static constexpr int INPUTS = DATA * 8 / BITS;                               // of a stage
  static constexpr int SCALES = GROUPED ? INPUTS / GROUP * SCALE_BYTES : 0;    // bytes
  static constexpr int PITCH = DATA + SCALES + ((DATA + SCALES) / 16 % 2 ? 0 : 16);
  static constexpr int FLIGHT = largest_flight(16 * PITCH);
  static constexpr int STAGES_OF_CHUNK = CHUNK / INPUTS;
  static constexpr int OF_WARP = INPUTS / WARPS, BYTES_OF_WARP = DATA / WARPS;
  static constexpr int WORDS_OF_STAGE = OF_WARP / 8, WORDS = WORDS_OF_STAGE * STAGES_OF_CHUNK;   // a lane's activations
  static constexpr int ROWS = GATED ? 8 : 16;                                  // outputs of a tile
  static constexpr i64 ROW_BYTES = (i64)K * BITS / 8, SCALE_ROW = GROUPED ? (i64)K / GROUP * SCALE_BYTES : 0;
  static_assert(K % UNIT == 0 && CHUNK % INPUTS == 0 && 16 * PITCH <= STAGE, "the launcher checks sizes");
  static_assert(PITCH / 16 % 2 == 1 && SCALES % 16 == 0 && OF_WARP % 32 == 0, "shape of a stage");
};
typedef Tiles<HIDDEN, HEAD_FORMAT, false> HeadTiles;

struct Matrix {
  const u8* data;
  const u8* scales;   // of outputs: float32 [rows]; of groups: [rows, groups], with zero points pairs of a scale and 8 less the zero point
  const u16* bias;
};
struct Layer {
  const float *norm_1, *norm_2, *q_norm, *k_norm;
  Matrix qkv, out, gate_up, down;
  u16 *keys, *values;
  i64 window, rotates;
#ifdef OTHER_FORMATS
  i64 others;   // a bit for each projection whose weight is in the other format
#endif
};

// The projections of a layer. Each has one format in all layers, or two of which a layer's description names one: then
// the kernel has the code of both, and all of a block takes the same.
__host__ __device__ constexpr int nth(int which, int a, int b, int c, int d) { return which == 0 ? a : which == 1 ? b : which == 2 ? c : d; }
__host__ __device__ constexpr int usual_format(int which) { return nth(which, FORMATS); }
#ifdef OTHER_FORMATS
__host__ __device__ constexpr int other_format(int which) { return nth(which, OTHER_FORMATS); }
#define IS_OTHER(y, which) ((y).others >> (which) & 1)
#define BEGIN_WITH(projection, tiles) projection::with_tiles(y, [&](auto of_layer) { typedef decltype(of_layer) tiles;
#define END_WITH });
#else   // plain blocks: of lambdas the compiler makes other code
__host__ __device__ constexpr int other_format(int which) { return usual_format(which); }
#define IS_OTHER(y, which) false
#define BEGIN_WITH(projection, tiles) { typedef projection::Usual tiles;
#define END_WITH }
#endif
typedef Pairs<usual_format(0)> LayerPairs;
template <class Usual, class Other> struct Reader : LayerPairs {   // of activations: where it looks for them
  bool other;
  DEVICE explicit Reader(bool other) : other(other) {}
  DEVICE int index(int k, int column) const {
    if (Usual::BITS != Other::BITS && other) return Pairs<Other::F>::index(k, column);
    return Pairs<Usual::F>::index(k, column);
  }
};
template <int K, int WHICH, bool GATED> struct Projection {
  typedef Tiles<K, usual_format(WHICH), GATED> Usual;
  typedef Tiles<K, other_format(WHICH), GATED> Other;
  static_assert(Pairs<Usual::F>::AS_HALF == LayerPairs::AS_HALF && Pairs<Other::F>::AS_HALF == LayerPairs::AS_HALF, "one kind of words");
  template <class Call> static DEVICE void with_tiles(const Layer& y, Call call) {
    if constexpr (usual_format(WHICH) != other_format(WHICH)) {
      if (IS_OTHER(y, WHICH)) { call(Other()); return; }
    }
    call(Usual());
  }
  static DEVICE Reader<Usual, Other> reader(const Layer& y) { return Reader<Usual, Other>(IS_OTHER(y, WHICH)); }
};
typedef Projection<HIDDEN, 0, false> Qkv;
typedef Projection<QUERIES, 1, false> Out;
typedef Projection<HIDDEN, 2, true> GateUp;
typedef Projection<INTERMEDIATE, 3, false> Down;

struct Shared {   // beside the stages
  u64 full[STAGES], empty[STAGES];
  const int* table[COLUMNS];                  // the pages of each column's request
  int position[COLUMNS], cached[COLUMNS];     // of a column; positions of its request before this step
  u32 peers[COLUMNS];                         // columns of the same request that it sees, itself included
  float factor[COLUMNS], scale[COLUMNS];      // see Norms
  float squares[OWNERS / 32][COLUMNS];
  __align__(8) float softmax[WARPS][UNIT_HEADS][2];
  float own_scores[UNIT_HEADS];
  u32 given_up, is_last;
  int page;                                   // of the token of an attention's column
#ifdef TRACE
  i64* trace;
#endif
  __align__(16) float cos[HEAD / 2], sin[HEAD / 2], gains[2][HEAD];
  __align__(16) float own_value[HEAD];
  __align__(16) u16 zeros[64];
  __align__(16) u16 fresh[2][HEAD / 64][COLUMNS][64];   // keys and values of a column's request that this step makes, from `cached` on
  __align__(16) float part[2][WARPS][BATCH][16][COLUMNS];
};
extern __shared__ __align__(1024) u8 stages[];
DEVICE Shared* shared_state() { return (Shared*)(stages + (i64)STAGES * STAGE); }
#ifdef TRACE   // clocks of each block's first thread, by layer (benchmarks/rows_phases.py)
#define MARK(i) if (threadIdx.x == 0) shared_state()->trace[i] = clock64();
#else
#define MARK(i)
#endif
static_assert(sizeof(Shared) <= SHARED, "the launcher reserves SHARED bytes beside the stages");
static_assert(WARPS * UNIT_HEADS * HEAD <= 2 * WARPS * BATCH * 16 * COLUMNS, "attention shares the partial sums");

// This block's rows of a projection, an even number of them from an even one on; the launcher spreads them so that each
// block reads as many bytes as the others.
struct Share {
  int first, count;
  DEVICE Share(const int* table, int which) {
    const int* at = table + which * (BLOCKS + 1) + blockIdx.x;
    first = __ldg(at);
    count = __ldg(at + 1) - first;
  }
};
struct Shares {
  Share qkv, hidden, inner, head;
  DEVICE Shares(const int* table) : qkv(table, 0), hidden(table, 1), inner(table, 2), head(table, 3) {}
};

// Attention is cut into units: a column, UNIT_HEADS query heads of one kv head, SPLIT positions. How a column is cut
// depends on its own length alone, so that its numbers are the same in any company. Columns that a step does not have
// are units too, without positions: their words are rewritten with all others.
struct Unit {
  int column, split, splits, head, low, high, first;   // positions [low, high), of which those from `first` on are seen
};
#define HEAD_GROUPS (HEADS / UNIT_HEADS)
struct Cut {
  static constexpr int EACH = KV8 ? HEAD : 2 * HEAD;   // bytes of a key
  static constexpr int FIT = STAGE / (2 * EACH);
  static constexpr int POSITIONS = FIT >= 128 ? 128 : FIT >= 64 ? 64 : FIT >= 32 ? 32 : 16;   // of a stage
  static constexpr int COPIED = POSITIONS < PAGE ? POSITIONS : PAGE;
  static_assert(PAGE % COPIED == 0 && POSITIONS % COPIED == 0 && SPLIT % POSITIONS == 0, "pages and stages divide each other");
  static DEVICE int splits(int column, int window, int& first, int& begin) {
    const Shared* s = shared_state();
    first = window > 0 ? max(0, s->position[column] + 1 - window) : 0;
    begin = first / POSITIONS * POSITIONS;
    return max(1, (s->position[column] - begin + SPLIT - 1) / SPLIT);
  }
  static DEVICE int count(int window) {
    int first, begin, n = 0;
    for (int c = 0; c < COLUMNS; c++) n += splits(c, window, first, begin);
    return n * HEAD_GROUPS;
  }
  // Where a unit of several splits leaves its part: in the order of columns.
  static DEVICE int index(const Unit& unit, int window) {
    int first, begin, n = unit.split;
    for (int c = 0; c < unit.column; c++) n += splits(c, window, first, begin);
    return n * HEAD_GROUPS + unit.head / UNIT_HEADS;
  }
  static DEVICE Unit find(int u, int window) {
    const Shared* s = shared_state();
    int first, begin;
    const Place at = place_of(
        u / HEAD_GROUPS, [&](int c) { return splits(c, window, first, begin); },
        [&](int c) { return s->table[c] == s->table[c - 1] && s->position[c] == s->position[c - 1] + 1; });
    const int n = splits(at.column, window, first, begin), group = u % HEAD_GROUPS, position = s->position[at.column];
    const int low = min(begin + at.split * SPLIT, position);
    return Unit{at.column, at.split, n, group * UNIT_HEADS, low, min(low + SPLIT, position), first};
  }
};

DEVICE void prefetch_map(const u8* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
DEVICE void copy_box(u32 to, const u8* map, int x, int y, u32 barrier, u64 policy) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(map), "r"(x), "r"(y), "r"(barrier), "l"(policy) : "memory");
}

struct Producer {
  u32 turn;
  int which;
  u64 policy;
  template <int FLIGHT> DEVICE u32 begin(u32 bytes) {   // bytes of this producer
    Shared* s = shared_state();
    const u32 slot = turn % STAGES;
    barrier_wait(shared_address(&s->empty[slot]), ((turn / STAGES) & 1) ^ 1);
    if (FLIGHT < STAGES && turn >= FLIGHT) {   // deep queues in the memory system would only delay the activations
      const u32 earlier = turn - FLIGHT;
      barrier_wait(shared_address(&s->full[earlier % STAGES]), (earlier / STAGES) & 1);
    }
    barrier_expect(shared_address(&s->full[slot]), bytes);
    turn++;
    return slot;
  }
  template <class T> DEVICE void stage(const Matrix& m, int first, int rows, i64 twin, int index) {
    constexpr int OWN = 16 / PRODUCERS;   // rows of a tile that this producer copies
    const int at = which * OWN, row = T::GATED ? at & 7 : at, n = max(0, min(OWN, rows - row));
    const u32 slot = begin<T::FLIGHT>(n * (T::DATA + T::SCALES));
    const u32 barrier = shared_address(&shared_state()->full[slot]), to = shared_address(stages) + slot * STAGE + at * T::PITCH;
    const i64 from = first + row + (T::GATED && at >= 8 ? twin : 0);
    const u8* data = m.data + from * T::ROW_BYTES + (i64)index * T::DATA;
    const u8* scales = m.scales + from * T::SCALE_ROW + (i64)index * T::SCALES;
    UNROLL for (int i = 0; i < OWN; i++) if (i < n) {
      copy_in(to + i * T::PITCH, data + i * T::ROW_BYTES, T::DATA, barrier, policy);
      if (T::GROUPED) copy_in(to + i * T::PITCH + T::DATA, scales + i * T::SCALE_ROW, T::SCALES, barrier, policy);
    }
  }
  template <class T> DEVICE void projection(const Matrix& m, const Share& share, i64 twin) {
#pragma unroll 1
    for (int c = 0; c < T::CHUNKS; c++)
#pragma unroll 1
      for (int t = 0; t < share.count; t += T::ROWS)
#pragma unroll 1
        for (int i = 0; i < T::STAGES_OF_CHUNK; i++)
          stage<T>(m, share.first + t, min(T::ROWS, share.count - t), twin, c * T::STAGES_OF_CHUNK + i);
  }
  // Keys and values as boxes of positions by 64 dimensions (with KV8 all of them), in rows of 128 bytes. The copy swizzles the
  // rows' chunks of 16 bytes by the row's place among eight, so that a product reads them without meeting a bank twice. A
  // producer has a box's dimensions.
  DEVICE void cache(const u8* maps, const Unit& unit) {
    constexpr int HALVES = KV8 ? 1 : HEAD / 64, EACH = Cut::EACH / HALVES;   // bytes of a position in a box
    const int what = which / HALVES, half = which % HALVES;   // keys or values
    const int* table = shared_state()->table[unit.column];
    const int cached = shared_state()->cached[unit.column];   // what comes behind is made by this step
    for (int t = unit.low; t < unit.high; t += Cut::POSITIONS) {
      const int n = max(0, min(Cut::POSITIONS, min(unit.high, cached) - t)), boxes = (n + Cut::COPIED - 1) / Cut::COPIED;
      const u32 slot = begin<largest_flight(Cut::POSITIONS * 2 * Cut::EACH)>(what < 2 ? boxes * Cut::COPIED * EACH : 0);
      if (what >= 2) continue;
      const u32 barrier = shared_address(&shared_state()->full[slot]);
      const u32 to = shared_address(stages) + slot * STAGE + which * Cut::POSITIONS * EACH;
      for (int i = 0; i < n; i += Cut::COPIED) {
        const int at = t + i, page = __ldg(table + at / PAGE);
        copy_box(to + i * EACH, maps + what * 128, half * 64, ((page * KV_HEADS + unit.head / PER_KV) * PAGE + at % PAGE) / (128 / EACH), barrier, policy);
      }
    }
  }
};

struct Ring {   // the consumers' side
  u32 slot, parity;
  DEVICE u32 wait() const {
    barrier_wait(shared_address(&shared_state()->full[slot]), parity);
    return shared_address(stages) + slot * STAGE;
  }
  // Give the stage back. `read`: bits of reads that nothing has used yet, 0 for none. An arrival does not wait for reads
  // that are on their way: without the fence stages were overwritten under late ones in a few of a thousand steps. The
  // compiler can put the arrival before the first use of a read. Then `read` makes the arrival's address depend on it.
  DEVICE void done(u32 read = 0) {
    __syncwarp();
    __threadfence_block();
    const u32 nothing = read & blockIdx.y;   // 0, which the compiler does not know: the grid has one dimension
    if ((threadIdx.x & 31) == 0) barrier_arrive(shared_address(&shared_state()->empty[slot]) + nothing);
    if (++slot == STAGES) { slot = 0; parity ^= 1; }
  }
};
