/* AVX2, FMA and F16C. A strip of 32 columns is 8 groups, one to a lane, so x is kept as 4 vectors a strip: vector c holds
 * column c of every group. Then two blends a kept value find its x without a table, and no sum crosses a lane before the end. */
#include "linear.h"
#if ARMOR_X86
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX2_INLINE static inline __attribute__((always_inline, target("avx2,fma,f16c")))

/* The first and the second kept value of the 8 groups of a strip. */
typedef struct {
    __m256 first, second;
} pairs_t;

/* Lanes of a and b that hold even (or odd) places, back in order of the places. */
AVX2_INLINE __m256 in_order(__m256 shuffled) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(shuffled), 0xd8));
}

AVX2_INLINE pairs_t split_floats(__m256 low, __m256 high) {
    return (pairs_t){in_order(_mm256_shuffle_ps(low, high, 0x88)), in_order(_mm256_shuffle_ps(low, high, 0xdd))};
}

AVX2_INLINE pairs_t pairs(const uint8_t *values, int64_t strip, format_t format) {
    if (format == FP32) {
        const float *at = (const float *)(const void *)(values + 64 * strip);
        return split_floats(_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8));
    }
    const __m128i *at = (const __m128i *)(const void *)(values + 32 * strip);
    if (format == FP16) return split_floats(_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1)));
    const __m256i words = _mm256_loadu_si256((const __m256i *)(const void *)at);
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000u);
    return (pairs_t){_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)),
                     _mm256_castsi256_ps(_mm256_and_si256(words, upper))};
}

/* Lane g: the 4 mask bits of group g in the uppermost bits, so that shifting left by 3 - c puts bit c in the sign. */
AVX2_INLINE __m256i nibbles(uint32_t mask) {
    return _mm256_sllv_epi32(_mm256_set1_epi32((int)mask), _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0));
}

AVX2_INLINE __m256 sign(__m256i nibble, int bit) { return _mm256_castsi256_ps(_mm256_slli_epi32(nibble, 3 - bit)); }

AVX2_INLINE uint32_t word(const uint8_t *bitmask, int64_t strip) {
    uint32_t mask;
    memcpy(&mask, bitmask + 4 * strip, 4);
    return mask;
}

/* Ask for the same columns `rows` rows on: the hardware follows a row, but a page or a chunk ends with it. */
AVX2_INLINE void fetch_ahead(const uint8_t *values, const uint8_t *bitmask, const job_t *job, int64_t strip, int rows,
                             format_t format) {
    const int64_t pitch = job->columns / 2 * width(format);
    _mm_prefetch((const char *)(values + rows * pitch + strip * STRIP / 2 * width(format)), _MM_HINT_T1);
    if (strip % 16 == 0) _mm_prefetch((const char *)(bitmask + rows * (job->columns / 8) + 4 * strip), _MM_HINT_T1);
}

/* One token: bring x to the kept values. */
AVX2_INLINE __m256 gather_step(__m256 sum, pairs_t kept, uint32_t mask, const float *x) {
    const __m256i nibble = nibbles(mask);
    const __m256 x1 = _mm256_loadu_ps(x + 8), x2 = _mm256_loadu_ps(x + 16);
    const __m256 first = _mm256_blendv_ps(_mm256_blendv_ps(x2, x1, sign(nibble, 1)), _mm256_loadu_ps(x), sign(nibble, 0));
    const __m256 second =
        _mm256_blendv_ps(_mm256_blendv_ps(x1, x2, sign(nibble, 2)), _mm256_loadu_ps(x + 24), sign(nibble, 3));
    return _mm256_fmadd_ps(kept.second, second, _mm256_fmadd_ps(kept.first, first, sum));
}

/* Several tokens: bring the kept values to their columns, once. */
AVX2_INLINE void spread(pairs_t kept, uint32_t mask, __m256 columns[4]) {
    const __m256i nibble = nibbles(mask);
    __m256 keep[4];
    for (int c = 0; c < 4; c++) keep[c] = _mm256_castsi256_ps(_mm256_srai_epi32(_mm256_slli_epi32(nibble, 3 - c), 31));
    columns[0] = _mm256_and_ps(kept.first, keep[0]);
    columns[1] = _mm256_and_ps(_mm256_blendv_ps(kept.first, kept.second, keep[0]), keep[1]);
    columns[2] = _mm256_and_ps(_mm256_blendv_ps(kept.second, kept.first, keep[3]), keep[2]);
    columns[3] = _mm256_and_ps(kept.second, keep[3]);
}

/* In the order in which `totals` adds: the bits of a row do not depend on its neighbours. */
AVX2_INLINE float total(__m256 lanes) {
    const __m256 pairs_of = _mm256_hadd_ps(lanes, lanes), sum = _mm256_hadd_ps(pairs_of, pairs_of);
    return _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1)));
}

/* The totals of four vectors. */
AVX2_INLINE __m128 totals(const __m256 lanes[4]) {
    const __m256 sum = _mm256_hadd_ps(_mm256_hadd_ps(lanes[0], lanes[1]), _mm256_hadd_ps(lanes[2], lanes[3]));
    return _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
}

/* `count` rows (a constant: 1 or 4) times one token. */
AVX2_INLINE void one_token(const job_t *job, const float *x, int64_t row, int count, int64_t begin, int64_t end,
                           float *z, format_t format) {
    const int64_t whole = end <= job->columns ? end / STRIP : job->columns / STRIP;
    const uint8_t *values[4], *bitmask[4];
    __m256 sum[4];
    for (int r = 0; r < count; r++) {
        values[r] = job->values + (row + r) * job->columns / 2 * width(format);
        bitmask[r] = job->bitmask + (row + r) * job->columns / 8;
        sum[r] = _mm256_setzero_ps();
    }
    int64_t strip = begin / STRIP;
    for (; strip + 2 <= whole; strip += 2) /* two strips of 16-bit values are what a prefetch brings */
        for (int r = 0; r < count; r++) {
            fetch_ahead(values[r], bitmask[r], job, strip, count, format);
            for (int64_t s = strip; s < strip + 2; s++)
                sum[r] = gather_step(sum[r], pairs(values[r], s, format), word(bitmask[r], s), x + s * STRIP);
        }
    for (; strip < whole; strip++)
        for (int r = 0; r < count; r++)
            sum[r] = gather_step(sum[r], pairs(values[r], strip, format), word(bitmask[r], strip), x + strip * STRIP);
    if (whole * STRIP < end)
        for (int r = 0; r < count; r++) {
            uint8_t rest[4 * STRIP / 2];
            const uint32_t mask = last_strip(job, row + r, whole * STRIP, rest);
            sum[r] = gather_step(sum[r], pairs(rest, 0, format), mask, x + whole * STRIP);
        }
    if (count == 1) {
        z[0] += total(sum[0]);
        return;
    }
    _mm_storeu_ps(z, _mm_add_ps(_mm_loadu_ps(z), totals(sum)));
}

AVX2_INLINE void spread_step(__m256 *sum, pairs_t kept, uint32_t mask, const float *x, int tokens) {
    __m256 columns[4];
    spread(kept, mask, columns);
    for (int c = 0; c < 4; c++)
        for (int t = 0; t < tokens; t++) sum[t] = _mm256_fmadd_ps(columns[c], _mm256_loadu_ps(x + t * STRIP + 8 * c), sum[t]);
}

/* `count` rows times `tokens`, constants whose product is at most 8: as many sums as hide the time that an addition takes. */
AVX2_INLINE void tile(const job_t *job, const float *x, int64_t row, int count, int tokens, int64_t begin, int64_t end,
                      float *z, int64_t stride, format_t format) {
    const int64_t whole = end <= job->columns ? end / STRIP : job->columns / STRIP;
    const int64_t pitch = job->columns / 2 * width(format), mask_pitch = job->columns / 8;
    const uint8_t *values = job->values + row * pitch, *bitmask = job->bitmask + row * mask_pitch;
    __m256 sum[8];
    for (int i = 0; i < 8; i++) sum[i] = _mm256_setzero_ps();
    for (int64_t strip = begin / STRIP; strip < whole; strip++)
        for (int r = 0; r < count; r++) {
            if (strip % 2 == 0) fetch_ahead(values + r * pitch, bitmask + r * mask_pitch, job, strip, 4, format);
            spread_step(sum + r * tokens, pairs(values + r * pitch, strip, format), word(bitmask + r * mask_pitch, strip),
                        x + strip * tokens * STRIP, tokens);
        }
    if (whole * STRIP < end)
        for (int r = 0; r < count; r++) {
            uint8_t rest[4 * STRIP / 2];
            const uint32_t mask = last_strip(job, row + r, whole * STRIP, rest);
            spread_step(sum + r * tokens, pairs(rest, 0, format), mask, x + whole * tokens * STRIP, tokens);
        }
    for (int r = 0; r < count; r++)
        for (int t = 0; t < tokens; t++) z[t * stride + r] += total(sum[r * tokens + t]);
}

AVX2_INLINE void tiles(const job_t *job, int64_t token, int tokens, int64_t row, int64_t rows, int64_t begin, int64_t end,
                       float *z, int64_t stride, format_t format) {
    const float *x = job->inner + token * padded(job->columns);
    const int count = tokens == 1 ? 4 : 8 / tokens;
    int64_t r = 0;
    z += token * stride;
    for (; r + count <= rows; r += count)
        if (tokens == 1)
            one_token(job, x, row + r, 4, begin, end, z + r, format);
        else
            tile(job, x, row + r, count, tokens, begin, end, z + r, stride, format);
    for (; r < rows; r++) /* the same additions in the same order */
        if (tokens == 1)
            one_token(job, x, row + r, 1, begin, end, z + r, format);
        else
            tile(job, x, row + r, 1, tokens, begin, end, z + r, stride, format);
}

AVX2_INLINE void core_rows(const job_t *job, int64_t row, int64_t count, int64_t begin, int64_t end, float *z,
                           int64_t stride, format_t format) {
    for (int64_t t = 0; t < job->tokens;) {
        const int64_t tokens = tile_of(job->tokens, t);
        switch (tokens) {
        case 8: tiles(job, t, 8, row, count, begin, end, z, stride, format); break;
        case 4: tiles(job, t, 4, row, count, begin, end, z, stride, format); break;
        case 2: tiles(job, t, 2, row, count, begin, end, z, stride, format); break;
        default: tiles(job, t, 1, row, count, begin, end, z, stride, format);
        }
        t += tokens;
    }
}

AVX2 static void core(const job_t *job, int64_t row, int64_t count, int64_t begin, int64_t end, float *z, int64_t stride) {
    switch ((format_t)job->format) {
    case BF16: core_rows(job, row, count, begin, end, z, stride, BF16); break;
    case FP16: core_rows(job, row, count, begin, end, z, stride, FP16); break;
    case FP32: core_rows(job, row, count, begin, end, z, stride, FP32); break;
    }
}

AVX2_INLINE __m256 eight(const uint8_t *numbers, int64_t index, format_t format) {
    if (format == FP32) return _mm256_loadu_ps((const float *)(const void *)(numbers + 4 * index));
    const __m128i halves = _mm_loadu_si128((const __m128i *)(const void *)(numbers + 2 * index));
    if (format == FP16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

/* Four rows of a square matrix times `tokens` (a constant: 1 or 2). */
AVX2_INLINE void four_rows(const uint8_t *matrix, int64_t i, int64_t size, format_t format, const float *in,
                           int64_t in_stride, float *out, int64_t out_stride, int tokens) {
    __m256 sum[2][4];
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < 4; r++) sum[t][r] = _mm256_setzero_ps();
    for (int64_t j = 0; j + 8 <= size; j += 8)
        for (int r = 0; r < 4; r++) {
            const __m256 numbers = eight(matrix, (i + r) * size + j, format);
            for (int t = 0; t < tokens; t++)
                sum[t][r] = _mm256_fmadd_ps(numbers, _mm256_loadu_ps(in + t * in_stride + j), sum[t][r]);
        }
    for (int t = 0; t < tokens; t++) {
        float four[4];
        _mm_storeu_ps(four, totals(sum[t]));
        for (int r = 0; r < 4; r++) {
            for (int64_t j = size / 8 * 8; j < size; j++)
                four[r] += load_number(matrix, (i + r) * size + j, format) * in[t * in_stride + j];
            out[t * out_stride + i + r] = four[r];
        }
    }
}

AVX2_INLINE void square_of(const uint8_t *matrix, int64_t size, format_t format, const float *in, int64_t in_stride,
                           float *out, int64_t out_stride, int64_t tokens) {
    int64_t i = 0;
    for (; i + 4 <= size; i += 4) {
        int64_t t = 0;
        for (; t + 2 <= tokens; t += 2)
            four_rows(matrix, i, size, format, in + t * in_stride, in_stride, out + t * out_stride, out_stride, 2);
        if (t < tokens)
            four_rows(matrix, i, size, format, in + t * in_stride, in_stride, out + t * out_stride, out_stride, 1);
    }
    for (; i < size; i++)
        for (int64_t t = 0; t < tokens; t++) {
            float sum = 0.0f;
            for (int64_t j = 0; j < size; j++) sum += load_number(matrix, i * size + j, format) * in[t * in_stride + j];
            out[t * out_stride + i] = sum;
        }
}

AVX2 static void square(const uint8_t *matrix, int64_t size, format_t format, const float *in, int64_t in_stride,
                        float *out, int64_t out_stride, int64_t tokens) {
    switch (format) {
    case BF16: square_of(matrix, size, BF16, in, in_stride, out, out_stride, tokens); break;
    case FP16: square_of(matrix, size, FP16, in, in_stride, out, out_stride, tokens); break;
    case FP32: square_of(matrix, size, FP32, in, in_stride, out, out_stride, tokens); break;
    }
}

static void arrange(const job_t *job, int64_t token, const float *natural, int64_t column, int64_t count) {
    const int64_t tile = tile_of(job->tokens, token), start = tile_start(job->tokens, token);
    float *inner = job->inner + start * padded(job->columns) + (token - start) * STRIP;
    int64_t i = 0;
    if (column % STRIP == 0)
        for (; i + STRIP <= count; i += STRIP) {
            float *to = inner + (column + i) * tile;
            for (int c = 0; c < 4; c++)
                for (int g = 0; g < 8; g++) to[8 * c + g] = natural[i + 4 * g + c];
        }
    for (; i < count; i++) {
        const int64_t strip = (column + i) / STRIP, place = (column + i) % STRIP;
        inner[strip * tile * STRIP + place % 4 * 8 + place / 4] = natural[i];
    }
}

const path_t AVX2_PATH = {core, square, arrange};
#endif
