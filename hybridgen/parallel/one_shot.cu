// Small sums, and small gathers, over the GPUs of a host: each rank writes what it has into the memory of all others,
// and reads what they wrote into its own.
//
// A packet is 8 bytes of data in 16: two words of 8 bytes, each 4 bytes of data with the launch's number above them. A
// word is written and read by single accesses of 8 bytes, so that number and data cannot come apart: no fence, no
// barrier, and one way over NVLink (NCCL calls its protocol of this kind LL).
//
// Launches alternate between two halves of the memory. A rank writes a half again only after it got the packets of the
// launch in between, which the others sent after they had read that half. That holds block by block: a block has its own
// packets and its own number, so launches of other sizes may come between.
typedef unsigned int u32;
typedef unsigned long long u64;

struct Packet {
  u64 low, high;
};

struct Parameters {
  const u64* source;   // what this rank has, in groups of 8 bytes
  u64* out;            // the sum; of a gather, the groups of all ranks, one rank behind the other
  u32* numbers;        // [BLOCKS]: of the last launch, by block
  const u32* ended;    // host memory: not 0 once the group has ended, so that nobody waits any more
  u64 groups;
  u64 rank;
  u64 gathers;
  Packet* inboxes[SIZE];   // [2, BLOCKS, SIZE, THREADS] of each rank, the third by who wrote
  // Of a sum that goes to a residual stream: float32 [rows, width], what the next projection reads of it, the norm's gain
  // or nothing, and sums of squares [blocks of a row, 16].
  float* state;
  u64* handed;
  const float* gain;
  float* squares;
  u64 row_groups, row_blocks;
  double factor;
};

__device__ __forceinline__ void send(Packet* to, u64 group, u32 number) {
  u64 low = (group & 0xffffffffull) | ((u64)number << 32), high = (group >> 32) | ((u64)number << 32);
  asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(to), "l"(low), "l"(high) : "memory");
}

__device__ __forceinline__ u64 receive(const Packet* from, u32 number, const u32* ended) {
  u64 low, high;
  for (u32 tries = 1;; tries++) {
    asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];" : "=l"(low), "=l"(high) : "l"(from) : "memory");
    if ((u32)(low >> 32) == number && (u32)(high >> 32) == number) break;
    if (tries % 4096 == 0 && *(const volatile u32*)ended != 0) break;
  }
  return (low & 0xffffffffull) | (high << 32);
}

#if DTYPE == 0   // float32
#define VALUES 2
__device__ __forceinline__ void add(float* sum, u64 group) {
  sum[0] += __uint_as_float((u32)group);
  sum[1] += __uint_as_float((u32)(group >> 32));
}
__device__ __forceinline__ u64 packed(const float* sum) {
  return (u64)__float_as_uint(sum[0]) | ((u64)__float_as_uint(sum[1]) << 32);
}
#else
#define VALUES 4
#if DTYPE == 1   // bfloat16
__device__ __forceinline__ float widened(u64 bits) { return __uint_as_float((u32)(bits & 0xffff) << 16); }
__device__ __forceinline__ u64 rounded(float f) {
  unsigned short r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(f));
  return r;
}
#else            // float16
__device__ __forceinline__ float widened(u64 bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((unsigned short)(bits & 0xffff)));
  return f;
}
__device__ __forceinline__ u64 rounded(float f) {
  unsigned short r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(f));
  return r;
}
#endif
__device__ __forceinline__ void add(float* sum, u64 group) {
  for (int i = 0; i < VALUES; i++) sum[i] += widened(group >> (16 * i));
}
__device__ __forceinline__ u64 packed(const float* sum) {
  u64 group = 0;
  for (int i = 0; i < VALUES; i++) group |= rounded(sum[i]) << (16 * i);
  return group;
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS) one_shot(const __grid_constant__ Parameters p) {
  const u32 block = blockIdx.x, thread = threadIdx.x;
  u32 number = p.numbers[block] + 1;
  if (number == 0) number = 2;   // 0 is what fresh memory has; the halves still alternate
  const u64 group = (u64)block * THREADS + thread;
  const u64 place = ((u64)(number & 1) * BLOCKS + block) * SIZE * THREADS + thread;
  const u32 rank = (u32)p.rank;
  if (group < p.groups) {
    const u64 own = p.source[group];
    for (u32 i = 1; i < SIZE; i++) {
      const u32 peer = (rank + i) % SIZE;
      send(p.inboxes[peer] + place + rank * THREADS, own, number);
    }
    const Packet* inbox = p.inboxes[rank] + place;
    float sum[VALUES] = {};
    for (u32 from = 0; from < SIZE; from++) {   // in the order of the ranks: the same bits on all of them
      const u64 found = from == rank ? own : receive(inbox + from * THREADS, number, p.ended);
      if (p.gathers) p.out[from * p.groups + group] = found;
      else add(sum, found);
    }
    if (!p.gathers) p.out[group] = packed(sum);
  }
  __syncthreads();   // all threads have read the number
  if (thread == 0) p.numbers[block] = number;
}

// What a layer of the chain does behind a projection: state += factor * sum over the ranks, handed = state * gain, and sums
// of squares. A block has a part of a row. The next kernel may start at once and ask for its weights; this one waits for
// the projection's end itself.
extern "C" __global__ void __launch_bounds__(THREADS) one_shot_add(const __grid_constant__ Parameters p) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  __shared__ float squares_of[THREADS / 32];
  const u32 block = blockIdx.x, thread = threadIdx.x, rank = (u32)p.rank;
  const u32 row = block / (u32)p.row_blocks, part = block % (u32)p.row_blocks;
  u32 number = p.numbers[block] + 1;
  if (number == 0) number = 2;
  const u64 at = (u64)part * THREADS + thread, group = row * p.row_groups + at;
  const u64 place = ((u64)(number & 1) * BLOCKS + block) * SIZE * THREADS + thread;
  float squares = 0.f;
  if (at < p.row_groups) {
    const u64 own = p.source[group];
    for (u32 i = 1; i < SIZE; i++) send(p.inboxes[(rank + i) % SIZE] + place + rank * THREADS, own, number);
    float* state = p.state + group * VALUES;
    float values[VALUES], gain[VALUES], sum[VALUES] = {};
    for (int i = 0; i < VALUES; i++) {
      values[i] = state[i];
      gain[i] = p.gain ? p.gain[at * VALUES + i] : 1.f;
    }
    const Packet* inbox = p.inboxes[rank] + place;
    for (u32 from = 0; from < SIZE; from++) add(sum, from == rank ? own : receive(inbox + from * THREADS, number, p.ended));
    for (int i = 0; i < VALUES; i++) {
      values[i] += (float)p.factor * sum[i];
      state[i] = values[i];
      squares += values[i] * values[i];
      values[i] *= gain[i];
    }
    p.handed[group] = packed(values);
  }
  for (int o = 16; o; o >>= 1) squares += __shfl_xor_sync(~0u, squares, o);
  if (thread % 32 == 0) squares_of[thread / 32] = squares;
  __syncthreads();   // and all threads have read the number
  if (thread == 0) {
    float total = 0.f;
    for (int i = 0; i < THREADS / 32; i++) total += squares_of[i];
    p.squares[part * 16 + row] = total;
    p.numbers[block] = number;
  }
}
