// Products of 8-bit codes with 5 to 64 tokens: codewords go from shared memory to tensor cores.
//
// y^T = W x^T by mma.m16n8k16. W is the left operand, 16 rows of it in a warp's tile; 8 tokens are
// the width of the right one. A product may take its depth in any order, if both operands take the
// same. So lane j of the four that hold a row takes word j of a block of its codes, and 8
// neighbouring weights for its part of two products: one piece, 16 bytes, of a codeword. The right
// operand is then 16 neighbouring bytes of x.
//
// The table [256 codes][8 pieces] holds a codeword's pieces of all codebooks, repeated until a line
// fills the 32 banks. Of the 8 lanes that shared memory serves at a time, each takes another piece
// at every step, key ^ step, and no two meet in a bank. Two codewords are added in the activations'
// type before they are multiplied, rounded once as weights in that type are; of four, the two sums
// are multiplied one after the other.
//
// `native.py` compiles this file with the constants
//   CODEBOOKS 1, 2 or 4; GROUP 8 or 16; SIZE codewords, at most 256; BF16 0 or 1;
//   TOKENS 8, 16, 32 or 64; THREADS of a block; TILES of 16 rows for a warp;
//   BLOCKS that an SM should hold, which limits registers.

#include "common.cuh"

constexpr int HALVES = GROUP / 8;               // pieces of a codeword
constexpr int PIECES = CODEBOOKS * HALVES;      // of all codewords of a group, at most 8
constexpr int LINE = 128;                       // bytes of the table for a code
constexpr int SUMS = CODEBOOKS == 4 ? 2 : 1;    // of codewords, for a weight
constexpr int GROUPS = 4 / CODEBOOKS;           // of a word of codes
constexpr int DEPTH = GROUPS * HALVES;          // pieces of x for a word
constexpr int ROOM = 4 * DEPTH * TOKENS * 16;   // bytes of x for a block
constexpr int STEP = THREADS / (4 * DEPTH);     // tokens that all threads copy at a time
constexpr int COLUMNS = TOKENS / 8;
constexpr int AHEAD = 2;                        // blocks of codes that are loaded in advance
static_assert(PIECES <= 8, "too large codewords");

#ifndef ON_CPU  // tests/kernels/gpu/native_on_cpu.cpp has these for a CPU
__device__ __forceinline__ u32 load_word(const u32 *at) {
  u32 v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(at));
  return v;
}

// Begins to copy 16 bytes to shared memory, or zeros.
__device__ __forceinline__ void copy_piece(u32 to, const void *from, bool really) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(to), "l"(from), "r"(really ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void read_piece(u32 (&v)[4], u32 at) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(at));
}

// The sums of two pairs. Before sm_90, bfloat16 has only a fused one.
__device__ __forceinline__ u32 add_pairs(u32 a, u32 b) {
#if BF16
  asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(a) : "r"(0x3f803f80), "r"(b));
#else
  asm("add.rn.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
#endif
  return a;
}
#endif

// Writes the table.
__device__ __forceinline__ void make_table(u32 to, const u16 *codebooks) {
#pragma unroll
  for (int begin = 0; begin < 8 * SIZE; begin += THREADS) {
    int i = begin + threadIdx.x;
    if (8 * SIZE % THREADS && i >= 8 * SIZE) return;
    int piece = i % PIECES, code = i / 8;
    const u16 *codeword = codebooks + (piece / HALVES * SIZE + code) * GROUP;
    copy_piece(to + 16 * i, codeword + piece % HALVES * 8, true);
  }
}

// The inputs of a block that a thread copies to [DEPTH pieces][TOKENS][4 words], in the order in
// which lanes read them: one piece for every STEP-th token.
struct Inputs {
  int at, group, token;  // `at` counts numbers of x
  u32 to;
};

__device__ __forceinline__ Inputs own_inputs(u32 to, int block, int groups) {
  int j = threadIdx.x & 3, piece = threadIdx.x / 8 % DEPTH;
  int t = threadIdx.x / 8 / DEPTH * 2 + (threadIdx.x >> 2 & 1);
  int group = (block * 4 + j) * GROUPS + piece / HALVES, place = piece ^ (j & (HALVES - 1));
  int at = (t * groups + group) * GROUP + piece % HALVES * 8;
  return {at, group, t, to + (place * TOKENS + t) * 64 + j * 16};
}

// Begins to copy them, and goes on to those of a block `split` further on.
__device__ __forceinline__ void copy_inputs(Inputs &own, u32 buffer, const u16 *x, int split,
                                            int groups, int tokens) {
  int at = own.at;
#pragma unroll
  for (int t = 0; t < TOKENS; t += STEP) {
    bool really = own.group < groups && own.token + t < tokens;
    if (STEP <= TOKENS || own.token < TOKENS) copy_piece(own.to + buffer + t * 64, x + at, really);
    at += STEP * groups * GROUP;
  }
  own.group += split * 4 * GROUPS;
  own.at += split * 4 * GROUPS * GROUP;
}

// A lane's words of codes: of two rows in each tile, 8 rows apart.
struct Codes {
  u32 words[TILES][2];
};

// Loads those at `from` of rows before `end`, and goes on to a block `split` further on.
__device__ __forceinline__ void load_codes(Codes &codes, const u32 *&from, int split, int rows,
                                           int end) {
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int n = 16 * tile + 8 * half;
      codes.words[tile][half] = n < end ? load_word(from + 4 * n) : 0;
    }
  from += split * rows * 4;
}

// What a lane needs to look up: `from`[step] is where its piece of codeword 0 is, and a dot product
// of bytes with `take`[byte] multiplies the byte of its codebook with LINE.
struct Keys {
  u32 from[PIECES], take[4];
};

__device__ __forceinline__ Keys make_keys(u32 at, int lane) {
  Keys keys;
#pragma unroll
  for (int step = 0; step < PIECES; step++) keys.from[step] = at + 16 * ((lane & 7) ^ step);
#pragma unroll
  for (int byte = 0; byte < 4; byte++)
    keys.take[byte] = (u32)LINE << 8 * (byte ^ (lane & (PIECES - 1)) / HALVES);
  return keys;
}

// One piece of the weights of a word, 8 in pairs: the sums of its codewords.
__device__ __forceinline__ void decode(u32 (&weights)[SUMS][4], u32 word, const Keys &keys,
                                       int piece) {
#pragma unroll
  for (int book = 0; book < CODEBOOKS; book++) {
    u32 take = keys.take[piece / HALVES * CODEBOOKS + book], found[4];
    read_piece(found, dot_bytes(word, take, keys.from[book * HALVES + piece % HALVES]));
#pragma unroll
    for (int i = 0; i < 4; i++) {
      u32 &weight = weights[book / 2][i];
      weight = book % 2 ? add_pairs(weight, found[i]) : found[i];
    }
  }
}

// Adds the products of a block, whose inputs are at `inputs` for this lane.
__device__ __forceinline__ void multiply_block(float (&sums)[TILES][COLUMNS][4], const Codes &codes,
                                               const Keys &keys, u32 inputs) {
#pragma unroll
  for (int piece = 0; piece < DEPTH; piece++) {
    u32 weights[TILES][2][SUMS][4];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        decode(weights[tile][half], codes.words[tile][half], keys, piece);
#pragma unroll
    for (int column = 0; column < COLUMNS; column++) {
      u32 x[4];
      read_piece(x, inputs + (piece * COLUMNS + column) * 512);
#pragma unroll
      for (int i = 0; i < 4 * SUMS; i += 2)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          int k = i % 4;
          const u32(&low)[4] = weights[tile][0][i / 4], (&high)[4] = weights[tile][1][i / 4];
          u32 a[4] = {low[k], high[k], low[k + 1], high[k + 1]}, b[2] = {x[k], x[k + 1]};
          multiply(sums[tile][column], a, b);
        }
    }
  }
}

// Grid (tiles of THREADS / 2 * TILES rows, split). Program (i, s) sums blocks s, s + split, ...
//
// x [tokens, groups, GROUP], tokens <= TOKENS; blocks [count, rows] of 16 code bytes; codebooks
// [partitions, CODEBOOKS, SIZE, GROUP]; end0 and end1 as in `row_tile`, the rest as in `Output`.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
tile_gemm(const u16 *__restrict__ x, const uint4 *__restrict__ blocks,
          const u16 *__restrict__ codebooks, const u16 *__restrict__ scales,
          const u16 *__restrict__ bias, u16 *__restrict__ y, float *partial, int *arrived, int rows,
          int groups, int count, int tokens, int end0, int end1) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, split = gridDim.y;
  RowTile own = row_tile(blockIdx.x, THREADS / 2 * TILES, rows, end0, end1);
  int row = own.first + warp * TILES * 16 + lane / 4;
  u32 at = shared_address(table), inputs = at + 256 * LINE, buffer = 0;
  const u32 *from = (const u32 *)(blocks + (long long)blockIdx.y * rows + row) + (lane & 3);
  int left = own.end - row, block = blockIdx.y;  // rows of this lane, and the next block to load

  Codes codes[AHEAD];
#pragma unroll
  for (int i = 0; i < AHEAD; i++, block += split)
    load_codes(codes[i], from, split, rows, block < count ? left : 0);
  make_table(at, codebooks + own.part * (CODEBOOKS * SIZE * GROUP));
  Inputs copied = own_inputs(inputs, blockIdx.y, groups);
  copy_inputs(copied, 0, x, split, groups, tokens);
  Keys keys = make_keys(at, lane);
  float sums[TILES][COLUMNS][4] = {};
  while (block - AHEAD * split < count)
#pragma unroll
    for (int i = 0; i < AHEAD; i++, block += split) {
      if (block - AHEAD * split >= count) break;
      await_copies();
      __syncthreads();
      copy_inputs(copied, buffer ^ ROOM, x, split, groups, tokens);  // past the last, zeros
      multiply_block(sums, codes[i], keys, inputs + buffer + 16 * lane);
      load_codes(codes[i], from, split, rows, block < count ? left : 0);
      buffer ^= ROOM;
    }
  await_copies();
  finish({scales, bias, y, partial, arrived, rows, tokens}, own.end, [&](auto visit) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int column = 0; column < COLUMNS; column++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          visit(row + 16 * tile + 8 * (i >> 1), 8 * column + 2 * (lane & 3) + (i & 1),
                sums[tile][column][i]);
  });
}
