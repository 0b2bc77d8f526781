/* The few AVX-512 instructions of armor_recipes/runtime/native/avx512.c in plain C, so that its logic is tested on any machine. */
#ifndef EMULATED_IMMINTRIN_H
#define EMULATED_IMMINTRIN_H
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t __m128i __attribute__((vector_size(16)));
typedef uint16_t __m256i __attribute__((vector_size(32)));
typedef uint16_t __m256bh __attribute__((vector_size(32)));
typedef uint16_t __m512i __attribute__((vector_size(64)));
typedef uint16_t __m512bh __attribute__((vector_size(64)));
typedef float __m512 __attribute__((vector_size(64)));
typedef int32_t emulated_lanes __attribute__((vector_size(64)));
typedef uint32_t emulated_unsigned_lanes __attribute__((vector_size(64)));
typedef int32_t emulated_half __attribute__((vector_size(32)));
typedef int8_t emulated_bytes __attribute__((vector_size(32)));
typedef uint8_t emulated_unsigned __attribute__((vector_size(32)));
typedef int16_t emulated_words __attribute__((vector_size(64)));
typedef float __m256 __attribute__((vector_size(32)));
typedef float __m128 __attribute__((vector_size(16)));
typedef uint16_t __mmask16;
typedef uint32_t __mmask32;

#define _MM_HINT_T1 2
#define _mm_prefetch(address, hint) ((void)(address))
#define EMULATED static inline __attribute__((target("avx2")))

EMULATED __m256i _mm256_loadu_si256(const __m256i *from) {
    __m256i value;
    memcpy(&value, from, sizeof value);
    return value;
}

EMULATED __m512i _mm512_loadu_si512(const void *from) {
    __m512i value;
    memcpy(&value, from, sizeof value);
    return value;
}

EMULATED __m512i _mm512_castsi256_si512(__m256i low) {
    __m512i value;
    memset(&value, 0xff, sizeof value); /* undefined in the real one: nothing may depend on it */
    memcpy(&value, &low, sizeof low);
    return value;
}

EMULATED __m512i _mm512_mask_expand_epi16(__m512i value, uint32_t mask, __m512i packed) {
    for (int lane = 0, next = 0; lane < 32; lane++)
        if (mask >> lane & 1u) value[lane] = packed[next++];
    return value;
}

EMULATED float emulated_widen(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

EMULATED __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh x, __m512bh y) {
    for (int lane = 0; lane < 32; lane++) sum[lane / 2] += emulated_widen(x[lane]) * emulated_widen(y[lane]);
    return sum;
}

EMULATED __m128i _mm_loadu_si128(const __m128i *from) {
    __m128i value;
    memcpy(&value, from, sizeof value);
    return value;
}

EMULATED __m512 _mm512_cvtepi32_ps(__m512i integers) {
    const emulated_lanes lanes = (emulated_lanes)integers;
    __m512 value;
    for (int lane = 0; lane < 16; lane++) value[lane] = (float)lanes[lane];
    return value;
}

EMULATED __m256i _mm256_or_si256(__m256i x, __m256i y) { return x | y; }

EMULATED __m512 _mm512_set1_ps(float number) {
    __m512 value;
    for (int lane = 0; lane < 16; lane++) value[lane] = number;
    return value;
}

EMULATED __m512 _mm512_fmadd_ps(__m512 x, __m512 y, __m512 z) { return x * y + z; }

EMULATED __m512 _mm512_setzero_ps(void) { return (__m512){0}; }

EMULATED float _mm512_reduce_add_ps(__m512 lanes) {
    float sum = 0.0f;
    for (int lane = 0; lane < 16; lane++) sum += lanes[lane];
    return sum;
}

/* Of int8 cores: 16-bit integers. */
EMULATED __m256i _mm256_cvtepi8_epi16(__m128i bytes) {
    __m256i value;
    for (int lane = 0; lane < 16; lane++) value[lane] = (uint16_t)(int16_t)(int8_t)(bytes[lane / 2] >> 8 * (lane % 2));
    return value;
}

EMULATED __m512i _mm512_castps_si512(__m512 value) { return (__m512i)value; }
EMULATED __m512 _mm512_castsi512_ps(__m512i value) { return (__m512)value; }

EMULATED __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i x, __m512i y) {
    emulated_lanes lanes = (emulated_lanes)sum;
    const emulated_words left = (emulated_words)x, right = (emulated_words)y;
    for (int lane = 0; lane < 32; lane++) lanes[lane / 2] += left[lane] * right[lane];
    return (__m512i)lanes;
}

/* Of int4 cores: bytes. */
EMULATED __m256i _mm256_setzero_si256(void) { return (__m256i){0}; }
EMULATED __m256i _mm256_set1_epi8(int8_t number) { return (__m256i)((emulated_bytes){0} + number); }
EMULATED __m256i _mm256_and_si256(__m256i x, __m256i y) { return x & y; }
EMULATED __m256i _mm256_slli_epi16(__m256i words, int count) { return words << count; }
EMULATED __m256i _mm256_sub_epi8(__m256i x, __m256i y) { return (__m256i)((emulated_bytes)x - (emulated_bytes)y); }

EMULATED __m256i _mm512_castsi512_si256(__m512i value) {
    __m256i low;
    memcpy(&low, &value, sizeof low);
    return low;
}

EMULATED __m256i _mm256_cvtepu8_epi16(__m128i bytes) {
    __m256i value;
    for (int lane = 0; lane < 16; lane++) value[lane] = bytes[lane / 2] >> 8 * (lane % 2) & 0xff;
    return value;
}

EMULATED __m256i _mm256_abs_epi8(__m256i numbers) {
    emulated_bytes value = (emulated_bytes)numbers;
    for (int lane = 0; lane < 32; lane++) value[lane] = (int8_t)(value[lane] < 0 ? -value[lane] : value[lane]);
    return (__m256i)value;
}

EMULATED __m256i _mm256_sign_epi8(__m256i numbers, __m256i by) {
    emulated_bytes value = (emulated_bytes)numbers;
    const emulated_bytes sign = (emulated_bytes)by;
    for (int lane = 0; lane < 32; lane++) value[lane] = (int8_t)(sign[lane] < 0 ? -value[lane] : sign[lane] ? value[lane] : 0);
    return (__m256i)value;
}

EMULATED __m512i _mm512_maskz_compress_epi8(uint64_t mask, __m512i numbers) {
    uint8_t from[64], to[64] = {0};
    memcpy(from, &numbers, sizeof from);
    for (int lane = 0, next = 0; lane < 64; lane++)
        if (mask >> lane & 1u) to[next++] = from[lane];
    memcpy(&numbers, to, sizeof to);
    return numbers;
}

EMULATED __m256i _mm256_dpbusd_epi32(__m256i sum, __m256i x, __m256i y) {
    emulated_half lanes = (emulated_half)sum;
    const emulated_unsigned left = (emulated_unsigned)x;
    const emulated_bytes right = (emulated_bytes)y;
    for (int lane = 0; lane < 32; lane++) lanes[lane / 4] += left[lane] * right[lane];
    return (__m256i)lanes;
}

EMULATED __m256 _mm256_setzero_ps(void) { return (__m256){0}; }
EMULATED __m256 _mm256_set1_ps(float number) { return (__m256){0} + number; }
EMULATED __m256 _mm256_fmadd_ps(__m256 x, __m256 y, __m256 z) { return x * y + z; }

EMULATED __m256 _mm256_cvtepi32_ps(__m256i integers) {
    const emulated_half lanes = (emulated_half)integers;
    __m256 value;
    for (int lane = 0; lane < 8; lane++) value[lane] = (float)lanes[lane];
    return value;
}

EMULATED __m128 _mm256_castps256_ps128(__m256 value) { return (__m128){value[0], value[1], value[2], value[3]}; }
EMULATED __m128 _mm256_extractf128_ps(__m256 value, int half) {
    return half ? (__m128){value[4], value[5], value[6], value[7]} : _mm256_castps256_ps128(value);
}
EMULATED __m128 _mm_add_ps(__m128 x, __m128 y) { return x + y; }
EMULATED __m128 _mm_movehl_ps(__m128 x, __m128 y) { return (__m128){y[2], y[3], x[2], x[3]}; }
EMULATED __m128 _mm_movehdup_ps(__m128 x) { return (__m128){x[1], x[1], x[3], x[3]}; }
EMULATED __m128 _mm_add_ss(__m128 x, __m128 y) { return (__m128){x[0] + y[0], x[1], x[2], x[3]}; }
EMULATED float _mm_cvtss_f32(__m128 x) { return x[0]; }

/* Bx in integers. */
EMULATED __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void *from) {
    __m512 value = {0};
    for (int lane = 0; lane < 16; lane++)
        if (mask >> lane & 1u) memcpy((char *)&value + 4 * lane, (const char *)from + 4 * lane, 4);
    return value;
}

EMULATED __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void *from) {
    __m512i value = {0};
    for (int lane = 0; lane < 32; lane++)
        if (mask >> lane & 1u) memcpy((char *)&value + 2 * lane, (const char *)from + 2 * lane, 2);
    return value;
}

EMULATED __m512 _mm512_abs_ps(__m512 x) {
    for (int lane = 0; lane < 16; lane++) x[lane] = fabsf(x[lane]);
    return x;
}

EMULATED __m512 _mm512_max_ps(__m512 x, __m512 y) {
    for (int lane = 0; lane < 16; lane++) x[lane] = x[lane] > y[lane] ? x[lane] : y[lane];
    return x;
}

EMULATED float _mm512_reduce_max_ps(__m512 x) {
    float most = x[0];
    for (int lane = 1; lane < 16; lane++) most = x[lane] > most ? x[lane] : most;
    return most;
}

EMULATED __m512 _mm512_mul_ps(__m512 x, __m512 y) { return x * y; }
EMULATED __m512i _mm512_set1_epi32(int32_t number) { return (__m512i)((emulated_lanes){0} + number); }

EMULATED __m512i _mm512_cvtps_epi32(__m512 x) {
    emulated_lanes value;
    for (int lane = 0; lane < 16; lane++) value[lane] = (int32_t)rintf(x[lane]);
    return (__m512i)value;
}

EMULATED __m512i _mm512_min_epi32(__m512i x, __m512i y) {
    emulated_lanes value = (emulated_lanes)x;
    const emulated_lanes other = (emulated_lanes)y;
    for (int lane = 0; lane < 16; lane++) value[lane] = other[lane] < value[lane] ? other[lane] : value[lane];
    return (__m512i)value;
}

EMULATED __m512i _mm512_max_epi32(__m512i x, __m512i y) {
    emulated_lanes value = (emulated_lanes)x;
    const emulated_lanes other = (emulated_lanes)y;
    for (int lane = 0; lane < 16; lane++) value[lane] = other[lane] > value[lane] ? other[lane] : value[lane];
    return (__m512i)value;
}

EMULATED __m256i _mm512_cvtepi32_epi16(__m512i integers) {
    const emulated_lanes lanes = (emulated_lanes)integers;
    __m256i value;
    for (int lane = 0; lane < 16; lane++) value[lane] = (uint16_t)lanes[lane];
    return value;
}

EMULATED __m128i _mm512_cvtsepi32_epi8(__m512i integers) {
    const emulated_lanes lanes = (emulated_lanes)integers;
    int8_t bytes[16];
    for (int lane = 0; lane < 16; lane++) bytes[lane] = (int8_t)(lanes[lane] > 127 ? 127 : lanes[lane] < -128 ? -128 : lanes[lane]);
    __m128i value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

/* Of dense layers. */
EMULATED __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void *from) {
    return _mm512_castsi512_si256(_mm512_maskz_loadu_epi16(mask, from));
}

EMULATED __m256i _mm256_maskz_loadu_epi8(__mmask32 mask, const void *from) {
    __m256i value = {0};
    for (int lane = 0; lane < 32; lane++)
        if (mask >> lane & 1u) memcpy((char *)&value + lane, (const char *)from + lane, 1);
    return value;
}

EMULATED __m256i _mm256_xor_si256(__m256i x, __m256i y) { return x ^ y; }
EMULATED __m512i _mm512_and_si512(__m512i x, __m512i y) { return x & y; }
EMULATED __m512i _mm512_setzero_si512(void) { return (__m512i){0}; }
EMULATED __m512i _mm512_slli_epi32(__m512i x, int count) { return (__m512i)((emulated_unsigned_lanes)x << count); }

EMULATED __m512i _mm512_cvtepi8_epi16(__m256i bytes) {
    const emulated_bytes lanes = (emulated_bytes)bytes;
    __m512i value;
    for (int lane = 0; lane < 32; lane++) value[lane] = (uint16_t)lanes[lane];
    return value;
}

EMULATED __m512i _mm512_cvtepu16_epi32(__m256i words) {
    emulated_lanes value;
    for (int lane = 0; lane < 16; lane++) value[lane] = words[lane];
    return (__m512i)value;
}

EMULATED int32_t _mm512_reduce_max_epi32(__m512i integers) {
    const emulated_lanes lanes = (emulated_lanes)integers;
    int32_t most = lanes[0];
    for (int lane = 1; lane < 16; lane++) most = lanes[lane] > most ? lanes[lane] : most;
    return most;
}

EMULATED void _mm256_storeu_si256(__m256i *to, __m256i value) { memcpy(to, &value, sizeof value); }
EMULATED void _mm_storeu_si128(__m128i *to, __m128i value) { memcpy(to, &value, sizeof value); }

/* Of many tokens. */
EMULATED void _mm512_storeu_ps(void *to, __m512 value) { memcpy(to, &value, sizeof value); }
EMULATED void _mm512_storeu_si512(void *to, __m512i value) { memcpy(to, &value, sizeof value); }
EMULATED __m512 _mm512_add_ps(__m512 x, __m512 y) { return x + y; }
EMULATED __m512 _mm512_loadu_ps(const void *from) { return _mm512_maskz_loadu_ps(0xffff, from); }
EMULATED __m512 _mm512_sub_ps(__m512 x, __m512 y) { return x - y; }
EMULATED __m512 _mm512_mask_add_ps(__m512 other, __mmask16 mask, __m512 x, __m512 y) {
    for (int lane = 0; lane < 16; lane++) other[lane] = mask >> lane & 1u ? x[lane] + y[lane] : other[lane];
    return other;
}
EMULATED void _mm512_mask_storeu_ps(void *to, __mmask16 mask, __m512 value) {
    for (int lane = 0; lane < 16; lane++)
        if (mask >> lane & 1u) memcpy((char *)to + 4 * lane, (const char *)&value + 4 * lane, 4);
}
EMULATED __m512i _mm512_add_epi32(__m512i x, __m512i y) { return (__m512i)((emulated_lanes)x + (emulated_lanes)y); }
EMULATED __m512i _mm512_or_si512(__m512i x, __m512i y) { return x | y; }
EMULATED __m512i _mm512_andnot_si512(__m512i x, __m512i y) { return ~x & y; }
EMULATED __m512i _mm512_srli_epi32(__m512i x, int count) { return (__m512i)((emulated_unsigned_lanes)x >> count); }

EMULATED __m256bh _mm512_cvtneps_pbh(__m512 x) {
    __m256bh value;
    for (int lane = 0; lane < 16; lane++) {
        uint32_t bits;
        const float number = x[lane];
        memcpy(&bits, &number, 4);
        value[lane] = (uint16_t)(number != number ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
    return value;
}

EMULATED __m512i _mm512_permutexvar_epi32(__m512i place, __m512i numbers) {
    const emulated_lanes from = (emulated_lanes)numbers, at = (emulated_lanes)place;
    emulated_lanes value;
    for (int lane = 0; lane < 16; lane++) value[lane] = from[at[lane] & 15];
    return (__m512i)value;
}

EMULATED __m128i _mm_loadl_epi64(const __m128i *from) {
    __m128i value = {0};
    memcpy(&value, from, 8);
    return value;
}

EMULATED __m128i _mm_set1_epi8(int8_t number) { return (__m128i){0} + (uint16_t)((uint8_t)number * 0x101); }
EMULATED __m128i _mm_and_si128(__m128i x, __m128i y) { return x & y; }
EMULATED __m128i _mm_srli_epi16(__m128i words, int count) { return words >> count; }

EMULATED __m128i _mm_unpacklo_epi8(__m128i x, __m128i y) {
    uint8_t first[16], second[16], both[16];
    memcpy(first, &x, 16), memcpy(second, &y, 16);
    for (int lane = 0; lane < 8; lane++) both[2 * lane] = first[lane], both[2 * lane + 1] = second[lane];
    memcpy(&x, both, 16);
    return x;
}

EMULATED __m128i _mm_shuffle_epi8(__m128i table, __m128i place) {
    uint8_t from[16], at[16], value[16];
    memcpy(from, &table, 16), memcpy(at, &place, 16);
    for (int lane = 0; lane < 16; lane++) value[lane] = at[lane] & 0x80 ? 0 : from[at[lane] & 15];
    memcpy(&table, value, 16);
    return table;
}

EMULATED __m256i _mm256_add_epi16(__m256i x, __m256i y) { return x + y; }
#endif
