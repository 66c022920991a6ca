/* Attention of one token, gates, and exp. Included once per instruction set: GNU C's own vectors of 8. */
#include <math.h>
#include <string.h>

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

#ifndef MULTIPLY_ADD
#define MULTIPLY_ADD(a, b, sum) ((sum) + (a) * (b))
#endif
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints8){__VA_ARGS__})
#endif

/* The sums of a, b, c and d, in elements 0, 4, 2 and 6. */
static inline floats8 sum4(floats8 a, floats8 b, floats8 c, floats8 d) {
    const floats8 ab = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
                       SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    const floats8 cd = SHUFFLE(c, d, 0, 1, 2, 3, 8, 9, 10, 11) +
                       SHUFFLE(c, d, 4, 5, 6, 7, 12, 13, 14, 15);
    const floats8 all = SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
                        SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    return all + SHUFFLE(all, all, 1, 0, 3, 2, 5, 4, 7, 6);
}

#define SPAN 16 /* values that stay near while all their elements are weighted, or keys ahead */

/* weights [heads][count] = scale queries . keys. Two keys at a time are read once for all heads. */
static inline __attribute__((always_inline)) void scores_of(
    const float *queries, int heads, const float *keys, int64_t count, int64_t dim, float scale,
    float *weights) {
    for (int64_t t = 0; t < count; t += 2) {
        const float *key = keys + t * dim, *key2 = t + 1 < count ? key + dim : key;
        floats8 s[ATTEND_ROWS] = {{0}}, s2[ATTEND_ROWS] = {{0}};
        int64_t i = 0;
        for (; i + 8 <= dim; i += 8) {
            const floats8 k = AT(key + i), k2 = AT(key2 + i);
            __builtin_prefetch(key + SPAN * dim + 2 * i);
            for (int h = 0; h < heads; h++) {
                const floats8 q = AT(queries + h * dim + i);
                s[h] = MULTIPLY_ADD(q, k, s[h]), s2[h] = MULTIPLY_ADD(q, k2, s2[h]);
            }
        }
        const floats8 sums = sum4(s[0], s[1], s[2], s[3]) * scale;
        const floats8 sums2 = sum4(s2[0], s2[1], s2[2], s2[3]) * scale;
        for (int h = 0; h < heads; h++) {
            float score = sums[h % 2 * 4 + h / 2 * 2], score2 = sums2[h % 2 * 4 + h / 2 * 2];
            for (int64_t e = i; e < dim; e++) {
                score += queries[h * dim + e] * key[e] * scale;
                score2 += queries[h * dim + e] * key2[e] * scale;
            }
            weights[h * count + t] = score;
            if (t + 1 < count) weights[h * count + t + 1] = score2;
        }
    }
}

/* w = exp(w - their maximum); returns the sum. */
static float exponentials(float *w, int64_t count) {
    float highest = w[0], sum = 0;
    floats8 most = (floats8){0} + highest, sums = {0};
    int64_t t = 0;
    for (; t + 8 <= count; t += 8) {
        const ints8 more = AT(w + t) > most;
        most = (floats8)(((ints8)AT(w + t) & more) | ((ints8)most & ~more));
    }
    for (; t < count; t++) highest = w[t] > highest ? w[t] : highest;
    for (int l = 0; l < 8; l++) highest = most[l] > highest ? most[l] : highest;
    for (t = 0; t + 8 <= count; t += 8) {
        const floats8 e = exp8(AT(w + t) - highest);
        *(floats8 *)(w + t) = e;
        sums += e;
    }
    for (; t < count; t++) sum += w[t] = expf(w[t] - highest);
    return sum + sum8(sums);
}

/* y [heads][dim] = sums of weights times values, the sums of 16 elements of all heads in registers. */
static inline __attribute__((always_inline)) void weighted(
    const float *weights, int heads, const float *values, int64_t count, int64_t dim, float *y) {
    for (int64_t i = 0; i < heads * dim; i++) y[i] = 0;
    for (int64_t first = 0; first < count; first += SPAN) {
        const int64_t end = first + SPAN < count ? first + SPAN : count;
        int64_t i = 0;
        for (; i + 16 <= dim; i += 16) {
            floats8 s[ATTEND_ROWS], s2[ATTEND_ROWS];
            for (int h = 0; h < heads; h++) s[h] = AT(y + h * dim + i), s2[h] = AT(y + h * dim + i + 8);
            for (int64_t t = first; t < end; t++) {
                const floats8 v = AT(values + t * dim + i), v2 = AT(values + t * dim + i + 8);
                __builtin_prefetch(values + (t + SPAN) * dim + i);
                for (int h = 0; h < heads; h++) {
                    const float f = weights[h * count + t];
                    const floats8 w = {f, f, f, f, f, f, f, f};
                    s[h] = MULTIPLY_ADD(w, v, s[h]), s2[h] = MULTIPLY_ADD(w, v2, s2[h]);
                }
            }
            for (int h = 0; h < heads; h++)
                *(floats8 *)(y + h * dim + i) = s[h], *(floats8 *)(y + h * dim + i + 8) = s2[h];
        }
        for (int64_t t = first; t < end && i < dim; t++)
            for (int h = 0; h < heads; h++)
                for (int64_t e = i; e < dim; e++)
                    y[h * dim + e] += weights[h * count + t] * values[t * dim + e];
    }
}

static inline __attribute__((always_inline)) void attend_heads(
    const float *queries, int heads, const float *keys, const float *values, int64_t count,
    int64_t dim, float scale, float *weights, float *y) {
    float factors[ATTEND_ROWS];
    scores_of(queries, heads, keys, count, dim, scale, weights);
    for (int h = 0; h < heads; h++) factors[h] = 1.0f / exponentials(weights + h * count, count);
    weighted(weights, heads, values, count, dim, y);
    for (int h = 0; h < heads; h++)
        for (int64_t i = 0; i < dim; i++) y[h * dim + i] *= factors[h];
}

static void attend(const float *queries, int64_t heads, const float *keys, const float *values,
                   int64_t count, int64_t dim, float scale, float *weights, float *y) {
#define HEADS(n) attend_heads(queries, n, keys, values, count, dim, scale, weights, y)
    for (; heads >= 4; heads -= 4, queries += 4 * dim, y += 4 * dim) HEADS(4);
    if (heads == 3) HEADS(3);
    else if (heads == 2) HEADS(2);
    else if (heads == 1) HEADS(1);
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
