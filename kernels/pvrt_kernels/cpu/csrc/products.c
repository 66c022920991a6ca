/* Entry points for ctypes: choice of instruction set, threads, linear layers.
 *
 * Threads are borrowed from the OpenMP runtime that torch has loaded (`pvrt_use_threads`), so that
 * there is one pool of them. Work is cut into parts over output rows (or tokens), never over
 * inputs; a part is taken by one thread and writes its own outputs, hence no races.
 */
#include "cpu.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

const isa *kernels = &isa_portable;

#ifdef PVRT_X86
static const isa *const all[] = {&isa_vbmi, &isa_avx2, &isa_portable};
static int available(const isa *set) {
#ifdef PVRT_MODEL_AVX512
    (void)set;
    return 1;
#endif
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
    if (set == &isa_vbmi)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vbmi");
    return set == &isa_portable || avx2;
}
#else
static const isa *const all[] = {&isa_portable};
static int available(const isa *set) { return set == &isa_portable; }
#endif

/* Use the instruction set of a name, or the best one for "". Returns its name, NULL if it cannot
 * run here; then the one in use stays. */
API const char *pvrt_use_isa(const char *name) {
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (available(all[i]) && (!*name || !strcmp(name, all[i]->name))) {
            kernels = all[i];
            return kernels->name;
        }
    return NULL;
}

/* The instruction set in use, and its table_rounding. */
API const char *pvrt_isa_name(void) { return kernels->name; }
API double pvrt_table_rounding(void) { return kernels->table_rounding; }

parallel_fn parallel;
team_size_fn team_size;

API void pvrt_use_threads(parallel_fn runner, team_size_fn size) { parallel = runner, team_size = size; }

static void take_parts(void *data) {
    job *work = data;
    for (long long i; (i = atomic_fetch_add_explicit(&work->next, 1, memory_order_relaxed)) <
                      work->parts;)
        work->part(work, i);
}

void run(job *work, int64_t threads) {
    atomic_init(&work->next, 0);
    if (parallel && threads > 1 && work->parts > 1)
        parallel(take_parts, work, (unsigned)(threads < work->parts ? threads : work->parts), 0);
    else
        take_parts(work);
}

/* Scratch that a thread keeps for its next call. NULL is never returned: out of memory ends here,
 * as a kernel has nobody to tell. */
float *scratch(size_t bytes) {
    static _Thread_local void *kept;
    static _Thread_local size_t size;
    if (bytes > size) {
        free(kept);
        size = (bytes + 4095) / 4096 * 4096;
        kept = aligned_alloc(4096, size);
        if (!kept) abort();
    }
    return kept;
}

static size_t round64(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* A scaled sum of output row i with its bias, on top of what is there if the product accumulates. */
static inline float finish(const product *io, float sum, int64_t i, float there) {
    if (io->bias) sum += io->bias[i];
    return io->accumulate ? there + sum : sum;
}

#define AHEAD 16 /* tiles between what is looked up and what is prefetched */

/* Whether a block's tables of steps hold what they were made of: not infinity, nor what is near. */
static int held(const char *scale_and_sum) {
    float ends[2];
    memcpy(ends, scale_and_sum, sizeof ends);
    return fabsf(ends[0]) < INFINITY && fabsf(ends[1]) < INFINITY;
}

/* Tiles [first, last) of one token or of up to eight: visits every partition that has tiles there.
 * With rough tables (lanes 0, one token), returns how far a sum may be off. */
static float tiles_of(const tiled_job *work, int64_t first, int64_t last, int64_t token, int lanes) {
    const int rough = lanes == 0;
    if (rough) lanes = 1;
    float off = 0, size = 0; /* by rounding to steps; what is summed up at most */
    const tiled_weight *w = work->weight;
    const product *io = &work->product;
    const int64_t live = io->tokens - token < lanes ? io->tokens - token : lanes;
    const int whole = block_groups(w->books);
    /* Tables of 8 tokens are 8 times as large, so a block is cut into pieces. */
    const int piece = lanes == 1 ? whole : (w->books >= 4 ? 1 : 4 / (int)w->books);
    const size_t table = rough ? ENTRIES
                         : lanes == 1 ? kernels->table_bytes : ENTRIES * LANES * sizeof(float);
    const size_t extra = rough ? 2 * sizeof(float) : kernels->extra_bytes;
    const size_t tables = round64(table * piece * w->books + extra);
    const size_t inputs = round64(sizeof(float) * w->groups * w->group * (lanes == 1 ? 0 : lanes));
    char *room = (char *)scratch(tables + inputs + sizeof(float) * TILE * lanes * (last - first));
    float *x8 = (float *)(room + tables), *acc = (float *)(room + tables + inputs);
    const float *x = io->x + token * io->in;
    const int64_t tiles = count_tiles(w->rows, w->parts);
    if (lanes > 1)
        for (int64_t k = 0; k < io->in; k++)
            for (int l = 0; l < LANES; l++) x8[k * LANES + l] = l < live ? x[l * io->in + k] : 0;
    memset(acc, 0, sizeof(float) * TILE * lanes * (last - first));
    int64_t tile = 0, row = 0;
    for (int64_t p = 0; p < w->parts; row += w->rows[p], p++) {
        const int64_t begin = tile, end = tile + (w->rows[p] + TILE - 1) / TILE;
        const int64_t from = first > begin ? first : begin, to = last < end ? last : end;
        const float *books = w->tables + p * w->books * w->group * ENTRIES;
        tile = end;
        if (from >= to) continue;
        for (int64_t j = 0; j < w->groups; j += whole) {
            const int groups = w->groups - j < whole ? (int)(w->groups - j) : whole;
            const int64_t bytes = groups * w->books * TILE; /* of one tile in this block */
            const uint8_t *codes = w->codes + tiled_at(tiles, 0, 0, j, w->groups, w->books);
            const int follows = j + 2 * whole <= w->groups; /* a block of the same size */
            for (int done = 0; done < groups; done += piece) {
                const int now = groups - done < piece ? groups - done : piece;
                const int lookups = now * (int)w->books;
                const uint8_t *c = codes + done * w->books * TILE;
                if (rough) {
                    float ends[2];
                    kernels->build_rough(books, x + j * w->group, now, (int)w->group, (int)w->books,
                                         room);
                    memcpy(ends, room + ENTRIES * lookups, sizeof ends);
                    off += 0.5f * ends[0] * lookups;
                    size += fabsf(ends[1]) + 256 * ends[0] * lookups;
                } else if (lanes == 1) {
                    kernels->build(books, x + (j + done) * w->group, now, (int)w->group,
                                   (int)w->books, room);
                    if (extra && !held(room + table * lookups)) { /* fp32 tables do, from here on */
                        tiled_job alone = *work;
                        alone.product.tokens = token + 1;
                        return tiles_of(&alone, from, last, token, LANES);
                    }
                } else
                    kernels->build8(books, x8 + (j + done) * w->group * LANES, now, (int)w->group,
                                    (int)w->books, (float *)room);
                for (int64_t k = 0; k < to - from; k++) {
                    const int64_t t = in_two_streams(k, from, to), later = k + AHEAD;
                    const int64_t rest = later - (to - from); /* of it in the next block */
                    const uint8_t *next =
                        rest < 0  ? c + in_two_streams(later, from, to) * bytes
                        : follows ? c + (tiles + in_two_streams(rest, from, to)) * bytes : c;
                    float *sums = acc + (t - first) * TILE * lanes;
                    if (rough) kernels->lookup_rough(c + t * bytes, next, room, lookups, sums);
                    else if (lanes == 1) kernels->lookup(c + t * bytes, next, room, lookups, sums);
                    else kernels->lookup8(c + t * bytes, next, (const float *)room, lookups, sums);
                }
            }
        }
        for (int64_t t = from; t < to; t++) {
            const float *sums = acc + (t - first) * TILE * lanes;
            const int64_t at = row + (t - begin) * TILE;
            const int64_t n = w->rows[p] - (t - begin) * TILE < TILE
                                  ? w->rows[p] - (t - begin) * TILE : TILE;
            for (int64_t l = 0; l < live; l++) {
                float *y = io->y + (token + l) * io->stride + at;
                for (int64_t r = 0; r < n; r++) {
                    const float sum = sums[r * lanes + l] * w->scales[at + r];
                    y[r] = finish(io, sum, at + r, y[r]);
                }
            }
        }
    }
    return 1.01f * off + size / (1 << 18); /* the slack covers rounding in fp32 */
}

/* The first tile of a thread's share, so that all shares cost about the same. Every partition that a
 * share touches has tables of its own to build, at the price of `build` tiles. */
static int64_t cut_tiles(const tiled_weight *w, int64_t split, int64_t splits, int64_t build) {
    const int64_t tiles = count_tiles(w->rows, w->parts);
    if (split == 0 || split == splits) return split ? tiles : 0;
    /* Each cut makes one partition pay twice. */
    const int64_t total = tiles + build * (w->parts + splits - 1);
    int64_t before = 0, left = total * split / splits - build * (split - 1);
    for (int64_t p = 0; p < w->parts; p++) {
        const int64_t own = (w->rows[p] + TILE - 1) / TILE;
        if (left <= build + own) return before + (left > build ? left - build : 0);
        before += own, left -= build + own;
    }
    return tiles;
}

void tiled_part(const job *job, int64_t index) {
    const tiled_job *work = (const tiled_job *)job;
    const int64_t chunk = index / work->splits, split = index % work->splits;
    const int64_t tokens = work->product.tokens, group = work->weight->group;
    int64_t token = chunk * LANES;
    const int eight = tokens - token > kernels->few;
    const int64_t build = eight ? 2 * group : group / 2; /* measured */
    const int64_t from = cut_tiles(work->weight, split, work->splits, build);
    const int64_t to = cut_tiles(work->weight, split + 1, work->splits, build);
    if (eight) tiles_of(work, from, to, token, LANES);
    else for (; token < tokens; token++) tiles_of(work, from, to, token, 1);
}

float rough_tiles(const tiled_job *work, int64_t split, int64_t token, int64_t *from, int64_t *to) {
    const int64_t build = work->weight->group / 2, out = work->product.out;
    const int64_t first = cut_tiles(work->weight, split, work->splits, build);
    const int64_t last = cut_tiles(work->weight, split + 1, work->splits, build);
    *from = first * TILE < out ? first * TILE : out, *to = last * TILE < out ? last * TILE : out;
    return tiles_of(work, first, last, token, 0);
}

/* All fp32, outputs side by side. */
static product product_of(const float *x, const float *bias, float *y, int64_t tokens, int64_t in,
                          int64_t out) {
    return (product){.x = x, .bias = bias, .y = y, .tokens = tokens, .in = in, .out = out,
                     .stride = out};
}

static int64_t sum_of(const int64_t *rows, int64_t parts) {
    int64_t sum = 0;
    for (int64_t p = 0; p < parts; p++) sum += rows[p];
    return sum;
}

/* y [tokens, out] = x [tokens, in] W^T (+ bias), all fp32. Tokens go in eights: one table lookup
 * serves eight; threads share tokens where there are enough, else output rows. */
API void pvrt_tiled_linear(const tiled_weight *w, const float *x, const float *bias, float *y,
                       int64_t tokens, int64_t threads) {
    const int64_t chunks = (tokens + LANES - 1) / LANES, tiles = count_tiles(w->rows, w->parts);
    const int64_t splits = chunks >= 2 * threads ? 1 : threads < tiles ? threads : tiles;
    const int64_t in = w->groups * w->group, out = sum_of(w->rows, w->parts);
    tiled_job work = {.job = {.part = tiled_part, .parts = chunks * splits},
                      .product = product_of(x, bias, y, tokens, in, out),
                      .weight = w, .splits = splits};
    run(&work.job, threads);
}

/* The first row of a share: in its part of the weight a multiple of four, because rows go in fours,
 * which sum in another order than those left over. Nothing depends on the number of shares. */
static int64_t cut_rows(const plain_weight *w, int64_t out, int64_t index, int64_t shares) {
    const int64_t at = share(out, index, shares);
    int64_t row = 0;
    for (int64_t p = 0; p < w->parts && at < out; row += w->rows[p], p++)
        if (at < row + w->rows[p]) return row + (at - row) / 4 * 4;
    return out;
}

void plain_part(const job *job, int64_t index) {
    const plain_job *work = (const plain_job *)job;
    const plain_weight *w = work->weight;
    const product *io = &work->product;
    const int64_t first = cut_rows(w, io->out, index, job->parts);
    const int64_t stop = cut_rows(w, io->out, index + 1, job->parts);
    plain_weight local = *w;
    const size_t width = w->dtype == F32 ? 4 : 2;
    const int64_t entries = w->books * w->size * w->group;
    int64_t row = 0;
    for (int64_t p = 0; p < w->parts; row += w->rows[p], p++) {
        const int64_t from = first > row ? first : row, end = row + w->rows[p];
        const int64_t count = (stop < end ? stop : end) - from;
        const void *books = (const char *)w->codebooks + p * entries * width;
        if (count <= 0) continue;
        const int convert = w->code_bytes == 1 && w->dtype != F32; /* small books are worth it */
        float *sums = scratch(sizeof(float) * (count + entries * convert)), *copy = sums + count;
        if (convert) {
            for (int64_t i = 0; i < entries; i++) copy[i] = load_float(books, i, w->dtype);
            books = copy, local.dtype = F32;
        }
        for (int64_t t = 0; t < io->tokens; t++) {
            float *y = io->y + t * io->stride + from;
            kernels->direct(&local, books, io->x + t * io->in, from, count, sums);
            for (int64_t r = 0; r < count; r++)
                y[r] = finish(io, sums[r] * w->scales[from + r], from + r, y[r]);
        }
    }
}

/* The same from the checkpoint's layout, decoding entry by entry: for few tokens. */
API void pvrt_plain_linear(const plain_weight *w, const float *x, const float *bias, float *y,
                       int64_t tokens, int64_t threads) {
    const int64_t in = w->groups * w->group, out = sum_of(w->rows, w->parts);
    plain_job work = {.job = {.part = plain_part, .parts = threads < out ? threads : out},
                      .product = product_of(x, bias, y, tokens, in, out),
                      .weight = w};
    run(&work.job, threads);
}

void dense_part(const job *job, int64_t index) {
    const dense_job *work = (const dense_job *)job;
    const product *io = &work->product;
    const int64_t from = share(io->out, index, job->parts), in = io->in;
    const int64_t to = share(io->out, index + 1, job->parts);
    const size_t width = work->dtype == F32 ? 4 : 2;
    for (int64_t k = 0; k < to - from; k++) { /* a row serves all tokens while it is near */
        const int64_t i = in_two_streams(k, from, to);
        const char *row = (const char *)work->weight + i * in * width;
        for (int64_t t = 0; t < io->tokens;) {
            const int64_t count = io->tokens - t >= 4 ? 4 : 1;
            const float *x = io->x + t * in;
            float sums[4];
            if (count == 4) kernels->dot4(x, in, row, in, work->dtype, sums);
            else sums[0] = kernels->dot(x, row, in, work->dtype);
            for (const float *sum = sums; sum < sums + count; sum++, t++) {
                float *y = io->y + t * io->stride + i;
                *y = finish(io, *sum, i, *y);
            }
        }
    }
}

/* y [tokens, out] = x W^T for a dense W [out, in] of any of the three types, summed in fp32. */
API void pvrt_dense_linear(const void *w, const float *x, float *y, int64_t tokens, int64_t out,
                       int64_t in, int64_t dtype, int64_t threads) {
    dense_job work = {.job = {.part = dense_part, .parts = out < 64 ? 1 : threads * 4},
                      .product = product_of(x, NULL, y, tokens, in, out),
                      .weight = w, .dtype = dtype};
    run(&work.job, threads);
}

typedef struct {
    job job;
    const uint64_t *memory;
    int64_t words; /* of a part */
    uint64_t *sums;
} read_job;

static void read_part(const job *job, int64_t index) {
    const read_job *work = (const read_job *)job;
    const uint64_t *p = work->memory + work->words * index;
    const int64_t lines = work->words / 32;
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (int64_t k = 0; k < lines; k++) {
        const uint64_t *line = p + 32 * in_two_streams(k, 0, lines);
        for (int i = 0; i < 32; i += 4) a += line[i], b += line[i + 1], c += line[i + 2],
                                        d += line[i + 3];
    }
    work->sums[index * 8] = a + b + c + d;
}

/* Read `bytes` once, one contiguous part per thread; sums [threads][8]: what memory can deliver. */
API void pvrt_read_memory(const void *memory, int64_t bytes, uint64_t *sums, int64_t threads) {
    read_job work = {.job = {.part = read_part, .parts = threads},
                     .memory = memory, .words = bytes / 8 / threads, .sums = sums};
    run(&work.job, threads);
}
