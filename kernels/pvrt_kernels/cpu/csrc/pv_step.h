/* A step of PV-Tuning in GNU C's vectors of 8. Included once per instruction set: NAME(f) tells their
 * functions apart. */

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
