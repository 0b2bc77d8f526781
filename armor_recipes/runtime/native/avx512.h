/* What the files with AVX-512 share. */
#ifndef ARMOR_AVX512_H
#define ARMOR_AVX512_H
#include <immintrin.h>

#ifndef FEATURES /* a test emulates the instructions and names fewer */
#define FEATURES "avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,avx512vnni,avx2,fma,f16c"
#endif
#ifdef EMULATED /* where it is checked, not timed: what is inlined everywhere takes a compiler's sanitizers minutes */
#define UNROLLED
#define AVX512_INLINE static inline __attribute__((target(FEATURES)))
#else
#define UNROLLED _Pragma("GCC unroll 16")
#define AVX512_INLINE static inline __attribute__((always_inline, target(FEATURES)))
#endif

/* 32 int4 in their order: byte i holds numbers 2i and 2i + 1. */
AVX512_INLINE __m256i nibbles(const uint8_t *values) {
    const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(const void *)values));
    const __m256i both = _mm256_or_si256(words, _mm256_slli_epi16(words, 4));
    return _mm256_sub_epi8(_mm256_and_si256(both, _mm256_set1_epi8(15)), _mm256_set1_epi8(8));
}

#endif
