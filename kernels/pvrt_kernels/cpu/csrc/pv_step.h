/* What tuning needs of additive codebooks, in GNU C's vectors of 8. Included once per instruction
 * set: NAME(f) tells their functions apart. */

/* The least of eight keys. */
static inline int32_t NAME(least)(ints8 keys) {
    int32_t low = keys[0];
    for (int l = 1; l < 8; l++) low = keys[l] < low ? keys[l] : low;
    return low;
}

/* The least key above `low`, of whole vectors. */
static inline int32_t NAME(next)(const ints8 *keys, int64_t vectors, int32_t low) {
    const ints8 most = (ints8){0} + INT32_MAX;
    ints8 best = most;
    for (int64_t v = 0; v < vectors; v++) {
        const ints8 higher = keys[v] > low;
        best = LESSER(best, (keys[v] & higher) | (most & ~higher));
    }
    return NAME(least)(best);
}

/* Beam search for one value; see pvrt_nearest_sums. */
static inline __attribute__((always_inline)) void NAME(search_any)(
    const sums *s, int64_t books, int64_t group, const float *x, int64_t beam, int64_t count,
    uint8_t *codes) {
    const int64_t vectors = s->size / 8;
    _Alignas(32) float alone[ENTRIES], aimed[ENTRIES];
    _Alignas(32) int32_t keys[ENTRIES];
    const ints8 order = {0, 1, 2, 3, 4, 5, 6, 7};
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
            floats8 product = x[0] * *(const floats8 *)(book + 8 * v);
            for (int64_t e = 1; e < group; e++)
                product += x[e] * *(const floats8 *)(book + e * s->size + 8 * v);
            product = *(const floats8 *)(norms + 8 * v) - (product + product);
            *(floats8 *)(alone + 8 * v) = product;
            *(floats8 *)(aimed + 8 * v) = product + *(const floats8 *)(pull + m * s->size + 8 * v);
        }
        int64_t kept = 0;
        for (int64_t b = 0; b < live; b++) {
            const float *near[MOST_BOOKS] = {0};
            float start = rest + from[b].sum;
            for (int64_t i = 0; i < m; i++) {
                start += pull[i * s->size + from[b].codes[i]];
                near[i] = products(s, i, m, from[b].codes[i]);
            }
            ints8 best = (ints8){0} + INT32_MAX, entry = order;
            for (int64_t v = 0; v < vectors; v++, entry += 8) {
                floats8 score = *(const floats8 *)(aimed + 8 * v) + start;
                for (int64_t i = 0; i < m; i++) score += *(const floats8 *)(near[i] + 8 * v);
                /* Bits of positive floats are in the order of their values. */
                const ints8 key = ((ints8)score & -ENTRIES) | entry;
                best = LESSER(best, key);
                if (each > 1) *(ints8 *)(keys + 8 * v) = key;
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
                key = NAME(next)((const ints8 *)keys, vectors, key);
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

/* |x - sum|^2 of the entries with these codes, and their sum. */
static inline float NAME(away)(const choice *c, int64_t group, const float *x, const uint8_t *codes,
                               float *sum) {
    float total[8] = {0};
    for (int64_t m = 0; m < c->books; m++) {
        const float *entry = c->entries + (m * c->size + codes[m]) * group;
        for (int64_t e = 0; e < group; e++) sum[e] = m == 0 ? entry[e] : sum[e] + entry[e];
    }
    for (int64_t e = 0; e < group; e++) total[e & 7] += (x[e] - sum[e]) * (x[e] - sum[e]);
    return sum8(AT(total));
}

/* Choices of groups [from, to); see pvrt_choose_codes. */
static inline void NAME(choose_any)(const choice *c, int64_t from, int64_t to, int64_t group) {
    const int64_t books = c->books;
    for (int64_t i = from; i < to; i++) {
        const float *x = c->wanted + i * group;
        float sum[3][MOST_GROUP], off[3];
        /* What is there, which wins among equals, and the two nearest sums. */
        const uint8_t *found = c->found + 2 * i * books;
        const uint8_t *codes[3] = {c->present + i * books, found, found + books};
        int near = 0;
        for (int k = 0; k < 3; k++) {
            const int again = k > 0 && !memcmp(codes[k], codes[0], (size_t)books);
            off[k] = again ? INFINITY : NAME(away)(c, group, x, codes[k], sum[k]);
            if (off[k] < off[near]) near = k;
        }
        int next = near == 0;
        for (int k = 1; k < 3; k++)
            if (k != near && off[k] < off[next]) next = k;
        c->margins[i] = (sqrtf(off[next]) - sqrtf(off[near])) / 2;
        if (c->draws) {
            float along = 0, length = 0;
            for (int64_t e = 0; e < group; e++) {
                const float between = sum[next][e] - sum[near][e];
                along += (x[e] - sum[near][e]) * between;
                length += between * between;
            }
            if (length > 0 && c->draws[i] * length < along) {
                near = next;
                c->margins[i] = 0;
            }
        }
        c->moves[i] = near != 0;
        memcpy(c->codes + i * books, codes[near], (size_t)books);
        memcpy(c->sums + i * group, sum[near], sizeof(float) * (size_t)group);
    }
}

static void NAME(choose)(const choice *c, int64_t from, int64_t to) {
    if (c->group == 8) NAME(choose_any)(c, from, to, 8); /* unrolled */
    else NAME(choose_any)(c, from, to, c->group);
}

/* Rows [from, to) of a weight's gradient: books [M][size][group] gather it, scales get their own. */
static inline void NAME(gather)(const plain_weight *w, const gradients *g, int64_t from, int64_t to,
                                int64_t group, float *books) {
    const float *codebooks = w->codebooks;
    for (int64_t row = from; row < to; row++) {
        const float *grad = g->weight + row * w->groups * group, scale = w->scales[row];
        float total[8] = {0};
        for (int64_t j = 0; j < w->groups; j++, grad += group)
            for (int64_t m = 0; m < w->books; m++) {
                const int64_t at = (row * w->groups + j) * w->books + m;
                const int64_t code = (w->code_bytes == 1 ? ((const uint8_t *)w->codes)[at]
                                                         : ((const uint16_t *)w->codes)[at]) &
                                     (w->size - 1);
                const int64_t entry = (m * w->size + code) * group;
                for (int64_t e = 0; e < group; e++) {
                    total[e & 7] += grad[e] * codebooks[entry + e];
                    books[entry + e] += scale * grad[e];
                }
            }
        g->scales[row] = sum8(AT(total));
    }
}

static void NAME(gradient)(const plain_weight *w, const gradients *g, int64_t from, int64_t to,
                           float *books) {
    if (w->group == 8) NAME(gather)(w, g, from, to, 8, books); /* unrolled */
    else NAME(gather)(w, g, from, to, w->group, books);
}

/* Groups [from, to) of a step, before its length is known: the new moment, and in sums the squares
 * of the latent and of the direction. */
static void NAME(moment)(const latent_step *l, int64_t from, int64_t to, double *sums) {
    floats8 length = {0}, size = {0};
    for (int64_t i = from * l->group; i < to * l->group; i += 8) {
        const floats8 grad = *(const floats8 *)(l->grad + i), b = *(const floats8 *)(l->latent + i);
        floats8 *kept = (floats8 *)(l->moment + i);
        *kept = l->beta * *kept + (1 - l->beta) * (grad * grad);
        const floats8 direction = grad / (ROOT(*kept) + TINY);
        size += b * b;
        length += direction * direction;
    }
    sums[0] = sums[1] = 0;
    for (int lane = 0; lane < 8; lane++) {
        sums[0] += size[lane];
        sums[1] += length[lane];
    }
}

/* Groups [from, to) of the step itself, and how far each then is from the decoded weight. */
static inline void NAME(move)(const latent_step *l, int64_t from, int64_t to, int64_t group) {
    for (int64_t i = from * group; i < to * group; i += 8) {
        const floats8 root = ROOT(*(const floats8 *)(l->moment + i)) + TINY;
        *(floats8 *)(l->latent + i) -= l->rate * (*(const floats8 *)(l->grad + i) / root);
    }
    for (int64_t j = from; j < to; j++) {
        float total[8] = {0};
        for (int64_t e = 0; e < group; e++) {
            const float off = l->latent[j * group + e] - l->decoded[j * group + e];
            total[e & 7] += off * off;
        }
        l->distance[j] = sqrtf(sum8(AT(total)));
    }
}

static void NAME(latent)(const latent_step *l, int64_t from, int64_t to) {
    if (l->group == 8) NAME(move)(l, from, to, 8); /* unrolled */
    else NAME(move)(l, from, to, l->group);
}
