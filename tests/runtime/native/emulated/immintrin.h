/* The few AVX-512 instructions of armor_recipes/runtime/native/avx512.c in plain C, so that its logic is tested on any machine. */
#ifndef EMULATED_IMMINTRIN_H
#define EMULATED_IMMINTRIN_H
#include <stdint.h>
#include <string.h>

typedef uint16_t __m256i __attribute__((vector_size(32)));
typedef uint16_t __m512i __attribute__((vector_size(64)));
typedef uint16_t __m512bh __attribute__((vector_size(64)));
typedef float __m512 __attribute__((vector_size(64)));

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

EMULATED __m512i _mm512_maskz_expand_epi16(uint32_t mask, __m512i packed) {
    __m512i value = {0};
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

EMULATED __m512 _mm512_setzero_ps(void) { return (__m512){0}; }

EMULATED float _mm512_reduce_add_ps(__m512 lanes) {
    float sum = 0.0f;
    for (int lane = 0; lane < 16; lane++) sum += lanes[lane];
    return sum;
}
#endif
