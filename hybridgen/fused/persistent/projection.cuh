// Matrix-vector products: this block's rows of a weight, as they arrive in the ring, with an activation in registers.
#pragma once
#include "ring.cuh"

// Sum COUNT values that every lane has over the warp. The lane returns the total of one of them, `which`.
template <int COUNT> DEVICE float warp_sum(float* v, int& which) {
  const int lane = threadIdx.x & 31;
  which = 0;
  int n = COUNT;
  UNROLL for (int o = 16; o; o >>= 1) {
    if (n > 1) {   // halve the values while halving the lanes that share one
      n >>= 1;
      const bool up = lane & o;
      UNROLL for (int i = 0; i < COUNT / 2; i++) if (i < n) {
        const float send = up ? v[i] : v[i + n], keep = up ? v[i + n] : v[i];
        v[i] = keep + __shfl_xor_sync(~0u, send, o);
      }
      if (up) which += n;
    } else v[0] += __shfl_xor_sync(~0u, v[0], o);
  }
  return v[0];
}

// y = W x for this block's rows; `finish(row, y, twin's y)` runs on the thread that has a row's result.
template <int K, bool GATED, class Finish>
DEVICE void project(const float (&x)[Layout<K>::PER_WARP][8], int rows, u32& turn, u32& side, Arrivals& arrivals, Finish finish) {
  using L = Layout<K>;
  constexpr int STEP = GATED ? L::ROWS / 2 : L::ROWS;
  constexpr int SUMS = L::PER_ROWS >= 4 ? 1 : L::PER_ROWS == 2 ? 2 : 4;   // independent sums, where rows are few
  Shared* s = shared_state();
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, across = L::across(), down = L::down();
  const int count = row_count(rows);
  for (int b = 0; b < count; b += BATCH) {
    const int batch = min(BATCH, count - b);
    for (int r0 = 0; r0 < batch; r0 += STEP, turn++) {
      const u32 slot = turn % STAGES;
      const u32 base = shared_address(stages) + slot * STAGE + lane * 16 + across * 512 + down * (K * 2);
      barrier_wait(shared_address(&s->full[slot]), (turn / STAGES) & 1);
      uint4 w[L::PER_ROWS][L::PER_WARP];
      UNROLL for (int r = 0; r < L::PER_ROWS; r++)
        UNROLL for (int j = 0; j < L::PER_WARP; j++) {
          if (L::has(j)) w[r][j] = load_shared(base + r * L::DOWN * (K * 2) + j * L::ACROSS * 512);
          else w[r][j] = make_uint4(0, 0, 0, 0);
        }
      float sums[L::PER_ROWS];
      UNROLL for (int r = 0; r < L::PER_ROWS; r++) {
        float t[SUMS];
        UNROLL for (int k = 0; k < SUMS; k++) t[k] = 0.f;
        UNROLL for (int j = 0; j < L::PER_WARP; j++) {
          float f[8];
          unpack(w[r][j], f);
          UNROLL for (int e = 0; e < 8; e++) t[e % SUMS] = fmaf(f[e], x[j][e], t[e % SUMS]);
        }
        sums[r] = SUMS == 1 ? t[0] : SUMS == 2 ? t[0] + t[1 % SUMS] : (t[0] + t[1 % SUMS]) + (t[2 % SUMS] + t[3 % SUMS]);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(shared_address(&s->empty[slot]));
      int which;
      const float y = warp_sum<L::PER_ROWS>(sums, which);
      const int row = which * L::DOWN + down;
      if ((lane & (32 / L::PER_ROWS - 1)) == 0) s->part[side][GATED && row >= STEP ? BATCH + r0 + row - STEP : r0 + row][across] = y;
    }
    consumers_meet();
    if (tid < batch) {
      float y = 0.f, z = 0.f;
      UNROLL for (int i = 0; i < L::ACROSS; i++) {
        y += s->part[side][tid][i];
        if (GATED) z += s->part[side][BATCH + tid][i];
      }
      finish(b + tid, y, z);
    }
    side ^= 1;
  }
  if (warp < BATCH / 32) {   // the warps that finished rows
    __syncwarp();
    if (lane == 0) arrivals.arrive();
  }
}
#define PROJECTION_ARRIVALS (BATCH / 32 * BLOCKS)

// This lane's part of a vector of words.
template <int K> DEVICE void read_words(const u32* words, u32 number, Watch& watch, float (&x)[Layout<K>::PER_WARP][8]) {
  using L = Layout<K>;
  Words v[L::PER_WARP];
  u32 stale;
  UNROLL for (int j = 0; j < L::PER_WARP; j++) v[j].assume(number);
  ASK(watch,
    stale = 0;
    UNROLL for (int j = 0; j < L::PER_WARP; j++) if (L::has(j)) v[j].load(words + L::column(j));
    UNROLL for (int j = 0; j < L::PER_WARP; j++) stale |= v[j].stale(number), stale)
  UNROLL for (int j = 0; j < L::PER_WARP; j++) {
    if (L::has(j)) v[j].values(x[j]);
    else UNROLL for (int e = 0; e < 8; e++) x[j][e] = 0.f;
  }
}

// RMSNorm on the way into a projection: x * scale into registers; the sum of squares follows, and divides the result.
template <int K> struct Normed {
  float scale[Layout<K>::PER_WARP][8];
  DEVICE void prefetch(const float* by) {   // before waiting for x
    UNROLL for (int j = 0; j < Layout<K>::PER_WARP; j++) {
      if (Layout<K>::has(j)) load_floats(by + Layout<K>::column(j), scale[j]);
      else UNROLL for (int e = 0; e < 8; e++) scale[j][e] = 0.f;
    }
  }
  DEVICE void apply(float (&x)[Layout<K>::PER_WARP][8]) {
    float squares = 0.f;
    UNROLL for (int j = 0; j < Layout<K>::PER_WARP; j++)
      UNROLL for (int e = 0; e < 8; e++) {
        squares = fmaf(x[j][e], x[j][e], squares);
        x[j][e] *= scale[j][e];
      }
    UNROLL for (int o = 16; o; o >>= 1) squares += __shfl_xor_sync(~0u, squares, o);
    if ((threadIdx.x & 31) == 0) shared_state()->squares[threadIdx.x >> 5] = squares;
  }
  static DEVICE float factor() {   // after the consumers met
    float t = 0.f;
    UNROLL for (int i = 0; i < Layout<K>::ACROSS; i++) t += shared_state()->squares[i];
    return rsqrtf(t / K + EPSILON);
  }
};
DEVICE float bias_of(const u16* bias, int row) { return bias ? widened(__ldg(bias + row)) : 0.f; }
DEVICE float qkv_bias_of(const Layer& y, int row) {
#if SEPARATE
  if (row >= QUERIES + KEYS) return bias_of(y.v_bias, row - QUERIES - KEYS);
  if (row >= QUERIES) return bias_of(y.k_bias, row - QUERIES);
#endif
  return bias_of(y.qkv_bias, row);
}
DEVICE float up_bias_of(const Layer& y, int row) {
#if SEPARATE
  return bias_of(y.up_bias, row);
#else
  return bias_of(y.gate_up_bias, INTERMEDIATE + row);
#endif
}
