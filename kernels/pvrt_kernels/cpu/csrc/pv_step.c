/* What a step of PV-Tuning asks of additive codebooks on CPUs: choice among codes, gradients of
 * codebooks and scales, and the step of a latent weight. */
#include "cpu.h"

#include <math.h>
#include <string.h>

#define MOST_GROUP 64

typedef struct {
    const float *weight;
    float *books, *scales;
} gradients;

#define TINY 1e-12f /* added to the root of the moment */

#ifdef PVRT_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include <immintrin.h>
#define NAME(f) f##_avx2
#define ROOT(a) (floats8)_mm256_sqrt_ps((__m256)(a))
#include "pv_step.h"
#undef NAME
#undef ROOT
#pragma GCC pop_options
#endif

static inline floats8 roots(floats8 a) {
    for (int l = 0; l < 8; l++) a[l] = sqrtf(a[l]);
    return a;
}
#define NAME(f) f##_portable
#define ROOT(a) roots(a)
#include "pv_step.h"

#ifndef PVRT_X86
#define choose_avx2 choose_portable
#define gradient_avx2 gradient_portable
#define moment_avx2 moment_portable
#define latent_avx2 latent_portable
#endif

#define QUERIES 256 /* of one part */

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
