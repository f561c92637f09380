// One decode step of a Llama-like model for one row, as one persistent kernel: a block on every multiprocessor.
//
// Eight consumer warps of each block compute, a ninth's first thread streams the weights (ring.cuh). A layer has five
// phases: qkv | attention | out | gate and up | down. Between them activations travel as words (words.cuh); there is no
// grid barrier and no fence. The residual stream stays in the registers of the blocks that own its rows, in float32.
// docs/fused-decode.md explains the parts; hybridgen/fused/reference.py computes the same in PyTorch.
#include "attention_long.cuh"
#include "peers.cuh"

#if HAS_LONG
typedef LongAttention LongWay;
#else
typedef ShortAttention LongWay;   // never used
#endif

struct Parameters {
  const i64 *rows, *state;   // the row's slot; [3, slots]: last token, length, generated
  const int* tables;         // [slots, max_pages]
  i64 state_stride, table_stride;
  const u16 *embedding, *head;
  const float *norm, *cos, *sin;
  u16* logits;
  u32 *x, *middle, *qkv, *hidden;                                  // words
  u32 *short_mixed, *short_sums, *long_mixed, *long_sums, *long_merged;   // words
  u32* counters;   // layers run, with the short way, with the long way; arrivals; finished blocks: a sector apart
  u32* fault;
#if RANKS > 1
  Peers peers;
#endif
  Layer layers[LAYERS];
};
#define COUNTER(i) (p.counters + 32 * (i))

DEVICE void produce(const Parameters& p, const Step& t) {
  Producer from;
  from.turn = 0;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(from.policy));
  for (int l = 0; l < LAYERS; l++) {
    const Layer& y = p.layers[l];
#if SEPARATE
    from.projection_of_three<HIDDEN>(y);
#else
    from.projection<HIDDEN, false>(y.qkv, QUERIES + 2 * KEYS, nullptr);
#endif
    from.cache(y, t.table, Plan(t.position, y.window).span(t.position));
    from.projection<QUERIES, false>(y.out, HIDDEN, nullptr);
#if SEPARATE
    from.projection<HIDDEN, true>(y.gate_up, INTERMEDIATE, y.up);
#else
    from.projection<HIDDEN, true>(y.gate_up, INTERMEDIATE, y.gate_up + (i64)INTERMEDIATE * HIDDEN);
#endif
    from.projection<INTERMEDIATE, false>(y.down, HIDDEN, nullptr);
  }
  from.projection<HIDDEN, false>(p.head, VOCAB, nullptr);
}

DEVICE float activated(float gate) {
#if GELU
  const float inner = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
  return gate / (1.f + exp2f(-2.f * LOG2E * inner));   // x (1 + tanh(u)) / 2 = x sigmoid(2u)
#else
  return gate / (1.f + exp2f(-LOG2E * gate));
#endif
}

// The sum over all ranks of what this thread has of a row of the hidden size.
DEVICE float over_ranks(const Parameters& p, int projection, int row, float part, u32 number, Watch& watch) {
#if RANKS > 1
  float values[1] = {part};
  p.peers.add_up<HIDDEN, 1>(projection, row, number, values, watch);
  return values[0];
#else
  return part;
#endif
}

template <class C, class Attention>
DEVICE void attend(const Step& t, const Layer& y, const Plan& plan, const u32* qkv, u32* mixed, u32* sums, u32 number, u32 mixed_number, u32& turn, Arrivals& arrivals, Watch& watch) {
  if (blockIdx.x < C::UNITS) {
    Attention attention;
    attention.prefetch(t, y);
    arrivals.wait(watch);
    attention.run(t, y, plan, qkv, mixed, sums, number, mixed_number, turn, watch);
    consumers_meet();
    if (threadIdx.x == 0) arrivals.arrive();
  }
  arrivals.target += C::UNITS;
}

extern "C" __global__ void __launch_bounds__(THREADS + 128, 1) decode_step(const __grid_constant__ Parameters p) {
  Shared* s = shared_state();
  const int tid = threadIdx.x;
  if (tid == 0) {
    s->given_up = 0;
    for (int i = 0; i < STAGES; i++) {
      barrier_init(shared_address(&s->full[i]), 1);
      barrier_init(shared_address(&s->empty[i]), WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
  }
  __syncthreads();
  const i64 slot = *p.rows;
  const Step t = {(int)p.state[p.state_stride + slot], p.tables + slot * p.table_stride, p.cos, p.sin};
  if (tid >= THREADS) {   // four warps, as registers move between groups of four
    leave_registers();
    if (tid == THREADS) produce(p, t);
    return;
  }
  take_registers();

  u32 turn = 0, side = 0;
  u32 number = *COUNTER(0), short_number = *COUNTER(1), long_number = *COUNTER(2);   // their low bytes mark words
  Arrivals arrivals = {COUNTER(3), 0};
  Watch watch = {p.fault, &s->given_up, false};
  const u16* embedded = p.embedding + p.state[slot] * HIDDEN;
  static_assert((HIDDEN + BLOCKS - 1) / BLOCKS <= BATCH, "a thread has at most one row of the residual stream");
  const int own = first_row(HIDDEN);
  float residual = tid < row_count(HIDDEN) ? widened(embedded[own + tid]) * EMBEDDING_SCALE : 0.f;

  for (int l = 0; l < LAYERS; l++) {
    const Layer& y = p.layers[l];
    const u32 before = number & 255u;
    number++;
    const u32 now = number & 255u;
    {
      Normed<HIDDEN> norm;
      norm.prefetch(y.norm_1);
      float x[Layout<HIDDEN>::PER_WARP][8];
      if (l) {
        arrivals.wait(watch);
        read_words<HIDDEN>(p.x, before, watch, x);
      } else UNROLL for (int j = 0; j < Layout<HIDDEN>::PER_WARP; j++) {
        unpack(Layout<HIDDEN>::has(j) ? load_constant(embedded + Layout<HIDDEN>::column(j)) : make_uint4(0, 0, 0, 0), x[j]);
        UNROLL for (int e = 0; e < 8; e++) x[j][e] *= EMBEDDING_SCALE;
      }
      norm.apply(x);
      const int first = first_row(QUERIES + 2 * KEYS);
      project<HIDDEN, false>(x, QUERIES + 2 * KEYS, turn, side, arrivals, [&](int r, float a, float) {
        store_word(p.qkv + first + r, a * norm.factor() + qkv_bias_of(y, first + r), now);
      });
      arrivals.target += PROJECTION_ARRIVALS;
    }
    const Plan plan(t.position, y.window);
    u32 mixed_number;
    if (HAS_LONG && plan.is_long) {
      mixed_number = ++long_number & 255u;
      attend<Long, LongWay>(t, y, plan, p.qkv, p.long_mixed, p.long_sums, now, mixed_number, turn, arrivals, watch);
      // Every block needs all heads. If each read all splits, 34 MB would come from L2 (8B): a wait more takes less.
      arrivals.wait(watch);
      merge_splits(p.long_mixed, p.long_sums, p.long_merged, mixed_number, plan.active, watch);
      consumers_meet();
      if (tid == 0) arrivals.arrive();
      arrivals.target += BLOCKS;
    } else {
      mixed_number = ++short_number & 255u;
      attend<Short, ShortAttention>(t, y, plan, p.qkv, p.short_mixed, p.short_sums, now, mixed_number, turn, arrivals, watch);
    }
    {
      arrivals.wait(watch);
      float x[Layout<QUERIES>::PER_WARP][8];
      if (HAS_LONG && plan.is_long) read_words<QUERIES>(p.long_merged, mixed_number, watch, x);
      else read_merged(p.short_mixed, p.short_sums, mixed_number, plan.active, watch, x);
      project<QUERIES, false>(x, HIDDEN, turn, side, arrivals, [&](int r, float a, float) {
        residual += RESIDUAL_SCALE * (over_ranks(p, OF_ATTENTION, own + r, a, number, watch) + bias_of(y.out_bias, own + r));
        store_word(p.middle + own + r, residual, now);
      });
      arrivals.target += PROJECTION_ARRIVALS;
    }
    {
      Normed<HIDDEN> norm;
      norm.prefetch(y.norm_2);
      arrivals.wait(watch);
      float x[Layout<HIDDEN>::PER_WARP][8];
      read_words<HIDDEN>(p.middle, now, watch, x);
      norm.apply(x);
      const int first = first_row(INTERMEDIATE);
      project<HIDDEN, true>(x, INTERMEDIATE, turn, side, arrivals, [&](int r, float gate, float up) {
        const float factor = norm.factor();
        gate = gate * factor + bias_of(y.gate_up_bias, first + r);
        up = up * factor + up_bias_of(y, first + r);
        store_word(p.hidden + first + r, activated(gate) * up, now);
      });
      arrivals.target += PROJECTION_ARRIVALS;
    }
    {
      arrivals.wait(watch);
      float x[Layout<INTERMEDIATE>::PER_WARP][8];
      read_words<INTERMEDIATE>(p.hidden, now, watch, x);
      project<INTERMEDIATE, false>(x, HIDDEN, turn, side, arrivals, [&](int r, float a, float) {
        residual += RESIDUAL_SCALE * (over_ranks(p, OF_MLP, own + r, a, number, watch) + bias_of(y.down_bias, own + r));
        store_word(p.x + own + r, residual, now);
      });
      arrivals.target += PROJECTION_ARRIVALS;
    }
  }
  {
    Normed<HIDDEN> norm;
    norm.prefetch(p.norm);
    arrivals.wait(watch);
    float x[Layout<HIDDEN>::PER_WARP][8];
    read_words<HIDDEN>(p.x, number & 255u, watch, x);
    norm.apply(x);
    const int first = first_row(VOCAB);
    // What a stopped step leaves is no number.
    project<HIDDEN, false>(x, VOCAB, turn, side, arrivals, [&](int r, float a, float) {
      p.logits[first + r] = *(volatile u32*)&s->given_up ? rounded(__int_as_float(0x7fffffff)) : rounded(a * norm.factor() * LOGITS_SCALE);
    });
  }
  consumers_meet();
  if (tid == 0) {
    __threadfence();
    if (atomicAdd(COUNTER(4), 1u) == BLOCKS - 1) {   // nobody waits any more
      *COUNTER(0) = number; *COUNTER(1) = short_number; *COUNTER(2) = long_number;
      *COUNTER(3) = 0; *COUNTER(4) = 0;
    }
  }
}
