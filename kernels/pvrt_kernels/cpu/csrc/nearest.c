/* The nearest entries of codebooks and sums of them on CPUs, which fits and PV-Tuning search. */
#include "cpu.h"

#include <math.h>
#include <string.h>

#define MOST_KEPT 8 /* partial sums of a search */
#define MOST_BOOKS 8

/* A sum of entries of the first books: its codes, |x - sum|^2 - |x|^2, and the key by which it is
 * ranked: the bits of its squared distance, whose low 8 are the last code. */
typedef struct {
    float sum;
    int32_t key;
    uint8_t codes[MOST_BOOKS];
} partial;

/* Twice the products of entry `code` of book i with all entries of book m. */
static inline const float *products(const sums *s, int64_t i, int64_t m, int64_t code) {
    return s->products + ((i * s->books + m) * s->size + code) * s->size;
}

#ifdef PVRT_X86
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define NAME(f) f##_avx2
#define WIDTH 8
#define FLOATS floats8
#define INTS ints8
#define ORDER ((ints8){0, 1, 2, 3, 4, 5, 6, 7})
#define LESSER(a, b) (ints8)_mm256_min_epi32((__m256i)(a), (__m256i)(b))
#define LOWER(a, b) (floats8)_mm256_min_ps((__m256)(a), (__m256)(b))
#define FUSED(a, b, c) (floats8)_mm256_fmadd_ps(_mm256_set1_ps(a), (__m256)(b), (__m256)(c))
#include "nearest.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx2,fma")
typedef float floats16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t ints16 __attribute__((vector_size(64)));
#define NAME(f) f##_avx512
#define WIDTH 16
#define FLOATS floats16
#define INTS ints16
#define ORDER ((ints16){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
#define LESSER(a, b) (ints16)_mm512_min_epi32((__m512i)(a), (__m512i)(b))
#define LOWER(a, b) (floats16)_mm512_min_ps((__m512)(a), (__m512)(b))
#define FUSED(a, b, c) (floats16)_mm512_fmadd_ps(_mm512_set1_ps(a), (__m512)(b), (__m512)(c))
#include "nearest.h"
#pragma GCC pop_options
#endif

static inline ints8 lesser(ints8 a, ints8 b) {
    const ints8 less = a < b;
    return (a & less) | (b & ~less);
}
static inline floats8 lower(floats8 a, floats8 b) {
    const ints8 less = a < b;
    return (floats8)(((ints8)a & less) | ((ints8)b & ~less));
}
#define NAME(f) f##_portable
#define WIDTH 8
#define FLOATS floats8
#define INTS ints8
#define ORDER ((ints8){0, 1, 2, 3, 4, 5, 6, 7})
#define LESSER(a, b) lesser(a, b)
#define LOWER(a, b) lower(a, b)
#define FUSED(a, b, c) ((a) * (b) + (c))
#include "nearest.h"

/* What runs here for so many entries. */
typedef struct {
    void (*search)(const sums *s, const float *x, int64_t beam, int64_t count, uint8_t *codes);
    void (*lowest)(const scores *s, const float *x, int64_t n, uint8_t *codes);
} searches;

static searches searches_of(int64_t size) {
#ifdef PVRT_X86
    if (kernels == &isa_vbmi && size % 16 == 0) return (searches){search_avx512, lowest_avx512};
    if (has_avx2()) return (searches){search_avx2, lowest_avx2};
#endif
    (void)size;
    return (searches){search_portable, lowest_portable};
}

#define QUERIES 256 /* of one part */

typedef struct {
    job job;
    const sums *books;
    const float *x; /* [n][group] */
    uint8_t *codes; /* [n][count][books] */
    int64_t n, beam, count;
} search_job;

static void search_part(const job *job, int64_t index) {
    const search_job *work = (const search_job *)job;
    const sums *books = work->books;
    const int64_t end = part_end(index, QUERIES, work->n);
    const searches here = searches_of(books->size);
    for (int64_t i = index * QUERIES; i < end; i++) {
        const float *x = work->x + i * books->group;
        uint8_t *codes = work->codes + i * work->count * books->books;
        here.search(books, x, work->beam, work->count, codes);
    }
}

/* Codes [n][count][books] of sums of entries, one of every book, that are near to x [n][group],
 * nearest first. After every book the `beam` partial sums are kept that come nearest together with
 * the means of the later books. size: a multiple of 8, at most 256; beam and count: at most 8, and
 * count no more than there are sums that the last beam reaches. */
API void pvrt_nearest_sums(const sums *books, const float *x, int64_t n, int64_t beam, int64_t count,
                           uint8_t *codes, int64_t threads) {
    search_job work = {.job = {.part = search_part, .parts = part_count(QUERIES, n)},
                       .books = books, .x = x, .codes = codes, .n = n, .beam = beam, .count = count};
    run(&work.job, threads);
}

typedef struct {
    job job;
    const scores *scores;
    const float *x; /* [n][length] */
    uint8_t *codes; /* [n] */
    int64_t n;
} lowest_job;

static void lowest_part(const job *job, int64_t index) {
    const lowest_job *work = (const lowest_job *)job;
    const int64_t from = index * QUERIES, end = part_end(index, QUERIES, work->n);
    const float *x = work->x + from * work->scores->length;
    searches_of(work->scores->size).lowest(work->scores, x, end - from, work->codes + from);
}

/* The entry of the lowest score for each x [n][length], by the first 15 bits of their mantissas; among
 * equals the first, or the last of negative ones. size: a multiple of 8, at most 256. */
API void pvrt_lowest_scores(const scores *s, const float *x, int64_t n, uint8_t *codes,
                            int64_t threads) {
    lowest_job work = {.job = {.part = lowest_part, .parts = part_count(QUERIES, n)},
                       .scores = s, .x = x, .codes = codes, .n = n};
    run(&work.job, threads);
}
