/* Decoding of packed codes, a block of groups of one tile at a time. Included once per instruction
 * set: GNU C's own vectors. A row's weights of a block are written together, for rows may be a power
 * of two apart and then share a few lines of the cache.
 */
#include <string.h>

/* Stored in fp32; or (half) rounded to the nearest bf16 as torch does, NaN staying one. */
#define STORE(width)                                                                               \
    static inline __attribute__((always_inline)) void store##width(char *to, floats##width v,      \
                                                                   int half) {                     \
        const ints##width bits = (ints##width)v, nan = v != v;                                     \
        const ints##width near = bits + (((bits >> 16) & 1) + 0x7fff);                             \
        const ints##width upper = ((near & ~nan) | ((bits | 0x400000) & nan)) >> 16;               \
        const shorts##width words = __builtin_convertvector(upper, shorts##width);                 \
        if (half) memcpy(to, &words, sizeof words);                                                \
        else memcpy(to, &v, sizeof v);                                                             \
    }
STORE(4)
STORE(8)

/* `width` weights of a row from element `at` of its group on: the sum of its entries, scaled. */
#define ENTRY(m, width) (*(const floats##width *)(books + (m * ENTRIES + code[m * TILE]) * group + at))
#define WEIGHTS(width)                                                                             \
    static inline __attribute__((always_inline)) floats##width weights##width(                     \
        const uint8_t *code, const float *books, int count, int group, int at, float scale) {      \
        floats##width sum = ENTRY(0, width);                                                       \
        for (int m = 1; m < count; m++) sum += ENTRY(m, width);                                    \
        return sum * scale;                                                                        \
    }
WEIGHTS(4)
WEIGHTS(8)

static inline __attribute__((always_inline)) void decode_counted(
    const uint8_t *codes, const float *books, int count, int group, int groups, int rows,
    const float *scales, char *y, size_t stride, int half) {
    const int size = half ? 2 : 4;
    for (int r = 0; r < rows; r++, codes++, y += stride) {
        const uint8_t *code = codes;
        char *to = y;
        for (int j = 0; j < groups; j++, code += count * TILE)
            for (int e = 0; e < group; e += group % 8 ? 4 : 8, to += size * (group % 8 ? 4 : 8))
                if (group % 8) store4(to, weights4(code, books, count, group, e, scales[r]), half);
                else store8(to, weights8(code, books, count, group, e, scales[r]), half);
    }
}

static void decode_tile(const uint8_t *codes, const float *books, int count, int group, int groups,
                        int rows, const float *scales, void *y, size_t stride, int half) {
#define DECODE(count_, group_, half_)                                                              \
    decode_counted(codes, books, count_, group_, groups, rows, scales, y, stride, half_)
#define COUNTED(group_, half_)                                                                     \
    if (count == 1) DECODE(1, group_, half_);                                                      \
    else if (count == 2) DECODE(2, group_, half_);                                                 \
    else DECODE(count, group_, half_)
    if (group == 8 && half) COUNTED(8, 1);
    else if (group == 8) COUNTED(8, 0);
    else if (group == 4 && half) COUNTED(4, 1);
    else if (group == 4) COUNTED(4, 0);
    else DECODE(count, group, half);
}
