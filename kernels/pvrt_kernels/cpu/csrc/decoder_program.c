/* Programs: a list of operations that turns one token of each sequence into logits of its next.
 *
 * The threads enter once per step, not once per layer, and meet at a barrier after every
 * operation. What a thread computes depends on its number and nothing else, so the results do not
 * depend on timing. Vectors have a row per sequence; weights are read once for all of them.
 */
#include "cpu.h"

#include <math.h>
#include <sched.h>

#define MOST_ROWS 64 /* sequences of one run */

typedef struct {
    const operation *operations;
    const sequence *sequences;
    int64_t count, rows, room_floats;
    float *room; /* [threads][room_floats]: normed inputs, or attention scores */
    atomic_int arrived, round, entered;
} program;

static void barrier(program *p, int threads) {
    const int round = atomic_load_explicit(&p->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&p->arrived, 1, memory_order_acq_rel) == threads - 1) {
        atomic_store_explicit(&p->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&p->round, round + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&p->round, memory_order_acquire) == round; spins++) {
        if (spins > 2000) sched_yield(); /* the others may have no core */
#ifdef PVRT_X86
        else __builtin_ia32_pause();
#endif
    }
}

static void rms_norm(const float *x, const float *weight, int64_t n, double epsilon, float *y) {
    float sums[8] = {0}, total = 0;
    for (int64_t i = 0; i < n / 8 * 8; i += 8)
        for (int l = 0; l < 8; l++) sums[l] += x[i + l] * x[i + l];
    for (int64_t i = n / 8 * 8; i < n; i++) total += x[i] * x[i];
    for (int l = 0; l < 8; l++) total += sums[l];
    const float factor = 1.0f / sqrtf(total / (float)n + (float)epsilon);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * factor * weight[i];
}

/* In place: heads are rotated in halves, as transformers does. */
static void rotate(float *x, const float *cosine, const float *sine, int64_t rotary) {
    const int64_t half = rotary / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
}

/* A kv head and the query heads that share it: x holds all queries, then keys, then values. */
static void attend(const operation *o, const sequence *s, float *x, float *y, int64_t head,
                   float *room) {
    const int64_t dim = o->dim, share = o->heads / o->kv_heads, position = s->position;
    float *keys = s->cache + (2 * o->layer * o->kv_heads + head) * s->capacity * dim;
    float *values = keys + o->kv_heads * s->capacity * dim;
    const float *cosine = o->cosine + position * o->rotary, *sine = o->sine + position * o->rotary;
    float *key = x + (o->heads + head) * dim;
    const float *value = x + (o->heads + o->kv_heads + head) * dim;
    if (o->key_norm) rms_norm(key, o->key_norm, dim, o->epsilon, key);
    rotate(key, cosine, sine, o->rotary);
    for (int64_t i = 0; i < dim; i++) {
        keys[position * dim + i] = key[i];
        values[position * dim + i] = value[i];
    }
    float *queries = x + head * share * dim;
    for (float *query = queries; query < queries + share * dim; query += dim) {
        if (o->query_norm) rms_norm(query, o->query_norm, dim, o->epsilon, query);
        rotate(query, cosine, sine, o->rotary);
    }
    kernels->attend(queries, share, keys, values, position + 1, dim, (float)o->scale, room,
                    y + head * share * dim);
}

static void barrier_of(program *p, int64_t threads) {
    if (threads > 1) barrier(p, (int)threads);
}

/* An input of a screened product in whole numbers, and what bounds its products' errors. */
typedef struct {
    int16_t *whole;
    float step, norm, lost, least; /* least: what the largest logit is at least */
    int usable;
} screened;

static screened round_input(const float *x, int64_t n, int16_t *whole) {
    double square = 0;
    float largest = 0;
    for (int64_t i = 0; i < n; i++) {
        square += (double)x[i] * x[i];
        largest = fmaxf(largest, fabsf(x[i]));
    }
    const double room = 2147483647.0 / 127 / ((double)n / 8 + 8);
    screened s = {.whole = whole, .step = largest / (float)(room < 32767 ? room : 32767)};
    s.norm = (float)sqrt(square) * 1.001f; /* the slack covers rounding in fp32 */
    s.lost = s.step * 0.5f * sqrtf((float)n) * 1.001f;
    s.least = -INFINITY;
    s.usable = largest > 0 && largest < INFINITY && square == square;
    for (int64_t i = 0; i < n; i++) whole[i] = s.usable ? (int16_t)lrintf(x[i] / s.step) : 0;
    return s;
}

/* Logits of which only the largest need be right: products with int8 rows first, then exact ones
 * for every row that the rounding errors (Cauchy-Schwarz) leave a chance to be the largest. */
static void screen(program *p, const operation *o, const float *x, int64_t thread,
                   int64_t threads) {
    const int64_t n = o->in, from = share(o->out, thread, threads);
    const int64_t to = share(o->out, thread + 1, threads);
    const size_t width = o->dtype == F32 ? 4 : 2, after = 2 * p->rows * n; /* x and its rounding */
    screened s[MOST_ROWS];
    float *least = p->room + p->room_floats * thread + after;
    for (int64_t t = 0; t < p->rows; t++)
        s[t] = round_input(x + t * n, n, (int16_t *)(least - p->rows * n) + t * n);
    for (int64_t k = 0; k < to - from; k++) {
        const int64_t i = in_two_streams(k, from, to);
        const float *bound = o->bounds + 3 * i;
        for (int64_t t = 0; t < p->rows; t++) {
            if (!s[t].usable) continue;
            const float y = bound[0] * s[t].step * kernels->dot_bytes(s[t].whole, o->bytes + i * n, n);
            o->y[t * o->stride + i] = y;
            s[t].least = fmaxf(s[t].least, y - bound[1] * s[t].norm - bound[2] * s[t].lost);
        }
    }
    for (int64_t t = 0; t < p->rows; t++) least[t] = s[t].least;
    barrier_of(p, threads);
    for (int64_t t = 0; t < p->rows; t++) {
        for (int64_t other = 0; other < threads; other++)
            s[t].least = fmaxf(s[t].least, p->room[p->room_floats * other + after + t]);
        for (int64_t i = from; i < to; i++) {
            const float *bound = o->bounds + 3 * i;
            float *y = o->y + t * o->stride + i;
            if (!s[t].usable || *y + bound[1] * s[t].norm + bound[2] * s[t].lost >= s[t].least)
                *y = kernels->dot(x + t * n, (const char *)o->weight + i * n * width, n, o->dtype);
        }
    }
}

static float largest_of(const float *y, const float *scales, int64_t n, float off) {
    float m[8], rest = -INFINITY;
    for (int l = 0; l < 8; l++) m[l] = -INFINITY;
    for (int64_t i = 0; i < n / 8 * 8; i += 8)
        for (int l = 0; l < 8; l++) {
            const float least = y[i + l] - fabsf(scales[i + l]) * off;
            m[l] = least > m[l] ? least : m[l];
        }
    for (int64_t i = n / 8 * 8; i < n; i++) rest = fmaxf(rest, y[i] - fabsf(scales[i]) * off);
    for (int l = 0; l < 8; l++) rest = fmaxf(rest, m[l]);
    return rest;
}

/* The same over a packed weight: by rough tables first, then row by row. */
static void screen_tiled(program *p, const operation *o, const float *x, int64_t thread,
                         int64_t threads) {
    const product product = {.x = x, .y = o->y, .tokens = p->rows, .in = o->in, .out = o->out,
                             .stride = o->stride};
    const tiled_job work = {.product = product, .weight = o->weight, .splits = threads};
    const float *scales = work.weight->scales;
    const int64_t after = p->rows * o->in; /* in a thread's room */
    float *mine = p->room + p->room_floats * thread + after, *row = mine + p->rows, off[MOST_ROWS];
    int64_t from = 0, to = 0;
    for (int64_t t = 0; t < p->rows; t++) {
        off[t] = rough_tiles(&work, thread, t, &from, &to);
        mine[t] = largest_of(o->y + t * o->stride + from, scales + from, to - from, off[t]);
    }
    barrier_of(p, threads);
    for (int64_t t = 0; t < p->rows; t++) {
        float *y = o->y + t * o->stride, least = -INFINITY;
        for (int64_t other = 0; other < threads; other++)
            least = fmaxf(least, p->room[p->room_floats * other + after + t]);
        for (int64_t i = from; i < to; i++) {
            if (y[i] + fabsf(scales[i]) * off[t] < least) continue;
            const decode_job one = {.job.parts = 1, .weight = o->plain, .first = i, .count = 1,
                                    .y = row};
            decode_part(&one.job, 0);
            y[i] = kernels->dot(x + t * o->in, row, o->in, F32);
            least = fmaxf(least, y[i]); /* exact now, so fewer are left a chance */
        }
    }
}

/* Rows of a packed weight; each thread decodes those of its sequences. */
static void embed_packed(const program *p, const operation *o, int64_t thread, int64_t threads) {
    int64_t tokens[MOST_ROWS];
    for (int64_t t = 0; t < p->rows; t++) tokens[t] = p->sequences[t].token;
    const decode_job work = {.job.parts = threads, .weight = o->weight, .rows = tokens,
                             .count = p->rows, .y = o->y};
    decode_part(&work.job, thread);
    const int64_t to = share(p->rows, thread + 1, threads);
    for (int64_t t = share(p->rows, thread, threads); t < to; t++)
        for (int64_t i = 0; i < o->out; i++)
            o->y[t * o->out + i] *= (float)o->scale * (o->norm ? o->norm[i] : 1);
}

static void operate(program *p, const operation *o, int64_t thread, int64_t n) {
    float *room = p->room + p->room_floats * thread;
    const int64_t from = share(o->out, thread, n), to = share(o->out, thread + 1, n);
    if (o->kind == EMBED) {
        for (int64_t t = 0; t < p->rows; t++)
            for (int64_t i = from; i < to; i++)
                o->y[t * o->stride + i] = (float)o->scale * load_float(
                    o->weight, p->sequences[t].token * o->out + i, o->dtype);
        return;
    }
    if (o->kind == DECODE) {
        embed_packed(p, o, thread, n);
        return;
    }
    if (o->kind == ATTEND) {
        const int64_t inputs = (o->heads + 2 * o->kv_heads) * o->dim;
        for (int64_t i = thread; i < p->rows * o->kv_heads; i += n) {
            const int64_t t = i / o->kv_heads;
            attend(o, p->sequences + t, (float *)o->x + t * inputs, o->y + t * o->heads * o->dim,
                   i % o->kv_heads, room);
        }
        return;
    }
    if (o->kind == GATE) { /* x: gates, then values, of one layer; threads take whole eights */
        const int64_t first = from / 8 * 8, end = thread + 1 == n ? to : to / 8 * 8;
        for (int64_t t = 0; t < p->rows; t++) {
            const float *x = o->x + 2 * t * o->out + first;
            kernels->gate(x, x + o->out, o->y + t * o->out + first, end - first);
        }
        return;
    }
    const float *x = o->x;
    if (o->norm) {
        for (int64_t t = 0; t < p->rows; t++)
            rms_norm(o->x + t * o->in, o->norm, o->in, o->epsilon, room + t * o->in);
        x = room;
    }
    if (o->kind == SCREEN) {
        screen(p, o, x, thread, n);
        return;
    }
    if (o->kind == SCREEN_TILED && kernels->build_rough) {
        screen_tiled(p, o, x, thread, n);
        return;
    }
    const product product = {.x = x, .bias = o->bias, .y = o->y, .tokens = p->rows, .in = o->in,
                             .out = o->out, .stride = o->stride, .accumulate = o->accumulate};
    if (o->kind == TILED || o->kind == SCREEN_TILED) {
        const tiled_job work = {.product = product, .weight = o->weight, .splits = n};
        for (int64_t eight = 0; eight * LANES < p->rows; eight++)
            tiled_part(&work.job, eight * n + thread);
    }
    else if (o->kind == PLAIN) {
        const plain_job work = {.job.parts = n, .product = product, .weight = o->weight};
        plain_part(&work.job, thread);
    }
    else {
        const dense_job work = {.job.parts = n, .product = product, .weight = o->weight,
                                .dtype = o->dtype};
        dense_part(&work.job, thread);
    }
}

static void enter(void *data) {
    program *p = data;
    const int threads = team_size ? team_size() : 1; /* may be fewer than asked for */
    const int thread = atomic_fetch_add_explicit(&p->entered, 1, memory_order_relaxed);
    for (int64_t i = 0; i < p->count; i++) {
        operate(p, p->operations + i, thread, threads);
        if (threads > 1 && i + 1 < p->count) barrier(p, threads);
    }
}

/* Whether a sequence's token is one of the embedding, its position one of its cache and angles. */
static int in_bounds(const program *p, const sequence *s) {
    for (const operation *o = p->operations; o < p->operations + p->count; o++) {
        if ((o->kind == EMBED || o->kind == DECODE) && (s->token < 0 || s->token >= o->in)) return 0;
        if (o->kind == ATTEND &&
            (s->position < 0 || s->position >= s->capacity || s->position >= o->in))
            return 0;
    }
    return 1;
}

/* Run a program for the next tokens of `rows` sequences, at most MOST_ROWS. room:
 * [threads][room_floats] fp32: enough for rows * (2 * the longest normed input + 1), and for
 * ATTEND_ROWS * (position + 1) scores of every sequence. Returns -1; or the number of a sequence
 * whose token or position is not there, and nothing is run. */
API int64_t pvrt_run_program(const operation *operations, int64_t count, const sequence *sequences,
                          int64_t rows, float *room, int64_t room_floats, int64_t threads) {
    program p = {.operations = operations, .count = count, .sequences = sequences, .rows = rows,
                 .room = room, .room_floats = room_floats};
    for (int64_t t = 0; t < rows; t++)
        if (!in_bounds(&p, sequences + t)) return t;
    if (parallel && team_size && threads > 1) {
        parallel(enter, &p, (unsigned)(threads < 256 ? threads : 256), 0);
        return -1;
    }
    for (int64_t i = 0; i < count; i++) operate(&p, operations + i, 0, 1);
    return -1;
}
