/* A scalar model of the AVX-512 instructions that avx512.c uses, after Intel's intrinsics
 * guide: its pseudo-code, lane by lane. It lets machines without them test the kernels' values. */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct { float f[16]; } __m512;
typedef struct { uint8_t b[64]; } __m512i;
typedef struct { uint8_t b[32]; } __m256i;
typedef struct { uint8_t b[16]; } __m128i;
typedef uint64_t __mmask64;

#define MODEL static inline __attribute__((unused))
#define _MM_HINT_T1 2
#define _mm_prefetch(p, hint) ((void)(p))

#define LANES32(i) for (int i = 0; i < 16; i++)
#define LANES16(i) for (int i = 0; i < 32; i++)
#define LANES8(i) for (int i = 0; i < 64; i++)

MODEL uint16_t word(const void *b, int i) { uint16_t w; memcpy(&w, (const char *)b + 2 * i, 2); return w; }
MODEL void set_word(void *b, int i, uint16_t w) { memcpy((char *)b + 2 * i, &w, 2); }
MODEL int32_t dword(const void *b, int i) { int32_t w; memcpy(&w, (const char *)b + 4 * i, 4); return w; }
MODEL void set_dword(void *b, int i, int32_t w) { memcpy((char *)b + 4 * i, &w, 4); }

MODEL __m512 _mm512_set1_ps(float a) { __m512 r; LANES32(i) r.f[i] = a; return r; }
MODEL __m512 _mm512_setzero_ps(void) { return _mm512_set1_ps(0); }
MODEL __m512 _mm512_loadu_ps(const void *p) { __m512 r; memcpy(&r, p, 64); return r; }
MODEL void _mm512_storeu_ps(void *p, __m512 a) { memcpy(p, &a, 64); }
MODEL __m512 _mm512_sub_ps(__m512 a, __m512 b) { LANES32(i) a.f[i] -= b.f[i]; return a; }
MODEL __m512 _mm512_mul_ps(__m512 a, __m512 b) { LANES32(i) a.f[i] *= b.f[i]; return a; }
MODEL __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    LANES32(i) a.f[i] = fmaf(a.f[i], b.f[i], c.f[i]);
    return a;
}
MODEL __m512 _mm512_min_ps(__m512 a, __m512 b) { LANES32(i) a.f[i] = a.f[i] < b.f[i] ? a.f[i] : b.f[i]; return a; }
MODEL __m512 _mm512_max_ps(__m512 a, __m512 b) { LANES32(i) a.f[i] = a.f[i] > b.f[i] ? a.f[i] : b.f[i]; return a; }
MODEL float _mm512_reduce_min_ps(__m512 a) { LANES32(i) if (a.f[i] < a.f[0]) a.f[0] = a.f[i]; return a.f[0]; }
MODEL float _mm512_reduce_max_ps(__m512 a) { LANES32(i) if (a.f[i] > a.f[0]) a.f[0] = a.f[i]; return a.f[0]; }
MODEL __m512 _mm512_cvtepi32_ps(__m512i a) { __m512 r; LANES32(i) r.f[i] = (float)dword(&a, i); return r; }
MODEL __m512i _mm512_cvtps_epi32(__m512 a) { /* to nearest, ties to even */
    __m512i r;
    LANES32(i) set_dword(&r, i, (int32_t)nearbyintf(a.f[i]));
    return r;
}

MODEL void _mm_storeu_si128(void *p, __m128i a) { memcpy(p, &a, 16); }
MODEL __m512i _mm512_loadu_si512(const void *p) { __m512i r; memcpy(&r, p, 64); return r; }
MODEL __m512i _mm512_setzero_si512(void) { __m512i r; memset(&r, 0, 64); return r; }
MODEL __m512i _mm512_set1_epi32(int32_t a) { __m512i r; LANES32(i) set_dword(&r, i, a); return r; }
MODEL __m512i _mm512_min_epi32(__m512i a, __m512i b) {
    LANES32(i) if (dword(&b, i) < dword(&a, i)) set_dword(&a, i, dword(&b, i));
    return a;
}
MODEL __m512i _mm512_cvtepu16_epi32(__m256i a) { __m512i r; LANES32(i) set_dword(&r, i, word(&a, i)); return r; }
MODEL __m128i _mm512_cvtepi32_epi8(__m512i a) { /* truncates */
    __m128i r;
    LANES32(i) r.b[i] = (uint8_t)dword(&a, i);
    return r;
}
MODEL __m512i _mm512_srli_epi32(__m512i a, unsigned n) {
    LANES32(i) set_dword(&a, i, (int32_t)((uint32_t)dword(&a, i) >> n));
    return a;
}
MODEL __m512i _mm512_srli_epi16(__m512i a, unsigned n) { LANES16(i) set_word(&a, i, word(&a, i) >> n); return a; }
MODEL __m512i _mm512_slli_epi16(__m512i a, unsigned n) { LANES16(i) set_word(&a, i, (uint16_t)(word(&a, i) << n)); return a; }
MODEL __m512i _mm512_add_epi16(__m512i a, __m512i b) { LANES16(i) set_word(&a, i, word(&a, i) + word(&b, i)); return a; }
MODEL __m512i _mm512_sub_epi16(__m512i a, __m512i b) { LANES16(i) set_word(&a, i, word(&a, i) - word(&b, i)); return a; }
MODEL __m256i _mm512_extracti64x4_epi64(__m512i a, int half) { __m256i r; memcpy(&r, a.b + 32 * half, 32); return r; }
MODEL __mmask64 _mm512_movepi8_mask(__m512i a) {
    __mmask64 r = 0;
    LANES8(i) r |= (uint64_t)(a.b[i] >> 7) << i;
    return r;
}
MODEL __m512i _mm512_mask_blend_epi8(__mmask64 k, __m512i a, __m512i b) {
    LANES8(i) if (k >> i & 1) a.b[i] = b.b[i];
    return a;
}
MODEL __m512 _mm512_add_ps(__m512 a, __m512 b) { LANES32(i) a.f[i] += b.f[i]; return a; }
MODEL __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) { /* in every 128 bits */
    __m512i r;
    LANES16(i) set_word(&r, i, word(i & 1 ? &b : &a, i / 8 * 8 + i % 8 / 2));
    return r;
}
MODEL __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) {
    __m512i r;
    LANES16(i) set_word(&r, i, word(i & 1 ? &b : &a, i / 8 * 8 + 4 + i % 8 / 2));
    return r;
}
MODEL __m512i _mm512_set_epi64(int64_t h, int64_t g, int64_t f, int64_t e, int64_t d, int64_t c, int64_t b, int64_t a) {
    const int64_t all[8] = {a, b, c, d, e, f, g, h};
    __m512i r;
    memcpy(&r, all, 64);
    return r;
}
MODEL __m512i _mm512_permutex2var_epi64(__m512i a, __m512i index, __m512i b) {
    __m512i r;
    for (int i = 0; i < 8; i++) memcpy(r.b + 8 * i, (index.b[8 * i] & 8 ? b.b : a.b) + 8 * (index.b[8 * i] & 7), 8);
    return r;
}
MODEL __m512i _mm512_permutex2var_epi8(__m512i a, __m512i index, __m512i b) {
    __m512i r;
    LANES8(i) r.b[i] = index.b[i] & 64 ? b.b[index.b[i] & 63] : a.b[index.b[i] & 63];
    return r;
}
