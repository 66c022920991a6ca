/* Programs: a list of operations that turns one token into the logits of the next.
 *
 * The threads enter once per token, not once per layer, and meet at a barrier after every
 * operation. What a thread computes depends on its number and nothing else, so the results do not
 * depend on timing.
 */
#include "cpu.h"

#include <math.h>
#include <sched.h>

enum { EMBED, TILED, PLAIN, DENSE, ATTEND, GATE, SCREEN };

/* x, y: fp32 vectors. norm: root-mean-square norm weights that x passes first (NULL: none).
 * keys, values: [kv_heads][capacity][dim]; cosine, sine: [positions][rotary].
 * bytes: the weight again, rounded to int8 times bounds[row][0]; bounds[row][1] and [2]: norms of
 * the row's rounding error and of the rounded row. */
typedef struct {
    int64_t kind, in, out, dtype, accumulate;
    const float *x;
    float *y;
    const float *norm;
    const void *weight;
    const float *bias;
    double epsilon;
    float *keys, *values;
    const float *cosine, *sine, *query_norm, *key_norm;
    int64_t heads, kv_heads, dim, rotary, capacity, window;
    double scale;
    const int8_t *bytes;
    const float *bounds;
} operation;

typedef struct {
    const operation *operations;
    int64_t count, token, position, room_floats;
    float *room; /* [threads][room_floats]: a normed input, or attention scores */
    atomic_int arrived, round, entered;
    float least[256]; /* by thread: what the largest logit is at least */
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
static void attend(const operation *o, int64_t head, int64_t position, float *room) {
    const int64_t dim = o->dim, share = o->heads / o->kv_heads;
    float *x = (float *)o->x, *keys = o->keys + head * o->capacity * dim;
    float *values = o->values + head * o->capacity * dim;
    const float *cosine = o->cosine + position * o->rotary, *sine = o->sine + position * o->rotary;
    float *key = x + (o->heads + head) * dim;
    const float *value = x + (o->heads + o->kv_heads + head) * dim;
    const int64_t first = o->window && position + 1 > o->window ? position + 1 - o->window : 0;
    if (o->key_norm) rms_norm(key, o->key_norm, dim, o->epsilon, key);
    rotate(key, cosine, sine, o->rotary);
    for (int64_t i = 0; i < dim; i++) {
        keys[position * dim + i] = key[i];
        values[position * dim + i] = value[i];
    }
    for (int64_t h = head * share; h < (head + 1) * share; h++) {
        float *query = x + h * dim, *y = o->y + h * dim;
        if (o->query_norm) rms_norm(query, o->query_norm, dim, o->epsilon, query);
        rotate(query, cosine, sine, o->rotary);
        kernels->attend(query, keys + first * dim, values + first * dim, position + 1 - first, dim,
                        (float)o->scale, room, y);
    }
}

static void barrier_of(program *p, int64_t threads) {
    if (threads > 1) barrier(p, (int)threads);
}

/* Logits of which only the largest need be right: products with int8 rows first, then exact ones
 * for every row that the rounding errors (Cauchy-Schwarz) leave a chance to be the largest. */
static void screen(program *p, const operation *o, const float *x, int16_t *whole, int64_t thread,
                   int64_t threads) {
    const int64_t n = o->in, from = o->out * thread / threads, to = o->out * (thread + 1) / threads;
    const size_t width = o->dtype == F32 ? 4 : 2;
    double square = 0;
    float largest = 0;
    for (int64_t i = 0; i < n; i++) {
        square += (double)x[i] * x[i];
        largest = fmaxf(largest, fabsf(x[i]));
    }
    const double room = 2147483647.0 / 127 / ((double)n / 8 + 8);
    const float step = largest / (float)(room < 32767 ? room : 32767);
    const float norm = (float)sqrt(square) * 1.001f; /* the slack covers rounding in fp32 */
    const float lost = step * 0.5f * sqrtf((float)n) * 1.001f;
    const int usable = largest > 0 && largest < INFINITY && square == square;
    for (int64_t i = 0; i < n; i++) whole[i] = usable ? (int16_t)lrintf(x[i] / step) : 0;
    float least = -INFINITY;
    for (int64_t i = from; usable && i < to; i++) {
        const float *bound = o->bounds + 3 * i;
        o->y[i] = bound[0] * step * kernels->dot_bytes(whole, o->bytes + i * n, n);
        least = fmaxf(least, o->y[i] - bound[1] * norm - bound[2] * lost);
    }
    p->least[thread] = least;
    barrier_of(p, threads);
    for (int64_t t = 0; t < threads; t++) least = fmaxf(least, p->least[t]);
    for (int64_t i = from; i < to; i++) {
        const float *bound = o->bounds + 3 * i;
        if (!usable || o->y[i] + bound[1] * norm + bound[2] * lost >= least)
            o->y[i] = kernels->dot(x, (const char *)o->weight + i * n * width, n, o->dtype);
    }
}

static void operate(program *p, const operation *o, int64_t thread, int64_t n) {
    float *room = p->room + p->room_floats * thread;
    const int64_t from = o->out * thread / n, to = o->out * (thread + 1) / n;
    if (o->kind == EMBED) {
        for (int64_t i = from; i < to; i++)
            o->y[i] = load_float(o->weight, p->token * o->out + i, o->dtype) * (float)o->scale;
        return;
    }
    if (o->kind == ATTEND) {
        for (int64_t h = thread; h < o->kv_heads; h += n) attend(o, h, p->position, room);
        return;
    }
    if (o->kind == GATE) { /* x: gates, then values, of one layer */
        for (int64_t i = from; i < to; i++)
            o->y[i] = o->x[i] / (1.0f + expf(-o->x[i])) * o->x[o->out + i];
        return;
    }
    const float *x = o->x;
    if (o->norm) rms_norm(o->x, o->norm, o->in, o->epsilon, room), x = room;
    if (o->kind == SCREEN) {
        screen(p, o, x, (int16_t *)(room + o->in), thread, n);
        return;
    }
    job work = {.x = x, .y = o->y, .bias = o->bias, .tokens = 1, .in = o->in, .out = o->out,
                .parts = n, .splits = n, .accumulate = (int)o->accumulate, .dtype = o->dtype};
    if (o->kind == TILED) work.tiled = o->weight, tiled_part(&work, thread);
    else if (o->kind == PLAIN) work.plain = o->weight, plain_part(&work, thread);
    else work.matrix = o->weight, matrix_part(&work, thread);
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

/* Run a program for a token at a position (all earlier ones are in the keys and values). room:
 * [threads][room_floats] fp32, enough for the longest normed input and for position + 1 scores. */
API void pvrt_run_program(const operation *operations, int64_t count, int64_t token,
                          int64_t position, float *room, int64_t room_floats, int64_t threads) {
    program p = {.operations = operations, .count = count, .token = token, .position = position,
                 .room = room, .room_floats = room_floats};
    if (parallel && team_size && threads > 1) {
        parallel(enter, &p, (unsigned)(threads < 256 ? threads : 256), 0);
        return;
    }
    for (int64_t i = 0; i < count; i++) operate(&p, operations + i, 0, 1);
}
