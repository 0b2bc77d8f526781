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

/* int8 to the uppermost byte of each lane, that is times 2^24: with what is below it zero, no sign has to be extended. */
AVX2_INLINE pairs_t int8_pairs(const uint8_t *values) {
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)values));
    const __m256i pair = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14); /* of bytes, of each lane's group */
    const __m256i first = _mm256_or_si256(_mm256_slli_epi32(pair, 24), _mm256_set1_epi32(0x00808080));
    const __m256i second = _mm256_add_epi32(first, _mm256_set1_epi32(1 << 24));
    return (pairs_t){_mm256_cvtepi32_ps(_mm256_shuffle_epi8(bytes, first)),
                     _mm256_cvtepi32_ps(_mm256_shuffle_epi8(bytes, second))};
}

/* A group's int4 are one byte. Its uppermost 4 bits of a lane are the second one times 2^28, once their sign is flipped, which
 * takes away the 8 that was added; shifted left they are the first one. */
AVX2_INLINE pairs_t int4_pairs(const uint8_t *values) {
    int64_t eight;
    memcpy(&eight, values, 8);
    const __m256i place = _mm256_slli_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), 24);
    const __m256i uppermost = _mm256_or_si256(place, _mm256_set1_epi32(0x00808080));
    const __m256i both = _mm256_xor_si256(_mm256_shuffle_epi8(_mm256_set1_epi64x(eight), uppermost),
                                          _mm256_set1_epi32((int)0x88000000u));
    const __m256i second = _mm256_and_si256(both, _mm256_set1_epi32((int)0xf0000000u));
    return (pairs_t){_mm256_cvtepi32_ps(_mm256_slli_epi32(both, 4)), _mm256_cvtepi32_ps(second)};
}

/* What makes up for that in x. */
static float unit(format_t format) { return format == INT8 ? 0x1p-24f : format == INT4 ? 0x1p-28f : 1.0f; }

AVX2_INLINE pairs_t pairs(const uint8_t *values, int64_t strip, format_t format) {
    if (format == INT8) return int8_pairs(values + 16 * strip);
    if (format == INT4) return int4_pairs(values + 8 * strip);
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

AVX2_INLINE pairs_t times(pairs_t kept, __m256 factor) {
    return (pairs_t){_mm256_mul_ps(kept.first, factor), _mm256_mul_ps(kept.second, factor)};
}

/* Lane g: the 4 mask bits of group g in the uppermost bits. */
AVX2_INLINE __m256i nibbles(uint32_t mask) {
    return _mm256_sllv_epi32(_mm256_set1_epi32((int)mask), _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0));
}

/* Bit c in the sign of selectors[c]; by additions, which more units can do than shifts. */
AVX2_INLINE void select_bits(uint32_t mask, __m256 selectors[4]) {
    __m256i bits = nibbles(mask);
    for (int c = 3; c >= 0; c--, bits = _mm256_add_epi32(bits, bits)) selectors[c] = _mm256_castsi256_ps(bits);
}

AVX2_INLINE uint32_t word(const uint8_t *bitmask, int64_t strip) {
    uint32_t mask;
    memcpy(&mask, bitmask + 4 * strip, 4);
    return mask;
}

/* Strips whose values are a line of the cache, or half as many where one strip is a whole line. */
AVX2_INLINE int64_t strips_of_line(format_t format) { return format == FP32 ? 2 : 64 / bytes_of(STRIP / 2, format); }

/* Ask for the same columns `rows` rows on: the hardware follows a row, but a page or a chunk ends with it. */
AVX2_INLINE void fetch_ahead(const uint8_t *values, const uint8_t *bitmask, const job_t *job, int64_t strip, int rows,
                             format_t format) {
    const int64_t pitch = bytes_of(job->columns / 2, format);
    _mm_prefetch((const char *)(values + rows * pitch + bytes_of(strip * STRIP / 2, format)), _MM_HINT_T1);
    if (strip % 16 == 0) _mm_prefetch((const char *)(bitmask + rows * (job->columns / 8) + 4 * strip), _MM_HINT_T1);
}

/* The scales of up to 4 rows over some columns, as floats, and which of them is the present strip's. */
typedef struct {
    float scale[4][GROUPED_COLUMNS / STRIP];
    int64_t strips, group, next; /* strips of a group; the present group; the strip after it */
} scales_t;

AVX2_INLINE void begin_scales(scales_t *s, const job_t *job, int64_t row, int count, int64_t begin, int64_t end) {
    const int64_t wide = job->columns / job->groups, first = begin / wide, groups = (end - 1) / wide - first + 1;
    const int64_t size = width((format_t)job->floats);
    for (int r = 0; r < count; r++) {
        const int64_t index = (row + r) * job->groups + first;
        for (int64_t byte = 0; byte < groups * size; byte += 64)
            _mm_prefetch((const char *)(job->scale + (index + 4 * job->groups) * size + byte), _MM_HINT_T1);
        load_numbers(job->scale, index, groups, (format_t)job->floats, s->scale[r]);
    }
    s->strips = wide / STRIP, s->group = 0, s->next = (first + 1) * s->strips;
}

AVX2_INLINE void at_strip(scales_t *s, int64_t strip) {
    if (strip == s->next) s->group++, s->next += s->strips;
}

AVX2_INLINE __m256 scale_of(const scales_t *s, int r) { return _mm256_broadcast_ss(&s->scale[r][s->group]); }

/* One token: bring x to the kept values. The scale is that of row r, where groups have their own. */
AVX2_INLINE __m256 gather_step(__m256 sum, pairs_t kept, uint32_t mask, const float *x, const scales_t *scales, int r) {
    __m256 bit[4];
    select_bits(mask, bit);
    const __m256 x1 = _mm256_loadu_ps(x + 8), x2 = _mm256_loadu_ps(x + 16);
    const __m256 first = _mm256_blendv_ps(_mm256_blendv_ps(x2, x1, bit[1]), _mm256_loadu_ps(x), bit[0]);
    const __m256 second = _mm256_blendv_ps(_mm256_blendv_ps(x1, x2, bit[2]), _mm256_loadu_ps(x + 24), bit[3]);
    if (!scales) return _mm256_fmadd_ps(kept.second, second, _mm256_fmadd_ps(kept.first, first, sum));
    const __m256 unscaled = _mm256_fmadd_ps(kept.second, second, _mm256_mul_ps(kept.first, first));
    return _mm256_fmadd_ps(unscaled, scale_of(scales, r), sum);
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
                           float *z, format_t format, int grouped) {
    const int64_t whole = end <= job->columns ? end / STRIP : job->columns / STRIP;
    const int64_t pitch = bytes_of(job->columns / 2, format), mask_pitch = job->columns / 8;
    const uint8_t *values = job->values + row * pitch, *bitmask = job->bitmask + row * mask_pitch;
    scales_t held, *scales = grouped ? &held : NULL;
    __m256 sum[4];
    for (int r = 0; r < count; r++) sum[r] = _mm256_setzero_ps();
    if (grouped) begin_scales(&held, job, row, count, begin, end);
    for (int64_t strip = begin / STRIP; strip < whole; strip++) {
        if (grouped) at_strip(&held, strip);
        for (int r = 0; r < count; r++) {
            if (strip % strips_of_line(format) == 0)
                fetch_ahead(values + r * pitch, bitmask + r * mask_pitch, job, strip, count, format);
            sum[r] = gather_step(sum[r], pairs(values + r * pitch, strip, format), word(bitmask + r * mask_pitch, strip),
                                 x + strip * STRIP, scales, r);
        }
    }
    if (!grouped && whole * STRIP < end)
        for (int r = 0; r < count; r++) {
            uint8_t rest[4 * STRIP / 2];
            const uint32_t mask = last_strip(job, row + r, whole * STRIP, rest);
            sum[r] = gather_step(sum[r], pairs(rest, 0, format), mask, x + whole * STRIP, NULL, r);
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

/* `count` rows times `tokens`, constants whose product is at most 8: as many sums as hide the time that an addition takes.
 * There is no room for a sum of each group: its integers are scaled, once for all tokens. */
AVX2_INLINE void tile(const job_t *job, const float *x, int64_t row, int count, int tokens, int64_t begin, int64_t end,
                      float *z, int64_t stride, format_t format, int grouped) {
    const int64_t whole = end <= job->columns ? end / STRIP : job->columns / STRIP;
    const int64_t pitch = bytes_of(job->columns / 2, format), mask_pitch = job->columns / 8;
    const uint8_t *values = job->values + row * pitch, *bitmask = job->bitmask + row * mask_pitch;
    scales_t scales;
    __m256 sum[8];
    for (int i = 0; i < 8; i++) sum[i] = _mm256_setzero_ps();
    if (grouped) begin_scales(&scales, job, row, count, begin, end);
    for (int64_t strip = begin / STRIP; strip < whole; strip++) {
        if (grouped) at_strip(&scales, strip);
        for (int r = 0; r < count; r++) {
            if (strip % strips_of_line(format) == 0)
                fetch_ahead(values + r * pitch, bitmask + r * mask_pitch, job, strip, 4, format);
            pairs_t kept = pairs(values + r * pitch, strip, format);
            if (grouped) kept = times(kept, scale_of(&scales, r));
            spread_step(sum + r * tokens, kept, word(bitmask + r * mask_pitch, strip), x + strip * tokens * STRIP, tokens);
        }
    }
    if (!grouped && whole * STRIP < end)
        for (int r = 0; r < count; r++) {
            uint8_t rest[4 * STRIP / 2];
            const uint32_t mask = last_strip(job, row + r, whole * STRIP, rest);
            spread_step(sum + r * tokens, pairs(rest, 0, format), mask, x + whole * tokens * STRIP, tokens);
        }
    for (int r = 0; r < count; r++)
        for (int t = 0; t < tokens; t++) z[t * stride + r] += total(sum[r * tokens + t]);
}

AVX2_INLINE void tiles(const job_t *job, int64_t token, int tokens, int64_t row, int64_t rows, int64_t begin, int64_t end,
                       float *z, int64_t stride, format_t format, int grouped) {
    const float *x = job->inner + token * padded(job->columns);
    const int count = tokens == 1 ? 4 : 8 / tokens;
    int64_t r = 0;
    z += token * stride;
    for (; r + count <= rows; r += count)
        if (tokens == 1)
            one_token(job, x, row + r, 4, begin, end, z + r, format, grouped);
        else
            tile(job, x, row + r, count, tokens, begin, end, z + r, stride, format, grouped);
    for (; r < rows; r++) /* the same additions in the same order */
        if (tokens == 1)
            one_token(job, x, row + r, 1, begin, end, z + r, format, grouped);
        else
            tile(job, x, row + r, 1, tokens, begin, end, z + r, stride, format, grouped);
}

AVX2_INLINE void core_rows(const job_t *job, int64_t row, int64_t count, int64_t begin, int64_t end, float *z,
                           int64_t stride, format_t format, int grouped) {
    for (int64_t t = 0; t < job->tokens;) {
        const int64_t tokens = tile_of(job->tokens, t);
        switch (tokens) {
        case 8: tiles(job, t, 8, row, count, begin, end, z, stride, format, grouped); break;
        case 4: tiles(job, t, 4, row, count, begin, end, z, stride, format, grouped); break;
        case 2: tiles(job, t, 2, row, count, begin, end, z, stride, format, grouped); break;
        default: tiles(job, t, 1, row, count, begin, end, z, stride, format, grouped);
        }
        t += tokens;
    }
}

AVX2 static void grouped_core(const job_t *job, int64_t row, int64_t count, int64_t begin, int64_t end, float *z,
                              int64_t stride) {
    if (job->format == INT8)
        core_rows(job, row, count, begin, end, z, stride, INT8, 1);
    else
        core_rows(job, row, count, begin, end, z, stride, INT4, 1);
}

AVX2 static void core(const job_t *job, int64_t row, int64_t count, int64_t begin, int64_t end, float *z, int64_t stride) {
    if (job->groups > 1) {
        grouped_core(job, row, count, begin, end, z, stride);
        return;
    }
    switch ((format_t)job->format) {
    case BF16: core_rows(job, row, count, begin, end, z, stride, BF16, 0); break;
    case FP16: core_rows(job, row, count, begin, end, z, stride, FP16, 0); break;
    case FP32: core_rows(job, row, count, begin, end, z, stride, FP32, 0); break;
    case INT8: core_rows(job, row, count, begin, end, z, stride, INT8, 0); break;
    case INT4: core_rows(job, row, count, begin, end, z, stride, INT4, 0); break;
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
    default: square_of(matrix, size, FP32, in, in_stride, out, out_stride, tokens);
    }
}

static void arrange(const job_t *job, int64_t token, const float *natural, int64_t column, int64_t count) {
    const int64_t tile = tile_of(job->tokens, token), start = tile_start(job->tokens, token);
    const float by = unit((format_t)job->format);
    float *inner = job->inner + start * padded(job->columns) + (token - start) * STRIP;
    int64_t i = 0;
    if (column % STRIP == 0)
        for (; i + STRIP <= count; i += STRIP) {
            float *to = inner + (column + i) * tile;
            for (int c = 0; c < 4; c++)
                for (int g = 0; g < 8; g++) to[8 * c + g] = by * natural[i + 4 * g + c];
        }
    for (; i < count; i++) {
        const int64_t strip = (column + i) / STRIP, place = (column + i) % STRIP;
        inner[strip * tile * STRIP + place % 4 * 8 + place / 4] = by * natural[i];
    }
}

const path_t AVX2_PATH = {core, square, arrange, NULL};
#endif
