// Products of 8-bit codes with 1 to 4 tokens by table lookup, without bank conflicts.
//
// y[t][n] = scale[n] * sum over the code bytes f of row n of <codebook[f % M][code], x[t] group f/M>
//
// Every inner product of a codeword with a group of x is computed once for all rows of a block of
// threads. A stage covers 32 code bytes of every row. Its table [256 codewords][32 positions] is in
// shared memory, and position p lies in bank p. A thread owns rows. At step i of a stage it looks up
// position i ^ (n & 31) of its row n: at every step the 32 lanes of a warp read 32 banks. The tables
// are small products on tensor cores.
//
// A table of one token is float32. Of more tokens, a word holds two float16: reading the tables is
// what the kernel takes its time for. These are divided by a bound, the largest |x| of the stage
// times the largest 1-norm of a codeword, so that no sum of four leaves float16.
//
// `native.py` compiles this file with the constants
//   CODEBOOKS 1, 2 or 4; GROUP 8, 16 or 32; SIZE codewords, at most 256; BF16 0 or 1;
//   TOKENS 1, 2 or 4; THREADS of a block, 128, 256 or 512; ROWS of a thread;
//   BLOCKS that an SM should hold, which limits registers.

#include "common.cuh"

constexpr int POSITIONS = 32;                          // code bytes in a stage
constexpr int GROUPS = POSITIONS / CODEBOOKS;          // of x in a stage
constexpr int COLUMNS = GROUPS / 8;                    // tiles of 8 groups
constexpr int WARPS = THREADS / 32;
constexpr int TILES = 16 / WARPS;                      // of 16 codewords, for a warp and codebook
constexpr int DEPTHS = GROUP > 16 ? GROUP / 16 : 1;    // products that make one of a group
constexpr int A_REGISTERS = GROUP >= 16 ? 4 : 2;       // of an operand of mma
constexpr int B_REGISTERS = A_REGISTERS / 2;
constexpr int CHUNK = CODEBOOKS == 1 ? 2 : 4;          // neighbouring positions that a thread makes
constexpr int CHUNKS = 8 / CHUNK;
constexpr int AHEAD = ROWS < 2 ? ROWS : 2;             // rows whose codes are loaded in advance
constexpr int WORDS = (TOKENS + 1) / 2;                // of a codeword and position in the table
constexpr int CODE_BYTES = 4 * POSITIONS * WORDS;
// Where the next stage's table is written while one is read; two of 64 KiB are more than some GPUs
// have.
constexpr u32 OTHER_TABLE = TOKENS < 4 ? 256 * CODE_BYTES : 0;

#ifndef ON_CPU  // tests/kernels/gpu/native_on_cpu.cpp has these for a CPU
__device__ __forceinline__ float read_float(u32 at) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at));
  return v;
}
__device__ __forceinline__ void read_words(u32 *words, u32 at) {
#if TOKENS == 4
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[WORDS - 1]) : "r"(at));
#else
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[0]) : "r"(at));
#endif
}

// Two float16 in a word: of two floats, their sums, and the floats again.
__device__ __forceinline__ u32 pack_halves(float low, float high) {
  u32 word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ u32 add_halves(u32 a, u32 b) {
  asm("add.rn.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
__device__ __forceinline__ float half_of(u32 word, int which) {
  u16 half = which ? word >> 16 : word;
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(half));
  return f;
}
__device__ __forceinline__ float of_other_lane(float v, int distance) {
  return __shfl_xor_sync(0xffffffff, v, distance);
}
#endif

// What one thread holds of the codewords of its warp.
struct Codewords {
  u32 a[TILES][CODEBOOKS][DEPTHS][A_REGISTERS];
};

__device__ __forceinline__ void load_codewords(Codewords &own, const u16 *codebooks, int warp,
                                               int lane) {
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int book = 0; book < CODEBOOKS; book++)
#pragma unroll
      for (int d = 0; d < DEPTHS; d++)
#pragma unroll
        for (int i = 0; i < A_REGISTERS; i++) {
          int code = (tile * WARPS + warp) * 16 + lane / 4 + 8 * (i & 1);
          int element = d * 16 + 8 * (i >> 1) + 2 * (lane & 3);
          const u16 *from = codebooks + (book * SIZE + code) * GROUP + element;
          own.a[tile][book][d][i] = code < SIZE ? *(const u32 *)from : 0;
        }
}

// What one thread holds of the groups of x in a stage.
struct Inputs {
  u32 b[TOKENS][COLUMNS][DEPTHS][B_REGISTERS];
};

__device__ __forceinline__ void load_inputs(Inputs &in, const u16 *x, int stage, int groups,
                                            int tokens, int lane) {
#pragma unroll
  for (int t = 0; t < TOKENS; t++)
#pragma unroll
    for (int column = 0; column < COLUMNS; column++) {
      int group = stage * GROUPS + column * 8 + lane / 4;
#pragma unroll
      for (int d = 0; d < DEPTHS; d++)
#pragma unroll
        for (int i = 0; i < B_REGISTERS; i++) {
          int element = d * 16 + 8 * i + 2 * (lane & 3);
          const u16 *from = x + ((long long)t * groups + group) * GROUP + element;
          in.b[t][column][d][i] = group < groups && t < tokens ? *(const u32 *)from : 0;
        }
    }
}

// The largest |value| of both halves.
__device__ __forceinline__ float largest(u32 pair) {
  return fmaxf(fabsf(widen(pair)), fabsf(widen(pair >> 16)));
}

// The largest 1-norm of a codeword, for all threads of the block; `room` is a float for each warp.
__device__ __forceinline__ float largest_norm(const Codewords &own, float *room, int warp, int lane) {
  float most = 0;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int book = 0; book < CODEBOOKS; book++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float norm = 0;
#pragma unroll
        for (int d = 0; d < DEPTHS; d++)
#pragma unroll
          for (int i = half; i < A_REGISTERS; i += 2) {
            u32 pair = own.a[tile][book][d][i];
            norm += fabsf(widen(pair)) + fabsf(widen(pair >> 16));
          }
        for (int lanes = 1; lanes < 4; lanes *= 2) norm += of_other_lane(norm, lanes);
        most = fmaxf(most, norm);
      }
  for (int lanes = 4; lanes < 32; lanes *= 2) most = fmaxf(most, of_other_lane(most, lanes));
  if (lane == 0) room[warp] = most;
  __syncthreads();
  for (int other = 0; other < WARPS; other++) most = fmaxf(most, room[other]);
  __syncthreads();  // before the room becomes the table
  return most;
}

// What the sums of each token are divided by in the table of a stage; 1 for one token.
__device__ __forceinline__ void bound_sums(float *bounds, const Inputs &in, float norm) {
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    bounds[t] = 1;
    if (TOKENS == 1) continue;
    float most = 0;
#pragma unroll
    for (int column = 0; column < COLUMNS; column++)
#pragma unroll
      for (int d = 0; d < DEPTHS; d++)
#pragma unroll
        for (int i = 0; i < B_REGISTERS; i++) most = fmaxf(most, largest(in.b[t][column][d][i]));
    for (int lanes = 1; lanes < 32; lanes *= 2) most = fmaxf(most, of_other_lane(most, lanes));
    bounds[t] = most * norm + 1e-30f;
  }
}

// Positions of a thread's chunk: 8 for each codeword, which `multiply` leaves in groups 2j, 2j + 1
// of every column.
__device__ __forceinline__ int first_position(int chunk, int lane) {
  int j = lane & 3;
  return CODEBOOKS == 4 ? 8 * j + CHUNK * chunk : POSITIONS / CHUNKS * chunk + CHUNK * j;
}

__device__ __forceinline__ void swap_if(bool really, u32 *a, u32 *b) {
#pragma unroll
  for (int i = 0; i < CHUNK * WORDS; i++) {
    u32 first = a[i], second = b[i];
    a[i] = really ? second : first;
    b[i] = really ? first : second;
  }
}

// Writes the table of a stage.
__device__ __forceinline__ void make_table(char *to, const Codewords &own, const Inputs &in,
                                           const float *bounds, int warp, int lane) {
  int line = lane / 4;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    float sums[TOKENS][2][8];  // of codewords `line` and `line` + 8 of the tile
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      float factor = 1 / bounds[t];
#pragma unroll
      for (int column = 0; column < COLUMNS; column++)
#pragma unroll
        for (int book = 0; book < CODEBOOKS; book++) {
          float d[4] = {0, 0, 0, 0};
#pragma unroll
          for (int k = 0; k < DEPTHS; k++) multiply(d, own.a[tile][book][k], in.b[t][column][k]);
#pragma unroll
          for (int i = 0; i < 4; i++)
            sums[t][i >> 1][(column * 2 + (i & 1)) * CODEBOOKS + book] =
                TOKENS == 1 ? d[i] : d[i] * factor;
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      char *line_at = to + ((tile * WARPS + warp) * 16 + half * 8 + line) * CODE_BYTES;
      u32 words[CHUNKS][CHUNK * WORDS];
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int w = 0; w < WORDS; w++)
          words[i / CHUNK][i % CHUNK * WORDS + w] =
              TOKENS == 1 ? __float_as_uint(sums[0][half][i])
                          : pack_halves(sums[2 * w][half][i], sums[2 * w + (TOKENS > 1)][half][i]);
      // Lanes of different lines would meet in the same banks: each line begins with another chunk.
#pragma unroll
      for (int bit = 1; bit < CHUNKS; bit *= 2)
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
          if (!(c & bit)) swap_if(line & bit, words[c], words[c | bit]);
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        u32 *v = words[c];
        char *at = line_at + 4 * WORDS * first_position(c ^ (line & (CHUNKS - 1)), lane);
#if CODEBOOKS == 1 && TOKENS < 4
        *(uint2 *)at = make_uint2(v[0], v[1]);
#else
#pragma unroll
        for (int i = 0; i < CHUNK * WORDS; i += 4)
          *(uint4 *)(at + 4 * i) = make_uint4(v[i], v[i + 1], v[i + 2], v[i + 3]);
#endif
      }
    }
  }
}

// 32 code bytes of a row.
struct Codes {
  u32 words[8];
};

// The block of 16 bytes that a lane looks up first comes first.
__device__ __forceinline__ void load_codes(Codes &codes, const uint4 *blocks, int stage, int count,
                                           int rows, int n, int end, int key) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int block = 2 * stage + (half ^ (key >> 4));
    uint4 v = make_uint4(0, 0, 0, 0);
    if (n < end && block < count) v = load_once(blocks + (long long)block * rows + n);
    codes.words[4 * half] = v.x;
    codes.words[4 * half + 1] = v.y;
    codes.words[4 * half + 2] = v.z;
    codes.words[4 * half + 3] = v.w;
  }
}

// Adds what a table at shared address `from` holds for 32 codes of row n, key = n & 31.
//
// Word w of the lane's own order is word w ^ (key >> 2) of the row, and byte b of it byte b ^ key.
// A dot product of bytes takes the byte, multiplies it by 128 and adds the lane's position.
__device__ __forceinline__ void look_up(float *sums, Codes codes, u32 from, int key,
                                        const float *bounds) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
    for (int w = 0; w < 8; w++)
      if (!(w & bit)) {
        u32 first = codes.words[w], second = codes.words[w | bit];
        codes.words[w] = key & 4 * bit ? second : first;
        codes.words[w | bit] = key & 4 * bit ? first : second;
      }
  float found[TOKENS] = {};
#pragma unroll
  for (int i = 0; i < POSITIONS; i += 4) {
    u32 halves[WORDS] = {};
#pragma unroll
    for (int k = i; k < i + 4; k++) {
      u32 take = 128u << (8 * ((k ^ key) & 3)), position = 4 * (k ^ key);
#if TOKENS == 1
      found[0] += read_float(dot_bytes(codes.words[k / 4], take, from + position));
#else
      u32 words[WORDS];
      read_words(words, from + WORDS * dot_bytes(codes.words[k / 4], take, position));
#pragma unroll
      for (int w = 0; w < WORDS; w++) halves[w] = k == i ? words[w] : add_halves(halves[w], words[w]);
#endif
    }
#if TOKENS > 1
#pragma unroll
    for (int t = 0; t < TOKENS; t++) found[t] += half_of(halves[t / 2], t % 2);
#endif
  }
#pragma unroll
  for (int t = 0; t < TOKENS; t++) sums[t] += TOKENS == 1 ? found[t] : found[t] * bounds[t];
}

// Grid (tiles of THREADS * ROWS rows, split). Program (i, s) sums stages s, s + split, ...
//
// x [tokens, groups, GROUP], tokens <= TOKENS; blocks [count, rows] of 16 code bytes; codebooks
// [partitions, CODEBOOKS, SIZE, GROUP]; end0 and end1 as in `row_tile`, the rest as in `Output`.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
lut_gemv(const u16 *__restrict__ x, const uint4 *__restrict__ blocks,
         const u16 *__restrict__ codebooks, const u16 *__restrict__ scales,
         const u16 *__restrict__ bias, u16 *__restrict__ y, float *partial, int *arrived, int rows,
         int groups, int count, int tokens, int end0, int end1) {
  int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  auto [part, first, end] = row_tile(blockIdx.x, THREADS * ROWS, rows, end0, end1);
  int row = first + thread;
  int key = row & 31;  // of all rows of this thread
  int stages = (count + 1) / 2, split = gridDim.y, stage = blockIdx.y;

  Codes codes[AHEAD];
  Codewords own;
  Inputs in;
  float sums[ROWS][TOKENS] = {};
#pragma unroll
  for (int r = 0; r < AHEAD; r++)
    load_codes(codes[r], blocks, stage, count, rows, row + r * THREADS, end, key);
  load_codewords(own, codebooks + part * (CODEBOOKS * SIZE * GROUP), warp, lane);
  float norm = TOKENS > 1 ? largest_norm(own, (float *)table, warp, lane) : 0;
  load_inputs(in, x, stage, groups, tokens, lane);
  float bounds[TOKENS], next_bounds[TOKENS] = {};
  bound_sums(bounds, in, norm);
  make_table(table, own, in, bounds, warp, lane);
  if (stage + split < stages) load_inputs(in, x, stage + split, groups, tokens, lane);
  __syncthreads();
  u32 buffer = 0;
  for (; stage < stages; stage += split) {
    auto prepare = [&] {
      if (stage + split >= stages) return;
      bound_sums(next_bounds, in, norm);
      make_table(table + (buffer ^ OTHER_TABLE), own, in, next_bounds, warp, lane);
      if (stage + 2 * split < stages) load_inputs(in, x, stage + 2 * split, groups, tokens, lane);
    };
    if (OTHER_TABLE) prepare();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      Codes now = codes[r % AHEAD];
      int next = r + AHEAD < ROWS ? stage : stage + split;  // past the last, it loads zeros
      load_codes(codes[r % AHEAD], blocks, next, count, rows,
                 row + (r + AHEAD) % ROWS * THREADS, end, key);
      look_up(sums[r], now, shared_address(table) + buffer, key, bounds);
    }
    __syncthreads();
    if (!OTHER_TABLE) {
      prepare();
      __syncthreads();
    }
    buffer ^= OTHER_TABLE;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) bounds[t] = next_bounds[t];
  }

  finish({scales, bias, y, partial, arrived, rows, tokens}, end, [&](auto visit) {
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int t = 0; t < TOKENS; t++) visit(row + r * THREADS, t, sums[r][t]);
  });
}
