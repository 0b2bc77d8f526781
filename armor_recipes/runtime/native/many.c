/* y = A (S (B x)) + bias for many tokens, with AVX-512 BF16 and VNNI: half the products of a dense matrix.
 *
 * Lanes are tokens. Of each group of four columns of Bx all six pairs are laid out, token by token, two 16-bit numbers each; a row
 * of the core picks the pair that its mask names, and one dpbf16 or dpwssd multiplies its two kept values with 16 tokens. Such a panel
 * of CHUNK columns for AT_ONCE tokens stays in the first cache while the rows of a part pass over it; sums of a part, for all tokens,
 * stay in the second. Bx is rounded as for few tokens, but with integer cores always to 16 bits, a power of two for each CHUNK columns
 * of a token. A multiplies sums that are rounded to bf16. No sum depends on the threads. */
#include "linear.h"
#if ARMOR_X86
#include "avx512.h"

#define LANES 16
#define AT_ONCE MANY_TOKENS
#define CHUNK BLOCK
#define GROUPS (CHUNK / 4)
#define PAIR (4 * AT_ONCE)          /* bytes of a pair of columns */
#define PANEL (6 * GROUPS * PAIR)   /* of all pairs of a chunk */
#define STORED MANY_STORED          /* of the first and the last pair of its groups, from which the others are made */

/* The place of a pair among the six, by the group's mask; a damaged mask stays within them. */
static const uint8_t PAIR_OF[16] = {0, 0, 0, 0, 0, 1, 3, 0, 0, 2, 4, 0, 5, 0, 0, 0};

AVX512_INLINE __m512i dword(const uint8_t *from) {
    int32_t both;
    memcpy(&both, from, 4);
    return _mm512_set1_epi32(both);
}

/* Two rows of numbers as 16-bit integers or bf16 in the low halves: one row of pairs. */
AVX512_INLINE __m512i paired(__m512i first, __m512i second) { return _mm512_or_si512(first, _mm512_slli_epi32(second, 16)); }

AVX512_INLINE __m512i halves(__m512 numbers) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(numbers)); }

/* out (size, AT_ONCE) = a (size, size) block of bf16 times pairs of rows (size / 2, AT_ONCE, 2), `count` rows of it. */
AVX512_INLINE void rows_of(const uint8_t *matrix, const uint8_t *pairs, float *out, int64_t size, int count) {
    __m512 sum[16];
    UNROLLED for (int i = 0; i < count * (AT_ONCE / LANES); i++) sum[i] = _mm512_setzero_ps();
    for (int64_t j = 0; j < size / 2; j++) {
        __m512i x[AT_ONCE / LANES];
        UNROLLED for (int m = 0; m < AT_ONCE / LANES; m++) x[m] = _mm512_loadu_si512(pairs + j * PAIR + 64 * m);
        UNROLLED for (int r = 0; r < count; r++) {
            const __m512i both = dword(matrix + 2 * (r * size + 2 * j));
            UNROLLED for (int m = 0; m < AT_ONCE / LANES; m++)
                sum[r * (AT_ONCE / LANES) + m] = _mm512_dpbf16_ps(sum[r * (AT_ONCE / LANES) + m], (__m512bh)both, (__m512bh)x[m]);
        }
    }
    UNROLLED for (int i = 0; i < count * (AT_ONCE / LANES); i++) _mm512_storeu_ps(out + LANES * i, sum[i]);
}

__attribute__((noinline, target(FEATURES))) static void block_of(const uint8_t *matrix, const uint8_t *pairs, float *out, int64_t size) {
    int64_t row = 0;
    for (; row + 4 <= size; row += 4) rows_of(matrix + 2 * row * size, pairs, out + row * AT_ONCE, size, 4);
    for (; row < size; row++) rows_of(matrix + 2 * row * size, pairs, out + row * AT_ONCE, size, 1);
}

/* `count` blocks of a factor: out (count * size, AT_ONCE) from pairs of rows; blocks of one number from the rows themselves. */
AVX512_INLINE void factor(const uint8_t *blocks, int64_t count, int64_t size, const float *rows, const uint8_t *pairs, float *out) {
    for (int64_t b = 0; b < count; b++) {
        if (size > 1) {
            block_of(blocks + 2 * b * size * size, pairs + b * size / 2 * PAIR, out + b * size * AT_ONCE, size);
            continue;
        }
        const float number = load_number(blocks, b, BF16);
        for (int64_t t = 0; t < AT_ONCE; t++) out[b * AT_ONCE + t] = number * rows[b * AT_ONCE + t];
    }
}

/* One chunk of Bx in bf16: columns 0 and 1, and 2 and 3, of each group as pairs. */
AVX512_INLINE void stored_floats(const float *rows, uint8_t *stored) {
    for (int pair = 0; pair < 2 * GROUPS; pair++)
        for (int m = 0; m < AT_ONCE; m += LANES) {
            const float *at = rows + 2 * pair * AT_ONCE + m;
            _mm512_storeu_si512(stored + pair * PAIR + 4 * m, paired(halves(_mm512_loadu_ps(at)), halves(_mm512_loadu_ps(at + AT_ONCE))));
        }
}

AVX512_INLINE __m512i fixed(const float *numbers, __m512 by) {
    const __m512i limit = _mm512_set1_epi32(32767), lowest = _mm512_set1_epi32(-32767);
    return _mm512_max_epi32(_mm512_min_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(numbers), by)), limit), lowest);
}

/* The same in fixed point; `units` are the powers of two, NaN where a token is not finite. */
AVX512_INLINE void stored_integers(const float *rows, uint8_t *stored, float *units) {
    const __m512i low = _mm512_set1_epi32(0xffff);
    for (int m = 0; m < AT_ONCE; m += LANES) {
        __m512 most = _mm512_setzero_ps(), wrong = _mm512_setzero_ps();
        for (int i = 0; i < CHUNK; i++) {
            const __m512 x = _mm512_loadu_ps(rows + i * AT_ONCE + m);
            most = _mm512_max_ps(most, _mm512_abs_ps(x));
            wrong = _mm512_fmadd_ps(x, _mm512_setzero_ps(), wrong); /* NaN or infinity times 0 is NaN */
        }
        float unit[LANES], by[LANES];
        _mm512_storeu_ps(unit, most);
        for (int i = 0; i < LANES; i++) unit[i] = unit_of(unit[i]), by[i] = 1.0f / unit[i];
        _mm512_storeu_ps(units + m, _mm512_add_ps(_mm512_loadu_ps(unit), wrong));
        for (int pair = 0; pair < 2 * GROUPS; pair++) {
            const float *at = rows + 2 * pair * AT_ONCE + m;
            const __m512i first = fixed(at, _mm512_loadu_ps(by)), second = fixed(at + AT_ONCE, _mm512_loadu_ps(by));
            _mm512_storeu_si512(stored + pair * PAIR + 4 * m, paired(_mm512_and_si512(first, low), second));
        }
    }
}

/* All six pairs of a chunk's groups. */
AVX512_INLINE void spread(const uint8_t *stored, uint8_t *panel) {
    const __m512i low = _mm512_set1_epi32(0xffff);
    for (int group = 0; group < GROUPS; group++)
        for (int m = 0; m < PAIR; m += 64) {
            const __m512i x01 = _mm512_loadu_si512(stored + 2 * group * PAIR + m);
            const __m512i x23 = _mm512_loadu_si512(stored + (2 * group + 1) * PAIR + m);
            const __m512i x0 = _mm512_and_si512(x01, low), x1 = _mm512_srli_epi32(x01, 16), x3 = _mm512_andnot_si512(low, x23);
            const __m512i x2 = _mm512_slli_epi32(x23, 16);
            uint8_t *at = panel + group * 6 * PAIR + m;
            _mm512_storeu_si512(at, x01);
            _mm512_storeu_si512(at + PAIR, _mm512_or_si512(x0, x2));
            _mm512_storeu_si512(at + 2 * PAIR, _mm512_or_si512(x0, x3));
            _mm512_storeu_si512(at + 3 * PAIR, _mm512_or_si512(x1, x2));
            _mm512_storeu_si512(at + 4 * PAIR, _mm512_or_si512(x1, x3));
            _mm512_storeu_si512(at + 5 * PAIR, x23);
        }
}

/* Columns [begin, end), whole chunks and blocks of B, of tokens [token, token + AT_ONCE), as far as there are such. */
__attribute__((noinline, target(FEATURES))) static void inputs_of(const many_t *task, float *work, int64_t token, int64_t begin,
                                                                  int64_t end) {
    const job_t *job = task->job;
    const int64_t columns = job->columns, chunks = columns / CHUNK, tile = token / AT_ONCE, size = job->b_i;
    const int64_t unit = size > CHUNK ? size : CHUNK, left = job->tokens - token < AT_ONCE ? job->tokens - token : AT_ONCE;
    float *given = work, *rows = work + unit * AT_ONCE;
    uint8_t *pairs = (uint8_t *)(rows + unit * AT_ONCE);
    memset(work, 0, (size_t)(unit * AT_ONCE) * 4), memset(pairs, 0, (size_t)(unit * AT_ONCE) * 2);
    for (int64_t column = begin; column < end; column += unit) {
        for (int64_t t = 0; t < left; t++) {
            const uint8_t *x = job->x + 2 * ((token + t) * columns + column);
            if (size == 1)
                for (int64_t c = 0; c < unit; c++) given[c * AT_ONCE + t] = load_number(x, c, BF16);
            else
                for (int64_t c = 0; c < unit / 2; c++) memcpy(pairs + c * PAIR + 4 * t, x + 4 * c, 4);
        }
        factor(job->b + 2 * column * size, unit / size, size, given, pairs, rows);
        for (int64_t c = 0; c < unit; c += CHUNK) {
            const int64_t place = tile * chunks + (column + c) / CHUNK;
            if (job->format == BF16)
                stored_floats(rows + c * AT_ONCE, task->inner + place * STORED);
            else
                stored_integers(rows + c * AT_ONCE, task->inner + place * STORED, task->units + place * AT_ONCE);
        }
    }
}

/* A chunk of `rows` rows: values as pairs of 16 bits (rows, GROUPS, 2), and where their pairs are in a panel (rows, GROUPS). */
AVX512_INLINE void repack(const job_t *job, int64_t row, int64_t rows, int64_t chunk, uint8_t *values, uint16_t *places) {
    const format_t format = (format_t)job->format;
    const __m128i table = _mm_loadu_si128((const __m128i *)(const void *)PAIR_OF);
    uint16_t start[GROUPS];
    for (int group = 0; group < GROUPS; group++) start[group] = (uint16_t)(group * 6 * PAIR);
    const __m256i starts = _mm256_loadu_si256((const __m256i *)(const void *)start);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t first = (row + r) * job->columns + chunk * CHUNK;
        const uint8_t *from = job->values + bytes_of(first / 2, format);
        uint8_t *to = values + r * 4 * GROUPS;
        if (format == BF16)
            _mm512_storeu_si512(to, _mm512_loadu_si512(from));
        else if (format == INT8)
            _mm512_storeu_si512(to, _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(const void *)from)));
        else
            _mm512_storeu_si512(to, _mm512_cvtepi8_epi16(nibbles(from)));
        const __m128i bits = _mm_loadl_epi64((const __m128i *)(const void *)(job->bitmask + first / 8)), low = _mm_set1_epi8(15);
        const __m128i groups = _mm_unpacklo_epi8(_mm_and_si128(bits, low), _mm_and_si128(_mm_srli_epi16(bits, 4), low));
        const __m256i pairs = _mm256_cvtepu8_epi16(_mm_shuffle_epi8(table, groups));
        _mm_prefetch((const char *)(from + bytes_of(CHUNK / 2, format)), _MM_HINT_T1);
        _mm256_storeu_si256((__m256i *)(void *)(places + r * GROUPS), _mm256_add_epi16(starts, _mm256_slli_epi16(pairs, 8)));
    }
}
_Static_assert(PAIR == 256 && 2 * GROUPS == 32, "the shifts above");

/* The same, unknown to the compiler. */
AVX512_INLINE __m512i in_register(__m512i value) {
#ifndef EMULATED
    __asm__("" : "+v"(value));
#endif
    return value;
}

/* z (rows, AT_ONCE) plus the sums of one chunk, for the first LANES * `lanes` tokens. */
AVX512_INLINE void chunk_of_rows(const job_t *job, const uint8_t *panel, const float *units, const uint8_t *values, const uint16_t *places,
                          int64_t row, int64_t rows, int64_t chunk, float *z, int lanes, int floats) {
    const int64_t group = floats ? 0 : chunk * CHUNK / (job->columns / job->groups);
    __m512i place[GROUPS]; /* kept in registers: values come with one load of a row, and go to all lanes without one each */
    UNROLLED for (int g = 0; g < GROUPS; g++) place[g] = in_register(_mm512_set1_epi32(g));
    for (int64_t r = 0; r < rows; r++) {
        const __m512i all = _mm512_loadu_si512(values + 4 * r * GROUPS);
        __m512i sum[AT_ONCE / LANES];
        UNROLLED for (int m = 0; m < lanes; m++)
            sum[m] = floats ? _mm512_castps_si512(_mm512_loadu_ps(z + r * AT_ONCE + LANES * m)) : _mm512_setzero_si512();
        UNROLLED for (int g = 0; g < GROUPS; g++) {
            const uint8_t *x = panel + places[r * GROUPS + g];
            const __m512i both = _mm512_permutexvar_epi32(place[g], all);
            UNROLLED for (int m = 0; m < lanes; m++) {
                const __m512i of = _mm512_loadu_si512(x + 64 * m);
                sum[m] = floats ? _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum[m]), (__m512bh)both, (__m512bh)of))
                                : _mm512_dpwssd_epi32(sum[m], both, of);
            }
        }
        const __m512 scale = _mm512_set1_ps(floats ? 1.0f : load_number(job->scale, (row + r) * job->groups + group, BF16));
        UNROLLED for (int m = 0; m < lanes; m++) {
            float *at = z + r * AT_ONCE + LANES * m;
            if (floats)
                _mm512_storeu_ps(at, _mm512_castsi512_ps(sum[m]));
            else
                _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum[m]), scale),
                                                     _mm512_loadu_ps(units + LANES * m), _mm512_loadu_ps(at)));
        }
    }
}

#define CHUNKS(name, lanes, floats)                                                                                               \
    __attribute__((noinline, target(FEATURES))) static void name(                                                                 \
        const job_t *job, const uint8_t *panel, const float *units, const uint8_t *values, const uint16_t *places, int64_t row,    \
        int64_t rows, int64_t chunk, float *z) {                                                                                   \
        chunk_of_rows(job, panel, units, values, places, row, rows, chunk, z, lanes, floats);                                      \
    }
CHUNKS(floats_1, 1, 1)
CHUNKS(floats_2, 2, 1)
CHUNKS(floats_3, 3, 1)
CHUNKS(floats_4, 4, 1)
CHUNKS(integers_1, 1, 0)
CHUNKS(integers_2, 2, 0)
CHUNKS(integers_3, 3, 0)
CHUNKS(integers_4, 4, 0)
typedef void chunks_t(const job_t *, const uint8_t *, const float *, const uint8_t *, const uint16_t *, int64_t, int64_t, int64_t, float *);
static chunks_t *const BY_LANES[2][AT_ONCE / LANES] = {{integers_1, integers_2, integers_3, integers_4},
                                                       {floats_1, floats_2, floats_3, floats_4}};

/* Rows (rows, AT_ONCE) in float as pairs of bf16 (rows / 2, AT_ONCE, 2); a last row without another beside zeros. */
AVX512_INLINE void pair_up(const float *rows, int64_t count, uint8_t *pairs) {
    for (int64_t r = 0; r < count; r += 2)
        for (int m = 0; m < AT_ONCE; m += LANES) {
            const __m512i first = halves(_mm512_loadu_ps(rows + r * AT_ONCE + m));
            const __m512i second = r + 1 < count ? halves(_mm512_loadu_ps(rows + (r + 1) * AT_ONCE + m)) : _mm512_setzero_si512();
            _mm512_storeu_si512(pairs + r / 2 * PAIR + 4 * m, paired(first, second));
        }
}

/* y of AT_ONCE tokens, or as many as there are, from sums z (rows, AT_ONCE). */
AVX512_INLINE void finish(const job_t *job, const float *z, float *out, uint8_t *pairs, int64_t token, int64_t row, int64_t rows) {
    const int64_t left = job->tokens - token < AT_ONCE ? job->tokens - token : AT_ONCE, size = job->b_o;
    if (size > 1) pair_up(z, rows, pairs);
    factor(job->a + 2 * row * size, rows / size, size, z, pairs, out);
    if (job->bias)
        for (int64_t r = 0; r < rows; r++) {
            const float bias = load_number(job->bias, row + r, BF16);
            for (int64_t t = 0; t < AT_ONCE; t++) out[r * AT_ONCE + t] += bias;
        }
    pair_up(out, rows, pairs);
    for (int64_t t = 0; t < left; t++) {
        uint8_t *y = job->y + 2 * ((token + t) * job->rows + row);
        for (int64_t r = 0; r < rows / 2; r++) memcpy(y + 4 * r, pairs + r * PAIR + 4 * t, 4);
        if (rows % 2) memcpy(y + 2 * (rows - 1), pairs + rows / 2 * PAIR + 4 * t, 2);
    }
}

/* Rows [row, row + rows), whole blocks of A, of all tokens. */
__attribute__((noinline, target(FEATURES))) static void outputs_of(const many_t *task, float *work, int64_t row, int64_t rows) {
    const job_t *job = task->job;
    const int64_t chunks = job->columns / CHUNK, tiles = (job->tokens + AT_ONCE - 1) / AT_ONCE;
    float *z = work, *out = z + tiles * rows * AT_ONCE;
    uint8_t *pairs = (uint8_t *)(out + rows * AT_ONCE), *panel = pairs + (rows + 1) / 2 * PAIR, *values = panel + PANEL;
    uint16_t *places = (uint16_t *)(void *)(values + rows * 4 * GROUPS);
    memset(z, 0, (size_t)(tiles * rows * AT_ONCE) * 4);
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        repack(job, row, rows, chunk, values, places);
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t left = job->tokens - tile * AT_ONCE < AT_ONCE ? job->tokens - tile * AT_ONCE : AT_ONCE;
            const int64_t place = tile * chunks + chunk;
            spread(task->inner + place * STORED, panel);
            BY_LANES[job->format == BF16][(left + LANES - 1) / LANES - 1](job, panel, task->units + place * AT_ONCE, values, places, row,
                                                                          rows, chunk, z + tile * rows * AT_ONCE);
        }
    }
    for (int64_t tile = 0; tile < tiles; tile++)
        finish(job, z + tile * rows * AT_ONCE, out, pairs, tile * AT_ONCE, row, rows);
}

/* Run by every thread of a team with the same task, as `armor_run`; a thread has one piece of `work`. */
EXPORT void armor_many(many_t *task) {
    const job_t *job = task->job;
    float *work = task->work + task->work_size * atomic_fetch_add(&task->threads, 1);
    const int64_t tiles = (job->tokens + AT_ONCE - 1) / AT_ONCE, unit = job->b_i > CHUNK ? job->b_i : CHUNK;
    const int64_t units = job->columns / unit, inputs = tiles * task->inputs, blocks = job->rows / job->b_o;
    const int64_t outputs = (blocks + task->blocks - 1) / task->blocks;
    for (int64_t part; (part = atomic_fetch_add(&task->next, 1)) < inputs + outputs;) {
        if (part < inputs) {
            const int64_t tile = part / task->inputs, place = part % task->inputs;
            inputs_of(task, work, tile * AT_ONCE, units * place / task->inputs * unit, units * (place + 1) / task->inputs * unit);
            atomic_fetch_add(&task->done, 1);
        } else {
            const int64_t block = (part - inputs) * task->blocks, count = blocks - block < task->blocks ? blocks - block : task->blocks;
            wait_until(&task->done, inputs);
            outputs_of(task, work, block * job->b_o, count * job->b_o);
        }
    }
}
#else
EXPORT void armor_many(many_t *task) { (void)task; } /* `armor_paths` has no AVX-512 here, which it is called for alone */
#endif
