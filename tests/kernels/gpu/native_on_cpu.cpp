// A kernel of csrc/ (KERNEL in the file SOURCE) as a program for the CPU: one thread of the system
// for each thread of a block.

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
#define __shared__ static
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
alignas(128) static char table[96 << 10];
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
static uint32_t load_word(const uint32_t *at) { return *at; }
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
static uint32_t add_pairs(uint32_t a, uint32_t b) {
  return narrow(widen(a) + widen(b)) | narrow(widen(a >> 16) + widen(b >> 16)) << 16;
}
static float half_of(uint32_t word, int which) { return as_float(which ? word >> 16 : word); }
static uint32_t __float_as_uint(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits;
}

// What the lanes of a warp read from shared memory, in order.
struct Read { int bank, words; };
static thread_local std::vector<Read> reads;
static void read_shared(uint32_t *words, uint32_t at, int count) {
  reads.push_back({int(at / 4 % 32), count});
  memcpy(words, table + at, 4 * count);
}
static void read_words(uint32_t *words, uint32_t at) { read_shared(words, at, (TOKENS + 1) / 2); }
static void read_piece(uint32_t (&words)[4], uint32_t at) { read_shared(words, at, 4); }
static void copy_piece(uint32_t to, const void *from, bool really) {
  if (really) memcpy(table + to, from, 16);
  else memset(table + to, 0, 16);
}
static void await_copies() {}
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
template <size_t A, size_t B>
static void multiply(float *d, const uint32_t (&a)[A], const uint32_t (&b)[B]) {
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

#include SOURCE

// Runs a grid. Returns the most reads that met in one bank, of those served at a time: 32 of one
// word, 16 of two, 8 of four.
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
      std::vector<std::vector<Read>> read(THREADS);
      std::vector<std::thread> threads;
      for (int t = 0; t < THREADS; t++)
        threads.emplace_back([&, t] {
          threadIdx = {t, 0};
          KERNEL(x, blocks, codebooks, scales, bias, y, partial, arrived, rows, groups, count,
                 tokens, end0, end1);
          read[t] = reads;
        });
      for (auto &thread : threads) thread.join();
      for (int warp = 0; warp < THREADS; warp += 32)
        for (size_t step = 0; step < read[warp].size(); step++) {
          int met[32] = {}, words = read[warp][step].words;
          for (int lane = 0; lane < 32; lane++) {
            if (lane % (32 / words) == 0) std::fill(met, met + 32, 0);
            worst = std::max(worst, ++met[read[warp + lane][step].bank]);
          }
        }
    }
  return worst;
}
