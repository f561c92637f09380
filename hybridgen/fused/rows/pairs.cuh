// Activations of up to eight columns, as words of two 16-bit numbers that prove by themselves that they are new.
//
// A pair word is what a tensor-core product wants, two neighbours in the halves of a register, and holds a sequence
// number of 2 bits. As bf16: of the two upper exponent bits of a number between 2^-63 and 2^64 one is the other's
// complement, so bit 13 of each half is free. As fp16: in the last bit of each mantissa. Like the float words of
// words.cuh they are single relaxed accesses, and every word of a buffer is rewritten each time that the buffer is used,
// so a stale one carries the number before the one expected.
#pragma once
#include "words.cuh"

#define COLUMNS 8   // of a step at most: the width of a product

DEVICE int thread_index() {   // hides the number, so that address arithmetic is not moved out of the layers and spilled
  int t = threadIdx.x;
  asm volatile("" : "+r"(t));
  return t;
}
template <int LUT> DEVICE u32 lop3(u32 a, u32 b, u32 c) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(LUT));
  return r;
}
DEVICE u32 pack_bf16(float l, float h) { u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(h), "f"(l)); return r; }
DEVICE u32 pack_half(float l, float h) { u32 r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(h), "f"(l)); return r; }
DEVICE float of_half(u32 h) { float f; asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(f) : "r"(h)); return f; }
DEVICE float within_bf16(float f) {   // 2^-63 <= |f| < 2^64, so that bit 13 is free
  const u32 u = __float_as_uint(f);
  return __uint_as_float(min(max(u & 0x7fffffffu, 0x20000000u), 0x5f7f0000u) | (u & 0x80000000u));
}
DEVICE float within_half(float f) {
  float r;
  asm("{ .reg .f32 t; min.NaN.f32 t, %1, %2; max.NaN.f32 %0, t, %3; }" : "=f"(r) : "f"(f), "f"(65504.f), "f"(-65504.f));
  return r;
}
// What passes for infinite: a number that is none is cut to 2^64 in a bf16 pair, and shall end as none all the same.
DEVICE float or_none(float f) { return fabsf(f) < 1e15f ? f : __int_as_float(0x7fffffff); }

// A format F of weights: their bits; 32 more where 8 bits are signed integers in place of e4m3; 64 more where 8 bits have a
// scale for each group of inputs, as 4 bits have, in place of one for each output. Of groups: 128 more where they have zero
// points of their own; 256 more where scales are float16, 512 where they are float32 (else bf16); 1024 where the codes are e2m1
// and the scales exponents (MXFP4); from 4096 on a 32nd of the inputs of a group. 2048 more where 16 bits meet words of fp16.
__host__ __device__ constexpr int bits_of(int f) { return f & 31; }
__host__ __device__ constexpr bool integers(int f) { return f & 32; }
__host__ __device__ constexpr bool has_groups(int f) { return bits_of(f) == 4 || (f & 64); }
__host__ __device__ constexpr bool has_zeros(int f) { return f & 128; }
__host__ __device__ constexpr bool is_e2m1(int f) { return f & 1024; }
__host__ __device__ constexpr bool from_half(int f) { return (f & 2048) && !HALF; }   // words are fp16, and products are not
__host__ __device__ constexpr int group_of(int f) { return f >> 12 ? (f >> 12) * 32 : 128; }
__host__ __device__ constexpr int scale_bytes(int f) { return is_e2m1(f) ? 1 : (f & 512 ? 4 : 2) * (has_zeros(f) ? 2 : 1); }

// Numbers for weights of a format: 16 bits are multiplied in the model's dtype, fewer in fp16, where their codes are exact.
// Where layers have several formats all words are fp16: marks are in the same places then, whoever reads a buffer next.
template <int F> struct Pairs {
  static constexpr bool AS_HALF = bits_of(F) != 16 || HALF || from_half(F);
  static constexpr u32 MASK = AS_HALF ? 0x00010001u : 0x20002000u;
  static DEVICE u32 mark(u32 n) { return AS_HALF ? (n & 1) | ((n & 2) << 15) : ((n & 1) << 13) | ((n & 2) << 28); }
  static DEVICE u32 number(u32 w) { return AS_HALF ? w & ~MASK : lop3<0xCA>(MASK, ~(w >> 1), w); }   // MASK ? ~(w >> 1) : w
  static DEVICE void store(u32* p, float a, float b, u32 marked) {
    const u32 w = AS_HALF ? pack_half(within_half(a), within_half(b)) : pack_bf16(within_bf16(a), within_bf16(b));
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"((w & ~MASK) | marked) : "memory");
  }
  // Where the pair of inputs k and k + 1 of a column lies: in blocks of 32 inputs, so that the four words which a lane
  // needs for a block are 16 neighbouring bytes; their order is that in which the codes of a weight leave shared memory.
  static DEVICE int place(int p) {
    return bits_of(F) == 16 ? ((p & 3) << 2) | (p >> 2) : bits_of(F) == 8 ? (((p >> 1) & 3) << 2) | ((p >> 3) << 1) | (p & 1) : p;
  }
  static DEVICE int index(int k, int column) { return ((k >> 5) * COLUMNS + column) * 16 + place((k & 31) >> 1); }
};
