// csrc/lut_gemv.cu as a program for the CPU: one thread of the system for each thread of a block.

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define ON_CPU
#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

struct uint4 { unsigned x, y, z, w; };
struct uint2 { unsigned x, y; };
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
struct Index { int x, y; };

static thread_local Index threadIdx;
static Index blockIdx, gridDim;
alignas(128) static char table[2 * 256 * 32 * 4];
static bool last;
static std::barrier<> *of_block, *of_warp[THREADS / 32];
static std::mutex atomic;

static void __syncthreads() { of_block->arrive_and_wait(); }
static void __threadfence() {}
static float __ldcg(const float *at) { return *at; }
template <class T> static T atomicAdd(T *at, T value) {
  std::lock_guard guard(atomic);
  T before = *at;
  *at += value;
  return before;
}
static uint4 load_once(const uint4 *at) { return *at; }
static float as_float(uint16_t v) {
  _Float16 half;
  memcpy(&half, &v, 2);
  return half;
}
static uint16_t as_half(float v) {
  _Float16 half = v;
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
static float widen(uint16_t v) {
#if BF16
  uint32_t wide = (uint32_t)v << 16;
  float f;
  memcpy(&f, &wide, 4);
  return f;
#else
  return as_float(v);
#endif
}
static uint16_t narrow(float v) {
#if BF16
  uint32_t wide;
  memcpy(&wide, &v, 4);
  return (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
#else
  return as_half(v);
#endif
}
static uint32_t dot_bytes(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
  return c;
}
static uint32_t shared_address(const void *at) { return (const char *)at - table; }

static uint32_t pack_halves(float low, float high) { return as_half(low) | as_half(high) << 16; }
static uint32_t add_halves(uint32_t a, uint32_t b) {
  return pack_halves(as_float(a) + as_float(b), as_float(a >> 16) + as_float(b >> 16));
}
static float half_of(uint32_t word, int which) { return as_float(which ? word >> 16 : word); }
static uint32_t __float_as_uint(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits;
}

// The banks that the lanes of a warp read at each of their lookups.
static thread_local std::vector<int> banks;
static void read_words(uint32_t *words, uint32_t at) {
  banks.push_back(at / 4 % 32);
  memcpy(words, table + at, 4 * ((TOKENS + 1) / 2));
}
static float read_float(uint32_t at) {
  uint32_t word;
  read_words(&word, at);
  float v;
  memcpy(&v, &word, 4);
  return v;
}

static float of_other_lane(float v, int distance) {
  static float all[THREADS / 32][32];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  all[warp][lane] = v;
  of_warp[warp]->arrive_and_wait();
  float other = all[warp][lane ^ distance];
  of_warp[warp]->arrive_and_wait();
  return other;
}

// Operands in the order of the PTX manual, "Matrix Fragments for mma.m16n8k8" and "...m16n8k16".
static void multiply(float *d, const uint32_t *a, const uint32_t *b) {
  constexpr int A = GROUP >= 16 ? 4 : 2, B = A / 2;
  static float all_a[THREADS / 32][32][2 * A], all_b[THREADS / 32][32][2 * B];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int i = 0; i < A; i++)
    for (int j = 0; j < 2; j++) all_a[warp][lane][2 * i + j] = widen(a[i] >> 16 * j);
  for (int i = 0; i < B; i++)
    for (int j = 0; j < 2; j++) all_b[warp][lane][2 * i + j] = widen(b[i] >> 16 * j);
  of_warp[warp]->arrive_and_wait();
  for (int i = 0; i < 4; i++) {
    int row = lane / 4 + 8 * (i >> 1), column = 2 * (lane & 3) + (i & 1);
    for (int k = 0; k < 4 * A; k++) {
      int owner = k % 8 / 2, part = 2 * (k / 8);
      d[i] += all_a[warp][row % 8 * 4 + owner][2 * (part + row / 8) + k % 2] *
              all_b[warp][column * 4 + owner][part + k % 2];
    }
  }
  of_warp[warp]->arrive_and_wait();
}

#include "lut_gemv.cu"

// Runs a grid. Returns the most lookups of a warp that met in one bank.
extern "C" int run(const u16 *x, const uint4 *blocks, const u16 *codebooks, const u16 *scales,
                   const u16 *bias, u16 *y, float *partial, int *arrived, int rows, int groups,
                   int count, int tokens, int end0, int end1, int tiles, int split) {
  gridDim = {tiles, split};
  std::barrier<> block(THREADS);
  of_block = &block;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  for (auto &barrier : of_warp) {
    warps.push_back(std::make_unique<std::barrier<>>(32));
    barrier = warps.back().get();
  }
  int worst = 0;
  for (int i = 0; i < tiles; i++)
    for (int s = 0; s < split; s++) {
      blockIdx = {i, s};
      std::vector<std::vector<int>> read(THREADS);
      std::vector<std::thread> threads;
      for (int t = 0; t < THREADS; t++)
        threads.emplace_back([&, t] {
          threadIdx = {t, 0};
          lut_gemv(x, blocks, codebooks, scales, bias, y, partial, arrived, rows, groups, count,
                   tokens, end0, end1);
          read[t] = banks;
        });
      for (auto &thread : threads) thread.join();
      for (int warp = 0; warp < THREADS; warp += 32)
        for (size_t step = 0; step < read[warp].size(); step++) {
          int met[32] = {};
          for (int lane = 0; lane < 32; lane++)  // of two words, 16 lanes are served at a time
            worst = std::max(worst, ++met[read[warp + lane][step]]);
        }
    }
  return worst;
}
