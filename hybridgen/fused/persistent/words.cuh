// Numbers, small wrappers of instructions, and activations that prove by themselves that they are new.
//
// A word is a float cut to 24 bits with an 8-bit sequence number below it. It is written and read with single relaxed
// 32-bit accesses, so value and number cannot come apart, and no fence or barrier is needed to hand it over. Every word
// of a buffer is rewritten each time that the buffer is used, so a stale word carries the number before the one
// expected, and its reader asks again.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define WARPS 8                 // consumer warps
#define THREADS (WARPS * 32)    // consumer threads
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

// ---- the weights' type: two of them in 32 bits
#if HALF
DEVICE float low(u32 w) { float f; asm("{ .reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a; }" : "=f"(f) : "r"(w)); return f; }
DEVICE float high(u32 w) { float f; asm("{ .reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b; }" : "=f"(f) : "r"(w)); return f; }
DEVICE u16 rounded(float f) { u16 r; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(f)); return r; }
DEVICE float widened(u16 b) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(b)); return f; }
#else
DEVICE float low(u32 w) { return __uint_as_float(w << 16); }
DEVICE float high(u32 w) { return __uint_as_float(w & 0xffff0000u); }
DEVICE u16 rounded(float f) { u16 r; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(f)); return r; }
DEVICE float widened(u16 b) { return __uint_as_float((u32)b << 16); }
#endif
DEVICE void unpack(uint4 v, float* f) {
  f[0] = low(v.x); f[1] = high(v.x); f[2] = low(v.y); f[3] = high(v.y);
  f[4] = low(v.z); f[5] = high(v.z); f[6] = low(v.w); f[7] = high(v.w);
}
DEVICE u32 pack(float a, float b) { return (u32)rounded(a) | ((u32)rounded(b) << 16); }

// ---- loads
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE uint4 load_shared(u32 a) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a));
  return v;
}
DEVICE uint4 load_constant(const void* p) {   // what no kernel writes while this one runs
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
DEVICE void load_floats(const float* p, float* f) {   // eight of them
  UNROLL for (int i = 0; i < 2; i++) {
    uint4 v = load_constant(p + 4 * i);
    f[4 * i] = __uint_as_float(v.x); f[4 * i + 1] = __uint_as_float(v.y);
    f[4 * i + 2] = __uint_as_float(v.z); f[4 * i + 3] = __uint_as_float(v.w);
  }
}
DEVICE u32 load_relaxed(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
DEVICE void consumers_meet() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

// ---- the watchdog
// Whoever asks in vain for too long raises the flag, and everybody goes on without waiting: the kernel ends, with
// numbers that nobody may use. The flag lies in host memory that the device addresses.
struct Watch {
  u32* fault;
  u32* given_up;   // in shared memory: whether a thread of this block gave up
  bool dead;
  DEVICE bool gives_up(u32& tries) {
    tries++;
    if (tries % 1024 == 0 && load_relaxed_system() != 0) dead = true;
    if (tries > PATIENCE) {
      asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(fault), "r"(1u) : "memory");
      dead = true;
    }
    if (dead) *(volatile u32*)given_up = 1;
    return dead;
  }
  DEVICE u32 load_relaxed_system() const {
    u32 v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(fault) : "memory");
    return v;
  }
};

// ---- words
DEVICE float value_of(u32 word) { return __uint_as_float(word & ~255u); }
DEVICE void store_word(u32* p, float f, u32 number) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"((__float_as_uint(f) & ~255u) | number) : "memory");
}
struct Words {   // eight neighbours
  uint4 a, b;
  DEVICE void load(const u32* p) { a = load4(p); b = load4(p + 4); }
  DEVICE void assume(u32 number) { a = b = make_uint4(number, number, number, number); }
  DEVICE u32 stale(u32 n) const {
    return ((a.x ^ n) | (a.y ^ n) | (a.z ^ n) | (a.w ^ n) | (b.x ^ n) | (b.y ^ n) | (b.z ^ n) | (b.w ^ n)) & 255u;
  }
  DEVICE void values(float* f) const {
    f[0] = value_of(a.x); f[1] = value_of(a.y); f[2] = value_of(a.z); f[3] = value_of(a.w);
    f[4] = value_of(b.x); f[5] = value_of(b.y); f[6] = value_of(b.z); f[7] = value_of(b.w);
  }
  static DEVICE uint4 load4(const u32* p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
  }
};
// Ask until `stale` is 0: `load` fetches, and `stale` is an expression of what it fetched.
#define ASK(watch, load, stale) { u32 tries_ = 0; for (;;) { load; if (!(stale) || (watch).dead || (watch).gives_up(tries_)) break; } }

// Arrivals in this step: a hint of when asking for words is worth while. Nothing is ordered by it.
struct Arrivals {
  u32* count;
  u32 target;
  DEVICE void arrive() { asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(count), "r"(1) : "memory"); }
  DEVICE void wait(Watch& watch) {
    if (threadIdx.x == 0) {   // one asker a block: more askers slow the answer down
      u32 seen;
      ASK(watch, seen = load_relaxed(count), (int)(seen - target) < 0)
    }
    consumers_meet();
  }
};
