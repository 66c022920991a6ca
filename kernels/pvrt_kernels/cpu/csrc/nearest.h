/* Nearest entries and sums of entries in vectors of WIDTH: FLOATS and INTS. Included once per
 * instruction set, whose functions NAME(f) tells apart. LESSER and LOWER are minima of INTS and FLOATS,
 * FUSED(a, b, c) is a b + c for a number and FLOATS, ORDER is 0, 1, ... */

/* The least of the keys. */
static inline int32_t NAME(least)(INTS keys) {
    int32_t low = keys[0];
    for (int l = 1; l < WIDTH; l++) low = keys[l] < low ? keys[l] : low;
    return low;
}

/* The least key above `low`, of whole vectors. */
static inline int32_t NAME(next)(const INTS *keys, int64_t vectors, int32_t low) {
    const INTS most = (INTS){0} + INT32_MAX;
    INTS best = most;
    for (int64_t v = 0; v < vectors; v++) {
        const INTS higher = keys[v] > low;
        best = LESSER(best, (keys[v] & higher) | (most & ~higher));
    }
    return NAME(least)(best);
}

/* Beam search for one value; see pvrt_nearest_sums. */
static inline __attribute__((always_inline)) void NAME(search_any)(
    const sums *s, int64_t books, int64_t group, const float *x, int64_t beam, int64_t count,
    uint8_t *codes) {
    const int64_t vectors = s->size / WIDTH;
    _Alignas(64) float alone[ENTRIES], aimed[ENTRIES];
    _Alignas(64) int32_t keys[ENTRIES];
    partial held[2][MOST_KEPT];
    int64_t live = 1;
    held[0][0].sum = 0;
    for (int64_t m = 0; m < books; m++) {
        const partial *from = held[m & 1];
        partial *to = held[~m & 1];
        const float *book = s->tables + m * group * s->size, *norms = s->norms + m * s->size;
        const float *mean = s->later + m * group, *pull = s->pull + m * books * s->size;
        const int64_t wanted = m + 1 == books ? count : beam;
        const int64_t each = wanted < s->size ? wanted : s->size;
        float rest = 0;
        for (int64_t e = 0; e < group; e++) rest += (x[e] - mean[e]) * (x[e] - mean[e]);
        for (int64_t v = 0; v < vectors; v++) {
            FLOATS product = x[0] * *(const FLOATS *)(book + WIDTH * v);
            for (int64_t e = 1; e < group; e++)
                product = FUSED(x[e], *(const FLOATS *)(book + e * s->size + WIDTH * v), product);
            product = *(const FLOATS *)(norms + WIDTH * v) - (product + product);
            *(FLOATS *)(alone + WIDTH * v) = product;
            *(FLOATS *)(aimed + WIDTH * v) = product + *(const FLOATS *)(pull + m * s->size + WIDTH * v);
        }
        int64_t kept = 0;
        for (int64_t b = 0; b < live; b++) {
            const float *near[MOST_BOOKS] = {0};
            float start = rest + from[b].sum;
            for (int64_t i = 0; i < m; i++) {
                start += pull[i * s->size + from[b].codes[i]];
                near[i] = products(s, i, m, from[b].codes[i]);
            }
            INTS best = (INTS){0} + INT32_MAX, entry = ORDER;
            for (int64_t v = 0; v < vectors; v++, entry += WIDTH) {
                FLOATS score = *(const FLOATS *)(aimed + WIDTH * v) + start;
                for (int64_t i = 0; i < m; i++) score += *(const FLOATS *)(near[i] + WIDTH * v);
                /* Bits of positive floats are in the order of their values. */
                const INTS key = ((INTS)score & -ENTRIES) | entry;
                best = LESSER(best, key);
                if (each > 1) *(INTS *)(keys + WIDTH * v) = key;
            }
            int32_t key = NAME(least)(best);
            for (int64_t f = 1; kept < wanted || key < to[kept - 1].key; f++) {
                int64_t at = kept < wanted ? kept++ : kept - 1;
                for (; at > 0 && to[at - 1].key > key; at--) to[at] = to[at - 1];
                const int32_t code = key & (ENTRIES - 1);
                to[at] = from[b];
                to[at].key = key;
                to[at].codes[m] = (uint8_t)code;
                to[at].sum += alone[code];
                for (int64_t i = 0; i < m; i++) to[at].sum += near[i][code];
                if (f == each) break;
                key = NAME(next)((const INTS *)keys, vectors, key);
            }
        }
        live = kept;
    }
    for (int64_t c = 0; c < count; c++, codes += books)
        memcpy(codes, held[books & 1][c].codes, (size_t)books);
}

static void NAME(search)(const sums *s, const float *x, int64_t beam, int64_t count,
                         uint8_t *codes) {
    /* Loops of known length are unrolled. */
    if (s->books == 2 && s->group == 8) NAME(search_any)(s, 2, 8, x, beam, count, codes);
    else NAME(search_any)(s, s->books, s->group, x, beam, count, codes);
}

/* Entries [v, v + count) vectors of the scores of x, which `best` is brought up to date with. */
static inline __attribute__((always_inline)) FLOATS NAME(score)(
    const scores *s, const float *x, int64_t v, const int64_t count, FLOATS best) {
    FLOATS sum[4];
    for (int64_t k = 0; k < count; k++) sum[k] = *(const FLOATS *)(s->offsets + WIDTH * (v + k));
    for (int64_t e = 0; e < s->length; e++) {
        const float *column = s->columns + e * s->size + WIDTH * v;
        for (int64_t k = 0; k < count; k++)
            sum[k] = FUSED(x[e], *(const FLOATS *)(column + WIDTH * k), sum[k]);
    }
    for (int64_t k = 0; k < count; k++) {
        const INTS entry = ORDER + (int32_t)(WIDTH * (v + k));
        best = LOWER(best, (FLOATS)(((INTS)sum[k] & -ENTRIES) | entry));
    }
    return best;
}

/* The entries of the lowest scores; see pvrt_lowest_scores. */
static void NAME(lowest)(const scores *s, const float *x, int64_t n, uint8_t *codes) {
    const int64_t vectors = s->size / WIDTH;
    for (int64_t i = 0; i < n; i++, x += s->length) {
        FLOATS best = (FLOATS){0} + INFINITY;
        int64_t v = 0;
        for (; v + 4 <= vectors; v += 4) best = NAME(score)(s, x, v, 4, best);
        for (; v < vectors; v++) best = NAME(score)(s, x, v, 1, best);
        union { float f; uint32_t u; } low = {best[0]};
        for (int l = 1; l < WIDTH; l++) low.f = best[l] < low.f ? best[l] : low.f;
        codes[i] = (uint8_t)(low.u & (ENTRIES - 1));
    }
}

#undef NAME
#undef WIDTH
#undef FLOATS
#undef INTS
#undef ORDER
#undef LESSER
#undef LOWER
#undef FUSED
