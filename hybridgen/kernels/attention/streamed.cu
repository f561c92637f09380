// Attention of one query token a row by a schedule (`schedule_kernels` says what lies in it), with pages streamed by bulk
// copies.
//
// A block is a part's chunks of one kv head. One warp copies keys and values of all of them, one after the other, through
// a ring of stages; it never waits for a chunk to end. WARPS warps attend, 16 positions each at a time, with the group's
// queries as rows of the products (eight of them at most, the others are zero) and positions as columns. What a product
// calls dimension k or n is free as long as both operands agree, so keys and values come from shared memory in 16-byte
// loads: lane 4g + c has the c-th quarter of the dimensions of position g as keys, and eight neighbouring dimensions of
// four positions as values. When a chunk ends one more warp puts their sums together while they go on; who finishes a
// row's last chunk combines them, in their order. A row's newest keys and values go into the tile that ends the row from
// where the step has them, and that warp writes them to their page, before anything else.
//
// What the kernels before the last one have written is read before that one has ended: the schedule, and positions a tile
// and more before the row's last tile. A step writes later ones alone.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

constexpr int HEADER = 16, SEVERAL = 1 << 30;                     // of a schedule: see schedule_kernels
constexpr int TILE = 16, SUBS = PIECE / TILE, PIECES = BLOCK / PIECE;
constexpr int KEY_BYTES = PIECE * HEAD * 2, ROW_BYTES = HEAD * 2, QUERY_BYTES = GROUP * ROW_BYTES;
constexpr int STAGE = 2 * KEY_BYTES + (QUERY_BYTES + 127) / 128 * 128;
constexpr int OWN = HEAD / 4, HALVES = HEAD / 64, VALUES = GROUP * HEAD;
constexpr float LOG2E = 1.4426950408889634f, NONE = -1e30f;
static_assert((HEAD == 64 || HEAD == 128) && GROUP <= 8 && PAGE % BLOCK == 0 && BLOCK % PIECE == 0 && PIECE % TILE == 0, "the launcher checks sizes");

struct Arguments {
  const u16 *q, *k, *v;
  u16 *k_pages, *v_pages;
  const int *plan, *table;
  const SLOT* slots;
  const POSITION* positions;
  const void* sinks;
  u16* out;
  float* partial;
  int* counters;   // [rows, HEADS], 0 between calls
  i64 lse_start, q_token, k_token, k_head, v_token, v_head, table_stride;
  float scale, softcap;
  int tokens, capacity, most_chunks, parts;
};
struct __align__(16) Info {   // of a stage
  int row, range, index, line;   // range: first position that is seen, and behind the last; index: of the piece in its chunk, and flags
  int first, count;              // the row's chunks, in the last piece of one of several
};
enum { FIRST = 1 << 28, LAST = 1 << 29, END = 1 << 30 };
struct Shared {
  u64 full[STAGES], empty[STAGES];
  u64 summed, taken;   // sums of a chunk: written by all warps, read by the one that finishes it
  Info info[STAGES];
  Info ended;
  float2 softmax[WARPS][8];
};
extern __shared__ __align__(128) u8 stages[];

// ---- numbers
#if HALF
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif
DEVICE u16 rounded(float f) { u16 r; asm("cvt.rn." TYPE ".f32 %0, %1;" : "=h"(r) : "f"(f)); return r; }
DEVICE u32 pack(float a, float b) { u32 r; asm("cvt.rn." TYPE "x2.f32 %0, %2, %1;" : "=r"(r) : "f"(a), "f"(b)); return r; }
DEVICE float widened(u16 b) {
#if HALF
  float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(b)); return f;
#else
  return __uint_as_float((u32)b << 16);
#endif
}
DEVICE float power(float x) { float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x)); return r; }
DEVICE float logarithm(float x) { float r; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x)); return r; }
DEVICE void multiply(float& c0, float& c1, u32 a0, u32 a2, u32 b0, u32 b1) {   // rows 8 to 15 are zero
  float d2, d3;
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, {%7,%8}, {%0,%1,%9,%9};"
      : "+f"(c0), "+f"(c1), "=f"(d2), "=f"(d3) : "r"(a0), "r"(0), "r"(a2), "r"(b0), "r"(b1), "f"(0.f));
}

// ---- memory
DEVICE u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE uint4 load_shared(u32 a) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a) : "memory");
  return v;
}
DEVICE int load(const int* p) { int v; asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory"); return v; }
DEVICE float load(const float* p) { float v; asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory"); return v; }
DEVICE uint4 load16(const u16* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
DEVICE void barrier_init(u32 a, u32 n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(a), "r"(n) : "memory"); }
DEVICE void barrier_arrive(u32 a) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(a) : "memory"); }
DEVICE void barrier_expect(u32 a, u32 bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(a), "r"(bytes) : "memory"); }
DEVICE void barrier_wait(u32 a, u32 parity) {
  u32 done = 0;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(a), "r"(parity) : "memory");
  } while (!done);
}
DEVICE void copy_in(u32 to, const void* from, u32 bytes, u32 barrier, u64 policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}
DEVICE int add_one(int* p) {   // behind what the warp has written, and before what it reads
  int v;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(v) : "l"(p) : "memory");
  return v;
}
DEVICE void earlier_kernel_ended() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- the schedule
DEVICE const int* part_tiles(const Arguments& a) { return a.plan + HEADER + a.tokens + 1; }
DEVICE const int* deal_begins(const Arguments& a) { return part_tiles(a) + a.parts; }
DEVICE const int* tile_rows(const Arguments& a) { return deal_begins(a) + a.parts + 1 + a.most_chunks; }
struct Words {   // of a tile
  int row, mark, line, page;
  DEVICE void read(const Arguments& a, int tile) {
    const int* at = tile_rows(a) + min(tile, a.capacity - 1);
    row = load(at); mark = load(at + a.capacity); line = load(at + 2 * a.capacity); page = load(at + 3 * a.capacity);
  }
  DEVICE Words of(int lane) const { return {__shfl_sync(~0u, row, lane), __shfl_sync(~0u, mark, lane), __shfl_sync(~0u, line, lane), __shfl_sync(~0u, page, lane)}; }
  DEVICE int valid() const { return mark & 0x1ff; }
  DEVICE int low() const { return mark >> 9 & 0xff; }
  DEVICE int left() const { return mark >> 17 & 0xfff; }
  DEVICE bool ends_row() const { return mark >> 30 & 1; }
};

struct Producer {
  const Arguments& a;
  Shared& s;
  const int head, lane;
  u64 policy;
  u32 turn = 0;
  bool early = true;
  int pending = -1;   // row whose queries the stage with this lane's number waits for

  DEVICE void queries(u32 slot, int row) {
    copy_in(address(stages) + slot * STAGE + 2 * KEY_BYTES, a.q + row * a.q_token + head * VALUES, QUERY_BYTES, address(&s.full[slot]), policy);
  }
  DEVICE void go_on() {
    earlier_kernel_ended();
    if (pending >= 0) queries(lane, pending);
    early = false;
  }
  // Positions [from, from + count) of a tile. `recent`: the step may write some of them; `newest`: the last one is the row's.
  DEVICE void piece(const Words& t, int from, int count, bool recent, bool newest, const Info& info) {
    const int index = info.index;
    if (early && (turn == STAGES || recent)) go_on();
    const u32 slot = turn % STAGES, full = address(&s.full[slot]), to = address(stages) + slot * STAGE;
    if (turn >= STAGES) {
      barrier_wait(address(&s.empty[slot]), (turn / STAGES - 1) & 1);
      __syncwarp();   // or lane 0 could fill the slot, and it be emptied again, before another lane looks
    }
    if (early && index & FIRST && lane == slot) pending = t.row;
    turn++;
    if (lane) return;
    s.info[slot] = info;
    barrier_expect(full, 2 * count * ROW_BYTES + (index & FIRST ? QUERY_BYTES : 0));
    constexpr int PARTS = PAGE / BLOCK;
    const i64 row = (((i64)(t.page / PARTS) * HEADS + head) * PAGE + t.page % PARTS * BLOCK + from) * HEAD;
    const int old = APPEND && newest ? count - 1 : count;
    if (old) {
      copy_in(to, a.k_pages + row, old * ROW_BYTES, full, policy);
      copy_in(to + KEY_BYTES, a.v_pages + row, old * ROW_BYTES, full, policy);
    }
    if (old < count) {
      copy_in(to + old * ROW_BYTES, a.k + t.row * a.k_token + head * a.k_head, ROW_BYTES, full, policy);
      copy_in(to + KEY_BYTES + old * ROW_BYTES, a.v + t.row * a.v_token + head * a.v_head, ROW_BYTES, full, policy);
    }
    if (!early && index & FIRST) queries(slot, t.row);
  }
  DEVICE void chunk(int first, Words words, bool is_end) {
    const Words begins = words.of(0);
    const int left = begins.left(), later = begins.line & 2 ? -1 : 0;   // tiles of the row behind this chunk, less one
    const int* const chunks = a.plan + HEADER + begins.row;
    const bool several = (begins.line & 3) != 3;
    const int low = several ? load(chunks) : 0, high = several ? load(chunks + 1) : 0;
    for (int i = 0; i < left; i++) {
      if (i && i % 32 == 0) words.read(a, first + i + lane);
      const Words t = words.of(i % 32);
      UNROLL for (int p = 0; p < PIECES; p++) {
        const int from = p * PIECE, behind = min(t.valid(), from + PIECE);
        if (from >= behind) break;
        const bool whole = behind == t.valid(), last = i == left - 1 && whole;
        const int flags = (i == 0 && p == 0 ? FIRST : 0) | (last ? LAST : 0) | (last && is_end ? END : 0);
        Info info{t.row, max(0, t.low() - from) | (behind - from) << 16, (i * PIECES + p) | flags, begins.line, 0, 0};
        if (last) { info.first = low; info.count = high - low; }
        piece(t, from, behind - from, left - i + later < 2, whole && t.ends_row(), info);
      }
    }
  }
  DEVICE void run(int part) {
    const int* deal = deal_begins(a);
    const int begin = load(deal + part), count = load(deal + part + 1) - begin;
    const int* order = deal + a.parts + 1 + begin;
    int done = 0;
    for (int batch = 0; batch < count; batch += 32) {
      // Chunks of rows that have several come first, because adding those up takes longest.
      const bool is_one = batch + lane < count;
      const int firsts = is_one ? load(order + batch + lane) : 0;
      const u32 several = __ballot_sync(~0u, firsts >= SEVERAL);
      u32 open = __ballot_sync(~0u, is_one);
      auto next = [&] {   // first tile of the next chunk; -1: there is none
        if (!open) return -1;
        const int from = __ffs(open & several ? open & several : open) - 1;
        open &= ~(1u << from);
        return __shfl_sync(~0u, firsts, from) & (SEVERAL - 1);
      };
      int first = next();
      Words ahead;
      ahead.read(a, first + lane);
      while (first >= 0) {
        const int own = first;
        Words words = ahead;
        first = next();
        if (first >= 0) ahead.read(a, first + lane);
        chunk(own, words, ++done == count);
      }
    }
    if (early) go_on();
  }
};

struct Attending {
  const Arguments& a;
  Shared& s;
  const int head, warp, lane, g, c;
  u32 query[HEAD / 16][2];
  float top, sum, mixed[HALVES][8][2];

  // Where the i-th 16 bytes of this lane's keys lie in a row: permuted, so that more lanes of a load meet other banks.
  DEVICE int key_chunk(int i) const { return HEAD == 128 ? c * 4 + (i ^ (c >> 1)) : c * 2 + i; }
  DEVICE void begin(u32 queries) {
    UNROLL for (int i = 0; i < OWN / 8; i++) {
      uint4 w = make_uint4(0, 0, 0, 0);
      if (g < GROUP) w = load_shared(queries + g * ROW_BYTES + key_chunk(i) * 16);
      query[2 * i][0] = w.x; query[2 * i][1] = w.y; query[2 * i + 1][0] = w.z; query[2 * i + 1][1] = w.w;
    }
    top = NONE; sum = 0.f;
    UNROLL for (int j = 0; j < HALVES; j++) UNROLL for (int i = 0; i < 8; i++) mixed[j][i][0] = mixed[j][i][1] = 0.f;
  }
  DEVICE float scored(float x) const {
    if (!SOFTCAP) return x * (a.scale * LOG2E);
    return LOG2E * (a.softcap - 2.f * a.softcap / (1.f + power(x * a.scale * (2.f * LOG2E / a.softcap))));
  }
  // 16 positions whose keys and values begin at these addresses; those outside [low, high) count for nothing.
  DEVICE void tile(u32 keys, u32 values, int low, int high) {
    float x[2][2] = {};
    UNROLL for (int h = 0; h < 2; h++)
      UNROLL for (int i = 0; i < OWN / 8; i++) {
        const uint4 k = load_shared(keys + (8 * h + g) * ROW_BYTES + key_chunk(i) * 16);
        multiply(x[h][0], x[h][1], query[2 * i][0], query[2 * i][1], k.x, k.y);
        multiply(x[h][0], x[h][1], query[2 * i + 1][0], query[2 * i + 1][1], k.z, k.w);
      }
    float higher = top;
    bool seen[2][2];
    UNROLL for (int h = 0; h < 2; h++)
      UNROLL for (int e = 0; e < 2; e++) {
        const int at = 8 * h + 2 * c + e;
        seen[h][e] = at >= low && at < high;
        x[h][e] = seen[h][e] ? scored(x[h][e]) : NONE;
        higher = fmaxf(higher, x[h][e]);
      }
    higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 1));
    higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 2));
    const float shrink = power(top - higher);
    top = higher; sum *= shrink;
    u32 weights[2];
    UNROLL for (int h = 0; h < 2; h++) {
      UNROLL for (int e = 0; e < 2; e++) x[h][e] = seen[h][e] ? power(x[h][e] - higher) : 0.f;
      weights[h] = pack(x[h][0], x[h][1]);
      sum += x[h][0] + x[h][1];
    }
    UNROLL for (int j = 0; j < HALVES; j++) {
      UNROLL for (int i = 0; i < 8; i++) { mixed[j][i][0] *= shrink; mixed[j][i][1] *= shrink; }
      uint4 v[4];
      UNROLL for (int r = 0; r < 4; r++) {
        v[r] = make_uint4(0, 0, 0, 0);
        if (seen[r >> 1][r & 1]) v[r] = load_shared(values + (2 * c + (r & 1) + (r >> 1) * 8) * ROW_BYTES + j * 128 + g * 16);
      }
      const u32* rows[4] = {&v[0].x, &v[1].x, &v[2].x, &v[3].x};
      UNROLL for (int i = 0; i < 8; i++) {
        const u32 select = i & 1 ? 0x7632 : 0x5410;
        multiply(mixed[j][i][0], mixed[j][i][1], weights[0], weights[1], __byte_perm(rows[0][i / 2], rows[1][i / 2], select), __byte_perm(rows[2][i / 2], rows[3][i / 2], select));
      }
    }
  }
  // Hand the sums of a chunk to the warp that finishes it.
  DEVICE void end(const Info& info, u32 number) {
    float* const scratch = (float*)(stages + STAGES * STAGE);   // [WARPS][GROUP][HEAD]
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (number) barrier_wait(address(&s.taken), (number - 1) & 1);
    if (g < GROUP) {
      if (c == 0) s.softmax[warp][g] = make_float2(top, sum);
      UNROLL for (int j = 0; j < HALVES; j++)
        UNROLL for (int e = 0; e < 2; e++)
          UNROLL for (int i = 0; i < 8; i += 4)
            *(float4*)(scratch + (warp * GROUP + g) * HEAD + j * 64 + (2 * c + e) * 8 + i) = make_float4(mixed[j][i][e], mixed[j][i + 1][e], mixed[j][i + 2][e], mixed[j][i + 3][e]);
    }
    if (warp == 0 && lane == 0) s.ended = info;
    __syncwarp();
    if (lane == 0) barrier_arrive(address(&s.summed));
  }
  DEVICE void run(int part) {
    if (!load(part_tiles(a) + part)) return;
    u32 chunks = 0;
    for (u32 turn = 0;; turn++) {
      const u32 slot = turn % STAGES, stage = address(stages) + slot * STAGE;
      barrier_wait(address(&s.full[slot]), (turn / STAGES) & 1);
      const Info info = s.info[slot];
      if (info.index & FIRST) begin(stage + 2 * KEY_BYTES);
      const int low = info.range & 0xffff, high = info.range >> 16, sub = (info.index & (FIRST - 1)) * SUBS;
      UNROLL for (int i = 0; i < SUBS; i++)
        if ((sub + i) % WARPS == warp && i * TILE < high)
          tile(stage + i * TILE * ROW_BYTES, stage + KEY_BYTES + i * TILE * ROW_BYTES, low - i * TILE, high - i * TILE);
      __syncwarp();
      if (lane == 0) barrier_arrive(address(&s.empty[slot]));
      if (info.index & LAST) end(info, chunks++);
      if (info.index & END) return;
    }
  }
};

// One warp puts the sums of the others together, while they go on with the next chunk.
struct Finishing {
  const Arguments& a;
  Shared& s;
  const int head, lane;
  static constexpr int OWN_VALUES = (VALUES + 127) / 128;   // fours of values of a lane

  DEVICE float sink_of(int member) const {
#if SINKS == 1
    return ((const float*)a.sinks)[head * GROUP + member] * LOG2E;
#elif SINKS == 2
    return widened(((const u16*)a.sinks)[head * GROUP + member]) * LOG2E;
#else
    return NONE;
#endif
  }
  static DEVICE void add(float4& x, const float4& y, float f) {
    x.x = fmaf(y.x, f, x.x); x.y = fmaf(y.y, f, x.y); x.z = fmaf(y.z, f, x.z); x.w = fmaf(y.w, f, x.w);
  }
  DEVICE void store(int row, int e, const float4& x, float f) const {
    *(uint2*)(a.out + ((i64)row * HEADS + head) * VALUES + e) = make_uint2(pack(x.x * f, x.y * f), pack(x.z * f, x.w * f));
  }
  DEVICE void chunk(u32 number) {
    const float* const scratch = (const float*)(stages + STAGES * STAGE);
    barrier_wait(address(&s.summed), number & 1);
    const Info info = s.ended;
    float4 x[OWN_VALUES];
    float peak[OWN_VALUES], total[OWN_VALUES];
    UNROLL for (int n = 0; n < OWN_VALUES; n++) {
      const int e = (n * 32 + lane) * 4, member = min(e / HEAD, GROUP - 1);
      float2 parts[WARPS];
      peak[n] = SINKS && info.line & 1 ? sink_of(member) : NONE;
      total[n] = 0.f;
      UNROLL for (int w = 0; w < WARPS; w++) { parts[w] = s.softmax[w][member]; peak[n] = fmaxf(peak[n], parts[w].x); }
      if (SINKS && info.line & 1) total[n] = power(sink_of(member) - peak[n]);
      x[n] = make_float4(0.f, 0.f, 0.f, 0.f);
      UNROLL for (int w = 0; w < WARPS; w++) {
        const float f = power(parts[w].x - peak[n]);
        total[n] = fmaf(parts[w].y, f, total[n]);
        if (e < VALUES) add(x[n], *(const float4*)(scratch + w * VALUES + e), f);
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(address(&s.taken));
    const bool only = (info.line & 3) == 3;
    const i64 place = (i64)(info.line >> 2) * HEADS + head;
    UNROLL for (int n = 0; n < OWN_VALUES; n++) {
      const int e = (n * 32 + lane) * 4;
      if (e >= VALUES) break;
      const float f = 1.f / total[n];
      if (only) store(info.row, e, x[n], f);
      else {
        *(float4*)(a.partial + place * VALUES + e) = make_float4(x[n].x * f, x[n].y * f, x[n].z * f, x[n].w * f);
        if (e % HEAD == 0) a.partial[a.lse_start + place * GROUP + e / HEAD] = peak[n] + logarithm(total[n]);
      }
    }
    if (!only) combine(info.row, info.first, info.count);
  }
  // Who has finished the last of a row's chunks adds them up, in their order.
  DEVICE void combine(int row, int first, int count) {
    int* counter = a.counters + (i64)row * HEADS + head;
    __syncwarp();
    int before = 0;
    if (lane == 0) before = add_one(counter);
    before = __shfl_sync(~0u, before, 0);
    if (before != count - 1) return;
    __syncwarp();
    if (lane == 0) *counter = 0;
    const float* const values = a.partial + ((i64)first * HEADS + head) * VALUES;
    const float* const lse = a.partial + a.lse_start + ((i64)first * HEADS + head) * GROUP;
    UNROLL for (int n = 0; n < OWN_VALUES; n++) {
      const int e = (n * 32 + lane) * 4;
      if (e >= VALUES) break;
      float peak = NONE, total = 0.f;
      float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
      for (int i = 0; i < count; i++) peak = fmaxf(peak, load(lse + (i64)i * HEADS * GROUP + e / HEAD));
#pragma unroll 2
      for (int i = 0; i < count; i++) {
        const float f = power(load(lse + (i64)i * HEADS * GROUP + e / HEAD) - peak);
        total += f;
        add(x, __ldcg((const float4*)(values + (i64)i * HEADS * VALUES + e)), f);
      }
      store(row, e, x, 1.f / total);
    }
  }
  DEVICE void run(int part) {
    const int* deal = deal_begins(a) + part;
    const int count = load(deal + 1) - load(deal);
    for (int number = 0; number < count; number++) chunk(number);
  }
};

// The rows' newest keys and values, to their pages.
DEVICE void append(const Arguments& a, int lane) {
  constexpr int LANES = HEAD / 8;
  for (int pair = blockIdx.x; pair < a.tokens * HEADS; pair += gridDim.x) {
    const int row = pair / HEADS, head = pair % HEADS, d = lane % LANES * 8;
    const i64 position = a.positions[row];
    const i64 page = a.table[(i64)a.slots[row] * a.table_stride + position / PAGE];
    const i64 to = ((page * HEADS + head) * PAGE + position % PAGE) * HEAD + d;
    if (lane < LANES) *(uint4*)(a.k_pages + to) = load16(a.k + row * a.k_token + head * a.k_head + d);
    else if (lane < 2 * LANES) *(uint4*)(a.v_pages + to) = load16(a.v + row * a.v_token + head * a.v_head + d);
  }
  __threadfence();
  asm volatile("fence.proxy.async;" ::: "memory");
}

extern "C" __global__ void __launch_bounds__(32 * (WARPS + 2), RESIDENT) streamed(const __grid_constant__ Arguments a) {
  __shared__ Shared s;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, head = blockIdx.x % HEADS, part = blockIdx.x / HEADS;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) { barrier_init(address(&s.full[i]), 1); barrier_init(address(&s.empty[i]), WARPS); }
    barrier_init(address(&s.summed), WARPS);
    barrier_init(address(&s.taken), 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (warp == WARPS) {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    Producer producer{a, s, head, lane, policy};
    if (!EARLY) producer.go_on();
    producer.run(part);
  } else if (warp > WARPS) {
    earlier_kernel_ended();
    if (APPEND) append(a, lane);
    __syncwarp();
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    Finishing finishing{a, s, head, lane};
    finishing.run(part);
  } else {
    earlier_kernel_ended();
    Attending attending{a, s, head, warp, lane, lane >> 2, lane & 3};
    attending.run(part);
  }
}
