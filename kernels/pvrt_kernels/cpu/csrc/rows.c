/* Rows of codes: packing them into tiles, and decoding single ones. */
#define _GNU_SOURCE /* madvise */
#include "cpu.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

void decode_part(const job *job, int64_t index) {
    const decode_job *work = (const decode_job *)job;
    const plain_weight *w = work->weight;
    const size_t width = w->dtype == F32 ? 4 : 2;
    const int64_t entries = w->books * w->size * w->group, per_row = w->groups * w->books;
    const int64_t from = share(work->count, index, job->parts);
    const int64_t to = share(work->count, index + 1, job->parts);
    /* Small books are worth it, where they are read more than once. */
    const int convert =
        w->dtype != F32 && w->code_bytes == 1 && (to - from) * per_row * w->group > entries;
    const int64_t tiles = count_tiles(w->rows, w->parts);
    float *fp32 = scratch(sizeof(float) * entries * convert + (size_t)per_row);
    uint8_t *gathered = (uint8_t *)(fp32 + entries * convert);
    plain_weight local = *w;
    if (convert) local.dtype = F32;
    const void *books = NULL;
    int64_t begin = 0, end = 0, tile = 0; /* the rows of a partition, its first tile */
    for (int64_t k = from; k < to; k++) {
        const int64_t i = work->rows ? work->rows[k] : work->first + k;
        if (i < begin || i >= end) {
            int64_t p = 0;
            for (begin = tile = 0; i >= begin + w->rows[p]; p++)
                begin += w->rows[p], tile += (w->rows[p] + TILE - 1) / TILE;
            end = begin + w->rows[p];
            books = (const char *)w->codebooks + p * entries * width;
            if (convert) {
                for (int64_t v = 0; v < entries; v++) fp32[v] = load_float(books, v, w->dtype);
                books = fp32;
            }
        }
        local.codes = (const char *)w->codes + i * per_row * w->code_bytes;
        if (w->tiled) {
            for (int64_t j = 0; j < w->groups; j++)
                for (int64_t m = 0; m < w->books; m++)
                    gathered[j * w->books + m] = ((const uint8_t *)w->codes)[
                        tiled_at(tiles, tile + (i - begin) / TILE, (i - begin) % TILE, j, w->groups,
                                 w->books) + m * TILE];
            local.codes = gathered;
        }
        kernels->decode(&local, books, w->scales[i], work->y + k * w->groups * w->group);
    }
}

/* Rows [first, first + count) of a weight, decoded and scaled, fp32 [count][in]; or those that
 * `rows` [count] names, in its order, if it is not NULL. Returns 0; or 1 and decodes none, if one of
 * them is not there. */
API int64_t pvrt_decode_rows(const plain_weight *w, const int64_t *rows, int64_t first,
                             int64_t count, float *y, int64_t threads) {
    int64_t all = 0;
    for (int64_t p = 0; p < w->parts; p++) all += w->rows[p];
    if (!rows && count && (first < 0 || count < 0 || first > all - count)) return 1;
    for (int64_t k = 0; rows && k < count; k++)
        if (rows[k] < 0 || rows[k] >= all) return 1;
    decode_job work = {.job = {.part = decode_part, .parts = threads < count ? threads : count},
                       .weight = w, .rows = rows, .first = first, .count = count, .y = y};
    run(&work.job, threads);
    return 0;
}

typedef struct {
    job job; /* a part is a share of the tiles */
    const tiled_weight *weight;
    const float *books;
    int64_t first, count; /* tiles */
    char *y;
    int64_t half;
} panel_job;

static void panel_part(const job *job, int64_t index) {
    const panel_job *work = (const panel_job *)job;
    const tiled_weight *w = work->weight;
    const int64_t tiles = count_tiles(w->rows, w->parts), whole = block_groups(w->books);
    const int64_t from = work->first + share(work->count, index, job->parts);
    const int64_t to = work->first + share(work->count, index + 1, job->parts);
    const size_t width = work->half ? 2 : 4, stride = w->groups * w->group * width;
    int64_t tile = 0, row = 0, start = -1; /* start: the row that y begins with */
    for (int64_t p = 0; p < w->parts; p++)
        for (int64_t done = 0; done < w->rows[p]; done += TILE, tile++) {
            const int64_t rows = w->rows[p] - done < TILE ? w->rows[p] - done : TILE;
            if (tile == work->first) start = row;
            for (int64_t j = 0; j < w->groups && tile >= from && tile < to; j += whole) {
                const int64_t groups = w->groups - j < whole ? w->groups - j : whole;
                kernels->decode_tile(w->codes + tiled_at(tiles, tile, 0, j, w->groups, w->books),
                                     work->books + p * w->books * ENTRIES * w->group,
                                     (int)w->books, (int)w->group, (int)groups, (int)rows,
                                     w->scales + row,
                                     work->y + (row - start) * stride + j * w->group * width,
                                     stride, (int)work->half);
            }
            row += rows;
        }
}

/* Rows of `count` tiles from tile `first` on, decoded and scaled: y [rows][in] in fp32, or in bf16 if
 * `half`. books: fp32 [parts][books][ENTRIES][group]. The tiles must be there. */
API void pvrt_decode_tiles(const tiled_weight *w, const float *books, int64_t first, int64_t count,
                           void *y, int64_t half, int64_t threads) {
    panel_job work = {.job = {.part = panel_part, .parts = threads < count ? threads : count},
                      .weight = w, .books = books, .first = first, .count = count, .y = y,
                      .half = half};
    run(&work.job, threads);
}

/* Ask for large pages where weights will be written: reading them misses fewer translations. Only a
 * hint: its failure costs time. */
API void pvrt_huge_pages(void *memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 1 << 21, end = (uintptr_t)memory + (size_t)bytes;
    const uintptr_t first = ((uintptr_t)memory + page - 1) / page * page;
    if (end >= first + page) madvise((void *)first, (end - first) / page * page, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

/* Checkpoint layout [out][groups][books] to tiles, or back; padding rows get code 0. */
API void pvrt_tile_codes(uint8_t *plain, uint8_t *tiled, const int64_t *rows, int64_t parts,
                     int64_t groups, int64_t books, int64_t back) {
    const int64_t tiles = count_tiles(rows, parts);
    int64_t tile = 0;
    if (!back) pvrt_huge_pages(tiled, tiles * TILE * groups * books);
    for (int64_t p = 0; p < parts; tile += (rows[p] + TILE - 1) / TILE, p++)
        for (int64_t r = 0; r < (rows[p] + TILE - 1) / TILE * TILE; r++) {
            for (int64_t j = 0; j < groups; j++) {
                uint8_t *to = tiled + tiled_at(tiles, tile + r / TILE, r % TILE, j, groups, books);
                for (int64_t m = 0; m < books; m++)
                    if (r >= rows[p]) to[m * TILE] = 0;
                    else if (back) plain[j * books + m] = to[m * TILE];
                    else to[m * TILE] = plain[j * books + m];
            }
            if (r < rows[p]) plain += groups * books;
        }
}
