// What the products of 8-bit codes share: types, tensor cores, tiles of rows, and the last sums.

#pragma once

typedef unsigned int u32;
typedef unsigned short u16;

#ifndef ON_CPU  // tests/kernels/gpu/native_on_cpu.cpp has these for a CPU
extern __shared__ __align__(128) char table[];

__device__ __forceinline__ uint4 load_once(const uint4 *at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}

#if BF16
#define OPERANDS "f32.bf16.bf16.f32"
#else
#define OPERANDS "f32.f16.f16.f32"
#endif
// d [16, 8] += a [16, 16] b [16, 8]; one thread's part of each.
__device__ __forceinline__ void multiply(float *d, const u32 (&a)[4], const u32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col." OPERANDS
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same for a [16, 8] and b [8, 8].
__device__ __forceinline__ void multiply(float *d, const u32 (&a)[2], const u32 (&b)[1]) {
  asm("mma.sync.aligned.m16n8k8.row.col." OPERANDS
      " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

__device__ __forceinline__ float widen(u16 v) {
#if BF16
  return __uint_as_float((u32)v << 16);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
#endif
}

__device__ __forceinline__ u16 narrow(float v) {
  u16 h;
#if BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
#endif
  return h;
}

__device__ __forceinline__ u32 dot_bytes(u32 a, u32 b, u32 c) { return __dp4a(a, b, c); }

// 32-bit addresses of shared memory: with pointers, every lookup would add the table's own first.
__device__ __forceinline__ u32 shared_address(const void *at) {
  return (u32)__cvta_generic_to_shared(at);
}
#endif

// The rows of a program: [first, first + size), of which those before `end` are its partition's.
struct RowTile {
  int part, first, end;
};

// Partitions are rows [0, end0), [end0, end1), [end1, rows), and no tile straddles two.
__device__ __forceinline__ RowTile row_tile(int tile, int size, int rows, int end0, int end1) {
  int tiles0 = (end0 + size - 1) / size, tiles1 = tiles0 + (end1 - end0 + size - 1) / size;
  int part = (tile >= tiles0) + (tile >= tiles1);
  int begin = part == 0 ? 0 : part == 1 ? end0 : end1;
  int end = part == 0 ? end0 : part == 1 ? end1 : rows;
  return {part, begin + (tile - (part == 0 ? 0 : part == 1 ? tiles0 : tiles1)) * size, end};
}

// Where results go: scales [rows]; bias [rows] or null; y [tokens, rows]. With split > 1 programs
// add up in partial [tokens, rows], and the last to arrive writes y; both partial and arrived
// [tiles] are zero before and after.
struct Output {
  const u16 *scales, *bias;
  u16 *y;
  float *partial;
  int *arrived;
  int rows, tokens;
};

// Writes the thread's results. `each(visit)` calls visit(row, token, sum) for all of its sums.
template <class Each>
__device__ __forceinline__ void finish(const Output &out, int end, Each each) {
  __shared__ bool last;
  int split = gridDim.y, tile = blockIdx.x;
  if (split > 1) {
    each([&](int n, int t, float sum) {
      if (n < end && t < out.tokens) atomicAdd(out.partial + t * out.rows + n, sum);
    });
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(out.arrived + tile, 1) == split - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (threadIdx.x == 0) out.arrived[tile] = 0;
  }
  each([&](int n, int t, float sum) {
    if (n >= end || t >= out.tokens) return;
    int at = t * out.rows + n;
    if (split > 1) {
      sum = __ldcg(out.partial + at);
      out.partial[at] = 0;
    }
    out.y[at] = narrow(sum * widen(out.scales[n]) + (out.bias ? widen(out.bias[n]) : 0));
  });
}
