// Attention of one row to latents in pages: `attend`, and `combine` behind it. `latent_row.py` says how they are used.
//
// A block has a chunk of the row's positions, for all heads. Its ninth warp copies them through STAGES tiles of shared
// memory, and begins before the kernels in front have ended: what it reads then, the block table and pages of earlier
// steps, was written long before. Scores of a tile are a product over rank + rope, of which each of eight warps has a
// part of the columns for eight positions; all warps add the parts up and weigh alike, and then each mixes an eighth of
// the rank. Heads are the rows of both products (mma.sync m16n8k16).
#include "latent_row.cuh"

#ifndef EARLY
#define EARLY 1                   // 0: nothing is read before the kernels in front have ended
#endif
// For trials: PREFETCH 1 asks the L2 cache for a chunk at once, TRIAL 1 copies alone, TRIAL 2 multiplies alone.
#define TILE 32
#define WIDTH (RANK + ROPE)
#define LINE (WIDTH * 2 + 16)     // bytes of a position in shared memory: eight lines lie in eight different banks
#define PARTS (64 / TILE)         // of a score's columns
#define STEPS (WIDTH / 16 / PARTS)
#define CHAINS 3                  // sums of products that do not wait for each other
#define SCORES (TILE + 8)         // floats of a head's scores: four heads lie in different banks
#define COLUMNS (RANK / 8)        // of the mix that a warp has
static_assert(WIDTH % (16 * PARTS) == 0 && RANK % 128 == 0, "all warps have the same share");
static_assert(LINE % 128 == 16 && SCORES % 16 == 8, "lines lie in different banks");
#define LEAST 32                  // positions of a chunk

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
  u64 full[STAGES], empty[STAGES];
  __align__(16) float scores[2][PARTS][16][SCORES];
};
SHARED_MEMORY(stages)
DEVICE Shared* shared_state() { return (Shared*)(stages + STAGES * TILE * LINE); }

// The ninth warp: lane i has position i of each tile.
DEVICE void produce(const Parameters& p, int first, int last, int length) {
  Shared* s = shared_state();
  const int lane = thread_index() & 31;
  const i64 slot = p.wide_slots ? ((const i64*)p.slots)[0] : ((const int*)p.slots)[0];
  const int* table = p.block_table + slot * p.table_stride;
  // Positions behind the last are copied as that: all numbers are some.
  int position = first + lane < last ? first + lane : last - 1;
  int page = table[position / PAGE];
#if PREFETCH
  for (int i = first / PAGE + lane; i * PAGE < last; i += 32) {
    const int from = i * PAGE < first ? first : i * PAGE, to = (i + 1) * PAGE < last ? (i + 1) * PAGE : last;
    ask_for(p.pages + ((i64)table[i] * PAGE + from % PAGE) * WIDTH, (to - from) * WIDTH * 2);
  }
#endif
  bool waited = false;
  for (int start = first, turn = 0; start < last; start += TILE, turn++) {
    const int stage = turn % STAGES, here = position;
    const u16* line = p.pages + ((i64)page * PAGE + here % PAGE) * WIDTH;
    position = start + TILE + lane < last ? start + TILE + lane : last - 1;
    page = table[position / PAGE];   // of the next tile
    if (start + TILE >= length && !waited) {   // the newest may not be there yet
      wait_for_kernels();
      waited = true;
    }
    wait_barrier(&s->empty[stage], ((turn / STAGES) & 1) ^ 1);
    u8* target = stages + (stage * TILE + lane) * LINE;
#if TRIAL == 2
    arrive(&s->full[stage]);
    continue;
#endif
    expect_bytes(&s->full[stage], WIDTH * 2);
    if (here == length - 1) {
      copy_in(target, p.latent, RANK * 2, &s->full[stage]);
      copy_in(target + RANK * 2, p.rotary, ROPE * 2, &s->full[stage]);
    } else {
      copy_in(target, line, WIDTH * 2, &s->full[stage]);
    }
  }
  if (!waited) wait_for_kernels();
  if (last == length) {   // for later steps
    u16* line = p.pages + ((i64)table[(length - 1) / PAGE] * PAGE + (length - 1) % PAGE) * WIDTH;
    for (int i = lane; i < WIDTH; i += 32) line[i] = i < RANK ? p.latent[i] : p.rotary[i - RANK];
  }
}

// Two of a head's numbers from column `column` on; zeros for heads that are none.
DEVICE u32 query_pair(const Parameters& p, int head, int column) {
  if (head >= HEADS) return 0;
  const u16* from = column < RANK ? p.q + head * p.q_stride + column : p.q_rotary + head * p.rotary_stride + (column - RANK);
  return *(const u32*)from;
}

DEVICE void attend_chunk(const Parameters& p, int chunk, int chunks, int first, int last) {
  Shared* s = shared_state();
  const int warp = thread_index() >> 5, lane = thread_index() & 31, row = lane >> 2, pair = (lane & 3) * 2;
  const int eight = warp % (TILE / 8), part = warp / (TILE / 8);   // of a tile's positions, and of a score's columns
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
#if TRIAL == 1
    sync_warp();
    if (lane == 0) arrive(&s->empty[stage]);
    continue;
#endif
    // Eight positions, 32 columns at once.
    const u8* keys = tile + (eight * 8 + (lane & 7)) * LINE + (part * STEPS * 16 + (lane >> 3) * 8) * 2;
    float score[CHAINS][4] = {};
#pragma unroll
    for (int i = 0; i + 1 < STEPS; i += 2) {
      u32 key[4];
      load_matrices(key, keys + i * 32);
      multiply(score[i % CHAINS], query[i], key[0], key[1]);
      multiply(score[(i + 1) % CHAINS], query[i + 1], key[2], key[3]);
    }
    if (STEPS % 2) {
      u32 key[2];
      load_two_matrices(key, keys + (STEPS - 1) * 32);
      multiply(score[(STEPS - 1) % CHAINS], query[STEPS - 1], key[0], key[1]);
    }
    float sum[4];
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] = score[0][i] + score[1][i] + score[2][i];
    float* mine = &s->scores[turn & 1][part][0][eight * 8 + pair];
    store_pair(mine + row * SCORES, sum[0], sum[1]);
    store_pair(mine + (row + 8) * SCORES, sum[2], sum[3]);
    sync_warps();
    // All of a tile's scores, as the next product has its rows: [row or row + 8][pair, and every eighth behind it].
    float weight[2][TILE / 4];
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int i = 0; i < TILE / 8; i++) {
        const float* from = &s->scores[turn & 1][0][row + 8 * j][pair + 8 * i];
        Pair both = load_pair(from);
#pragma unroll
        for (int k = 1; k < PARTS; k++) {
          const Pair more = load_pair(from + k * 16 * SCORES);
          both.x += more.x, both.y += more.y;
        }
        weight[j][2 * i] = both.x, weight[j][2 * i + 1] = both.y;
      }
    const bool whole = start + TILE <= last;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float most = -INFINITY;
#pragma unroll
      for (int i = 0; i < TILE / 4; i++) {
        const int position = start + pair + (i & 1) + (i >> 1) * 8;
        weight[j][i] = whole || position < last ? weight[j][i] * p.factor : -INFINITY;
        most = fmaxf(most, weight[j][i]);
      }
      most = fmaxf(most, from_lane(most, lane ^ 1));
      most = fmaxf(most, from_lane(most, lane ^ 2));
      most = fmaxf(most, peak[j]);   // a number: a tile has a position
      const float rescale = power_of_2(peak[j] - most);
      peak[j] = most;
      total[j] *= rescale;
#pragma unroll
      for (int i = 0; i < TILE / 4; i++) weight[j][i] = power_of_2(weight[j][i] - most), total[j] += weight[j][i];
#pragma unroll
      for (int i = 0; i < COLUMNS / 8; i++) mixed[i][2 * j] *= rescale, mixed[i][2 * j + 1] *= rescale;
    }
    const u8* values = tile + ((lane & 7) + ((lane >> 3) & 1) * 8) * LINE + (warp * COLUMNS + (lane >> 4) * 8) * 2;
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) {
      const u32 weights[4] = {
        rounded_pair(weight[0][4 * k], weight[0][4 * k + 1]), rounded_pair(weight[1][4 * k], weight[1][4 * k + 1]),
        rounded_pair(weight[0][4 * k + 2], weight[0][4 * k + 3]), rounded_pair(weight[1][4 * k + 2], weight[1][4 * k + 3]),
      };
#pragma unroll
      for (int i = 0; i < COLUMNS / 8; i += 2) {
        u32 value[4];
        load_turned_matrices(value, values + k * 16 * LINE + i * 16);
        multiply(mixed[i], weights, value[0], value[1]);
        multiply(mixed[i + 1], weights, value[2], value[3]);
      }
    }
    sync_warp();
    if (lane == 0) arrive(&s->empty[stage]);
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

KERNEL(288, 1) attend(const Parameters p) {
#if EARLY
  release_kernels();
#else
  wait_for_kernels();
  release_kernels();
#endif
  Shared* s = shared_state();
  const int length = (int)p.positions[0] + 1;
  if (thread_index() == 0) {
    for (int i = 0; i < STAGES; i++) make_barrier(&s->full[i], TILE), make_barrier(&s->empty[i], 8);
    publish_barriers();
  }
  sync_block();
  const Cut cut = cut_of(length, p.chunks);
  const int chunk = block_index(), first = chunk * cut.size;
  const int last = first + cut.size < length ? first + cut.size : length;
  if (first < length && thread_index() >= 256) {
    produce(p, first, last, length);
    return;
  }
  wait_for_kernels();
  if (first < length) attend_chunk(p, chunk, cut.count, first, last);
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
