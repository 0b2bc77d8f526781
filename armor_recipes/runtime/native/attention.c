/* y = softmax(scale * q Kt) V for one query a head, as decoding asks for it, with AVX-512 BF16: in float32 throughout, but for the
 * bf16 of q, K and V, and rounded once. What a head waits for is its keys and values, which are read once. */
#include "linear.h"
#if ARMOR_X86
#include "avx512.h"

/* e^x for x of 0 and less: 2^n * 2^f with f within 1/2 of 0, to 2^-22. NaN stays. */
AVX512_INLINE __m512 exponential(__m512 x) {
    static const float terms[] = {1.8775767e-3f, 8.9893397e-3f, 5.5826318e-2f, 2.4015361e-1f, 6.9315308e-1f, 9.9999994e-1f};
    const __m512 t = _mm512_max_ps(_mm512_set1_ps(-126.0f), _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f))); /* NaN is its second */
    const __m512i n = _mm512_cvtps_epi32(t);
    const __m512 f = _mm512_sub_ps(t, _mm512_cvtepi32_ps(n));
    __m512 found = _mm512_set1_ps(terms[0]);
    UNROLLED for (int i = 1; i < 6; i++) found = _mm512_fmadd_ps(found, f, _mm512_set1_ps(terms[i]));
    return _mm512_mul_ps(found, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23)));
}

AVX512_INLINE __mmask16 sixteen_of(int64_t left) { return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1); }

/* scores[p] = scale * q . k[p], and the largest of them. */
AVX512_INLINE float scores_of(const attention_t *task, const uint8_t *q, const uint8_t *k, float *scores, int blocks) {
    float most = -3.4e38f;
    for (int64_t p = 0; p < task->length; p++) {
        __m512 sum = _mm512_setzero_ps();
        UNROLLED for (int i = 0; i < blocks; i++)
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(q + 64 * i),
                                   (__m512bh)_mm512_loadu_si512(k + 2 * p * task->k_row + 64 * i));
        scores[p] = _mm512_reduce_add_ps(sum) * task->scale;
        most = scores[p] > most ? scores[p] : most;
    }
    return most;
}

/* The head's part of y; `blocks` of 32 numbers a head, a constant. */
AVX512_INLINE void head(const attention_t *task, int64_t part, int blocks) {
    const int64_t sequence = part / task->heads, kv = part % task->heads / (task->heads / task->kv_heads), size = 32 * blocks;
    const uint8_t *v = task->v + 2 * (sequence * task->v_sequence + kv * task->v_head);
    float *scores = task->work + part * task->length;
    const __m512 most = _mm512_set1_ps(scores_of(task, task->q + 2 * part * size,
                                                 task->k + 2 * (sequence * task->k_sequence + kv * task->k_head), scores, blocks));
    __m512 all = _mm512_setzero_ps(), sum[16];
    for (int64_t p = 0; p < task->length; p += 16) {
        const __mmask16 there = sixteen_of(task->length - p);
        const __m512 weight = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(there, scores + p), most));
        _mm512_mask_storeu_ps(scores + p, there, weight);
        all = _mm512_mask_add_ps(all, there, all, weight);
    }
    UNROLLED for (int i = 0; i < 2 * blocks; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t p = 0; p < task->length; p++) {
        const __m512 weight = _mm512_set1_ps(scores[p]);
        UNROLLED for (int i = 0; i < 2 * blocks; i++) {
            const __m256i numbers = _mm256_loadu_si256((const __m256i *)(const void *)(v + 2 * p * task->v_row + 32 * i));
            const __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
            sum[i] = _mm512_fmadd_ps(weight, value, sum[i]);
        }
    }
    const __m512 by = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(all));
    UNROLLED for (int i = 0; i < 2 * blocks; i++) {
        float numbers[16];
        _mm512_storeu_ps(numbers, _mm512_mul_ps(sum[i], by));
        store_numbers(task->y, part * size + 16 * i, 16, BF16, numbers);
    }
}

#define HEADS(blocks)                                                                                                              \
    __attribute__((noinline, target(FEATURES))) static void heads_##blocks(const attention_t *task, int64_t part) {                \
        head(task, part, blocks);                                                                                                  \
    }
HEADS(2)
HEADS(3)
HEADS(4)
HEADS(8)

/* Run by every thread of a team with the same task, whose `size` is 64, 96, 128 or 256. */
EXPORT void armor_attend(attention_t *task) {
    for (int64_t part; (part = atomic_fetch_add(&task->next, 1)) < task->parts;)
        (task->size == 64 ? heads_2 : task->size == 96 ? heads_3 : task->size == 128 ? heads_4 : heads_8)(task, part);
}
#else
EXPORT void armor_attend(attention_t *task) { (void)task; } /* as `armor_dense` */
#endif
