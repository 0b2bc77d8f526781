/* The few AVX-512 instructions of armor_recipes/runtime/native/avx512.c in plain C, so that its logic is tested on any machine. */
#ifndef EMULATED_IMMINTRIN_H
#define EMULATED_IMMINTRIN_H
#include <stdint.h>
#include <string.h>

typedef uint16_t __m128i __attribute__((vector_size(16)));
typedef uint16_t __m256i __attribute__((vector_size(32)));
typedef uint16_t __m256bh __attribute__((vector_size(32)));
typedef uint16_t __m512i __attribute__((vector_size(64)));
typedef uint16_t __m512bh __attribute__((vector_size(64)));
typedef float __m512 __attribute__((vector_size(64)));
typedef int32_t emulated_lanes __attribute__((vector_size(64)));
typedef int32_t emulated_half __attribute__((vector_size(32)));
typedef int16_t emulated_words __attribute__((vector_size(32)));

#define _MM_HINT_T1 2
#define _mm_prefetch(address, hint) ((void)(address))
#define EMULATED static inline __attribute__((always_inline, target("avx2")))

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

EMULATED __m512i _mm512_cvtepi8_epi32(__m128i bytes) {
    emulated_lanes value;
    for (int lane = 0; lane < 16; lane++) value[lane] = (int8_t)(bytes[lane / 2] >> 8 * (lane % 2));
    return (__m512i)value;
}

EMULATED __m512 _mm512_cvtepi32_ps(__m512i integers) {
    const emulated_lanes lanes = (emulated_lanes)integers;
    __m512 value;
    for (int lane = 0; lane < 16; lane++) value[lane] = (float)lanes[lane];
    return value;
}

/* Rounds towards zero: right for numbers that bf16 holds exactly, which is all it is used for. */
EMULATED __m256bh _mm512_cvtneps_pbh(__m512 numbers) {
    const emulated_lanes lanes = (emulated_lanes)numbers;
    __m256bh value;
    for (int lane = 0; lane < 16; lane++) value[lane] = (uint16_t)((uint32_t)lanes[lane] >> 16);
    return value;
}

EMULATED __m128i _mm_loadl_epi64(const __m128i *from) {
    __m128i value = {0};
    memcpy(&value, from, 8);
    return value;
}

EMULATED __m256i _mm256_cvtepu8_epi32(__m128i bytes) {
    emulated_half value;
    for (int lane = 0; lane < 8; lane++) value[lane] = bytes[lane / 2] >> 8 * (lane % 2) & 0xff;
    return (__m256i)value;
}

EMULATED __m256i _mm256_slli_epi32(__m256i numbers, int count) { return (__m256i)((emulated_half)numbers << count); }

EMULATED __m256i _mm256_or_si256(__m256i x, __m256i y) { return x | y; }

#define _mm256_setr_epi16(...) ((__m256i)(emulated_words){__VA_ARGS__})

EMULATED __m256i _mm256_permutexvar_epi16(__m256i places, __m256i numbers) {
    __m256i value;
    for (int lane = 0; lane < 16; lane++) value[lane] = numbers[places[lane] & 15];
    return value;
}

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
#endif
