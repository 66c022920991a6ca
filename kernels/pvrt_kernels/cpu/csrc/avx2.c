/* AVX2, FMA and F16C. Zen 3 and its like: two vector loads a cycle are the limit of both forms. */
#include "cpu.h"
#ifdef PVRT_X86
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#include <immintrin.h>
#include <string.h>

/* Of codes, which may begin at any address. */
static inline uint64_t eight_bytes(const uint8_t *codes) {
    uint64_t word;
    memcpy(&word, codes, sizeof word);
    return word;
}

static inline __attribute__((always_inline)) void tables(
    const float *restrict books, const float *restrict x, int groups, int group, int count,
    float *restrict out) {
    size_t stride = (size_t)count * ENTRIES; /* from one group's table to the next group's */
    for (int j = 0; j < groups; j += 4, x += 4 * group, out += 4 * stride) {
        int last = groups - j < 4 ? groups - j - 1 : 3;
        /* beyond the end the last group is computed again */
        const float *x1 = x + group * (last < 1 ? last : 1), *x2 = x + group * (last < 2 ? last : 2);
        const float *x3 = x + group * last;
        float *o1 = out + stride * (last < 1 ? last : 1), *o2 = out + stride * (last < 2 ? last : 2);
        float *o3 = out + stride * last;
        for (int m = 0; m < count; m++)
            for (int v = 0; v < ENTRIES; v += 16) {
                const float *book = books + (size_t)m * group * ENTRIES + v;
                size_t at = (size_t)m * ENTRIES + v;
                __m256 a0 = _mm256_setzero_ps(), a1 = a0, b0 = a0, b1 = a0, c0 = a0, c1 = a0;
                __m256 d0 = a0, d1 = a0;
#pragma GCC unroll 8
                for (int e = 0; e < group; e++, book += ENTRIES) {
                    __m256 lo = _mm256_loadu_ps(book), hi = _mm256_loadu_ps(book + 8);
                    __m256 s = _mm256_broadcast_ss(x + e);
                    a0 = _mm256_fmadd_ps(s, lo, a0), a1 = _mm256_fmadd_ps(s, hi, a1);
                    s = _mm256_broadcast_ss(x1 + e);
                    b0 = _mm256_fmadd_ps(s, lo, b0), b1 = _mm256_fmadd_ps(s, hi, b1);
                    s = _mm256_broadcast_ss(x2 + e);
                    c0 = _mm256_fmadd_ps(s, lo, c0), c1 = _mm256_fmadd_ps(s, hi, c1);
                    s = _mm256_broadcast_ss(x3 + e);
                    d0 = _mm256_fmadd_ps(s, lo, d0), d1 = _mm256_fmadd_ps(s, hi, d1);
                }
                _mm256_storeu_ps(out + at, a0), _mm256_storeu_ps(out + at + 8, a1);
                _mm256_storeu_ps(o1 + at, b0), _mm256_storeu_ps(o1 + at + 8, b1);
                _mm256_storeu_ps(o2 + at, c0), _mm256_storeu_ps(o2 + at + 8, c1);
                _mm256_storeu_ps(o3 + at, d0), _mm256_storeu_ps(o3 + at + 8, d1);
            }
    }
}

static void build(const float *books, const float *x, int groups, int group, int count, void *t) {
    if (group == 8) tables(books, x, groups, 8, count, t); /* unrolled */
    else tables(books, x, groups, group, count, t);
}

/* Assembly, because compilers spend an extra move and shift on every byte of a word of codes. Two
 * loads a cycle bound a lookup at half a cycle; what the front end needs beside comes close to it,
 * so nothing is spent but a byte's move and its addition, and a shift for every second byte. Codes
 * are loaded one table ahead: otherwise they would queue behind the entries' loads. */
#define ADD(a, entry) "vaddss " entry ", %%xmm" #a ", %%xmm" #a "\n\t"
#define SET(a, entry) "vmovss " entry ", %%xmm" #a "\n\t"
#define CODES(r, at) "movq " at "(%[c]), %%r" r "x\n\t"
#define PAIR(op, a, b, r, table)                                                                   \
    "movzbl %%" r "l, %%ecx\n\t" op(a, table "(%[t],%%rcx,4)")                                     \
    "movzbl %%" r "h, %%edx\n\t" op(b, table "(%[t],%%rdx,4)")
#define NEXT(r) "shrq $16, %%r" r "x\n\t"
#define EIGHT(op, r, table)                                                                        \
    PAIR(op, 0, 1, r, table) NEXT(r) PAIR(op, 2, 3, r, table) NEXT(r)                              \
    PAIR(op, 4, 5, r, table) NEXT(r) PAIR(op, 6, 7, r, table)
#define STORE4(a, b, c, d, at)                                                                     \
    "vunpcklps %%xmm" #b ", %%xmm" #a ", %%xmm" #a "\n\t"                                          \
    "vunpcklps %%xmm" #d ", %%xmm" #c ", %%xmm" #c "\n\t"                                          \
    "vmovlhps %%xmm" #c ", %%xmm" #a ", %%xmm" #a "\n\t"                                           \
    "vaddps " at "(%[a]), %%xmm" #a ", %%xmm" #a "\n\tvmovups %%xmm" #a ", " at "(%[a])\n\t"
#define SUMS "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7"

/* A whole block: its 16 tables without a loop. The last codes loaded are the next eight rows'. */
static void lookup16(const uint8_t *c, const uint8_t *next, const void *t, float *a) {
    int64_t n = TILE / 8;
    __asm__ volatile(
        CODES("a", "") ".p2align 6\n1:\n\t"
        CODES("b", "64") EIGHT(SET, "a", "") CODES("a", "128") EIGHT(ADD, "b", "1024")
        CODES("b", "192") EIGHT(ADD, "a", "2048") CODES("a", "256") EIGHT(ADD, "b", "3072")
        "prefetcht1 (%[next])\n\t"
        CODES("b", "320") EIGHT(ADD, "a", "4096") CODES("a", "384") EIGHT(ADD, "b", "5120")
        CODES("b", "448") EIGHT(ADD, "a", "6144") CODES("a", "512") EIGHT(ADD, "b", "7168")
        CODES("b", "576") EIGHT(ADD, "a", "8192") CODES("a", "640") EIGHT(ADD, "b", "9216")
        CODES("b", "704") EIGHT(ADD, "a", "10240") CODES("a", "768") EIGHT(ADD, "b", "11264")
        "prefetcht1 64(%[next])\n\t"
        CODES("b", "832") EIGHT(ADD, "a", "12288") CODES("a", "896") EIGHT(ADD, "b", "13312")
        CODES("b", "960") EIGHT(ADD, "a", "14336") CODES("a", "8") EIGHT(ADD, "b", "15360")
        STORE4(0, 1, 2, 3, "") STORE4(4, 5, 6, 7, "16")
        "addq $8, %[c]\n\taddq $32, %[a]\n\tsubq $-128, %[next]\n\tdecq %[n]\n\tjnz 1b"
        : [c] "+r"(c), [a] "+r"(a), [next] "+r"(next), [n] "+r"(n)
        : [t] "r"(t)
        : "rax", "rbx", "rcx", "rdx", SUMS, "cc", "memory");
}

static void lookup(const uint8_t *codes, const uint8_t *next, const void *t, int tables,
                   float *acc) {
    if (tables == 16) {
        lookup16(codes, next, t, acc);
        return;
    }
    for (int line = 0; line < TILE * tables; line += 64)
        _mm_prefetch((const char *)next + line, _MM_HINT_T1);
    for (int h = 0; h < TILE; h += 8) {
        const uint8_t *c = codes + h;
        const float *table = t;
        int64_t n = tables - 1;
        __asm__ volatile(
            CODES("a", "") EIGHT(SET, "a", "") "testq %[n], %[n]\n\tjz 2f\n1:\n\t"
            "addq $64, %[c]\n\taddq $1024, %[t]\n\t" CODES("a", "") EIGHT(ADD, "a", "")
            "decq %[n]\n\tjnz 1b\n2:\n\t" STORE4(0, 1, 2, 3, "") STORE4(4, 5, 6, 7, "16")
            : [c] "+r"(c), [t] "+r"(table), [n] "+r"(n)
            : [a] "r"(acc + h)
            : "rax", "rcx", "rdx", SUMS, "cc", "memory");
    }
}

static void build8(const float *books, const float *x, int groups, int group, int count,
                   float *t) {
    for (int j = 0; j < groups; j++, x += group * LANES)
        for (int m = 0; m < count; m++)
            for (int v = 0; v < ENTRIES; v += 8, t += 8 * LANES) {
                const float *book = books + (size_t)m * group * ENTRIES + v;
                __m256 s0 = _mm256_setzero_ps(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0;
                __m256 s6 = s0, s7 = s0;
                for (int e = 0; e < group; e++, book += ENTRIES) {
                    __m256 xe = _mm256_loadu_ps(x + e * LANES);
                    s0 = _mm256_fmadd_ps(xe, _mm256_broadcast_ss(book), s0);
                    s1 = _mm256_fmadd_ps(xe, _mm256_broadcast_ss(book + 1), s1);
                    s2 = _mm256_fmadd_ps(xe, _mm256_broadcast_ss(book + 2), s2);
                    s3 = _mm256_fmadd_ps(xe, _mm256_broadcast_ss(book + 3), s3);
                    s4 = _mm256_fmadd_ps(xe, _mm256_broadcast_ss(book + 4), s4);
                    s5 = _mm256_fmadd_ps(xe, _mm256_broadcast_ss(book + 5), s5);
                    s6 = _mm256_fmadd_ps(xe, _mm256_broadcast_ss(book + 6), s6);
                    s7 = _mm256_fmadd_ps(xe, _mm256_broadcast_ss(book + 7), s7);
                }
                _mm256_storeu_ps(t, s0), _mm256_storeu_ps(t + 8, s1);
                _mm256_storeu_ps(t + 16, s2), _mm256_storeu_ps(t + 24, s3);
                _mm256_storeu_ps(t + 32, s4), _mm256_storeu_ps(t + 40, s5);
                _mm256_storeu_ps(t + 48, s6), _mm256_storeu_ps(t + 56, s7);
            }
}

/* Four codes sit in 16-bit fields of a word, already multiplied by the 32 bytes of an entry. */
#define ADD8(acc, offsets)                                                                         \
    __asm__("vaddps (%1,%2), %0, %0" : "+x"(acc) : "r"(t), "r"((uint64_t)(uint16_t)(offsets)))

static void lookup8(const uint8_t *codes, const uint8_t *next, const float *t8, int tables,
                    float *acc) {
    const uint64_t field = 0x1fe01fe01fe01fe0ull;
    for (int line = 0; line < TILE * tables; line += 64)
        _mm_prefetch((const char *)next + line, _MM_HINT_T1);
    for (int h = 0; h < TILE; h += 8, acc += 8 * LANES) {
        const float *t = t8;
        const uint8_t *c = codes + h;
        __m256 s0 = _mm256_loadu_ps(acc), s1 = _mm256_loadu_ps(acc + 8);
        __m256 s2 = _mm256_loadu_ps(acc + 16), s3 = _mm256_loadu_ps(acc + 24);
        __m256 s4 = _mm256_loadu_ps(acc + 32), s5 = _mm256_loadu_ps(acc + 40);
        __m256 s6 = _mm256_loadu_ps(acc + 48), s7 = _mm256_loadu_ps(acc + 56);
        for (int k = 0; k < tables; k++, t += ENTRIES * LANES, c += TILE) {
            uint64_t word = eight_bytes(c), even = (word << 5) & field;
            uint64_t odd = (word >> 3) & field;
            ADD8(s0, even);
            ADD8(s1, odd);
            even >>= 16, odd >>= 16;
            ADD8(s2, even);
            ADD8(s3, odd);
            even >>= 16, odd >>= 16;
            ADD8(s4, even);
            ADD8(s5, odd);
            even >>= 16, odd >>= 16;
            ADD8(s6, even);
            ADD8(s7, odd);
        }
        _mm256_storeu_ps(acc, s0), _mm256_storeu_ps(acc + 8, s1);
        _mm256_storeu_ps(acc + 16, s2), _mm256_storeu_ps(acc + 24, s3);
        _mm256_storeu_ps(acc + 32, s4), _mm256_storeu_ps(acc + 40, s5);
        _mm256_storeu_ps(acc + 48, s6), _mm256_storeu_ps(acc + 56, s7);
    }
}

static inline __m256 load8(const void *p, int64_t i, int64_t dtype) {
    if (dtype == F32) return _mm256_loadu_ps((const float *)p + i);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)p + i));
    if (dtype == F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

static inline float total(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

/* Rows together, so that x is read once for them and their sums do not wait for each other. */
#define ROWS 4
static inline __attribute__((always_inline)) void rows4(
    const plain_weight *w, const void *books, const float *x, int64_t row, float *y, int64_t bytes,
    int64_t count, int64_t group, int64_t dtype) {
    __m256 a0 = _mm256_setzero_ps(), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
    const size_t stride = (size_t)w->groups * count * bytes, mask = (size_t)w->size - 1;
    const size_t far = 16; /* codes ahead: the table of a 16-bit book is far from the core */
    const char *c = (const char *)w->codes + (size_t)row * stride;
#define CODE(r, at)                                                                                \
    (mask & (bytes == 1 ? ((const uint8_t *)(c + (r) * stride))[at]                                \
                        : ((const uint16_t *)(c + (r) * stride))[at]))
#define STEP(r, a, b)                                                                              \
    {                                                                                              \
        size_t entry = (m * (mask + 1) + CODE(r, at)) * group;                                     \
        a = _mm256_fmadd_ps(x0, load8(books, entry, dtype), a);                                    \
        if (group == 16) b = _mm256_fmadd_ps(x1, load8(books, entry + 8, dtype), b);               \
        if (bytes == 2 && ahead)                                                                   \
            _mm_prefetch((const char *)books + CODE(r, at + far) * group * (dtype ? 2 : 4),        \
                         _MM_HINT_T0);                                                             \
    }
    for (size_t j = 0, at = 0; j < (size_t)w->groups; j++, x += group) {
        __m256 x0 = _mm256_loadu_ps(x), x1 = group == 16 ? _mm256_loadu_ps(x + 8) : x0;
        int ahead = count == 1 && j + far < (size_t)w->groups;
        (void)x1, (void)ahead;
        for (size_t m = 0; m < (size_t)count; m++, at++) {
            STEP(0, a0, b0) STEP(1, a1, b1) STEP(2, a2, b2) STEP(3, a3, b3)
        }
    }
    y[0] = total(_mm256_add_ps(a0, b0)), y[1] = total(_mm256_add_ps(a1, b1));
    y[2] = total(_mm256_add_ps(a2, b2)), y[3] = total(_mm256_add_ps(a3, b3));
}

/* 2x8g8 and 4x8g8 with fp32 books: eight codes a word, offsets in fields as in lookup8. */
#define FMA8(acc, xs, offsets, base)                                                               \
    __asm__("vfmadd231ps (%1,%2), %3, %0"                                                          \
            : "+x"(acc)                                                                            \
            : "r"(base), "r"((uint64_t)(uint16_t)(offsets)), "x"(xs))

static void rows4_2x8(const plain_weight *w, const float *books, const float *x, int64_t row,
                      float *y) {
    const uint64_t field = 0x1fe01fe01fe01fe0ull;
    const size_t stride = (size_t)w->groups * 2;
    const uint8_t *c = (const uint8_t *)w->codes + (size_t)row * stride;
    const float *second = books + ENTRIES * 8;
    __m256 a0 = _mm256_setzero_ps(), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
#define ROW(r, a, b)                                                                               \
    {                                                                                              \
        uint64_t word = eight_bytes(c + (r) * stride), even = (word << 5) & field;                 \
        uint64_t odd = (word >> 3) & field;                                                        \
        FMA8(a, x0, even, books); FMA8(b, x0, odd, second); even >>= 16, odd >>= 16;                       \
        FMA8(a, x1, even, books); FMA8(b, x1, odd, second); even >>= 16, odd >>= 16;                       \
        FMA8(a, x2, even, books); FMA8(b, x2, odd, second); even >>= 16, odd >>= 16;                       \
        FMA8(a, x3, even, books); FMA8(b, x3, odd, second);                                        \
    }
    int64_t j = 0;
    for (; j + 4 <= w->groups; j += 4, c += 8, x += 32) {
        __m256 x0 = _mm256_loadu_ps(x), x1 = _mm256_loadu_ps(x + 8);
        __m256 x2 = _mm256_loadu_ps(x + 16), x3 = _mm256_loadu_ps(x + 24);
        ROW(0, a0, b0) ROW(1, a1, b1) ROW(2, a2, b2) ROW(3, a3, b3)
    }
    for (; j < w->groups; j++, c += 2, x += 8) {
        __m256 x0 = _mm256_loadu_ps(x);
#define TAIL(r, a, b)                                                                              \
    a = _mm256_fmadd_ps(x0, _mm256_loadu_ps(books + 8 * c[(r) * stride]), a);                      \
    b = _mm256_fmadd_ps(x0, _mm256_loadu_ps(second + 8 * c[(r) * stride + 1]), b);
        TAIL(0, a0, b0) TAIL(1, a1, b1) TAIL(2, a2, b2) TAIL(3, a3, b3)
    }
    y[0] = total(_mm256_add_ps(a0, b0)), y[1] = total(_mm256_add_ps(a1, b1));
    y[2] = total(_mm256_add_ps(a2, b2)), y[3] = total(_mm256_add_ps(a3, b3));
}

static void direct(const plain_weight *w, const void *books, const float *x, int64_t row,
                   int64_t count, float *y) {
    int64_t done = 0, group = w->group, dtype = w->dtype, bytes = w->code_bytes, m = w->books;
#define EACH(call)                                                                                 \
    for (; done + ROWS <= count; done += ROWS) call;
#define CASE(wanted_bytes, wanted_group, wanted_dtype)                                             \
    else if (bytes == (wanted_bytes) && group == (wanted_group) && dtype == (wanted_dtype)) EACH(   \
        rows4(w, books, x, row + done, y + done, wanted_bytes, m, wanted_group, wanted_dtype))
    if (bytes == 1 && group == 8 && dtype == F32 && m == 2 && w->size == ENTRIES)
        EACH(rows4_2x8(w, books, x, row + done, y + done))
    CASE(1, 8, F32) CASE(1, 16, F32) CASE(2, 8, F32) CASE(2, 8, F16) CASE(2, 8, BF16)
    CASE(2, 16, F32) CASE(2, 16, F16) CASE(2, 16, BF16)
    if (done < count) isa_portable.direct(w, books, x, row + done, count - done, y + done);
}

static inline __attribute__((always_inline)) void decode_groups(
    const plain_weight *w, const void *books, float scale, float *y, int64_t code_bytes,
    int64_t count, int64_t group, int64_t dtype) {
    const int64_t size = w->size;
    const uint8_t *bytes = w->codes;
    const uint16_t *words = w->codes;
    const __m256 s = _mm256_set1_ps(scale);
    for (int64_t j = 0; j < w->groups; j++, bytes += count, words += count, y += group)
        for (int64_t e = 0; e < group; e += 8) {
            __m256 sum = _mm256_setzero_ps();
            for (int64_t m = 0; m < count; m++) {
                int64_t entry = m * size + ((code_bytes == 1 ? bytes[m] : words[m]) & (size - 1));
                sum = _mm256_add_ps(sum, load8(books, entry * group + e, dtype));
            }
            _mm256_storeu_ps(y + e, _mm256_mul_ps(s, sum));
        }
}

static void decode(const plain_weight *w, const void *books, float scale, float *y) {
    const int64_t bytes = w->code_bytes, m = w->books, group = w->group, dtype = w->dtype;
    const int simple = bytes == 1 && group == 8 && dtype == F32;
    if (group % 8) isa_portable.decode(w, books, scale, y);
    else if (simple && m == 2) decode_groups(w, books, scale, y, 1, 2, 8, F32); /* unrolled */
    else if (simple && m == 1) decode_groups(w, books, scale, y, 1, 1, 8, F32);
    else decode_groups(w, books, scale, y, bytes, m, group, dtype);
}

#define MULTIPLY_ADD(a, b, sum) _mm256_fmadd_ps(a, b, sum)
#include "attention.h"
#include "tiles.h"

static float dot(const float *a, const void *b, int64_t n, int64_t dtype) {
    __m256 s0 = _mm256_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
    int64_t i = 0;
#define DOT(kind)                                                                                  \
    for (; i + 32 <= n; i += 32) {                                                                 \
        s0 = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), load8(b, i, kind), s0);                       \
        s1 = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8), load8(b, i + 8, kind), s1);               \
        s2 = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 16), load8(b, i + 16, kind), s2);             \
        s3 = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 24), load8(b, i + 24, kind), s3);             \
    }
    if (dtype == F32) DOT(F32)
    else if (dtype == F16) DOT(F16)
    else DOT(BF16)
    float sum = total(_mm256_add_ps(_mm256_add_ps(s0, s1), _mm256_add_ps(s2, s3)));
    for (; i < n; i++) sum += a[i] * load_float(b, i, dtype);
    return sum;
}

static void dot4(const float *a, int64_t stride, const void *b, int64_t n, int64_t dtype,
                 float *y) {
    const float *a1 = a + stride, *a2 = a1 + stride, *a3 = a2 + stride;
    __m256 s0 = _mm256_setzero_ps(), s1 = s0, s2 = s0, s3 = s0, r0 = s0, r1 = s0, r2 = s0, r3 = s0;
    int64_t i = 0;
#define DOT4(kind)                                                                                 \
    for (; i + 16 <= n; i += 16) {                                                                 \
        const __m256 b0 = load8(b, i, kind), b1 = load8(b, i + 8, kind);                           \
        s0 = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), b0, s0);                                      \
        s1 = _mm256_fmadd_ps(_mm256_loadu_ps(a1 + i), b0, s1);                                     \
        s2 = _mm256_fmadd_ps(_mm256_loadu_ps(a2 + i), b0, s2);                                     \
        s3 = _mm256_fmadd_ps(_mm256_loadu_ps(a3 + i), b0, s3);                                     \
        r0 = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8), b1, r0);                                  \
        r1 = _mm256_fmadd_ps(_mm256_loadu_ps(a1 + i + 8), b1, r1);                                 \
        r2 = _mm256_fmadd_ps(_mm256_loadu_ps(a2 + i + 8), b1, r2);                                 \
        r3 = _mm256_fmadd_ps(_mm256_loadu_ps(a3 + i + 8), b1, r3);                                 \
    }
    if (dtype == F32) DOT4(F32)
    else if (dtype == F16) DOT4(F16)
    else DOT4(BF16)
    y[0] = total(_mm256_add_ps(s0, r0)), y[1] = total(_mm256_add_ps(s1, r1));
    y[2] = total(_mm256_add_ps(s2, r2)), y[3] = total(_mm256_add_ps(s3, r3));
    for (; i < n; i++)
        for (int k = 0; k < 4; k++) y[k] += a[k * stride + i] * load_float(b, i, dtype);
}

static float dot_bytes(const int16_t *a, const int8_t *b, int64_t n) {
    __m256i s0 = _mm256_setzero_si256(), s1 = s0;
    int64_t i = 0;
#define BYTES(at) _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)(b + (at))))
#define WORDS(at) _mm256_loadu_si256((const void *)(a + (at)))
    for (; i + 32 <= n; i += 32) {
        s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(WORDS(i), BYTES(i)));
        s1 = _mm256_add_epi32(s1, _mm256_madd_epi16(WORDS(i + 16), BYTES(i + 16)));
    }
    float sum = total(_mm256_add_ps(_mm256_cvtepi32_ps(s0), _mm256_cvtepi32_ps(s1)));
    for (; i < n; i++) sum += (float)((int32_t)a[i] * b[i]);
    return sum;
}

const isa isa_avx2 = {"avx2", ENTRIES * 4, 0, 0, 2, build, lookup, build8, lookup8, direct,
                      decode, decode_tile, attend, dot, dot_bytes, dot4, gate, NULL, NULL};
#endif
