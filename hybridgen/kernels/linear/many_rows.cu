// out = x @ w.T for thousands of rows in bfloat16 with sums in float32, on compute capability 9.0; or, where w is gate and
// up, silu(x @ gate.T) * (x @ up.T), whose products are never written.
//
// A block makes tiles of 64 * BLOCKS * CONSUMERS rows and WIDE columns of w, one after the other. One thread copies (TMA)
// steps of 64 inputs into a ring of stages; each group of four warps multiplies 64 * BLOCKS of the rows by all columns
// (wgmma). The blocks of a cluster make tiles that lie DOWN below and ACROSS beside each other; each copies a part of what
// it shares with others and sends it to them. Tiles are taken in groups of `group` cluster rows, column by column, so that
// what runs at the same time shares what lies in the L2 cache.
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

constexpr int STEP = 64, TALL = 64 * BLOCKS * CONSUMERS, THREADS = 128 * (CONSUMERS + PRODUCER);
constexpr int X_BYTES = TALL * STEP * 2, W_BYTES = WIDE * STEP * 2, STAGE = X_BYTES + W_BYTES;
constexpr int CLUSTER = DOWN * ACROSS, SHARERS = DOWN + ACROSS - 1;   // blocks of a cluster; those that share x or w with one
constexpr u32 COLUMN = DOWN == 1 ? 1 : DOWN == 2 ? 1 | 1 << ACROSS : 1 | 1 << ACROSS | 1 << 2 * ACROSS | 1 << 3 * ACROSS;
static_assert(DOWN == 1 || DOWN == 2 || DOWN == 4, "blocks one above the other");
constexpr int X_PART = TALL / ACROSS, W_PART = WIDE / (DOWN == 1 ? 2 : DOWN);   // rows of a copy
constexpr int OUT_WIDE = GATED ? WIDE / 2 : WIDE, BOX = 16 * BOX_WIDE * 2;   // a warp writes boxes of 16 rows
constexpr int OUT_BYTES = 4 * CONSUMERS * BOXES * BOX;
static_assert(OUT_WIDE % BOX_WIDE == 0, "whole boxes");

struct alignas(64) Map { u64 words[16]; };
struct Arguments {
  Map x, w, out;
  int rows, outputs, inputs, group;   // outputs: columns of `out`
};

DEVICE u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE u32 rank_in_cluster() { u32 r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
DEVICE void cluster_meets() { asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory"); }
DEVICE void barrier_begins(u32 at, u32 count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory"); }
DEVICE void wait_for(u32 at, u32 parity) {
  u32 done;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}" : "=r"(done) : "r"(at), "r"(parity) : "memory");
  } while (!done);
}
DEVICE void expect(u32 at, u32 bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory"); }
DEVICE void arrive_at(u32 at, u32 block) {
  asm volatile("{.reg .b32 r; mapa.shared::cluster.u32 r, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [r];}" ::"r"(at), "r"(block) : "memory");
}
DEVICE void copy_in(u32 to, const Map& map, int column, int row, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
    ::"r"(to), "l"(&map), "r"(barrier), "r"(column), "r"(row) : "memory");
}
DEVICE void copy_to_all(u32 to, const Map& map, int column, int row, u32 barrier, u16 blocks) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;"
    ::"r"(to), "l"(&map), "r"(barrier), "r"(column), "r"(row), "h"(blocks) : "memory");
}
DEVICE void copy_out(const Map& map, int column, int row, u32 from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\ncp.async.bulk.commit_group;"
    ::"l"(&map), "r"(from), "r"(column), "r"(row) : "memory");
}
// What wgmma reads: rows of 128 bytes, swizzled, eight of them 1024 bytes.
DEVICE u64 described(u32 at) { return (u64)((at & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62); }
#define SUMS4(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SUMS(c, i) SUMS4(c, i), SUMS4(c, i + 4), SUMS4(c, i + 8), SUMS4(c, i + 12)
DEVICE void multiply(float (&c)[96], u64 a, u64 b, u32 more) {   // 64 x 192
  asm volatile("{.reg .pred p; setp.ne.b32 p, %98, 0; wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
    "}, %96, %97, p, 1, 1, 0, 0;}"
    : SUMS(c, 0), SUMS(c, 16), SUMS(c, 32), SUMS(c, 48), SUMS(c, 64), SUMS(c, 80)
    : "l"(a), "l"(b), "r"(more));
}
DEVICE u32 pair(float low, float high) { u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r; }
DEVICE float gated(float gate, float up) {   // both rounded to bfloat16 first, as if they had been written
  const u32 both = pair(gate, up);
  const float g = __uint_as_float(both << 16), u = __uint_as_float(both & 0xffff0000u);
  return __fdividef(g, 1.f + __expf(-g)) * u;
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) many_rows(const __grid_constant__ Arguments g) {
  extern __shared__ __align__(1024) char shared[];
  const u32 ring = address(shared), boxes = ring + STAGES * STAGE, full = boxes + OUT_BYTES, empty = full + 8 * STAGES;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const u32 rank = rank_in_cluster(), below = rank / ACROSS, beside = rank % ACROSS;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_begins(full + 8 * s, 1);
      barrier_begins(empty + 8 * s, SHARERS * 4 * CONSUMERS);   // each warp of those that share
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_meets();

  const int steps = (g.inputs + STEP - 1) / STEP;
  constexpr int high = DOWN * TALL, wide = ACROSS * OUT_WIDE;   // of a cluster's tile
  const int down = (g.rows + high - 1) / high, across = (g.outputs + wide - 1) / wide;
  const int tiles = down * across, first = blockIdx.x / CLUSTER, apart = gridDim.x / CLUSTER;
  auto place = [&](int tile, int& row, int& column) {   // of the block's part
    const int top = tile / (g.group * across) * g.group, rest = tile - top * across, most = min(g.group, down - top);
    row = (top + rest % most) * high + below * TALL;
    column = rest / most * wide + beside * OUT_WIDE;
  };
  int stage = 0;
  u32 parity = 0;
  auto next = [&] { if (++stage == STAGES) { stage = 0; parity ^= 1; } };
  // One thread's: what is copied next.
  int tile_in = first, k_in = 0, stage_in = 0, row_in, column_in;
  u32 parity_in = 1;
  place(first, row_in, column_in);
  auto copy_step = [&] {
    const u32 to = ring + stage_in * STAGE, to_w = to + X_BYTES, barrier = full + 8 * stage_in;
    wait_for(empty + 8 * stage_in, parity_in);
    expect(barrier, STAGE);
    {
      if (ACROSS == 1) copy_in(to, g.x, k_in, row_in, barrier);
      else copy_to_all(to + beside * X_PART * STEP * 2, g.x, k_in, row_in + beside * X_PART, barrier, ((1 << ACROSS) - 1) << below * ACROSS);
    }
    {
      UNROLL for (int i = 0; i < (DOWN == 1 ? 2 : 1); i++) {
        const int part = (DOWN == 1 ? i : below) * W_PART;
        const int from = column_in + part + (GATED && part >= WIDE / 2 ? g.outputs - WIDE / 2 : 0);   // up is behind all of gate
        if (DOWN == 1) copy_in(to_w + part * STEP * 2, g.w, k_in, from, barrier);
        else copy_to_all(to_w + part * STEP * 2, g.w, k_in, from, barrier, COLUMN << beside);
      }
    }
    if (++stage_in == STAGES) { stage_in = 0; parity_in ^= 1; }
    if ((k_in += STEP) >= g.inputs) {
      k_in = 0;
      tile_in += apart;
      if (tile_in < tiles) place(tile_in, row_in, column_in);
    }
  };

  if (PRODUCER && warp < 4) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(CONSUMERS == 2 ? 24 : 32));
    if (threadIdx.x == 0) while (tile_in < tiles) copy_step();
  } else {
    if constexpr (PRODUCER) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMERS == 2 ? 240 : 160));
    const int consumer = (warp >> 2) - PRODUCER;
    auto copy_more = [&](int count) {
      if (PRODUCER || warp) return;
      if (lane == 0) for (int i = 0; i < count && tile_in < tiles; i++) copy_step();
      __syncwarp();
    };
    copy_more(STAGES);
    float sums[BLOCKS][WIDE / 2];
    // Those in its row, then the others in its column.
    const u32 sharer = lane < ACROSS ? below * ACROSS + lane : (lane - ACROSS + (lane - ACROSS >= (int)below)) * ACROSS + beside;
    auto release = [&](int s) { if (lane < SHARERS) arrive_at(empty + 8 * s, sharer); };
    // Where a lane puts its 16 bytes of a box: matrices of 8 x 8, two below and two beside each other.
    const u32 box = boxes + (warp - 4 * PRODUCER) * BOXES * BOX, box_row = lane & 15, place_in_box = box_row * BOX_WIDE * 2;
    const u32 swizzle = BOX_WIDE == 64 ? box_row & 7 : box_row >> 1 & 3;
    int turn = 0;
    for (int tile = first; tile < tiles; tile += apart) {
      int last = 0;
      for (int k = 0; k < steps; k++) {
        wait_for(full + 8 * stage, parity);
        const u64 x = described(ring + stage * STAGE + consumer * BLOCKS * (64 * STEP * 2)), w = described(ring + stage * STAGE + X_BYTES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        UNROLL for (int i = 0; i < 4; i++) {
          UNROLL for (int b = 0; b < BLOCKS; b++) multiply(sums[b], x + b * (64 * STEP * 2 >> 4) + 2 * i, w + 2 * i, k + i);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (k) {
          asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
          release(last);
          copy_more(1);
        }
        last = stage;
        next();
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      UNROLL for (int b = 0; b < BLOCKS; b++) UNROLL for (int i = 0; i < WIDE / 2; i++) asm volatile("" : "+f"(sums[b][i])::"memory");
      release(last);

      int row, column;
      place(tile, row, column);
      row += (consumer * BLOCKS * 4 + (warp & 3)) * 16;
      UNROLL for (int m = 0; m < BLOCKS; m++) {
        UNROLL for (int b = 0; b < OUT_WIDE / BOX_WIDE; b++) {
          if (lane == 0) asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(BOXES - 1) : "memory");
          __syncwarp();
          const u32 to = box + turn * BOX + place_in_box;
          UNROLL for (int i = 0; i < BOX_WIDE / 16; i++) {   // 16 columns each
            const int at = b * (BOX_WIDE / 2) + i * 8;
            u32 r[4];
            UNROLL for (int j = 0; j < 4; j++) {
              const float low = sums[m][at + 2 * j], high = sums[m][at + 2 * j + 1];
              if constexpr (GATED) r[j] = pair(gated(low, sums[m][WIDE / 4 + at + 2 * j]), gated(high, sums[m][WIDE / 4 + at + 2 * j + 1]));
              else r[j] = pair(low, high);
            }
            const u32 chunk = (2 * i + (lane >> 4)) ^ swizzle;
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to + chunk * 16), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
          }
          asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
          __syncwarp();
          if (lane == 0) copy_out(g.out, column + b * BOX_WIDE, row + m * 64, box + turn * BOX);
          if (++turn == BOXES) turn = 0;
        }
      }
      copy_more(1);
    }
    if (lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  __syncwarp();
  cluster_meets();
}
