/* AVX-512 with VBMI: byte permutes of 16-bit tables. Without VBMI nothing is gained over AVX2:
 * gathers from fp32 tables take twice the time of its scalar loads.
 *
 * With PVRT_MODEL_AVX512 the intrinsics come from a scalar model of the same instructions
 * (tests/kernels/cpu/avx512_model.h), so that the values are tested on machines without them.
 */
#include "cpu.h"
#ifdef PVRT_X86
#ifdef PVRT_MODEL_AVX512
#include PVRT_MODEL_AVX512
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")
#include <immintrin.h>
#endif

/* fp32 tables of one group and book: 16 vectors. */
static inline void table16(const float *book, const float *x, int group, __m512 *t) {
    for (int k = 0; k < ENTRIES / 16; k++) t[k] = _mm512_setzero_ps();
    for (int e = 0; e < group; e++, book += ENTRIES) {
        __m512 xe = _mm512_set1_ps(x[e]);
        for (int k = 0; k < ENTRIES / 16; k++)
            t[k] = _mm512_fmadd_ps(xe, _mm512_loadu_ps(book + 16 * k), t[k]);
    }
}

/* 16-bit tables as two planes of bytes [2][256], every table without its minimum, one scale for a
 * block: the span of its widest table in STEPS. After the tables: the scale, then the sum of the
 * minima. An entry is rounded to the nearest step, so each lookup is off by at most half a step;
 * that is table_rounding. Sums of steps are exact. Rough tables are the same with one plane. */
#define STEPS 65535.0f
#define ROUGH_STEPS 255.0f
#define SMALLEST_STEP 0x1p-126f /* its inverse is a number, and so is it */
static inline __attribute__((always_inline)) void quantised(
    const float *books, const float *x, int groups, int group, int count, void *t, int planes) {
    float least[256], widest = 0, sum = 0; /* a block has at most 16 tables, or books (<= 64) */
    const float steps = planes == 2 ? STEPS : ROUGH_STEPS, *block = x;
    for (int j = 0, k = 0; j < groups; j++, x += group)
        for (int m = 0; m < count; m++, k++) {
            __m512 sums[ENTRIES / 16];
            table16(books + (size_t)m * group * ENTRIES, x, group, sums);
            __m512 low = sums[0], high = sums[0];
            for (int i = 1; i < ENTRIES / 16; i++) {
                low = _mm512_min_ps(low, sums[i]), high = _mm512_max_ps(high, sums[i]);
            }
            const float from = _mm512_reduce_min_ps(low), to = _mm512_reduce_max_ps(high);
            least[k] = from, sum += from;
            if (to - from > widest) widest = to - from;
        }
    const float step = widest / steps, scale = step > SMALLEST_STEP ? step : SMALLEST_STEP;
    const __m512 inverse = _mm512_set1_ps(1.0f / scale);
    uint8_t *out = t;
    x = block;
    for (int j = 0, k = 0; j < groups; j++, x += group)
        for (int m = 0; m < count; m++, k++, out += planes * ENTRIES) {
            __m512 sums[ENTRIES / 16];
            table16(books + (size_t)m * group * ENTRIES, x, group, sums);
            const __m512 from = _mm512_set1_ps(least[k]);
            for (int i = 0; i < ENTRIES / 16; i++) {
                __m512i q = _mm512_cvtps_epi32(
                    _mm512_mul_ps(_mm512_sub_ps(sums[i], from), inverse));
                q = _mm512_min_epi32(q, _mm512_set1_epi32((int)steps)); /* rounding of the inverse */
                _mm_storeu_si128((void *)(out + 16 * i), _mm512_cvtepi32_epi8(q));
                if (planes == 2)
                    _mm_storeu_si128((void *)(out + ENTRIES + 16 * i),
                                     _mm512_cvtepi32_epi8(_mm512_srli_epi32(q, 8)));
            }
        }
    const float ends[2] = {scale, sum};
    __builtin_memcpy(out, ends, sizeof ends);
}

static void build(const float *books, const float *x, int groups, int group, int count, void *t) {
    quantised(books, x, groups, group, count, t, 2);
}

static void build_rough(const float *books, const float *x, int groups, int group, int count,
                        void *t) {
    quantised(books, x, groups, group, count, t, 1);
}

/* 64 bytes by 64 codes from one plane: two permutes of 128 entries each, chosen by the top bit. */
static inline __m512i plane(const uint8_t *p, __m512i codes, __mmask64 upper) {
    __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(p), codes, _mm512_loadu_si512(p + 64));
    __m512i high =
        _mm512_permutex2var_epi8(_mm512_loadu_si512(p + 128), codes, _mm512_loadu_si512(p + 192));
    return _mm512_mask_blend_epi8(upper, low, high);
}

/* 16-bit sums of 64 bytes, as FAISS's fast scan keeps them: `all` adds pairs of bytes as words,
 * `odd` the upper bytes; the lower ones are what is left. Exact for 257 additions.
 * sums[64] += factor times them. */
static inline void add_sums(__m512i all, __m512i odd, float factor, __m512 *sums) {
    const __m512i even = _mm512_sub_epi16(all, _mm512_slli_epi16(odd, 8));
    /* in each quarter q rows 16q to 16q + 7, and 16q + 8 to 16q + 15 */
    const __m512i first = _mm512_unpacklo_epi16(even, odd), last = _mm512_unpackhi_epi16(even, odd);
    const __m512i front = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
    const __m512i back = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    const __m512i halves[2] = {_mm512_permutex2var_epi64(first, front, last),
                               _mm512_permutex2var_epi64(first, back, last)};
    const __m512 f = _mm512_set1_ps(factor);
#define ADD(i, half, at)                                                                           \
    sums[i] = _mm512_fmadd_ps(f, _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(                         \
                                     _mm512_extracti64x4_epi64(halves[half], at))), sums[i])
    ADD(0, 0, 0), ADD(1, 0, 1), ADD(2, 1, 0), ADD(3, 1, 1);
}

static inline __attribute__((always_inline)) void permuted(
    const uint8_t *codes, const uint8_t *next, const void *t, int tables, float *acc, int planes) {
    const uint8_t *table = t;
    __m512i low = _mm512_setzero_si512(), low_odd = low, high = low, high_odd = low;
    for (int k = 0; k < tables; k++, table += planes * ENTRIES, codes += TILE, next += TILE) {
        _mm_prefetch((const char *)next, _MM_HINT_T1);
        __m512i c = _mm512_loadu_si512(codes);
        __mmask64 upper = _mm512_movepi8_mask(c);
        __m512i v = plane(table, c, upper);
        low = _mm512_add_epi16(low, v), low_odd = _mm512_add_epi16(low_odd, _mm512_srli_epi16(v, 8));
        if (planes == 1) continue;
        v = plane(table + ENTRIES, c, upper);
        high = _mm512_add_epi16(high, v);
        high_odd = _mm512_add_epi16(high_odd, _mm512_srli_epi16(v, 8));
    }
    float ends[2];
    __builtin_memcpy(ends, table, sizeof ends);
    __m512 sums[4];
    for (int i = 0; i < 4; i++) sums[i] = _mm512_set1_ps(ends[1]);
    add_sums(low, low_odd, ends[0], sums);
    if (planes == 2) add_sums(high, high_odd, ends[0] * 256.0f, sums);
    for (int i = 0; i < 4; i++)
        _mm512_storeu_ps(acc + 16 * i, _mm512_add_ps(_mm512_loadu_ps(acc + 16 * i), sums[i]));
}

static void lookup(const uint8_t *codes, const uint8_t *next, const void *t, int tables,
                   float *acc) {
    permuted(codes, next, t, tables, acc, 2);
}

static void lookup_rough(const uint8_t *codes, const uint8_t *next, const void *t, int tables,
                         float *acc) {
    permuted(codes, next, t, tables, acc, 1);
}

/* Eight tokens a lookup, and the direct form, gain nothing from wider vectors. */
static void build8(const float *books, const float *x, int groups, int group, int count,
                   float *t) {
    isa_avx2.build8(books, x, groups, group, count, t);
}

static void lookup8(const uint8_t *codes, const uint8_t *next, const float *t, int tables,
                    float *acc) {
    isa_avx2.lookup8(codes, next, t, tables, acc);
}

static void direct(const plain_weight *w, const void *books, const float *x, int64_t row,
                   int64_t count, float *y) {
    isa_avx2.direct(w, books, x, row, count, y);
}

static void decode(const plain_weight *w, const void *books, float scale, float *y) {
    isa_avx2.decode(w, books, scale, y);
}

static void decode_tile(const uint8_t *codes, const float *books, int count, int group, int groups,
                        int rows, const float *scales, void *y, size_t stride, int half) {
    isa_avx2.decode_tile(codes, books, count, group, groups, rows, scales, y, stride, half);
}

static void attend(const float *queries, int64_t heads, const float *keys, const float *values,
                   int64_t count, int64_t dim, float scale, float *weights, float *y) {
    isa_avx2.attend(queries, heads, keys, values, count, dim, scale, weights, y);
}

static float dot(const float *a, const void *b, int64_t n, int64_t dtype) {
    return isa_avx2.dot(a, b, n, dtype);
}

static float dot_bytes(const int16_t *a, const int8_t *b, int64_t n) {
    return isa_avx2.dot_bytes(a, b, n);
}

static void dot4(const float *a, int64_t stride, const void *b, int64_t n, int64_t dtype,
                 float *y) {
    isa_avx2.dot4(a, stride, b, n, dtype, y);
}

static void gate(const float *x, const float *values, float *y, int64_t n) {
    isa_avx2.gate(x, values, y, n);
}

const isa isa_vbmi = {"avx512-vbmi", 2 * ENTRIES, 8, 0.5 / STEPS, 5, build, lookup, build8,
                      lookup8, direct, decode, decode_tile, attend, dot, dot_bytes, dot4, gate,
                      build_rough, lookup_rough};
#endif
