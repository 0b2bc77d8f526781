/* AVX-512 with VBMI2 and BF16. The 32 bits of a mask word are the operand of an expand: 16 packed values become 32 columns in
 * one instruction, which dpbf16 multiplies with 32 columns of x. Rows of x are bf16 in natural order here. */
#include "linear.h"
#if ARMOR_X86
#include <immintrin.h>

#ifndef FEATURES /* a test emulates the instructions and names fewer */
#define FEATURES "avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,f16c"
#endif
#define AVX512_INLINE static inline __attribute__((always_inline, target(FEATURES)))

/* 16 integers, which bf16 holds exactly. */
AVX512_INLINE __m256i to_bf16(__m512i integers) { return (__m256i)_mm512_cvtneps_pbh(_mm512_cvtepi32_ps(integers)); }

/* Each word's low 4 bits, a number plus 8, choose its bf16 from 16; the rest of the word counts for nothing. */
AVX512_INLINE __m256i int4_to_bf16(const uint8_t *values) {
    const __m256i numbers = _mm256_setr_epi16((short)0xc100, (short)0xc0e0, (short)0xc0c0, (short)0xc0a0, (short)0xc080, (short)0xc040,
                                              (short)0xc000, (short)0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0);
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)values));
    return _mm256_permutexvar_epi16(_mm256_or_si256(bytes, _mm256_slli_epi32(bytes, 12)), numbers);
}

/* The kept values of a strip as bf16. */
AVX512_INLINE __m256i kept(const uint8_t *values, format_t format) {
    if (format == INT8) return to_bf16(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)values)));
    if (format == INT4) return int4_to_bf16(values);
    return _mm256_loadu_si256((const __m256i *)(const void *)values);
}

/* Zeros, unknown to the compiler. An expand waits for what was in its target, even where the mask says to zero it: it must be
 * told to merge into a register that nobody works on, or the expands run one after the other, at half the speed. The
 * mask is there to have new zeros for each expand, instead of one copy kept in memory. */
AVX512_INLINE __m512i zeros(uint32_t mask) {
    __m512i found;
#ifdef EMULATED
    (void)mask, memset(&found, 0, sizeof found);
#else
    __asm__("vpxord %0, %0, %0" : "=v"(found) : "r"(mask));
#endif
    return found;
}

AVX512_INLINE __m512i expand(const uint8_t *values, uint32_t mask, format_t format) {
    return _mm512_mask_expand_epi16(zeros(mask), mask, _mm512_castsi256_si512(kept(values, format)));
}

AVX512_INLINE __m512 step(__m512 sum, __m512i row, const uint16_t *x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)row, (__m512bh)_mm512_loadu_si512(x));
}

AVX512_INLINE uint32_t word(const uint8_t *bitmask) {
    uint32_t mask;
    memcpy(&mask, bitmask, 4);
    return mask;
}

AVX512_INLINE __m512 scale_of(const job_t *job, int64_t row, int64_t group) {
    return _mm512_set1_ps(load_number(job->scale, row * job->groups + group, BF16));
}

/* `count` rows times `tokens`, both constants; at most 16 sums. */
AVX512_INLINE void tile(const job_t *job, int64_t token, int64_t row, int count, int tokens, int64_t begin, int64_t end,
                        float *z, int64_t stride, format_t format, int grouped) {
    const int64_t pitch = bytes_of(job->columns / 2, format), mask_pitch = job->columns / 8, line = 64 / bytes_of(16, format);
    const int64_t whole = end <= job->columns ? end / STRIP : job->columns / STRIP;
    const int64_t strips = grouped ? job->columns / job->groups / STRIP : 1;
    const uint16_t *x = (const uint16_t *)(const void *)job->inner + token * padded(job->columns);
    const uint8_t *values = job->values + row * pitch, *bitmask = job->bitmask + row * mask_pitch;
    __m512 sum[16], total[16]; /* of strips under one scale; of what was scaled */
    for (int i = 0; i < count * tokens; i++) sum[i] = total[i] = _mm512_setzero_ps();
    for (int64_t strip = begin / STRIP, end_of_group = (strip / strips + 1) * strips; strip < whole;) {
        for (int r = 0; r < count; r++) {
            const uint8_t *at = values + r * pitch + bytes_of(16 * strip, format);
            const uint8_t *mask = bitmask + r * mask_pitch + 4 * strip;
            if (strip % line == 0) _mm_prefetch((const char *)(at + count * pitch), _MM_HINT_T1);
            if (strip % 16 == 0) _mm_prefetch((const char *)(mask + count * mask_pitch), _MM_HINT_T1);
            const __m512i columns = expand(at, word(mask), format);
            for (int t = 0; t < tokens; t++)
                sum[r * tokens + t] = step(sum[r * tokens + t], columns, x + (strip * tokens + t) * STRIP);
        }
        strip++;
        if (!grouped || (strip < end_of_group && strip < whole)) continue;
        for (int r = 0; r < count; r++) {
            const __m512 scale = scale_of(job, row + r, end_of_group / strips - 1);
            for (int i = r * tokens; i < (r + 1) * tokens; i++)
                total[i] = _mm512_fmadd_ps(sum[i], scale, total[i]), sum[i] = _mm512_setzero_ps();
        }
        end_of_group += strips;
    }
    for (int r = 0; r < count; r++) {
        if (!grouped && whole * STRIP < end) {
            uint8_t rest[4 * STRIP / 2];
            const uint32_t mask = last_strip(job, row + r, whole * STRIP, rest);
            const __m512i columns = expand(rest, mask, format);
            for (int t = 0; t < tokens; t++)
                sum[r * tokens + t] = step(sum[r * tokens + t], columns, x + (whole * tokens + t) * STRIP);
        }
        for (int t = 0; t < tokens; t++) z[t * stride + r] += _mm512_reduce_add_ps((grouped ? total : sum)[r * tokens + t]);
    }
}

AVX512_INLINE void tiles(const job_t *job, int64_t token, int64_t row, int64_t rows, int count, int tokens, int64_t begin,
                         int64_t end, float *z, int64_t stride, format_t format, int grouped) {
    int64_t r = 0;
    z += token * stride;
    for (; r + count <= rows; r += count)
        tile(job, token, row + r, count, tokens, begin, end, z + r, stride, format, grouped);
    for (; r < rows; r++) tile(job, token, row + r, 1, tokens, begin, end, z + r, stride, format, grouped);
}

/* As many rows at once as leave all sums in registers. */
AVX512_INLINE void core_rows(const job_t *job, int64_t row, int64_t count, int64_t begin, int64_t end, float *z,
                             int64_t stride, format_t format, int grouped) {
    int64_t t = 0;
    for (; t + 8 <= job->tokens; t += 8) tiles(job, t, row, count, grouped ? 1 : 2, 8, begin, end, z, stride, format, grouped);
    for (; t + 4 <= job->tokens; t += 4) tiles(job, t, row, count, grouped ? 2 : 4, 4, begin, end, z, stride, format, grouped);
    for (; t + 2 <= job->tokens; t += 2) tiles(job, t, row, count, 4, 2, begin, end, z, stride, format, grouped);
    if (t < job->tokens) tiles(job, t, row, count, 4, 1, begin, end, z, stride, format, grouped);
}

__attribute__((target(FEATURES))) static void core(const job_t *job, int64_t row, int64_t count, int64_t begin,
                                                   int64_t end, float *z, int64_t stride) {
    const format_t format = (format_t)job->format;
    if (format == BF16)
        core_rows(job, row, count, begin, end, z, stride, BF16, 0);
    else if (format == INT8 && job->groups == 1)
        core_rows(job, row, count, begin, end, z, stride, INT8, 0);
    else if (format == INT8)
        core_rows(job, row, count, begin, end, z, stride, INT8, 1);
    else if (job->groups == 1)
        core_rows(job, row, count, begin, end, z, stride, INT4, 0);
    else
        core_rows(job, row, count, begin, end, z, stride, INT4, 1);
}

static void square(const uint8_t *matrix, int64_t size, format_t format, const float *in, int64_t in_stride, float *out,
                   int64_t out_stride, int64_t tokens) {
    AVX2_PATH.square(matrix, size, format, in, in_stride, out, out_stride, tokens);
}

static void arrange(const job_t *job, int64_t token, const float *natural, int64_t column, int64_t count) {
    const int64_t tile = tile_of(job->tokens, token), start = tile_start(job->tokens, token);
    uint16_t *x = (uint16_t *)(void *)job->inner + start * padded(job->columns) + (token - start) * STRIP;
    for (int64_t i = 0; i < count; i++)
        x[(column + i) / STRIP * tile * STRIP + (column + i) % STRIP] = float_to_bfloat(natural[i]);
}

const path_t AVX512_PATH = {core, square, arrange};
#endif
