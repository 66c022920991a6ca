/* The kernels in plain C: the definition of every other instruction set, and what is not x86. */
#include "cpu.h"

static void build(const float *books, const float *x, int groups, int group, int count, void *t) {
    float *out = t;
    for (int j = 0; j < groups; j++, x += group)
        for (int m = 0; m < count; m++, out += ENTRIES) {
            const float *book = books + (size_t)m * group * ENTRIES;
            for (int v = 0; v < ENTRIES; v++) out[v] = 0;
            for (int e = 0; e < group; e++)
                for (int v = 0; v < ENTRIES; v++) out[v] += x[e] * book[e * ENTRIES + v];
        }
}

static void lookup(const uint8_t *codes, const uint8_t *next, const void *t, int tables,
                   float *acc) {
    const float *table = t;
    (void)next;
    for (int k = 0; k < tables; k++, table += ENTRIES, codes += TILE)
        for (int r = 0; r < TILE; r++) acc[r] += table[codes[r]];
}

static void build8(const float *books, const float *x, int groups, int group, int count,
                   float *t) {
    for (int j = 0; j < groups; j++, x += group * LANES)
        for (int m = 0; m < count; m++)
            for (int v = 0; v < ENTRIES; v++, t += LANES) {
                const float *book = books + (size_t)m * group * ENTRIES + v;
                for (int l = 0; l < LANES; l++) t[l] = 0;
                for (int e = 0; e < group; e++)
                    for (int l = 0; l < LANES; l++) t[l] += book[e * ENTRIES] * x[e * LANES + l];
            }
}

static void lookup8(const uint8_t *codes, const uint8_t *next, const float *t, int tables,
                    float *acc) {
    (void)next;
    for (int k = 0; k < tables; k++, t += ENTRIES * LANES, codes += TILE)
        for (int r = 0; r < TILE; r++)
            for (int l = 0; l < LANES; l++) acc[r * LANES + l] += t[codes[r] * LANES + l];
}

static void direct(const plain_weight *w, const void *books, const float *x, int64_t row,
                   int64_t count, float *y) {
    const uint8_t *bytes = w->codes;
    const uint16_t *words = w->codes;
    for (int64_t i = row; i < row + count; i++) {
        float sum = 0;
        int64_t at = i * w->groups * w->books;
        for (int64_t j = 0; j < w->groups; j++)
            for (int64_t m = 0; m < w->books; m++, at++) {
                int64_t code = (w->code_bytes == 1 ? bytes[at] : words[at]) & (w->size - 1);
                int64_t entry = (m * w->size + code) * w->group;
                for (int64_t e = 0; e < w->group; e++)
                    sum += x[j * w->group + e] * load_float(books, entry + e, w->dtype);
            }
        y[i - row] = sum;
    }
}

static void decode(const plain_weight *w, const void *books, float scale, float *y) {
    const uint8_t *bytes = w->codes;
    const uint16_t *words = w->codes;
    for (int64_t j = 0, at = 0; j < w->groups; j++, y += w->group) {
        for (int64_t e = 0; e < w->group; e++) y[e] = 0;
        for (int64_t m = 0; m < w->books; m++, at++) {
            int64_t code = (w->code_bytes == 1 ? bytes[at] : words[at]) & (w->size - 1);
            int64_t entry = (m * w->size + code) * w->group;
            for (int64_t e = 0; e < w->group; e++) y[e] += load_float(books, entry + e, w->dtype);
        }
        for (int64_t e = 0; e < w->group; e++) y[e] *= scale;
    }
}

#include "attention.h"
#include "tiles.h"

static float dot(const float *a, const void *b, int64_t n, int64_t dtype) {
    float sums[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int l = 0; l < 8; l++) sums[l] += a[i + l] * load_float(b, i + l, dtype);
    for (; i < n; i++) sums[0] += a[i] * load_float(b, i, dtype);
    return sum8(AT(sums));
}

static float dot_bytes(const int16_t *a, const int8_t *b, int64_t n) {
    int64_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (int32_t)a[i] * b[i];
    return (float)sum;
}

static void dot4(const float *a, int64_t stride, const void *b, int64_t n, int64_t dtype,
                 float *y) {
    for (int k = 0; k < 4; k++) y[k] = dot(a + k * stride, b, n, dtype);
}

const isa isa_portable = {"portable", ENTRIES * 4, 0, 0, 2, build, lookup, build8, lookup8, direct,
                          decode, decode_tile, attend, dot, dot_bytes, dot4, gate, NULL, NULL};
