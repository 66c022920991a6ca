/* Decoding of additive-codebook weights on CPUs: what the source files share.
 *
 * Packed codes ("tiles"): output rows in tiles of 64, every partition (source layer of a fused
 * one) padded to whole tiles; groups of inputs in blocks of J = max(1, 16 / books).
 *     codes[block][tile][group in block][book][row in tile]     one byte each
 * A lookup table holds, for one input group and one book, x_group . entry for the 256 entries of
 * the book; a row's product is the sum of one table entry per group and book. The tables of one
 * block fit the first-level cache and serve all tiles of a thread, so they are never shared.
 */
#ifndef PVRT_CPU_H
#define PVRT_CPU_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))

#define TILE 64
#define ENTRIES 256
#define LANES 8 /* tokens that one vector table serves */
#define ATTEND_ROWS 4 /* query heads that share what is read of keys and values */

enum { F32 = 0, F16 = 1, BF16 = 2 };

/* GNU C's own vectors */
typedef float floats8 __attribute__((vector_size(32), aligned(4)));
typedef float floats4 __attribute__((vector_size(16), aligned(4)));
typedef int32_t ints4 __attribute__((vector_size(16)));
typedef int32_t ints8 __attribute__((vector_size(32)));
typedef int16_t shorts4 __attribute__((vector_size(8)));
typedef int16_t shorts8 __attribute__((vector_size(16)));
#define AT(p) (*(const floats8 *)(p))

static inline float sum8(floats8 s) {
    return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
}

/* A packed weight. tables: fp32 books transposed [parts][books][group][ENTRIES]; scales [out]. */
typedef struct {
    const uint8_t *codes;
    const float *tables;
    const float *scales;
    const int64_t *rows; /* output rows of every partition */
    int64_t parts, books, group, groups;
} tiled_weight;

/* A weight in the checkpoint's layout: codes [out][groups][books], books [parts][books][size][group]. */
typedef struct {
    const void *codes;
    const void *codebooks;
    const float *scales;
    const int64_t *rows;
    int64_t parts, books, group, groups, size, code_bytes, dtype;
    int64_t tiled; /* codes are in tiles after all: for decoding only */
} plain_weight;

/* Codebooks to search, with what does not depend on the value wanted. later_m is the sum of the
 * means of the books after m. */
typedef struct {
    const float *tables;   /* [books][group][size] entries, transposed */
    const float *norms;    /* [books][size] squared lengths */
    const float *products; /* [books i][books m][size][size] twice the products of entries, i < m */
    const float *later;    /* [books][group] */
    const float *pull;     /* [books m][books i][size] twice the products of entries i and later_m */
    int64_t books, size, group;
} sums;

/* What scores entries: offset + x . column, for `size` entries and x of `length` numbers. */
typedef struct {
    const float *columns, *offsets; /* [length][size], [size] */
    int64_t length, size;
} scores;

/* Values wanted for groups, the codes that they have, the two nearest sums found, and which of the
 * three they are to get: moves tells whether the codes are new, margins half of how much farther the
 * next sum is. With draws, numbers from [0, 1), the next sum is taken with the chance that makes
 * rounding unbiased along the line between the two, and its margin is 0. */
typedef struct {
    const float *wanted, *entries;  /* [n][group], [books][size][group] */
    const float *draws;             /* [n] or NULL */
    const uint8_t *present, *found; /* [n][books], [n][2][books] */
    uint8_t *codes, *moves;         /* [n][books], [n] */
    float *sums, *margins;          /* [n][group], [n] */
    int64_t books, size, group;
} choice;

/* A latent weight's step against its gradient over the root of its moment; all [groups][group].
 * rate: of the direction as it is. A part has part_groups groups, and its own sums [parts][2]. */
typedef struct {
    const float *grad, *decoded;
    float *moment, *latent, *distance;
    double *sums;
    float beta, rate;
    int64_t group, groups, part_groups;
} latent_step;

/* What an instruction set brings. Tables of one token are opaque to everything else. */
typedef struct {
    const char *name;
    size_t table_bytes; /* of one group and book */
    size_t extra_bytes; /* of one block, after its tables */
    /* How far an entry of one token's tables may be from the sum it stands for, as a part of the
     * span (largest minus least entry) of the widest table of its block. 0: tables are fp32. */
    double table_rounding;
    int64_t few; /* tokens for which tables of one each cost less than tables for eight */
    /* Tables of `groups` input groups (x points at the first) into t, [group][book]. */
    void (*build)(const float *books, const float *x, int groups, int group, int books_count,
                  void *t);
    /* acc[64] += table sums of one tile's codes [tables][64]; next: the tile that follows. */
    void (*lookup)(const uint8_t *codes, const uint8_t *next, const void *t, int tables,
                   float *acc);
    /* The same for 8 tokens: x [inputs][8], tables [ENTRIES][8], acc [64][8]. */
    void (*build8)(const float *books, const float *x, int groups, int group, int books_count,
                   float *t);
    void (*lookup8)(const uint8_t *codes, const uint8_t *next, const float *t, int tables,
                    float *acc);
    /* y[row] = x . decoded row, before its scale; rows of one partition, checkpoint layout. */
    void (*direct)(const plain_weight *w, const void *books, const float *x, int64_t row,
                   int64_t count, float *y);
    /* One row, whose codes w->codes are, decoded and scaled. */
    void (*decode)(const plain_weight *w, const void *books, float scale, float *y);
    /* Rows of one tile in one block of groups: codes [groups][count][TILE], fp32 books
     * [count][ENTRIES][group], scales [rows]. Decoded and scaled into y, `stride` bytes a row, in
     * fp32 or (half) bf16. */
    void (*decode_tile)(const uint8_t *codes, const float *books, int count, int group, int groups,
                        int rows, const float *scales, void *y, size_t stride, int half);
    /* y [heads][dim] = softmax(scale queries . keys) values; queries [heads][dim], keys, values
     * [count][dim]; weights [ATTEND_ROWS][count] is room for the softmax. */
    void (*attend)(const float *queries, int64_t heads, const float *keys, const float *values,
                   int64_t count, int64_t dim, float scale, float *weights, float *y);
    /* a . b for b of 16 bits or fp32 */
    float (*dot)(const float *a, const void *b, int64_t n, int64_t dtype);
    /* a . b in whole numbers; the caller bounds a so that n / 8 products fit 31 bits */
    float (*dot_bytes)(const int16_t *a, const int8_t *b, int64_t n);
    /* y[k] = (a + k * stride) . b for k < 4, reading b once */
    void (*dot4)(const float *a, int64_t stride, const void *b, int64_t n, int64_t dtype, float *y);
    /* y = silu(x) * values; an element's result does not depend on where it is, in whole eights */
    void (*gate)(const float *x, const float *values, float *y, int64_t n);
    /* Tables of one token with steps of a byte, as `build` and `lookup`: ENTRIES bytes a table, then
     * two floats, the step and the sum of what all tables lack. NULL where nothing is gained. */
    void (*build_rough)(const float *books, const float *x, int groups, int group, int books_count,
                        void *t);
    void (*lookup_rough)(const uint8_t *codes, const uint8_t *next, const void *t, int tables,
                         float *acc);
} isa;

/* One call, cut into parts that threads take. What a kind of call needs is a struct of its own that
 * begins with a job, so that its part function can cast back. */
typedef struct job {
    void (*part)(const struct job *job, int64_t index);
    int64_t parts;
    atomic_llong next;
} job;

/* What all products with a weight [out][in] share: y [tokens][stride] = x [tokens][in] W^T (+ bias),
 * or += that, all fp32. */
typedef struct {
    const float *x, *bias; /* bias [out] or NULL */
    float *y;
    int64_t tokens, in, out, stride;
    int64_t accumulate;
} product;

typedef struct {
    job job; /* part chunk * splits + split: eight tokens, a share of the tiles */
    product product;
    const tiled_weight *weight;
    int64_t splits;
} tiled_job;

typedef struct {
    job job; /* a part is a share of the rows */
    product product;
    const plain_weight *weight;
} plain_job;

typedef struct {
    job job; /* a part is a share of the rows */
    product product;
    const void *weight; /* dense [out][in] */
    int64_t dtype;
} dense_job;

/* Rows [*from, *to), a split's share, of one token's product with a weight of one partition by rough
 * tables. Returns how far a row may be off, in parts of its scale. */
float rough_tiles(const tiled_job *work, int64_t split, int64_t token, int64_t *from, int64_t *to);

void tiled_part(const job *job, int64_t index);
void plain_part(const job *job, int64_t index);
void dense_part(const job *job, int64_t index);

/* Rows of a weight to decode and scale: rows[i], or first + i where rows is NULL. */
typedef struct {
    job job; /* a part is a share of them */
    const plain_weight *weight;
    const int64_t *rows;
    int64_t first, count;
    float *y; /* [count][in] */
} decode_job;

void decode_part(const job *job, int64_t index);

/* What operations of a program do (decoder_program.c). */
enum { EMBED, TILED, PLAIN, DENSE, ATTEND, GATE, SCREEN, DECODE, SCREEN_TILED };

/* x, y: fp32 [rows][in] and [rows][stride]. norm: root-mean-square norm weights that x passes first
 * (NULL: none), or what DECODE multiplies columns by. cosine, sine: [positions][rotary]. in: inputs;
 * of EMBED and DECODE the rows that there are, of ATTEND the positions.
 * bytes: the weight again, rounded to int8 times bounds[row][0]; bounds[row][1] and [2]: norms of
 * the row's rounding error and of the rounded row. */
typedef struct {
    int64_t kind, in, out, stride, dtype, accumulate;
    const float *x;
    float *y;
    const float *norm;
    const void *weight;
    const float *bias;
    double epsilon;
    const float *cosine, *sine, *query_norm, *key_norm;
    int64_t heads, kv_heads, dim, rotary, layer;
    double scale;
    const int8_t *bytes;
    const float *bounds;
    const plain_weight *plain; /* the packed weight again, for single rows */
} operation;

/* What a run appends to one sequence: a token, at a position whose predecessors are all in its
 * cache [layers][keys, values][kv_heads][capacity][dim]. */
typedef struct {
    float *cache;
    int64_t capacity, token, position;
} sequence;

/* Scratch that a thread keeps for its next call; never NULL. */
float *scratch(size_t bytes);

/* Do all parts of a job with up to `threads` threads. */
void run(job *work, int64_t threads);

/* GOMP_parallel of any OpenMP runtime, or the like: calls work(data) from up to `threads` threads
 * at once and waits for all; inside, omp_get_num_threads tells how many there are. */
typedef void (*parallel_fn)(void (*work)(void *), void *data, unsigned threads, unsigned flags);
typedef int (*team_size_fn)(void);
extern parallel_fn parallel;
extern team_size_fn team_size;

extern const isa *kernels; /* the instruction set in use */
extern const isa isa_portable;
#if defined(__x86_64__) && defined(__GNUC__)
#define PVRT_X86 1
extern const isa isa_avx2, isa_vbmi;
#endif

/* The first of `all` rows in a share of `parts` equal ones. */
static inline int64_t share(int64_t all, int64_t index, int64_t parts) {
    return all * index / parts;
}

/* The end of the part of `size` things that begins at index * size, of `all`. */
static inline int64_t part_end(int64_t index, int64_t size, int64_t all) {
    return (index + 1) * size < all ? (index + 1) * size : all;
}

/* How many parts of `size` things, of which the last may be shorter, make `all`. */
static inline int64_t part_count(int64_t size, int64_t all) { return (all + size - 1) / size; }

/* Every instruction set on x86 but the portable one has AVX2. */
static inline int has_avx2(void) {
#ifdef PVRT_X86
    return kernels != &isa_portable;
#else
    return 0;
#endif
}

/* The i-th row to read of rows [from, to): from two places in turn, since memory delivers two
 * streams faster than one. */
static inline int64_t in_two_streams(int64_t i, int64_t from, int64_t to) {
    return from + i / 2 + i % 2 * ((to - from + 1) / 2);
}

static inline int block_groups(int64_t books) { return books >= 16 ? 1 : (int)(16 / books); }

static inline int64_t count_tiles(const int64_t *rows, int64_t parts) {
    int64_t tiles = 0;
    for (int64_t p = 0; p < parts; p++) tiles += (rows[p] + TILE - 1) / TILE;
    return tiles;
}

/* Where tiled codes hold the code of a row in a tile, an input group and the first book; the other
 * books follow at steps of TILE. */
static inline size_t tiled_at(int64_t tiles, int64_t tile, int64_t row, int64_t group, int64_t groups,
                       int64_t books) {
    const int64_t whole = block_groups(books), start = group / whole * whole;
    const int64_t in_block = groups - start < whole ? groups - start : whole;
    return (size_t)(start * books * TILE * tiles +
                    (tile * in_block + (group - start)) * books * TILE + row);
}

static inline float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    union { uint32_t u; float f; } bits;
    if (exponent == 0) { /* zero or subnormal: exact in fp32 */
        bits.f = (float)mantissa * (1.0f / 16777216.0f);
        bits.u |= sign;
        return bits.f;
    }
    bits.u = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (mantissa << 13);
    return bits.f;
}

static inline float load_float(const void *p, int64_t i, int64_t dtype) {
    union { uint32_t u; float f; } bits;
    if (dtype == F32) return ((const float *)p)[i];
    if (dtype == F16) return half_to_float(((const uint16_t *)p)[i]);
    bits.u = (uint32_t)((const uint16_t *)p)[i] << 16;
    return bits.f;
}

#endif
