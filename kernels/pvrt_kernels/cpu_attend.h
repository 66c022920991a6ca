/* Attention of one query, gates, and exp. Included once per instruction set: GNU C's own vectors of 8. */
#include <math.h>
#include <string.h>

typedef float floats8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t ints8 __attribute__((vector_size(32)));

/* exp of values <= 0, relative error 2e-7: 2^(n + f) with a polynomial (Cephes) on |f| <= 0.5. */
static inline floats8 exp8(floats8 x) {
    const floats8 lowest = (floats8){0} - 87.0f;
    const ints8 tiny = x < lowest;
    x = (floats8)(((ints8)lowest & tiny) | ((ints8)x & ~tiny));
    const floats8 scaled = x * 1.44269504f - 0.5f; /* truncation then rounds: all are <= 0 */
    const ints8 n = __builtin_convertvector(scaled, ints8);
    const floats8 whole = __builtin_convertvector(n, floats8);
    const floats8 r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    floats8 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (floats8)((ints8)p + (n << 23));
}

static inline float sum8(floats8 s) {
    return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
}

/* y[i..i+8*n) = sum of weights times values, with the sums in registers. */
#define WEIGHTED(n)                                                                                \
    for (; i + 8 * (n) <= dim; i += 8 * (n)) {                                                     \
        floats8 s[n] = {{0}};                                                                      \
        for (int64_t t = 0; t < count; t++)                                                        \
            for (int k = 0; k < (n); k++)                                                          \
                s[k] += weights[t] * *(const floats8 *)(values + t * dim + i + 8 * k);             \
        for (int k = 0; k < (n); k++) *(floats8 *)(y + i + 8 * k) = s[k];                          \
    }

static void attend(const float *query, const float *keys, const float *values, int64_t count,
                   int64_t dim, float scale, float *weights, float *y) {
    float highest = -INFINITY, sum = 0;
    const int64_t whole = dim / 8 * 8;
    for (int64_t t = 0; t < count; t++) {
        const float *key = keys + t * dim;
        floats8 s = {0}, s2 = {0};
        int64_t i = 0;
        for (; i + 16 <= dim; i += 16) {
            s += *(const floats8 *)(query + i) * *(const floats8 *)(key + i);
            s2 += *(const floats8 *)(query + i + 8) * *(const floats8 *)(key + i + 8);
        }
        for (; i < whole; i += 8) s += *(const floats8 *)(query + i) * *(const floats8 *)(key + i);
        float score = sum8(s + s2);
        for (; i < dim; i++) score += query[i] * key[i];
        weights[t] = score *= scale;
        if (score > highest) highest = score;
    }
    int64_t t = 0;
    floats8 sums = {0};
    for (; t + 8 <= count; t += 8) {
        floats8 *w = (floats8 *)(weights + t);
        sums += *w = exp8(*w - highest);
    }
    for (; t < count; t++) sum += weights[t] = expf(weights[t] - highest);
    sum = 1.0f / (sum + sum8(sums));
    for (t = 0; t < count; t++) weights[t] *= sum;
    int64_t i = 0;
    WEIGHTED(8)
    WEIGHTED(1)
    for (; i < dim; i++) {
        y[i] = 0;
        for (t = 0; t < count; t++) y[i] += weights[t] * values[t * dim + i];
    }
}

static void gate(const float *x, const float *values, float *y, int64_t n) {
    const ints8 sign = (ints8){0} + INT32_MIN;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const floats8 v = *(const floats8 *)(x + i), one = (floats8){0} + 1.0f;
        const ints8 negative = (ints8)v >> 31;
        const floats8 e = exp8((floats8)((ints8)v | sign)); /* of -|v|: never too large */
        const floats8 above = (floats8)(((ints8)e & negative) | ((ints8)one & ~negative));
        *(floats8 *)(y + i) = v * above / (e + one) * *(const floats8 *)(values + i);
    }
    for (; i < n; i++) y[i] = x[i] / (1.0f + expf(-x[i])) * values[i];
}
