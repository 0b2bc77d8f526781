/* y = A (S (B x)) + bias for a few tokens: the job, the number formats, and what a path (scalar, AVX2, AVX-512) must provide. */
#ifndef ARMOR_LINEAR_H
#define ARMOR_LINEAR_H
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__) || defined(__clang__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define ARMOR_X86 1
#else
#define ARMOR_X86 0
#endif

#define MOST_TOKENS 16 /* of one job */
#define STRIP 32       /* columns of one 32-bit word of the bitmask; rows of x are padded to whole strips */
#define BLOCK 64       /* columns of Bx that have one scale where they are rounded to 8 bits */

/* How numbers are stored. The integers are for kept values alone; number k of int4 is in bits 4 (k % 8) of 32-bit word k / 8, plus 8. */
typedef enum { BF16 = 0, FP16 = 1, FP32 = 2, INT8 = 3, INT4 = 4 } format_t;

/* Everything is read and written at its own byte address: a tensor mapped from a file need not be aligned. */
typedef struct {
    const uint8_t *x;       /* (tokens, columns) in `activation` */
    const uint8_t *values;  /* (rows, columns / 2) in `format` */
    const uint8_t *scale;   /* (rows, groups) in `floats`: what the integers of a group are multiplied by; NULL where values are floats */
    const uint8_t *bitmask; /* (rows, columns / 8) */
    const uint8_t *a;       /* (rows / b_o, b_o, b_o) in `floats` */
    const uint8_t *b;       /* (columns / b_i, b_i, b_i) in `floats` */
    const uint8_t *bias;    /* (rows,) in `floats`, or NULL */
    uint8_t *y;             /* (tokens, rows) in `activation` */
    float *inner;           /* tokens * blocks * 2 * BLOCK numbers: B x, in the order that the path wants */
    int64_t tokens, rows, columns, groups, b_o, b_i, format, floats, activation, path; /* groups of a row: 0, 1 or more */
} job_t;

/* A job in parts: `inputs` of blocks of B, then `outputs` of blocks of A with the rows of the core that they need. */
typedef struct {
    const job_t *job;
    float *work; /* `work_size` floats a part, 2 * max(b_i, b_o, ROWS_AT_ONCE) * tokens */
    int64_t inputs, outputs, work_size;
    atomic_int_fast64_t next, done, ready; /* the first part that no thread has taken; inputs that are done; whether B x is there */
} task_t;

#define MANY_TOKENS 64                  /* whose Bx is laid out together */
#define MANY_STORED (2 * MANY_TOKENS * BLOCK) /* bytes of BLOCK columns of it */

/* A job of any number of tokens, in bf16 throughout, its columns whole BLOCKs and blocks of B, which are parts or multiples of BLOCK;
 * blocks of A have one row, or an even number; scales are of whole BLOCKs of columns. */
typedef struct {
    const job_t *job;
    uint8_t *inner; /* Bx: MANY_STORED bytes for each BLOCK of columns of MANY_TOKENS tokens */
    float *units;   /* MANY_TOKENS numbers for each of them */
    float *work;    /* `work_size` a thread: see `inputs_of` and `outputs_of` */
    int64_t work_size, inputs, blocks; /* parts of the columns; blocks of A in a part */
    atomic_int_fast64_t threads, next, done;
} many_t;

/* The core unpacked: rows in parts. */
typedef struct {
    const job_t *job;
    uint8_t *out; /* the core (rows, columns) in `out_format` */
    int64_t parts, out_format;
    atomic_int_fast64_t next;
} unpack_t;

/* A dense layer: rows in parts. Integers have x in 16-bit fixed point, a power of two for each token, so that sums are exact. */
typedef struct {
    const uint8_t *x;     /* (tokens, columns) in bf16 */
    const uint8_t *w;     /* (rows, columns) in bf16, or bytes */
    const uint8_t *scale; /* (rows, groups) in bf16: what the integers of a group, of whole strips, are times; NULL for bf16 */
    const uint8_t *bias;  /* (rows,) in bf16, or NULL */
    uint8_t *y;           /* (tokens, rows) in bf16 */
    uint8_t *words;       /* tokens * (words_pitch(columns) + 4) bytes, for integers: x in fixed point; then the powers of two */
    int64_t tokens, rows, columns, groups, flip, parts; /* flip: 128 where bytes hold integers plus 128, else 0 */
    atomic_int_fast64_t next;
} dense_t;

/* Attention of one query for each head over keys and values in bf16: a part for each head of each sequence. Strides are in numbers. */
typedef struct {
    const uint8_t *q; /* (sequences, heads, size) */
    const uint8_t *k; /* (sequences, kv_heads, length, size), with these strides but for the last, which is 1 */
    const uint8_t *v; /* the same */
    uint8_t *y;       /* (sequences, heads, size) */
    float *work;      /* sequences * heads * length numbers */
    int64_t parts, heads, kv_heads, length, size;
    int64_t k_sequence, k_head, k_row, v_sequence, v_head, v_row;
    float scale;
    atomic_int_fast64_t next;
} attention_t;

#define GROUPED_COLUMNS 8192 /* most columns at once where a row has several groups, or its sums are 32-bit integers */

/* Sums of core rows [row, row + count) over columns [begin, end), added to z[token * stride + (0..count)). Where a row has
 * several groups (of whole strips, but in the scalar path), times their scales; a scale for the whole row is left to the caller. */
typedef void core_t(const job_t *job, int64_t row, int64_t count, int64_t begin, int64_t end, float *z, int64_t stride);
/* out[token * out_stride + i] = sum_j matrix[i, j] * in[token * in_stride + j] for a (size, size) matrix of floats in `format`. */
typedef void square_t(const uint8_t *matrix, int64_t size, format_t format, const float *in, int64_t in_stride,
                      float *out, int64_t out_stride, int64_t tokens);
/* Put `count` columns from `column` on of one token, in natural order, where the path's core function reads them. */
typedef void arrange_t(const job_t *job, int64_t token, const float *natural, int64_t column, int64_t count);

/* Once all of B x is arranged, before any row of the core. */
typedef void prepare_t(const job_t *job);

typedef struct {
    core_t *core;
    square_t *square;
    arrange_t *arrange;
    prepare_t *prepare; /* or NULL */
} path_t;

INLINE int64_t padded(int64_t columns) { return (columns + STRIP - 1) / STRIP * STRIP; }

/* Bytes of a token's 16-bit x: a line more than it needs, so that the rows of powers of two do not share one set of the cache. */
INLINE int64_t words_pitch(int64_t columns) { return 2 * (padded(columns) + STRIP); }

/* Tokens go through the core in tiles of 8, and what is left of them in one each of 4, 2 and 1. */
INLINE int64_t tile_of(int64_t tokens, int64_t token) {
    const int64_t eights = tokens / 8 * 8;
    if (token < eights) return 8;
    const int64_t left = tokens - eights, place = token - eights;
    if (left & 4 && place < 4) return 4;
    return left & 2 && place < (left & 6) ? 2 : 1;
}

/* Within a tile, x is kept strip by strip with the tokens side by side. Rows of x a power of two apart would share one set of
 * the first cache, and push out of it each other and the weights. */
INLINE int64_t tile_start(int64_t tokens, int64_t token) {
    const int64_t tile = tile_of(tokens, token);
    return tile == 1 ? token : token / tile * tile;
}

INLINE int64_t bytes_of(int64_t count, format_t format) {
    if (format == INT4) return count / 2;
    return format == FP32 ? 4 * count : format == INT8 ? count : 2 * count;
}

INLINE int64_t width(format_t format) { return bytes_of(1, format); }

/* Where the two kept columns of a group are, by its 4 bits; a damaged mask stays within the group. */
static const uint8_t FIRST[16] = {0, 0, 1, 0, 2, 0, 1, 0, 3, 0, 1, 0, 2, 0, 1, 0};
static const uint8_t SECOND[16] = {0, 0, 1, 1, 2, 2, 2, 1, 3, 3, 3, 1, 3, 2, 2, 1};

INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* The power of two that brings a magnitude below 2^15; 0 stays. */
INLINE float unit_of(float most) {
    const uint32_t exponent = to_bits(most) >> 23;
    return most == 0.0f ? 1.0f : from_bits((exponent > 15 ? exponent - 14 : 1) << 23);
}

INLINE float half_to_float(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = half & 0x7fffu;
    if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    if (rest < 0x400u) return from_bits(sign | to_bits((float)rest * 0x1p-24f));
    return from_bits(sign | ((rest << 13) + 0x38000000u));
}

/* Round to nearest, ties to even. */
INLINE uint16_t float_to_half(float value) {
    const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);
    if (rest < 0x38800000u) return (uint16_t)(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000u));
    return (uint16_t)(sign | ((rest + 0xfffu + (rest >> 13 & 1u)) - 0x38000000u) >> 13);
}

INLINE uint16_t float_to_bfloat(float value) {
    const uint32_t bits = to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

INLINE float load_number(const uint8_t *numbers, int64_t index, format_t format) {
    uint32_t word = 0;
    uint16_t half;
    if (format == FP32) {
        memcpy(&word, numbers + 4 * index, 4);
        return from_bits(word);
    }
    if (format == INT8) return (float)(int8_t)numbers[index];
    if (format == INT4) {
        memcpy(&word, numbers + index / 8 * 4, 4);
        return (float)((int)(word >> 4 * (index % 8) & 15u) - 8);
    }
    memcpy(&half, numbers + 2 * index, 2);
    return format == FP16 ? half_to_float(half) : from_bits((uint32_t)half << 16);
}

INLINE void store_number(uint8_t *numbers, int64_t index, format_t format, float value) {
    if (format == FP32) {
        memcpy(numbers + 4 * index, &value, 4);
        return;
    }
    const uint16_t half = format == FP16 ? float_to_half(value) : float_to_bfloat(value);
    memcpy(numbers + 2 * index, &half, 2);
}

/* With the format known to the compiler, these loops are vectorised. */
INLINE void load_numbers(const uint8_t *numbers, int64_t index, int64_t count, format_t format, float *out) {
    if (format == BF16)
        for (int64_t i = 0; i < count; i++) out[i] = load_number(numbers, index + i, BF16);
    else if (format == FP16)
        for (int64_t i = 0; i < count; i++) out[i] = load_number(numbers, index + i, FP16);
    else
        memcpy(out, numbers + 4 * index, (size_t)count * 4);
}

INLINE void store_numbers(uint8_t *numbers, int64_t index, int64_t count, format_t format, const float *in) {
    if (format == BF16)
        for (int64_t i = 0; i < count; i++) store_number(numbers, index + i, BF16, in[i]);
    else if (format == FP16)
        for (int64_t i = 0; i < count; i++) store_number(numbers, index + i, FP16, in[i]);
    else
        memcpy(numbers + 4 * index, in, (size_t)count * 4);
}

/* Copy the strip that the columns end in, zeros after them, so that no path reads past a row. */
INLINE uint32_t last_strip(const job_t *job, int64_t row, int64_t begin, uint8_t values[4 * STRIP / 2]) {
    const int64_t left = job->columns - begin;
    const format_t format = (format_t)job->format;
    uint32_t mask = 0;
    memset(values, 0, 4 * STRIP / 2);
    memcpy(values, job->values + bytes_of((row * job->columns + begin) / 2, format), (size_t)bytes_of(left / 2, format));
    for (int64_t byte = 0; byte < left / 8; byte++)
        mask |= (uint32_t)job->bitmask[(row * job->columns + begin) / 8 + byte] << 8 * byte;
    return mask;
}

void wait_until(atomic_int_fast64_t *number, int64_t least);

extern const path_t SCALAR_PATH;
#if ARMOR_X86
extern const path_t AVX2_PATH;
extern const path_t AVX512_PATH;
#endif
#endif
