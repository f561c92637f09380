// One decode step of a Llama-like model for up to eight columns, as one persistent kernel: a block on every
// multiprocessor. A column is a slot and a position: a token of each of several requests, several of one, or a mix.
//
// Eight consumer warps of each block compute, one thread of each of four others streams weights and cache (tiles.cuh). A
// layer has five phases: qkv | attention | out | gate and up | down. Between them activations travel as words (pairs.cuh,
// words.cuh); there is no grid barrier. The residual stream stays in the registers of the blocks that own its rows, in
// float32. docs/fused-decode.md explains the parts; hybridgen/fused/reference.py computes the same in PyTorch.
#include "columns.cuh"
#include "peers.cuh"

// With activations in fp16: products of silu(gate) and up count a quarter, so that they may reach 262,016.
#define INNER_SCALE (LayerPairs::AS_HALF ? 0.25f : 1.f)

struct Parameters {
  const i64 *ids, *positions;
  const int *slots, *tables;                    // [columns]; [slots, max_pages]
  i64 columns, table_stride;
  const u16* embedding;
  const u8* maps;                               // tensor maps of each layer's keys and values, 128 bytes each
  Matrix head;
  const float *norm, *cos, *sin;
  u16* logits;                                  // [COLUMNS, VOCAB]
  u32 *x, *middle, *mixed, *hidden, *last, *qkv, *squares, *middle_squares, *last_squares;   // words
  float* partial;
  u32* tickets;
  const int* shares;                            // [4, BLOCKS + 1]: first rows of qkv, hidden, intermediate, vocab
  u32* counters;                                // layers run; steps run; arrivals; finished blocks: a sector apart
  u32* fault;
#ifdef READS
  u16* states;                                  // [COLUMNS, layers that are read, HIDDEN]
#endif
#if RANKS > 1
  Peers peers;
#endif
#ifdef TRACE
  i64* trace;                                   // [BLOCKS, LAYERS, MARKS]
#endif
  Layer layers[LAYERS];
};
#define COUNTER(i) (p.counters + 32 * (i))
#ifdef TRACE   // clocks of each block's first thread, by layer (benchmarks/rows_phases.py)
#define MARKS 24
#define TRACED(p, l) if (tid == 0) s->trace = (p).trace + (blockIdx.x * LAYERS + (l)) * MARKS;
#else
#define TRACED(p, l)
#endif

DEVICE void produce(const Parameters& p, const Shares& shares, int which) {
  Producer from;
  from.turn = 0;
  from.which = which;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(from.policy));
#pragma unroll 1
  for (int l = 0; l < LAYERS; l++) {
    const Layer& y = p.layers[l];
    UNROLL for (int i = 0; i < 2; i++) prefetch_map(p.maps + l * 256 + i * 128);
    Qkv::with_tiles(y, [&](auto tiles) { from.projection<decltype(tiles)>(y.qkv, shares.qkv, 0); });
    const int units = Cut::count(y.window);
#pragma unroll 1
    for (int u = blockIdx.x; u < units; u += BLOCKS) from.cache(p.maps + l * 256, Cut::find(u, y.window));
    Out::with_tiles(y, [&](auto tiles) { from.projection<decltype(tiles)>(y.out, shares.hidden, 0); });
    GateUp::with_tiles(y, [&](auto tiles) { from.projection<decltype(tiles)>(y.gate_up, shares.inner, INTERMEDIATE); });
    Down::with_tiles(y, [&](auto tiles) { from.projection<decltype(tiles)>(y.down, shares.hidden, 0); });
  }
  from.projection<HeadTiles>(p.head, shares.head, 0);
}

DEVICE float activated(float gate) {
#if GELU
  const float inner = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
  return gate / (1.f + exp2f(-2.f * LOG2E * inner));   // x (1 + tanh(u)) / 2 = x sigmoid(2u)
#else
  return gate / (1.f + exp2f(-LOG2E * gate));
#endif
}
DEVICE float power_of_two_near(float f) { return __uint_as_float(min(max(__float_as_uint(f) & 0x7f800000u, 0x10000000u), 0x60000000u)); }

// RMSNorm between a writer and its readers. Writers give each value times the next norm's gain; the sums of squares travel
// apart, a word a block and column, and divide the results. As fp16 a residual stream may not fit: then it is scaled by a
// power of two, near the factor of the norm before, which every block knows.
template <class T> DEVICE void read_normed(Activations<T>& a, const u32* x, const u32* squares, u32 number, int columns, Watch& watch) {
  Shared* s = shared_state();
  constexpr int EACH = (BLOCKS + 31) / 32;
  const int tid = thread_index(), lane = tid & 31, warp = tid >> 5;
  const u32 mark = Pairs<T::F>::mark(number), low8 = number & 255u;
  const u32* from = Activations<T>::place(x, 0, columns);
  a.ask(from);
  if (warp < columns) {
    u32 v[EACH], stale;
    ASK(watch,
      stale = 0;
      UNROLL for (int i = 0; i < EACH; i++) { v[i] = low8; if (lane + 32 * i < BLOCKS) v[i] = load_relaxed(squares + warp * BLOCKS + lane + 32 * i); }
      UNROLL for (int i = 0; i < EACH; i++) stale |= (v[i] ^ low8) & 255u, stale)
    float sum = 0.f;
    UNROLL for (int i = 0; i < EACH; i++) if (lane + 32 * i < BLOCKS) sum += value_of(v[i]);
    __syncwarp();
    UNROLL for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
    if (lane == 0) {
      const float factor = rsqrtf(sum / T::K + EPSILON);
      s->factor[warp] = Pairs<T::F>::AS_HALF ? factor / s->scale[warp] : factor;
      s->scale[warp] = power_of_two_near(factor);
    }
  }
  a.check(from, mark, watch);
  a.decode(a.words);
}

extern "C" __global__ void __launch_bounds__(THREADS + 32 * PRODUCERS, 1) decode_columns(const __grid_constant__ Parameters p) {
  Shared* s = shared_state();
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, columns = (int)p.columns;
  if (tid == 0) {
    s->given_up = 0;
    for (int i = 0; i < STAGES; i++) {
      barrier_init(shared_address(&s->full[i]), PRODUCERS);
      barrier_init(shared_address(&s->empty[i]), WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
  }
  if (tid < COLUMNS) {
    int position = 0, cached = 0;
    u32 peers = 0;
    s->table[tid] = p.tables;
    if (tid < columns) {
      const int slot = p.slots[tid];
      cached = position = (int)p.positions[tid];
      s->table[tid] = p.tables + slot * p.table_stride;
      for (int j = 0; j < columns; j++) if (p.slots[j] == slot) {
        const int other = (int)p.positions[j];
        cached = min(cached, other);
        if (other < position || j == tid) peers |= 1u << j;   // padding has many columns at one position
      }
    }
    s->position[tid] = position; s->cached[tid] = cached; s->peers[tid] = peers;
    s->factor[tid] = s->scale[tid] = 1.f;
  }
  if (tid < 64) s->zeros[tid] = 0;
  __syncthreads();
  const Shares shares(p.shares);
  if (tid >= THREADS) {
    leave_registers();
    if (lane == 0) produce(p, shares, warp - WARPS);
    return;
  }
  take_registers();

  Ring ring = {0, 0};
  u32 side = 0, number = *COUNTER(0);   // its low bits mark words
  const u32 step = *COUNTER(1) + 1;
  Arrivals arrivals = {COUNTER(2), 0};
  Watch watch = {p.fault, &s->given_up, false};
  const int column = tid & 7, own = (tid >> 3) * 2;   // of the residual stream: a column, two neighbours
  const bool owns = tid < OWNERS && own < shares.hidden.count, here = owns && column < columns;
  float residual0 = 0.f, residual1 = 0.f;

  int window = -1, units = 0;   // of the layer before: how attention is cut, and this block's first unit
  Unit first_unit = {};

  auto arrive = [&]() {
    if (warp == 0) {
      __syncwarp();
      if (lane == 0) arrivals.arrive();
    }
    arrivals.target += BLOCKS;
  };
  auto gain_of = [&](const float* norm) { return owns ? __ldg((const float2*)(norm + shares.hidden.first + own)) : make_float2(0.f, 0.f); };
  auto publish = [&](auto format, u32* x, u32* squares, float2 gain, u32 number) {
    typedef decltype(format) P;
    if (tid < OWNERS) {
      float sum = 0.f;
      if (owns) {
        const float scale = P::AS_HALF ? s->scale[column] : 1.f;
        P::store(x + format.index(shares.hidden.first + own, column), residual0 * gain.x * scale, residual1 * gain.y * scale, P::mark(number));
        sum = residual0 * residual0 + residual1 * residual1;
      }
      sum += __shfl_xor_sync(~0u, sum, 8);
      sum += __shfl_xor_sync(~0u, sum, 16);
      if (lane < COLUMNS) s->squares[warp][lane] = sum;
      asm volatile("bar.sync 2, %0;" ::"n"(OWNERS) : "memory");
      if (tid < COLUMNS) {
        float all = s->squares[0][tid];
        UNROLL for (int i = 1; i < OWNERS / 32; i++) all += s->squares[i][tid];
        store_word(squares + tid * BLOCKS + blockIdx.x, all, number & 255u);
      }
    }
  };
  auto add = [&](int projection, const Outputs& o, float bias0, float bias1, float by) {   // to the residual stream
    if (!o.on) return;
    float y[2] = {o.y0 * by, o.y1 * by};
#if RANKS > 1
    if (o.column < columns) p.peers.add_up<HIDDEN * COLUMNS, 2>(projection, (shares.hidden.first + o.at) * COLUMNS + o.column * 2, number, y, watch);
#endif
    residual0 += RESIDUAL_SCALE * (or_none(y[0]) + bias0);
    residual1 += RESIDUAL_SCALE * (or_none(y[1]) + bias1);
  };
  if (here) {
    const u32 e = *(const u32*)(p.embedding + p.ids[column] * HIDDEN + shares.hidden.first + own);
    residual0 = low(e) * EMBEDDING_SCALE; residual1 = high(e) * EMBEDDING_SCALE;
  }
  arrive();
  publish(Qkv::reader(p.layers[0]), p.x, p.squares, gain_of(p.layers[0].norm_1), number + 1);

#pragma unroll 1
  for (int l = 0; l < LAYERS; l++) {
    const Layer& y = p.layers[l];
    number++;
#ifdef READS   // what goes into some layers, for who drafts
    if (here) {
      constexpr int reads[] = {READS}, count = sizeof(reads) / sizeof(int);
      UNROLL for (int i = 0; i < count; i++)
        if (l == reads[i]) *(u32*)(p.states + ((i64)column * count + i) * HIDDEN + shares.hidden.first + own) = pack(residual0, residual1);
    }
#endif
    BEGIN_WITH(Qkv, QkvTiles)
      TRACED(p, l)
      MARK(0)
      Constants<QkvTiles> constants;
      constants.begin(y.qkv, shares.qkv, 0);
      arrivals.wait(watch);
      MARK(1)
      Activations<QkvTiles> a;
      read_normed(a, p.x, p.squares, number, columns, watch);
      MARK(2)
      project<QkvTiles>(a, constants, y.qkv, shares.qkv, 0, ring, side, arrive, [&](const Outputs& o, const Constants<QkvTiles>& k) {
        if (!o.on) return;
        const float factor = s->factor[o.column];
        u32* to = p.qkv + o.column * (QUERIES + 2 * KEYS) + shares.qkv.first + o.at;
        store_word(to, o.y0 * factor + low(k.bias), number & 255u);
        store_word(to + 1, o.y1 * factor + high(k.bias), number & 255u);
      });
      MARK(3)
    END_WITH
    {
      const Attention::Buffers to = {p.qkv, p.mixed, p.partial, p.tickets, p.cos, p.sin};
      if (y.window != window) {
        window = (int)y.window;
        units = Cut::count(window);
        first_unit = Cut::find(blockIdx.x, window);
      }
      bool waited = false;
#pragma unroll 1
      for (int u = blockIdx.x; u < units; u += BLOCKS) {
        const Unit unit = u < BLOCKS ? first_unit : Cut::find(u, window);
        if (unit.column >= columns) {
          Attention::nothing(y, p.mixed, unit, number);
          if (tid == 0) arrivals.arrive();
        } else {
          Attention::prefetch(y, p.cos, p.sin, unit.column);
          if (waited) consumers_meet();
          else arrivals.wait(watch);
          if (!waited) { MARK(4) }
          waited = true;
          Attention::run(y, to, unit, ring, arrivals, number, watch);
        }
        consumers_meet();
      }
      MARK(5)
      arrivals.target += units;
    }
    BEGIN_WITH(Out, OutTiles)
      const float2 gain = gain_of(y.norm_2);
      Constants<OutTiles> constants;
      constants.begin(y.out, shares.hidden, 0);
      arrivals.wait(watch);
      MARK(6)
      Activations<OutTiles> a;
      a.load(p.mixed, number, columns, watch);
      MARK(7)
      project<OutTiles>(a, constants, y.out, shares.hidden, 0, ring, side, arrive, [&](const Outputs& o, const Constants<OutTiles>& k) { add(OF_ATTENTION, o, low(k.bias), high(k.bias), 1.f); });
      MARK(8)
      publish(GateUp::reader(y), p.middle, p.middle_squares, gain, number);
      MARK(9)
    END_WITH
    BEGIN_WITH(GateUp, GateTiles)
      Constants<GateTiles> constants;
      constants.begin(y.gate_up, shares.inner, INTERMEDIATE);
      arrivals.wait(watch);
      MARK(10)
      Activations<GateTiles> a;
      read_normed(a, p.middle, p.middle_squares, number, columns, watch);
      MARK(11)
      project<GateTiles>(a, constants, y.gate_up, shares.inner, INTERMEDIATE, ring, side, arrive, [&](const Outputs& o, const Constants<GateTiles>& k) {
        if (!o.on) return;
        const float factor = s->factor[o.column];
        const float g0 = o.y0 * factor + low(k.bias), g1 = o.y1 * factor + high(k.bias), u0 = o.up0 * factor + low(k.up_bias), u1 = o.up1 * factor + high(k.up_bias);
        typedef LayerPairs P;
        P::store(p.hidden + Down::reader(y).index(shares.inner.first + o.at, o.column), activated(g0) * u0 * INNER_SCALE, activated(g1) * u1 * INNER_SCALE, P::mark(number));
      });
      MARK(12)
    END_WITH
    BEGIN_WITH(Down, DownTiles)
      const bool last = l + 1 == LAYERS;
      const float2 gain = gain_of(last ? p.norm : p.layers[last ? 0 : l + 1].norm_1);
      Constants<DownTiles> constants;
      constants.begin(y.down, shares.hidden, 0);
      arrivals.wait(watch);
      MARK(13)
      auto finish = [&](const Outputs& o, const Constants<DownTiles>& k) { add(OF_MLP, o, low(k.bias), high(k.bias), 1.f / INNER_SCALE); };
      if constexpr (DownTiles::CHUNKS == 1) {
        Activations<DownTiles> a;
        a.load(p.hidden, number, columns, watch);
        project<DownTiles>(a, constants, y.down, shares.hidden, 0, ring, side, arrive, finish);
      } else project_in_chunks<DownTiles>(p.hidden, number, columns, constants, shares.hidden, ring, side, watch, arrive, finish);
      MARK(14)
      if (last) publish(Pairs<HEAD_FORMAT>(), p.last, p.last_squares, gain, step);
      else publish(Qkv::reader(p.layers[last ? 0 : l + 1]), p.x, p.squares, gain, number + 1);
      MARK(15)
    END_WITH
  }
  {
    Constants<HeadTiles> constants;
    constants.begin(p.head, shares.head, 0);
    arrivals.wait(watch);
    Activations<HeadTiles> a;
    read_normed(a, p.last, p.last_squares, step, columns, watch);
    project<HeadTiles>(a, constants, p.head, shares.head, 0, ring, side, [] {}, [&](const Outputs& o, const Constants<HeadTiles>& k) {
      if (!o.on || o.column >= columns) return;
      const float factor = *(volatile u32*)&s->given_up ? __int_as_float(0x7fffffff) : s->factor[o.column] * LOGITS_SCALE;   // what a stopped step leaves is no number
      *(u32*)(p.logits + (i64)o.column * VOCAB + shares.head.first + o.at) = pack(o.y0 * factor, o.y1 * factor);
    });
  }
  consumers_meet();
  if (tid == 0) {
    __threadfence();
    if (atomicAdd(COUNTER(3), 1u) == BLOCKS - 1) {   // nobody waits any more
      *COUNTER(0) = number; *COUNTER(1) = step;
      *COUNTER(2) = 0; *COUNTER(3) = 0;
    }
  }
}
