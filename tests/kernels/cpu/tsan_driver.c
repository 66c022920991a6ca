/* Runs the kernels from POSIX threads, which ThreadSanitizer understands (OpenMP's it does not):
 * packs random weights and multiplies with 1 and with 4 threads; results must be equal. */
#include "cpu.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *pvrt_use_isa(const char *);
void pvrt_use_threads(parallel_fn, team_size_fn);
void pvrt_tiled_linear(const tiled_weight *, const float *, const float *, float *, int64_t, int64_t);
void pvrt_plain_linear(const plain_weight *, const float *, const float *, float *, int64_t, int64_t);
int64_t pvrt_decode_rows(const plain_weight *, const int64_t *, int64_t, int64_t, float *, int64_t);
int64_t pvrt_run_program(const operation *, int64_t, const sequence *, int64_t, float *, int64_t,
                         int64_t);
void pvrt_tile_codes(uint8_t *, uint8_t *, const int64_t *, int64_t, int64_t, int64_t, int64_t);
void pvrt_dense_linear(const void *, const float *, float *, int64_t, int64_t, int64_t, int64_t, int64_t);
void pvrt_nearest_sums(const sums *, const float *, int64_t, int64_t, int64_t, uint8_t *, int64_t);
void pvrt_choose_codes(const choice *, int64_t, int64_t);
void pvrt_parameter_gradients(const plain_weight *, const float *, float *, float *, int64_t);
void pvrt_latent_moment(const latent_step *, int64_t);
void pvrt_latent_step(const latent_step *, int64_t);

typedef struct { void (*work)(void *); void *data; } call;
static void *enter(void *p) { call *c = p; c->work(c->data); return NULL; }

static void threads(void (*work)(void *), void *data, unsigned n, unsigned flags) {
    pthread_t others[64];
    call c = {work, data};
    (void)flags;
    for (unsigned i = 1; i < n; i++) pthread_create(&others[i], NULL, enter, &c);
    work(data);
    for (unsigned i = 1; i < n; i++) pthread_join(others[i], NULL);
}

static int four_threads(void) { return 4; }

static int64_t largest(const float *y, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (y[i] > y[best]) best = i;
    return best;
}

static float uniform(void) { return (float)rand() / (float)RAND_MAX - 0.5f; }

int main(void) {
    enum { PARTS = 3, OUT = 70 + 64 + 130, GROUPS = 21, BOOKS = 2, GROUP = 8, IN = GROUPS * GROUP };
    enum { TILES = 2 + 1 + 3, TOKENS = 19 };
    const int64_t rows[PARTS] = {70, 64, 130};
    static uint8_t codes[OUT * GROUPS * BOOKS], tiled[TILES * TILE * GROUPS * BOOKS];
    static float books[PARTS * BOOKS * ENTRIES * GROUP], tables[PARTS * BOOKS * GROUP * ENTRIES];
    static float scales[OUT], x[TOKENS * IN], matrix[OUT * IN];
    static float one[TOKENS * OUT], four[TOKENS * OUT], dense1[OUT * IN], dense4[OUT * IN];
    for (size_t i = 0; i < sizeof codes; i++) codes[i] = (uint8_t)(rand() >> 7);
    for (int i = 0; i < PARTS * BOOKS; i++)
        for (int v = 0; v < ENTRIES; v++)
            for (int e = 0; e < GROUP; e++)
                books[(i * ENTRIES + v) * GROUP + e] = tables[(i * GROUP + e) * ENTRIES + v] = uniform();
    for (int i = 0; i < OUT; i++) scales[i] = uniform();
    for (int i = 0; i < TOKENS * IN; i++) x[i] = uniform();
    for (int i = 0; i < OUT * IN; i++) matrix[i] = uniform();
    pvrt_tile_codes(codes, tiled, rows, PARTS, GROUPS, BOOKS, 0);
    const tiled_weight t = {tiled, tables, scales, rows, PARTS, BOOKS, GROUP, GROUPS};
    const plain_weight p = {codes, books, scales, rows, PARTS, BOOKS, GROUP, GROUPS, ENTRIES, 1, F32, 0};
    enum { VALUES = OUT * GROUPS, KEPT = 2, BOOK = BOOKS * ENTRIES * GROUP, PART_GROUPS = 512 };
    static float products[BOOKS * BOOKS * ENTRIES * ENTRIES], zero[BOOKS * BOOKS * ENTRIES];
    static float shares[4][BOOK], row_gradients[OUT];
    static float moment[OUT * IN], distance[2][VALUES];
    static double squares[2][VALUES / PART_GROUPS + 1][2];
    static uint8_t moves[2][VALUES], chosen[2][VALUES * BOOKS];
    static uint8_t found1[VALUES * KEPT * BOOKS], found4[VALUES * KEPT * BOOKS];
    const sums n = {tables, zero, products, zero, zero, BOOKS, ENTRIES, GROUP};
    const int64_t all = OUT;
    const plain_weight g = {codes, books, scales, &all, 1, BOOKS, GROUP, GROUPS, ENTRIES, 1, F32, 0};
    enum { SEQUENCES = 5, ROOM = SEQUENCES * (2 * IN + 1) };
    static uint8_t whole[(OUT + TILE - 1) / TILE * TILE * GROUPS * BOOKS];
    static float hidden[2][SEQUENCES * IN], room[4 * ROOM];
    int64_t names[OUT];
    for (int64_t i = 0; i < OUT; i++) names[i] = OUT - 1 - i;
    pvrt_tile_codes(codes, whole, &all, 1, GROUPS, BOOKS, 0);
    const tiled_weight head = {whole, tables, scales, &all, 1, BOOKS, GROUP, GROUPS};
    const plain_weight table = {whole, books, scales, &all, 1, BOOKS, GROUP, GROUPS, ENTRIES, 1, F32, 1};
    const sequence tokens_of[SEQUENCES] = {{.token = 3}, {.token = 200}, {.token = OUT - 1}, {.token = 64}};
    pvrt_use_threads(threads, four_threads);
    const char *sets[] = {"portable", "avx2", "avx512-vbmi"};
    for (int s = 0; s < 3; s++) {
        if (!pvrt_use_isa(sets[s])) continue;
        for (int repeat = 0; repeat < 3; repeat++)
            for (int64_t tokens = 1; tokens <= TOKENS; tokens += 6) {
                pvrt_tiled_linear(&t, x, scales, one, tokens, 1);
                pvrt_tiled_linear(&t, x, scales, four, tokens, 4);
                if (memcmp(one, four, sizeof(float) * tokens * OUT)) return puts("tiled"), 1;
                pvrt_plain_linear(&p, x, NULL, one, tokens, 1);
                pvrt_plain_linear(&p, x, NULL, four, tokens, 4);
                if (memcmp(one, four, sizeof(float) * tokens * OUT)) return puts("plain"), 1;
                pvrt_dense_linear(matrix, x, one, tokens, OUT, IN, F32, 1);
                pvrt_dense_linear(matrix, x, four, tokens, OUT, IN, F32, 4);
                if (memcmp(one, four, sizeof(float) * tokens * OUT)) return puts("dense"), 1;
            }
        pvrt_decode_rows(&p, NULL, 0, OUT, dense1, 1);
        pvrt_decode_rows(&p, NULL, 0, OUT, dense4, 4);
        if (memcmp(dense1, dense4, sizeof dense1)) return puts("decode"), 1;
        pvrt_decode_rows(&table, names, 0, OUT, dense1, 1);
        pvrt_decode_rows(&table, names, 0, OUT, dense4, 4);
        if (memcmp(dense1, dense4, sizeof dense1)) return puts("rows"), 1;
        for (int threads = 1; threads <= 4; threads += 3) { /* embeds, and ends with the same weight */
            float *x = hidden[threads == 4], *y = threads == 1 ? one : four;
            const operation both[] = {
                {.kind = DECODE, .in = OUT, .out = IN, .stride = IN, .y = x, .weight = &table, .scale = 1},
                {.kind = SCREEN_TILED, .in = IN, .out = OUT, .stride = OUT, .x = x, .y = y,
                 .weight = &head, .plain = &table}};
            if (pvrt_run_program(both, 2, tokens_of, SEQUENCES, room, ROOM, threads) != -1) return 1;
        }
        if (memcmp(hidden[0], hidden[1], sizeof hidden[0])) return puts("embedding"), 1;
        for (int64_t t = 0; t < SEQUENCES; t++)
            if (largest(one + t * OUT, OUT) != largest(four + t * OUT, OUT)) return puts("logits"), 1;
        pvrt_nearest_sums(&n, matrix, VALUES, 8, 2, found1, 1);
        pvrt_nearest_sums(&n, matrix, VALUES, 8, 2, found4, 4);
        if (memcmp(found1, found4, sizeof found1)) return puts("search"), 1;
        for (int threads = 1; threads <= 4; threads += 3) {
            const int four = threads == 4;
            const choice asked = {matrix, books, NULL, codes, found1, chosen[four], moves[four],
                                  four ? dense4 : dense1, distance[four], BOOKS, ENTRIES, GROUP};
            pvrt_choose_codes(&asked, VALUES, threads);
        }
        if (memcmp(chosen[0], chosen[1], sizeof chosen[0]) || memcmp(dense1, dense4, sizeof dense1) ||
            memcmp(moves[0], moves[1], sizeof moves[0]) ||
            memcmp(distance[0], distance[1], sizeof distance[0]))
            return puts("choices"), 1;
        for (int threads = 1; threads <= 4; threads += 3) {
            float *latent = threads == 1 ? dense1 : dense4;
            memset(moment, 0, sizeof moment);
            const latent_step step = {matrix, matrix, moment, latent, distance[threads == 4],
                                      squares[threads == 4][0], 0.9f, 0.1f, GROUP, VALUES, PART_GROUPS};
            pvrt_latent_moment(&step, threads);
            pvrt_latent_step(&step, threads);
        }
        if (memcmp(dense1, dense4, sizeof dense1) || memcmp(squares[0], squares[1], sizeof squares[0]) ||
            memcmp(distance[0], distance[1], sizeof distance[0]))
            return puts("latent"), 1;
        memset(shares, 0, sizeof shares);
        pvrt_parameter_gradients(&g, matrix, shares[0], row_gradients, 4);
    }
    return 0;
}
