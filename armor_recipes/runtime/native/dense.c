/* y = W x + bias for a few tokens and a dense bf16 matrix, with AVX-512 BF16: the head, and layers that stay dense. */
#include "linear.h"
#if ARMOR_X86
#include <immintrin.h>

#ifndef FEATURES /* as in avx512.c */
#define FEATURES "avx512f,avx512bw,avx512vl,avx512bf16,avx2"
#endif
#ifdef EMULATED
#define INSIDE static inline __attribute__((target(FEATURES)))
#else
#define INSIDE static inline __attribute__((always_inline, target(FEATURES)))
#endif

/* `count` rows times `tokens`, constants whose product is at most 16, in float32. */
INSIDE void tile(const dense_t *task, int64_t token, int64_t row, int count, int tokens) {
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
            const float bias = task->bias ? load_number(task->bias, row + r, BF16) : 0.0f;
            store_number(task->y, (token + t) * task->rows + row + r, BF16, _mm512_reduce_add_ps(all) + bias);
        }
}

/* Rows [begin, end) times `tokens`, `count` at a time, then one by one; see avx512.c. */
#define TILES(tokens, count)                                                                                                      \
    __attribute__((noinline, target(FEATURES))) static void tiles_##tokens(const dense_t *task, int64_t token, int64_t begin,     \
                                                                           int64_t end) {                                          \
        for (; begin + count <= end; begin += count) tile(task, token, begin, count, tokens);                                      \
        for (; begin < end; begin++) tile(task, token, begin, 1, tokens);                                                          \
    }
TILES(1, 4)
TILES(2, 4)
TILES(4, 4)
TILES(8, 2)

#define ROWS_AT_ONCE 32 /* that stay in the second cache for all tokens */

/* Run by every thread of a team with the same task. */
EXPORT void armor_dense(dense_t *task) {
    for (int64_t part; (part = atomic_fetch_add(&task->next, 1)) < task->parts;) {
        const int64_t last = task->rows * (part + 1) / task->parts;
        for (int64_t begin = task->rows * part / task->parts; begin < last; begin += ROWS_AT_ONCE) {
            const int64_t end = begin + ROWS_AT_ONCE < last ? begin + ROWS_AT_ONCE : last;
            int64_t token = 0;
            for (; token + 8 <= task->tokens; token += 8) tiles_8(task, token, begin, end);
            for (; token + 4 <= task->tokens; token += 4) tiles_4(task, token, begin, end);
            for (; token + 2 <= task->tokens; token += 2) tiles_2(task, token, begin, end);
            if (token < task->tokens) tiles_1(task, token, begin, end);
        }
    }
}
#else
EXPORT void armor_dense(dense_t *task) { (void)task; } /* `armor_paths` has no AVX-512 here, which it is called for alone */
#endif
