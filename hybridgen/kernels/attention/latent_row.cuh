// What the kernels of `latent_row.cu` ask of a multiprocessor of compute capability 9. NUMBER: `bf16` or `f16`.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define SHARED_MEMORY(name) extern __shared__ __align__(128) u8 name[];
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

struct Pair { float x, y; };
struct __align__(16) Four { float x, y, z, w; };

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warps() { asm volatile("bar.sync 1, 256;" ::: "memory"); }   // the eight that compute
DEVICE void sync_warp() { __syncwarp(); }
DEVICE float from_lane(float value, int lane) { return __shfl_sync(~0u, value, lane); }

// The kernels in front have ended, and what they wrote is there.
DEVICE void wait_for_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The kernel behind may start, as soon as there is room.
DEVICE void release_kernels() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

DEVICE u32 address_of(const void* shared) { return (u32)__cvta_generic_to_shared(shared); }
DEVICE void make_barrier(u64* barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(address_of(barrier)), "r"(count) : "memory");
}
DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(address_of(barrier)) : "memory");
}
// Arrive, and wait for so many bytes more.
DEVICE void expect_bytes(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(address_of(barrier)), "r"(bytes) : "memory");
}
DEVICE void wait_barrier(u64* barrier, u32 parity) {
  asm volatile(
    "{\n.reg .pred done;\nagain:\n"
    "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
    "@!done bra again;\n}" :: "r"(address_of(barrier)), "r"(parity) : "memory");
}
DEVICE void ask_for(const void* from, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(from), "r"(bytes) : "memory");
}
DEVICE void copy_in(u8* target, const void* from, u32 bytes, u64* barrier) {
  asm volatile(
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
    :: "r"(address_of(target)), "l"(from), "r"(bytes), "r"(address_of(barrier)) : "memory");
}

DEVICE void load_matrices(u32 (&to)[4], const u8* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
    : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address_of(from)) : "memory");
}
DEVICE void load_two_matrices(u32 (&to)[2], const u8* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
    : "=r"(to[0]), "=r"(to[1]) : "r"(address_of(from)) : "memory");
}
DEVICE void load_turned_matrices(u32 (&to)[4], const u8* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
    : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address_of(from)) : "memory");
}
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
DEVICE void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TEXT(NUMBER) "." TEXT(NUMBER) ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
    : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE u32 rounded_pair(float low, float high) {
  u32 both;
  asm("cvt.rn." TEXT(NUMBER) "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
DEVICE u16 rounded(float value) { return (u16)rounded_pair(value, 0.0f); }
DEVICE float power_of_2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float logarithm_of_2(float x) { return __log2f(x); }
DEVICE void store_pair(float* to, float x, float y) { *(float2*)to = make_float2(x, y); }
DEVICE Pair load_pair(const float* from) { const float2 both = *(const float2*)from; return {both.x, both.y}; }
DEVICE Four load_four(const float* from) { return *(const Four*)from; }
