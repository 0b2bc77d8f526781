/* y = W x + bias for a few tokens and a dense matrix of bf16 or 8-bit integers, with AVX-512 BF16 and VNNI: the head, and layers that
 * stay dense. */
#include "linear.h"
#if ARMOR_X86
#include "avx512.h"

AVX512_INLINE void store(const dense_t *task, int64_t token, int64_t row, float value) {
    const float bias = task->bias ? load_number(task->bias, row, BF16) : 0.0f;
    store_number(task->y, token * task->rows + row, BF16, value + bias);
}

/* Columns [column, column + 16) of x, zeros behind the last one, as float32's bits. */
AVX512_INLINE __m512i sixteen(const uint8_t *x, int64_t column, int64_t columns) {
    const int64_t left = columns - column;
    const __mmask16 there = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, x + 2 * column)), 16);
}

/* `count` rows times `tokens`, constants whose product is at most 16, in float32. */
AVX512_INLINE void tile_of_bf16(const dense_t *task, int64_t token, int64_t row, int count, int tokens) {
    const int64_t columns = task->columns, whole = columns / STRIP;
    const uint8_t *w = task->w + 2 * row * columns, *x = task->x + 2 * token * columns;
    const __mmask32 left = columns % STRIP ? ((__mmask32)1 << columns % STRIP) - 1 : 0;
    __m512 sum[16];
    for (int i = 0; i < count * tokens; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t strip = 0; strip < whole; strip++)
        for (int r = 0; r < count; r++) {
            const uint8_t *at = w + 2 * (r * columns + strip * STRIP);
            _mm_prefetch((const char *)(at + 2 * count * columns), _MM_HINT_T1);
            const __m512bh numbers = (__m512bh)_mm512_loadu_si512(at);
            for (int t = 0; t < tokens; t++)
                sum[r * tokens + t] = _mm512_dpbf16_ps(sum[r * tokens + t], numbers,
                                                       (__m512bh)_mm512_loadu_si512(x + 2 * (t * columns + strip * STRIP)));
        }
    for (int r = 0; r < count; r++)
        for (int t = 0; t < tokens; t++) {
            const uint8_t *at = w + 2 * (r * columns + whole * STRIP), *of = x + 2 * (t * columns + whole * STRIP);
            __m512 all = sum[r * tokens + t];
            if (left)
                all = _mm512_dpbf16_ps(all, (__m512bh)_mm512_maskz_loadu_epi16(left, at),
                                       (__m512bh)_mm512_maskz_loadu_epi16(left, of));
            store(task, token + t, row + r, _mm512_reduce_add_ps(all));
        }
}

/* A strip of `count` rows of bytes, or as many bytes of it as `there` has bits, times `tokens`. */
AVX512_INLINE void strip_of_int8(__m512i *sum, const uint8_t *w, const uint8_t *x, int64_t columns, int64_t pitch, __mmask32 there,
                          __m256i flip, int count, int tokens) {
    UNROLLED for (int r = 0; r < count; r++) {
        _mm_prefetch((const char *)(w + (count + r) * columns), _MM_HINT_T1);
        const __m256i bytes = _mm256_maskz_loadu_epi8(there, w + r * columns);
        const __m512i numbers = _mm512_cvtepi8_epi16(_mm256_xor_si256(bytes, flip));
        UNROLLED for (int t = 0; t < tokens; t++)
            sum[r * tokens + t] = _mm512_dpwssd_epi32(sum[r * tokens + t], numbers, _mm512_loadu_si512(x + t * pitch));
    }
}

/* The same of integers: sums of at most GROUPED_COLUMNS in 32 bits, then times the scale. */
AVX512_INLINE void tile_of_int8(const dense_t *task, int64_t token, int64_t row, int count, int tokens) {
    const int64_t columns = task->columns, size = columns / task->groups, pitch = words_pitch(columns);
    const uint8_t *w = task->w + row * columns, *x = task->words + token * pitch;
    const __m256i flip = _mm256_set1_epi8((char)task->flip);
    __m512 total[16];
    UNROLLED for (int i = 0; i < count * tokens; i++) total[i] = _mm512_setzero_ps();
    for (int64_t begin = 0, end; begin < columns; begin = end) {
        const int64_t group = begin / size, last = (group + 1) * size;
        end = begin + GROUPED_COLUMNS < last ? begin + GROUPED_COLUMNS : last;
        __m512i sum[16];
        UNROLLED for (int i = 0; i < count * tokens; i++) sum[i] = _mm512_setzero_si512();
        int64_t c = begin;
        for (; c + STRIP <= end; c += STRIP)
            strip_of_int8(sum, w + c, x + 2 * c, columns, pitch, ~(__mmask32)0, flip, count, tokens);
        if (c < end) strip_of_int8(sum, w + c, x + 2 * c, columns, pitch, ((__mmask32)1 << (end - c)) - 1, flip, count, tokens);
        UNROLLED for (int r = 0; r < count; r++) {
            const __m512 scale = _mm512_set1_ps(load_number(task->scale, (row + r) * task->groups + group, BF16));
            UNROLLED for (int i = r * tokens; i < (r + 1) * tokens; i++)
                total[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i]), scale, total[i]);
        }
    }
    UNROLLED for (int t = 0; t < tokens; t++) {
        const float unit = load_number(task->words + task->tokens * pitch, token + t, FP32);
        UNROLLED for (int r = 0; r < count; r++)
            store(task, token + t, row + r, _mm512_reduce_add_ps(total[r * tokens + t]) * unit);
    }
}

/* x of integers, laid out; NaN for a token that is not finite. Before any thread runs `armor_dense`. */
EXPORT __attribute__((target(FEATURES))) void armor_words(const dense_t *task) {
    const int64_t columns = task->columns, pitch = words_pitch(columns);
    for (int64_t t = 0; t < task->tokens; t++) {
        const uint8_t *x = task->x + 2 * t * columns;
        uint8_t *words = task->words + t * pitch;
        __m512i most = _mm512_setzero_si512();
        for (int64_t c = 0; c < columns; c += 16)
            most = _mm512_max_epi32(most, _mm512_and_si512(sixteen(x, c, columns), _mm512_set1_epi32(0x7fffffff)));
        const float largest = from_bits((uint32_t)_mm512_reduce_max_epi32(most)), unit = unit_of(largest);
        store_number(task->words + task->tokens * pitch, t, FP32, largest < 3.4e38f ? unit : largest * 0.0f / 0.0f);
        const __m512 by = _mm512_set1_ps(1.0f / unit);
        const __m512i limit = _mm512_set1_epi32(32767), lowest = _mm512_set1_epi32(-32767); /* a sum of GROUPED_COLUMNS fits 32 bits */
        for (int64_t c = 0; c < padded(columns); c += 16) {
            const __m512i numbers = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(sixteen(x, c, columns)), by));
            _mm256_storeu_si256((__m256i *)(void *)(words + 2 * c),
                                _mm512_cvtepi32_epi16(_mm512_max_epi32(_mm512_min_epi32(numbers, limit), lowest)));
        }
    }
}

/* Rows [begin, end) times `tokens`, `count` at a time, then one by one; see avx512.c. */
#define TILES(format, tokens, count)                                                                                              \
    __attribute__((noinline, target(FEATURES))) static void format##_##tokens(const dense_t *task, int64_t token, int64_t begin,  \
                                                                              int64_t end) {                                       \
        for (; begin + count <= end; begin += count) tile_of_##format(task, token, begin, count, tokens);                          \
        for (; begin < end; begin++) tile_of_##format(task, token, begin, 1, tokens);                                              \
    }
#define ALL_TILES(format)                                                                                                         \
    TILES(format, 1, 4)                                                                                                            \
    TILES(format, 2, 4)                                                                                                            \
    TILES(format, 4, 4)                                                                                                            \
    TILES(format, 8, 2)                                                                                                            \
    static void format(const dense_t *task, int64_t begin, int64_t end) {                                                          \
        int64_t token = 0;                                                                                                         \
        for (; token + 8 <= task->tokens; token += 8) format##_8(task, token, begin, end);                                         \
        for (; token + 4 <= task->tokens; token += 4) format##_4(task, token, begin, end);                                         \
        for (; token + 2 <= task->tokens; token += 2) format##_2(task, token, begin, end);                                         \
        if (token < task->tokens) format##_1(task, token, begin, end);                                                             \
    }
ALL_TILES(bf16)
ALL_TILES(int8)

#define ROWS_AT_ONCE 32 /* that stay in the second cache for all tokens */

/* Run by every thread of a team with the same task. */
EXPORT void armor_dense(dense_t *task) {
    for (int64_t part; (part = atomic_fetch_add(&task->next, 1)) < task->parts;) {
        const int64_t last = task->rows * (part + 1) / task->parts;
        for (int64_t begin = task->rows * part / task->parts; begin < last; begin += ROWS_AT_ONCE) {
            const int64_t end = begin + ROWS_AT_ONCE < last ? begin + ROWS_AT_ONCE : last;
            (task->scale ? int8 : bf16)(task, begin, end);
        }
    }
}
#else
EXPORT void armor_words(const dense_t *task) { (void)task; }
EXPORT void armor_dense(dense_t *task) { (void)task; } /* `armor_paths` has no AVX-512 here, which it is called for alone */
#endif
