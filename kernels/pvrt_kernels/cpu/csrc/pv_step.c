/* What PV-Tuning asks of additive codebooks on CPUs: the nearest sums of entries, and the gradients
 * of codebooks and scales. */
#include "cpu.h"

#include <math.h>
#include <string.h>

#define MOST_KEPT 8  /* partial sums of a search */
#define MOST_BOOKS 8
#define MOST_GROUP 64

/* A sum of entries of the first books: its codes, |x - sum|^2 - |x|^2, and the key by which it is
 * ranked: the bits of its squared distance, whose low 8 are the last code. */
typedef struct {
    float sum;
    int32_t key;
    uint8_t codes[MOST_BOOKS];
} partial;

typedef struct {
    const float *weight;
    float *books, *scales;
} gradients;

#define TINY 1e-12f /* added to the root of the moment */

/* The end of the part of `size` things that begins at index * size, of `all`. */
static inline int64_t part_end(int64_t index, int64_t size, int64_t all) {
    return (index + 1) * size < all ? (index + 1) * size : all;
}

/* How many parts of `size` things, of which the last may be shorter, make `all`. */
static inline int64_t part_count(int64_t size, int64_t all) { return (all + size - 1) / size; }

/* Twice the products of entry `code` of book i with all entries of book m. */
static inline const float *products(const sums *s, int64_t i, int64_t m, int64_t code) {
    return s->products + ((i * s->books + m) * s->size + code) * s->size;
}

#ifdef PVRT_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include <immintrin.h>
#define NAME(f) f##_avx2
#define LESSER(a, b) (ints8)_mm256_min_epi32((__m256i)(a), (__m256i)(b))
#define ROOT(a) (floats8)_mm256_sqrt_ps((__m256)(a))
#include "pv_step.h"
#undef NAME
#undef LESSER
#undef ROOT
#pragma GCC pop_options
#endif

static inline ints8 lesser(ints8 a, ints8 b) {
    const ints8 less = a < b;
    return (a & less) | (b & ~less);
}
static inline floats8 roots(floats8 a) {
    for (int l = 0; l < 8; l++) a[l] = sqrtf(a[l]);
    return a;
}
#define NAME(f) f##_portable
#define LESSER(a, b) lesser(a, b)
#define ROOT(a) roots(a)
#include "pv_step.h"

/* Every instruction set on x86 but the portable one has AVX2. */
static int has_avx2(void) {
#ifdef PVRT_X86
    return kernels != &isa_portable;
#else
    return 0;
#endif
}

#ifndef PVRT_X86
#define search_avx2 search_portable
#define choose_avx2 choose_portable
#define gradient_avx2 gradient_portable
#define moment_avx2 moment_portable
#define latent_avx2 latent_portable
#endif

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
    const int fast = has_avx2();
    for (int64_t i = index * QUERIES; i < end; i++) {
        const float *x = work->x + i * books->group;
        uint8_t *codes = work->codes + i * work->count * books->books;
        if (fast) search_avx2(books, x, work->beam, work->count, codes);
        else search_portable(books, x, work->beam, work->count, codes);
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
    const choice *choice;
    int64_t n;
} choose_job;

static void choose_part(const job *job, int64_t index) {
    const choose_job *work = (const choose_job *)job;
    const int64_t end = part_end(index, QUERIES, work->n);
    if (has_avx2()) choose_avx2(work->choice, index * QUERIES, end);
    else choose_portable(work->choice, index * QUERIES, end);
}

/* For each of n groups the nearest to what it wants of the sum that it has and of two others; among
 * equals the one that it has. */
API void pvrt_choose_codes(const choice *c, int64_t n, int64_t threads) {
    choose_job work = {.job = {.part = choose_part, .parts = part_count(QUERIES, n)}, .choice = c, .n = n};
    run(&work.job, threads);
}

typedef struct {
    job job; /* a part is a share of the rows */
    const plain_weight *weight;
    gradients gradients;
} gradient_job;

static void gradient_part(const job *job, int64_t index) {
    const gradient_job *work = (const gradient_job *)job;
    const plain_weight *w = work->weight;
    const gradients *g = &work->gradients;
    const int64_t from = share(*w->rows, index, job->parts);
    const int64_t to = share(*w->rows, index + 1, job->parts);
    float *books = g->books + index * w->books * w->size * w->group;
    if (has_avx2()) gradient_avx2(w, g, from, to, books);
    else gradient_portable(w, g, from, to, books);
}

/* Gradients of codebooks and scales from that of an fp32 weight of one part, grad [rows][inputs].
 * grad_books [threads][books][size][group] must be zero: every thread adds the rows of its own share
 * to one of them. */
API void pvrt_parameter_gradients(const plain_weight *w, const float *grad, float *grad_books,
                                  float *grad_scales, int64_t threads) {
    gradient_job work = {.job = {.part = gradient_part, .parts = threads},
                         .weight = w, .gradients = {grad, grad_books, grad_scales}};
    run(&work.job, threads);
}

typedef struct {
    job job;
    const latent_step *step;
} step_job;

static void moment_part(const job *job, int64_t index) {
    const latent_step *l = ((const step_job *)job)->step;
    const int64_t from = index * l->part_groups, end = part_end(index, l->part_groups, l->groups);
    if (has_avx2()) moment_avx2(l, from, end, l->sums + 2 * index);
    else moment_portable(l, from, end, l->sums + 2 * index);
}

static void latent_part(const job *job, int64_t index) {
    const latent_step *l = ((const step_job *)job)->step;
    const int64_t from = index * l->part_groups, end = part_end(index, l->part_groups, l->groups);
    if (has_avx2()) latent_avx2(l, from, end);
    else latent_portable(l, from, end);
}

static void step_parts(void (*part)(const job *, int64_t), const latent_step *l, int64_t threads) {
    step_job work = {.job = {.part = part, .parts = part_count(l->part_groups, l->groups)},
                     .step = l};
    run(&work.job, threads);
}

/* Running mean of squared gradients, and l->sums of the squares of the latent and of the direction
 * that its step takes. The number of elements is a multiple of 8, and so is that of a part. */
API void pvrt_latent_moment(const latent_step *l, int64_t threads) {
    step_parts(moment_part, l, threads);
}

/* latent -= rate * direction; distance [groups] from the decoded weight. */
API void pvrt_latent_step(const latent_step *l, int64_t threads) {
    step_parts(latent_part, l, threads);
}
