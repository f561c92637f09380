// Partial sums of a model that is spread over RANKS GPUs of a host: each rank writes its own into the memory of all
// others, mapped here, and reads theirs in its own. What waits is the thread that owns the row; the producers go on
// filling the ring meanwhile.
//
// A packet is 8 bytes: a float, and above it the number of the layer since the kernel was loaded. It is written and read
// by single accesses, so that the two cannot come apart, and no fence is needed. Attention's and the MLP's projection have
// packets of their own. A rank writes a packet again one layer later, when it has those of the other projection in between:
// who sent these had read the packet before.
#pragma once
#include "words.cuh"

#ifndef RANKS
#define RANKS 1
#endif
enum { OF_ATTENTION, OF_MLP };   // the projections whose sums meet

#if RANKS > 1
struct Peers {
  i64 rank;
  u64* inboxes[RANKS];   // of each rank, as this one addresses it: [2 projections][RANKS, who wrote][COUNT]

  // `values` of this rank become the sums over all ranks, in their order: the same bits on all of them. COUNT packets are
  // of a projection and rank; this thread's are the VALUES ones from `at` on, a multiple of VALUES.
  template <int COUNT, int VALUES> DEVICE void add_up(int projection, int at, u32 number, float (&values)[VALUES], Watch& watch) const {
    static_assert(VALUES == 1 || VALUES == 2, "packets of a thread");
    const u64 mark = (u64)number << 32;
    const u64 *inbox = inboxes[rank] + (i64)projection * RANKS * COUNT + at;
    const i64 place = ((i64)projection * RANKS + rank) * COUNT + at;
    UNROLL for (int i = 1; i < RANKS; i++) {
      u64* to = inboxes[(rank + i) % RANKS] + place;
      if (VALUES == 1) asm volatile("st.relaxed.sys.global.b64 [%0], %1;" ::"l"(to), "l"(mark | __float_as_uint(values[0])) : "memory");
      else asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(to), "l"(mark | __float_as_uint(values[0])), "l"(mark | __float_as_uint(values[VALUES - 1])) : "memory");
    }
    float sum[VALUES] = {};
    UNROLL for (int from = 0; from < RANKS; from++) {
      if (from == rank) {
        UNROLL for (int v = 0; v < VALUES; v++) sum[v] += values[v];
        continue;
      }
      const u64* packet = inbox + (i64)from * COUNT;
      u64 found[2] = {mark, mark};
      ASK(watch,
        if (VALUES == 1) asm volatile("ld.relaxed.sys.global.b64 %0, [%1];" : "=l"(found[0]) : "l"(packet) : "memory");
        else asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];" : "=l"(found[0]) , "=l"(found[1]) : "l"(packet) : "memory"),
        (u32)(found[0] >> 32) != number || (u32)(found[1] >> 32) != number)
      UNROLL for (int v = 0; v < VALUES; v++) sum[v] += __uint_as_float((u32)found[v]);
    }
    UNROLL for (int v = 0; v < VALUES; v++) values[v] = sum[v];
  }
};
#endif
