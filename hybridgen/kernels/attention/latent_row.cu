// Attention of one row to latents in pages: `attend`, and `combine` behind it. `latent_row.py` says how they are used.
//
// A block has a chunk of the row's positions, for all heads, and copies them through STAGES tiles of shared memory. It
// begins before the kernels in front have ended: what it reads then, the block table and pages of earlier steps, was
// written long before. Scores of a tile are a product over rank + rope, of which each of eight warps has a quarter of
// the columns for half of the positions; all warps add the quarters up and weigh alike, and then each mixes an eighth of
// the rank. Heads are the rows of both products (mma.sync m16n8k16).
#include "latent_row.cuh"

#ifndef EARLY
#define EARLY 1
#endif
#ifndef BOUND
#define BOUND 320   // threads, of which 256 are launched: two blocks of 96 registers leave room for one of `combine`
#endif
#define TILE 16
#define WIDTH (RANK + ROPE)
#define LINE (WIDTH * 2 + 16)   // bytes of a position in shared memory: eight lines lie in eight different banks
#define PARTS 4                 // of a score's columns
#define STEPS (WIDTH / 16 / PARTS)
#define SCORES 24               // floats of a head's scores: four heads lie in different banks
#define COLUMNS (RANK / 8)      // of the mix that a warp has
static_assert(WIDTH % (16 * PARTS) == 0 && RANK % 128 == 0, "all warps have the same share");
static_assert(LINE % 128 == 16, "lines lie in different banks");
#define LEAST 32                // positions of a chunk

struct Parameters {
  const u16 *q, *q_rotary, *latent, *rotary;
  u16 *pages;
  const int *block_table;
  const void *slots;
  const i64 *positions;
  u16 *out;
  float *partial;               // [chunks, HEADS, RANK] means, then [chunks, HEADS] logarithms of sums
  i64 table_stride, q_stride, rotary_stride;   // in elements; of heads
  float factor;                 // of scores, times log2(e)
  int chunks, wide_slots;       // chunks at most; whether slots are 64 bits
};

struct Cut { int size, count; };

DEVICE Cut cut_of(int length, int chunks) {
  Cut cut;
  cut.size = (length + chunks - 1) / chunks;
  cut.size = cut.size < LEAST ? LEAST : cut.size;
  cut.count = (length + cut.size - 1) / cut.size;
  return cut;
}

struct Shared {
  u64 full[STAGES];
  __align__(16) float scores[2][PARTS][16][SCORES];
};
SHARED_MEMORY(stages)
DEVICE Shared* shared_state() { return (Shared*)(stages + STAGES * TILE * LINE); }

// One lane's share of what is copied to shared memory: a position of each tile.
struct Copier {
  const int* table;
  int next, page;   // the first position of the next tile, and the page that this lane's is in

  DEVICE int mine() const { return next + (thread_index() >> 5) * 2 + (thread_index() & 1); }
  // The page of the next tile, a tile early. Positions behind the last are copied as that: all numbers are some.
  DEVICE void look(int last) {
    const int position = mine() < last ? mine() : last - 1;
    page = next < last ? table[position / PAGE] : 0;
  }
  DEVICE void copy(const Parameters& p, int turn, int last, int length) {
    const int stage = turn % STAGES, position = mine() < last ? mine() : last - 1;
    u8* target = stages + (stage * TILE + (mine() - next)) * LINE;
    u64* full = &shared_state()->full[stage];
    expect_bytes(full, WIDTH * 2);
    if (position == length - 1) {
      copy_in(target, p.latent, RANK * 2, full);
      copy_in(target + RANK * 2, p.rotary, ROPE * 2, full);
    } else {
      copy_in(target, p.pages + ((i64)page * PAGE + position % PAGE) * WIDTH, WIDTH * 2, full);
    }
    next += TILE;
    look(last);
  }
};

// Two of a head's numbers from column `column` on; zeros for heads that are none.
DEVICE u32 query_pair(const Parameters& p, int head, int column) {
  if (head >= HEADS) return 0;
  const u16* from = column < RANK ? p.q + head * p.q_stride + column : p.q_rotary + head * p.rotary_stride + (column - RANK);
  return *(const u32*)from;
}

DEVICE void attend_chunk(const Parameters& p, int chunk, int chunks, int first, int last, int length) {
  Shared* s = shared_state();
  const int warp = thread_index() >> 5, lane = thread_index() & 31, row = lane >> 2, pair = (lane & 3) * 2;
  const i64 slot = p.wide_slots ? ((const i64*)p.slots)[0] : ((const int*)p.slots)[0];
  Copier copier = {p.block_table + slot * p.table_stride, first, 0};
  copier.look(last);
  int copied = 0;
  if (lane < 2)   // all but the newest, which may not be there yet
    for (; copied < STAGES && copier.next < last && copier.next + TILE < length; copied++) copier.copy(p, copied, last, length);
  wait_for_kernels();
  if (lane < 2)
    for (; copied < STAGES && copier.next < last; copied++) copier.copy(p, copied, last, length);
  const int half = warp & 1, part = warp >> 1;
  u32 query[STEPS][4];
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    const int column = (part * STEPS + i) * 16 + pair;
    query[i][0] = query_pair(p, row, column);
    query[i][1] = query_pair(p, row + 8, column);
    query[i][2] = query_pair(p, row, column + 8);
    query[i][3] = query_pair(p, row + 8, column + 8);
  }
  float mixed[COLUMNS / 8][4];
#pragma unroll
  for (int i = 0; i < COLUMNS / 8; i++) mixed[i][0] = mixed[i][1] = mixed[i][2] = mixed[i][3] = 0.0f;
  float peak[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
  for (int start = first, turn = 0; start < last; start += TILE, turn++) {
    const int stage = turn % STAGES;
    wait_barrier(&s->full[stage], (turn / STAGES) & 1);
    const u8* tile = stages + stage * TILE * LINE;
    // Positions of this warp's half, 32 columns at once; the last 16 alone.
    const u8* keys = tile + (half * 8 + (lane & 7)) * LINE + (part * STEPS * 16 + (lane >> 3) * 8) * 2;
    float score[3][4] = {};
#pragma unroll
    for (int i = 0; i + 1 < STEPS; i += 2) {
      u32 key[4];
      load_matrices(key, keys + i * 32);
      multiply(score[i % 3], query[i], key[0], key[1]);
      multiply(score[(i + 1) % 3], query[i + 1], key[2], key[3]);
    }
    if (STEPS % 2) {
      u32 key[2];
      load_two_matrices(key, keys + (STEPS - 1) * 32);
      multiply(score[(STEPS - 1) % 3], query[STEPS - 1], key[0], key[1]);
    }
    float* mine = &s->scores[turn & 1][part][0][half * 8 + pair];
    store_pair(mine + row * SCORES, score[0][0] + score[1][0] + score[2][0], score[0][1] + score[1][1] + score[2][1]);
    store_pair(mine + (row + 8) * SCORES, score[0][2] + score[1][2] + score[2][2], score[0][3] + score[1][3] + score[2][3]);
    sync_block();
    if (lane < 2 && turn > 0 && copier.next < last) copier.copy(p, turn - 1 + STAGES, last, length);   // all left that tile
    // All of a tile's scores, as the next product has its rows: [row or row + 8][pair or pair + 8].
    float weight[2][4] = {};
#pragma unroll
    for (int i = 0; i < PARTS; i++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const float* from = &s->scores[turn & 1][i][row + 8 * j][pair];
        const Pair low = load_pair(from), high = load_pair(from + 8);
        weight[j][0] += low.x, weight[j][1] += low.y, weight[j][2] += high.x, weight[j][3] += high.y;
      }
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float most = -INFINITY;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int position = start + pair + (i & 1) + (i >> 1) * 8;
        weight[j][i] = position < last ? weight[j][i] * p.factor : -INFINITY;
        most = fmaxf(most, weight[j][i]);
      }
      most = fmaxf(most, from_lane(most, lane ^ 1));
      most = fmaxf(most, from_lane(most, lane ^ 2));
      most = fmaxf(most, peak[j]);   // a number: a tile has a position
      const float rescale = power_of_2(peak[j] - most);
      peak[j] = most;
      total[j] *= rescale;
#pragma unroll
      for (int i = 0; i < 4; i++) weight[j][i] = power_of_2(weight[j][i] - most), total[j] += weight[j][i];
#pragma unroll
      for (int i = 0; i < COLUMNS / 8; i++) mixed[i][2 * j] *= rescale, mixed[i][2 * j + 1] *= rescale;
    }
    const u32 weights[4] = {
      rounded_pair(weight[0][0], weight[0][1]), rounded_pair(weight[1][0], weight[1][1]),
      rounded_pair(weight[0][2], weight[0][3]), rounded_pair(weight[1][2], weight[1][3]),
    };
    const u8* values = tile + ((lane & 7) + ((lane >> 3) & 1) * 8) * LINE + (warp * COLUMNS + (lane >> 4) * 8) * 2;
#pragma unroll
    for (int i = 0; i < COLUMNS / 8; i += 2) {
      u32 value[4];
      load_turned_matrices(value, values + i * 16);
      multiply(mixed[i], weights, value[0], value[1]);
      multiply(mixed[i + 1], weights, value[2], value[3]);
    }
  }
#pragma unroll
  for (int j = 0; j < 2; j++) {
    total[j] += from_lane(total[j], lane ^ 1);
    total[j] += from_lane(total[j], lane ^ 2);
    const int head = row + 8 * j;
    if (head >= HEADS) continue;   // of no warp's lanes together
    const float share = 1.0f / total[j];
    const i64 place = ((i64)chunk * HEADS + head) * RANK + warp * COLUMNS + pair;
#pragma unroll
    for (int i = 0; i < COLUMNS / 8; i++) {
      const float x = mixed[i][2 * j] * share, y = mixed[i][2 * j + 1] * share;
      if (chunks == 1) *(u32*)(p.out + place + i * 8) = rounded_pair(x, y);
      else store_pair(p.partial + place + i * 8, x, y);
    }
    if (chunks > 1 && warp == 0 && pair == 0)
      p.partial[(i64)p.chunks * HEADS * RANK + chunk * HEADS + head] = peak[j] + logarithm_of_2(total[j]);
  }
}

KERNEL(BOUND, 2) attend(const Parameters p) {
#if EARLY
  release_kernels();
#else
  wait_for_kernels();
  release_kernels();
#endif
  Shared* s = shared_state();
  const int thread = thread_index();
  if (thread == 0) {
    for (int i = 0; i < STAGES; i++) make_barrier(&s->full[i], TILE);
    publish_barriers();
  }
  sync_block();
  const int length = (int)p.positions[0] + 1;
  const Cut cut = cut_of(length, p.chunks);
  const int chunk = block_index(), first = chunk * cut.size;
  const int last = first + cut.size < length ? first + cut.size : length;
  if (first >= length) {
    wait_for_kernels();
    return;
  }
  attend_chunk(p, chunk, cut.count, first, last, length);
  if (last == length) {   // for later steps
    const i64 slot = p.wide_slots ? ((const i64*)p.slots)[0] : ((const int*)p.slots)[0];
    const i64 page = p.block_table[slot * p.table_stride + (length - 1) / PAGE];
    u16* line = p.pages + (page * PAGE + (length - 1) % PAGE) * WIDTH;
    for (int i = thread; i < WIDTH; i += 256) line[i] = i < RANK ? p.latent[i] : p.rotary[i - RANK];
  }
}

#define GROUPS 16
#define SLICE 64   // columns of a head that a block combines

// A block: SLICE columns of a head, over the chunks in their order; 16 groups of threads have every 16th chunk.
KERNEL(256, 1) combine(const Parameters p) {
#if EARLY
  release_kernels();
#else
  wait_for_kernels();
  release_kernels();
#endif
  __shared__ float results[GROUPS][SLICE];
  __shared__ float peaks[GROUPS], totals[GROUPS];
  const int thread = thread_index(), group = thread >> 4, column = (thread & 15) * 4;
  const int head = block_index() / (RANK / SLICE), slice = block_index() % (RANK / SLICE) * SLICE;
  const Cut cut = cut_of((int)p.positions[0] + 1, p.chunks);
  wait_for_kernels();
  if (cut.count == 1) return;
  const float* sums = p.partial + (i64)p.chunks * HEADS * RANK;
  float logarithm[MOST_CHUNKS / GROUPS], peak = -INFINITY, total = 0.0f;
  Four piece[MOST_CHUNKS / GROUPS], mixed = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < MOST_CHUNKS / GROUPS; i++) {
    const int chunk = group + i * GROUPS;
    logarithm[i] = -INFINITY;
    if (chunk < cut.count) {
      logarithm[i] = sums[chunk * HEADS + head];
      piece[i] = load_four(p.partial + ((i64)chunk * HEADS + head) * RANK + slice + column);
    }
  }
#pragma unroll
  for (int i = 0; i < MOST_CHUNKS / GROUPS; i++) peak = fmaxf(peak, logarithm[i]);
#pragma unroll
  for (int i = 0; i < MOST_CHUNKS / GROUPS; i++)
    if (group + i * GROUPS < cut.count) {
      const float share = power_of_2(logarithm[i] - peak);
      total += share;
      mixed.x += share * piece[i].x, mixed.y += share * piece[i].y;
      mixed.z += share * piece[i].z, mixed.w += share * piece[i].w;
    }
  if (column == 0) peaks[group] = peak, totals[group] = total;
  float* mine = &results[group][column];
  mine[0] = mixed.x, mine[1] = mixed.y, mine[2] = mixed.z, mine[3] = mixed.w;
  sync_block();
  if (thread >= SLICE) return;
  float most = -INFINITY, all = 0.0f, value = 0.0f;
  for (int i = 0; i < GROUPS; i++) most = fmaxf(most, peaks[i]);
  for (int i = 0; i < GROUPS; i++) {
    const float share = power_of_2(peaks[i] - most);   // 0 of a group without chunks
    all += share * totals[i];
    value += share * results[i][thread];
  }
  p.out[(i64)head * RANK + slice + thread] = rounded(value / all);
}
