/* AVX-512 with VBMI2, BF16 and VNNI. Mask bits are the operand of an expand or a compress, one instruction for 32 or 64 columns.
 *
 * - bf16 cores: 16 values expand to 32 columns, which dpbf16 multiplies with as many of Bx in bf16.
 * - int8 cores: the same as 16-bit integers, times Bx in 16-bit fixed point: a power of two for each token. Sums are exact.
 * - int4 cores: Bx is compressed to the 32 columns of 64 that a row keeps, and multiplied byte by byte: Bx has 8 bits here, with a
 *   scale for each 64 columns of a token. To bring the values to 16 bits would take twice as long as to read them. */
#include "linear.h"
#if ARMOR_X86
#include "avx512.h"

#define BLOCKS_AT_ONCE (GROUPED_COLUMNS / BLOCK)
#define RUN 4 /* strips whose int8 are a line of the cache, and blocks whose int4 are */

/* Bx of integer cores: as floats (tokens, wide(columns)); behind them in integers, in tiles as `arrange` lays them; then their scales,
 * one for each BLOCK of a token (int4) or for each token (int8). */
INLINE int64_t wide(const job_t *job) { return (job->columns + BLOCK - 1) / BLOCK * BLOCK; }
INLINE uint8_t *integers(const job_t *job) { return (uint8_t *)(job->inner + job->tokens * wide(job)); }
INLINE float *scales(const job_t *job) { return (float *)(void *)(integers(job) + 2 * job->tokens * wide(job)); }

/* The kept values of a strip, 16 bits each. */
AVX512_INLINE __m256i kept(const uint8_t *values, format_t format) {
    if (format == INT8) return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)values));
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

/* Sums of int8 are integers in the same lanes until they are `told`. */
AVX512_INLINE __m512 step(__m512 sum, __m512i row, const uint16_t *x, format_t format) {
    const __m512i columns = _mm512_loadu_si512(x);
    if (format == INT8) return _mm512_castsi512_ps(_mm512_dpwssd_epi32(_mm512_castps_si512(sum), row, columns));
    return _mm512_dpbf16_ps(sum, (__m512bh)row, (__m512bh)columns);
}

AVX512_INLINE __m512 told(__m512 sum, format_t format) {
    return format == INT8 ? _mm512_cvtepi32_ps(_mm512_castps_si512(sum)) : sum;
}

AVX512_INLINE uint32_t word(const uint8_t *bitmask) {
    uint32_t mask;
    memcpy(&mask, bitmask, 4);
    return mask;
}

AVX512_INLINE __m512 scale_of(const job_t *job, int64_t row, int64_t group) {
    return _mm512_set1_ps(load_number(job->scale, row * job->groups + group, BF16));
}

/* `strips` strips of `count` rows times `tokens`, from these addresses on. */
AVX512_INLINE void strips_of(__m512 *sum, const uint8_t *values, const uint8_t *bitmask, const uint16_t *x, int64_t pitch,
                             int64_t mask_pitch, int64_t strips, int count, int tokens, format_t format) {
    for (int64_t strip = 0; strip < strips; strip++)
        for (int r = 0; r < count; r++) {
            const __m512i columns = expand(values + r * pitch + bytes_of(16 * strip, format),
                                           word(bitmask + r * mask_pitch + 4 * strip), format);
            for (int t = 0; t < tokens; t++)
                sum[r * tokens + t] = step(sum[r * tokens + t], columns, x + (strip * tokens + t) * STRIP, format);
        }
}

/* Ask for the same columns of the rows that come next: the hardware follows a row, but a page or a chunk ends with it. */
AVX512_INLINE void fetch_ahead(const uint8_t *rows, int64_t pitch, int64_t bytes, int count) {
    for (int r = 0; r < count; r++)
        for (int64_t byte = 0; byte < bytes; byte += 64)
            _mm_prefetch((const char *)(rows + (count + r) * pitch + byte), _MM_HINT_T1);
}

/* `count` rows times `tokens`, both constants; at most 16 sums. Runs of RUN strips have neither a branch nor a group's end. */
AVX512_INLINE void tile(const job_t *job, int64_t token, int64_t row, int count, int tokens, int64_t begin, int64_t end,
                        float *z, int64_t stride, int grouped, format_t format) {
    const int64_t pitch = bytes_of(job->columns / 2, format), mask_pitch = job->columns / 8;
    const int64_t whole = end <= job->columns ? end / STRIP : job->columns / STRIP;
    const int64_t strips = grouped ? job->columns / job->groups / STRIP : whole + 1;
    const uint16_t *x = format == INT8 ? (const uint16_t *)(const void *)integers(job) + token * wide(job)
                                       : (const uint16_t *)(const void *)job->inner + token * padded(job->columns);
    const uint8_t *values = job->values + row * pitch, *bitmask = job->bitmask + row * mask_pitch;
    __m512 sum[16], total[16]; /* of strips under one scale; of what was scaled */
    for (int i = 0; i < count * tokens; i++) sum[i] = total[i] = _mm512_setzero_ps();
    for (int64_t strip = begin / STRIP, end_of_group = (strip / strips + 1) * strips; strip < whole;) {
        const uint8_t *at = values + bytes_of(16 * strip, format), *mask = bitmask + 4 * strip;
        const uint16_t *columns = x + strip * tokens * STRIP;
        int64_t most = end_of_group < whole ? end_of_group : whole;
        if (most > strip / RUN * RUN + RUN) most = strip / RUN * RUN + RUN;
        if (strip % RUN == 0) fetch_ahead(at, pitch, bytes_of(16 * RUN, format), count);
        if (strip % 16 == 0) fetch_ahead(mask, mask_pitch, 64, count);
        if (most - strip == RUN)
            strips_of(sum, at, mask, columns, pitch, mask_pitch, RUN, count, tokens, format);
        else
            strips_of(sum, at, mask, columns, pitch, mask_pitch, most - strip, count, tokens, format);
        strip = most;
        if (!grouped || (strip < end_of_group && strip < whole)) continue;
        for (int r = 0; r < count; r++) {
            const __m512 scale = scale_of(job, row + r, end_of_group / strips - 1);
            for (int i = r * tokens; i < (r + 1) * tokens; i++)
                total[i] = _mm512_fmadd_ps(told(sum[i], format), scale, total[i]), sum[i] = _mm512_setzero_ps();
        }
        end_of_group += strips;
    }
    for (int r = 0; r < count; r++) {
        if (!grouped && whole * STRIP < end) {
            uint8_t rest[4 * STRIP / 2];
            const uint32_t mask = last_strip(job, row + r, whole * STRIP, rest);
            const __m512i columns = expand(rest, mask, format);
            for (int t = 0; t < tokens; t++)
                sum[r * tokens + t] = step(sum[r * tokens + t], columns, x + (whole * tokens + t) * STRIP, format);
        }
        for (int t = 0; t < tokens; t++) {
            const int i = r * tokens + t;
            const float found = _mm512_reduce_add_ps(grouped ? total[i] : told(sum[i], format));
            z[t * stride + r] += format == INT8 ? found * scales(job)[token + t] : found;
        }
    }
}

/* The scale of Bx, times that of the row's group where it has several, for each block of columns [begin, end). */
AVX512_INLINE void block_scales(const job_t *job, int64_t row, int64_t token, int64_t begin, int64_t end, int grouped, float *out) {
    const float *x = scales(job) + token * (wide(job) / BLOCK) + begin / BLOCK;
    const int64_t count = (end - begin + BLOCK - 1) / BLOCK;
    if (!grouped) {
        memcpy(out, x, (size_t)count * sizeof(float));
        return;
    }
    const int64_t blocks = job->columns / job->groups / BLOCK, first = begin / BLOCK, start = row * job->groups;
    if (blocks == 1) {
        load_numbers(job->scale, start + first, count, BF16, out);
        for (int64_t k = 0; k < count; k++) out[k] *= x[k];
        return;
    }
    for (int64_t k = 0; k < count; k++) out[k] = x[k] * load_number(job->scale, start + (first + k) / blocks, BF16);
}

AVX512_INLINE float total(__m256 lanes) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

/* As `strips_of`, of int4; `scale` of the first block, a row of them for each token, and for each row where they are `grouped`. */
AVX512_INLINE void blocks_of(__m256 *sum, const uint8_t *values, const uint8_t *bitmask, const uint8_t *x, const float *scale,
                             int64_t pitch, int64_t mask_pitch, int64_t blocks, int count, int tokens, int grouped) {
    for (int64_t block = 0; block < blocks; block++)
        for (int r = 0; r < count; r++) {
            uint64_t bits;
            memcpy(&bits, bitmask + r * mask_pitch + 8 * block, 8);
            const __m256i numbers = nibbles(values + r * pitch + 16 * block), sizes = _mm256_abs_epi8(numbers);
            for (int t = 0; t < tokens; t++) {
                const __m512i columns = _mm512_loadu_si512(x + (block * tokens + t) * BLOCK);
                const __m256i met = _mm512_castsi512_si256(_mm512_maskz_compress_epi8(bits, columns));
                const __m256i found = _mm256_dpbusd_epi32(_mm256_setzero_si256(), sizes, _mm256_sign_epi8(met, numbers));
                const __m256 by = _mm256_set1_ps(scale[(grouped ? r * tokens + t : t) * BLOCKS_AT_ONCE + block]);
                sum[r * tokens + t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(found), by, sum[r * tokens + t]);
            }
        }
}

/* As `tile`, of int4. */
#define tile_of_BF16(...) tile(__VA_ARGS__, BF16)
#define tile_of_INT8(...) tile(__VA_ARGS__, INT8)
AVX512_INLINE void tile_of_INT4(const job_t *job, int64_t token, int64_t row, int count, int tokens, int64_t begin, int64_t end,
                             float *z, int64_t stride, int grouped) {
    const int64_t pitch = job->columns / 4, mask_pitch = job->columns / 8, most = end < job->columns ? end : job->columns;
    const uint8_t *x = integers(job) + token * wide(job);
    float scale[16][BLOCKS_AT_ONCE];
    __m256 sum[16];
    for (int r = 0; r < count; r++)
        for (int t = 0; t < tokens; t++) {
            sum[r * tokens + t] = _mm256_setzero_ps();
            if (grouped || r == 0) block_scales(job, row + r, token + t, begin, most, grouped, scale[r * tokens + t]);
        }
    const uint8_t *values = job->values + row * pitch, *bitmask = job->bitmask + row * mask_pitch;
    const int64_t whole = most / BLOCK;
    for (int64_t block = begin / BLOCK, next; block < whole; block = next) {
        const uint8_t *at = values + block * (BLOCK / 4), *mask = bitmask + block * (BLOCK / 8);
        next = block / RUN * RUN + RUN < whole ? block / RUN * RUN + RUN : whole;
        if (block % RUN == 0) fetch_ahead(at, pitch, 64, count);
        if (block % 8 == 0) fetch_ahead(mask, mask_pitch, 64, count);
        if (next - block == RUN)
            blocks_of(sum, at, mask, x + block * tokens * BLOCK, &scale[0][block - begin / BLOCK], pitch, mask_pitch, RUN, count, tokens, grouped);
        else
            blocks_of(sum, at, mask, x + block * tokens * BLOCK, &scale[0][block - begin / BLOCK], pitch, mask_pitch, next - block, count, tokens, grouped);
    }
    for (int r = 0; r < count && whole * BLOCK < most; r++) {
        uint8_t rest[BLOCK / 4] = {0}, bits[BLOCK / 8] = {0};
        const int64_t left = most - whole * BLOCK;
        memcpy(rest, values + r * pitch + whole * (BLOCK / 4), (size_t)left / 4);
        memcpy(bits, bitmask + r * mask_pitch + whole * (BLOCK / 8), (size_t)left / 8);
        blocks_of(sum + r * tokens, rest, bits, x + whole * tokens * BLOCK,
                  &scale[grouped ? r * tokens : 0][whole - begin / BLOCK], 0, 0, 1, 1, tokens, grouped);
    }
    for (int r = 0; r < count; r++)
        for (int t = 0; t < tokens; t++) z[t * stride + r] += total(sum[r * tokens + t]);
}

/* Rows [row, row + rows) times `tokens`, `count` rows at a time, then one by one: as many at once as leave all sums in registers.
 * A function each, so that the compiler, too, has registers for all of it. */
#define TILES(name, format, grouped, tokens, count)                                                                               \
    __attribute__((noinline, target(FEATURES))) static void name(const job_t *job, int64_t token, int64_t row, int64_t rows,       \
                                                                 int64_t begin, int64_t end, float *z, int64_t stride) {           \
        int64_t r = 0;                                                                                                             \
        for (; r + count <= rows; r += count)                                                                                      \
            tile_of_##format(job, token, row + r, count, tokens, begin, end, z + r, stride, grouped);                              \
        for (; r < rows; r++) tile_of_##format(job, token, row + r, 1, tokens, begin, end, z + r, stride, grouped);                \
    }
#define ALL_TILES(name, format, grouped, two, four, eight)                                                                        \
    TILES(name##_1, format, grouped, 1, 4)                                                                                         \
    TILES(name##_2, format, grouped, 2, two)                                                                                       \
    TILES(name##_4, format, grouped, 4, four)                                                                                      \
    TILES(name##_8, format, grouped, 8, eight)                                                                                     \
    static void name(const job_t *job, int64_t row, int64_t count, int64_t begin, int64_t end, float *z, int64_t stride) {         \
        int64_t t = 0;                                                                                                             \
        for (; t + 8 <= job->tokens; t += 8) name##_8(job, t, row, count, begin, end, z + t * stride, stride);                     \
        for (; t + 4 <= job->tokens; t += 4) name##_4(job, t, row, count, begin, end, z + t * stride, stride);                     \
        for (; t + 2 <= job->tokens; t += 2) name##_2(job, t, row, count, begin, end, z + t * stride, stride);                     \
        if (t < job->tokens) name##_1(job, t, row, count, begin, end, z + t * stride, stride);                                     \
    }
ALL_TILES(bf16_core, BF16, 0, 4, 4, 2)
ALL_TILES(int8_core, INT8, 0, 4, 4, 2)
ALL_TILES(grouped_int8_core, INT8, 1, 4, 2, 1)
ALL_TILES(int4_core, INT4, 0, 4, 4, 2)
ALL_TILES(grouped_int4_core, INT4, 1, 4, 4, 2)

static void core(const job_t *job, int64_t row, int64_t count, int64_t begin, int64_t end, float *z, int64_t stride) {
    const int grouped = job->groups > 1;
    (job->format == BF16   ? bf16_core
     : job->format == INT8 ? (grouped ? grouped_int8_core : int8_core)
                           : (grouped ? grouped_int4_core : int4_core))(job, row, count, begin, end, z, stride);
}

static void square(const uint8_t *matrix, int64_t size, format_t format, const float *in, int64_t in_stride, float *out,
                   int64_t out_stride, int64_t tokens) {
    AVX2_PATH.square(matrix, size, format, in, in_stride, out, out_stride, tokens);
}

/* Where column 0 of a token is, among what is laid out in tiles with `size` columns of each token side by side. */
INLINE int64_t place(const job_t *job, int64_t token, int64_t columns, int64_t size) {
    const int64_t start = tile_start(job->tokens, token);
    return start * columns + (token - start) * size;
}

static void arrange(const job_t *job, int64_t token, const float *natural, int64_t column, int64_t count) {
    if (job->format != BF16) {
        memcpy(job->inner + token * wide(job) + column, natural, (size_t)count * sizeof(float));
        return;
    }
    const int64_t tile = tile_of(job->tokens, token);
    uint16_t *x = (uint16_t *)(void *)job->inner + place(job, token, padded(job->columns), STRIP);
    for (int64_t i = 0; i < count; i++)
        x[(column + i) / STRIP * tile * STRIP + (column + i) % STRIP] = float_to_bfloat(natural[i]);
}

/* Columns [column, column + 16) of a token's Bx, zeros behind the last one. */
AVX512_INLINE __m512 sixteen(const job_t *job, int64_t token, int64_t column) {
    const int64_t left = job->columns - column;
    const __mmask16 there = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
    return _mm512_maskz_loadu_ps(there, job->inner + token * wide(job) + column);
}

/* The largest magnitude of `count` columns, NaN where one of them is not finite. */
AVX512_INLINE float largest(const job_t *job, int64_t token, int64_t column, int64_t count) {
    __m512 most = _mm512_setzero_ps(), wrong = _mm512_setzero_ps();
    for (int64_t c = column; c < column + count; c += 16) {
        const __m512 x = sixteen(job, token, c);
        most = _mm512_max_ps(most, _mm512_abs_ps(x));
        wrong = _mm512_fmadd_ps(x, _mm512_setzero_ps(), wrong); /* NaN or infinity times 0 is NaN */
    }
    return _mm512_reduce_max_ps(most) + _mm512_reduce_add_ps(wrong);
}

__attribute__((target(FEATURES))) static void as_words(const job_t *job, int64_t token) {
    const int64_t tile = tile_of(job->tokens, token);
    uint16_t *x = (uint16_t *)(void *)integers(job) + place(job, token, wide(job), STRIP);
    const float most = largest(job, token, 0, wide(job)), unit = unit_of(most);
    scales(job)[token] = most < 3e38f ? unit : most * 0.0f / 0.0f;
    const __m512 by = _mm512_set1_ps(1.0f / unit);
    const __m512i limit = _mm512_set1_epi32(32767), lowest = _mm512_set1_epi32(-32767); /* a sum of GROUPED_COLUMNS fits 32 bits */
    for (int64_t c = 0; c < wide(job); c += 16) {
        const __m512i numbers = _mm512_cvtps_epi32(_mm512_mul_ps(sixteen(job, token, c), by));
        _mm256_storeu_si256((__m256i *)(void *)(x + c / STRIP * tile * STRIP + c % STRIP),
                            _mm512_cvtepi32_epi16(_mm512_max_epi32(_mm512_min_epi32(numbers, limit), lowest)));
    }
}

__attribute__((target(FEATURES))) static void as_bytes(const job_t *job, int64_t token) {
    const int64_t tile = tile_of(job->tokens, token), blocks = wide(job) / BLOCK;
    uint8_t *x = integers(job) + place(job, token, wide(job), BLOCK);
    for (int64_t block = 0; block < blocks; block++) {
        const float most = largest(job, token, block * BLOCK, BLOCK);
        scales(job)[token * blocks + block] = most / 127.0f;
        const __m512 by = _mm512_set1_ps(most > 1e-30f ? 127.0f / most : 0.0f);
        for (int64_t c = 0; c < BLOCK; c += 16) {
            const __m512i numbers = _mm512_cvtps_epi32(_mm512_mul_ps(sixteen(job, token, block * BLOCK + c), by));
            _mm_storeu_si128((__m128i *)(void *)(x + block * tile * BLOCK + c), _mm512_cvtsepi32_epi8(numbers));
        }
    }
}

static void prepare(const job_t *job) {
    for (int64_t t = 0; t < job->tokens && job->format != BF16; t++) (job->format == INT8 ? as_words : as_bytes)(job, t);
}

const path_t AVX512_PATH = {core, square, arrange, prepare};
#endif
