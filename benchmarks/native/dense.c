/* A dense bf16 matrix times a few tokens, as carefully as armor_recipes/runtime/native: what the packed kernel is measured against.
 * Compiled by benchmarks/kernel.py. y (tokens, rows) and x (tokens, columns) are bf16, columns a multiple of 16; sums are float32;
 * `inner` holds tokens * columns floats. */
#include "../../armor_recipes/runtime/native/linear.h"

#define ROWS_AT_ONCE 64
#define CHUNK_NUMBERS 4096

#if ARMOR_X86
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma")))
#define AVX2_INLINE static inline __attribute__((always_inline, target("avx2,fma")))

AVX2_INLINE float total(__m256 lanes) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

/* `count` rows times `tokens`, both constants. Even columns of 16 are in one vector of `inner`, odd ones in the next. */
AVX2_INLINE void tile(const uint8_t *w, const float *inner, float *z, int64_t columns, int64_t begin, int64_t end, int count,
                      int tokens) {
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000u);
    __m256 sum[8];
    for (int i = 0; i < count * tokens; i++) sum[i] = _mm256_setzero_ps();
    for (int64_t c = begin; c < end; c += 16) {
        for (int r = 0; r < count; r++) {
            const uint8_t *at = w + 2 * (r * columns + c);
            if (c % 32 == 0) _mm_prefetch((const char *)(at + 2 * (tokens == 1 ? count : 4) * columns), _MM_HINT_T1);
            const __m256i words = _mm256_loadu_si256((const __m256i *)(const void *)at);
            const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
            const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(words, upper));
            for (int t = 0; t < tokens; t++) {
                const float *x = inner + c * tokens + 16 * t;
                sum[r * tokens + t] = _mm256_fmadd_ps(even, _mm256_loadu_ps(x), sum[r * tokens + t]);
                sum[r * tokens + t] = _mm256_fmadd_ps(odd, _mm256_loadu_ps(x + 8), sum[r * tokens + t]);
            }
        }
    }
    for (int r = 0; r < count; r++)
        for (int t = 0; t < tokens; t++) z[t * ROWS_AT_ONCE + r] += total(sum[r * tokens + t]);
}

AVX2 static void chunk(const uint8_t *w, const float *inner, float *z, int64_t tokens, int64_t rows, int64_t columns,
                       int64_t begin, int64_t end) {
    int64_t t = 0;
    for (; t + 8 <= tokens; t += 8)
        for (int64_t r = 0; r < rows; r++)
            tile(w + 2 * r * columns, inner + t * columns, z + t * ROWS_AT_ONCE + r, columns, begin, end, 1, 8);
    for (; t < tokens; t++) {
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4)
            tile(w + 2 * r * columns, inner + t * columns, z + t * ROWS_AT_ONCE + r, columns, begin, end, 4, 1);
        for (; r < rows; r++)
            tile(w + 2 * r * columns, inner + t * columns, z + t * ROWS_AT_ONCE + r, columns, begin, end, 1, 1);
    }
}

/* Tiles of 8 tokens, and of 1; within a tile 16 columns at a time, the tokens side by side. */
static int64_t place(int64_t tokens, int64_t token, int64_t columns, int64_t column) {
    const int64_t tile = token < tokens / 8 * 8 ? 8 : 1, start = token / tile * tile;
    return start * columns + (column / 16 * tile + token - start) * 16 + column % 2 * 8 + column % 16 / 2;
}
#else
static void chunk(const uint8_t *w, const float *inner, float *z, int64_t tokens, int64_t rows, int64_t columns,
                  int64_t begin, int64_t end) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = begin; c < end; c++)
                z[t * ROWS_AT_ONCE + r] += load_number(w, r * columns + c, BF16) * inner[t * columns + c];
}

static int64_t place(int64_t tokens, int64_t token, int64_t columns, int64_t column) {
    (void)tokens;
    return token * columns + column;
}
#endif

__attribute__((visibility("default"))) void dense_linear(const uint8_t *x, const uint8_t *w, uint8_t *y, float *inner,
                                                         int64_t tokens, int64_t rows, int64_t columns) {
    float z[MOST_TOKENS * ROWS_AT_ONCE];
    const int64_t wide = CHUNK_NUMBERS / tokens / 32 * 32, step = tokens == 1 ? columns : wide < 512 ? 512 : wide;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t c = 0; c < columns; c++) inner[place(tokens, t, columns, c)] = load_number(x, t * columns + c, BF16);
    for (int64_t row = 0; row < rows; row += ROWS_AT_ONCE) {
        const int64_t count = rows - row < ROWS_AT_ONCE ? rows - row : ROWS_AT_ONCE;
        memset(z, 0, sizeof z);
        for (int64_t c = 0; c < columns; c += step)
            chunk(w + 2 * row * columns, inner, z, tokens, count, columns, c, c + step < columns ? c + step : columns);
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t r = 0; r < count; r++) store_number(y, t * rows + row + r, BF16, z[t * ROWS_AT_ONCE + r]);
    }
}
