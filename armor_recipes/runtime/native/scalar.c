/* The plain C path: what every machine runs, and what the others are checked against. */
#include "linear.h"

/* 1 where the caller applies the scale of the whole row, or there is none. */
INLINE float group_scale(const job_t *job, int64_t row, int64_t index) {
    return job->groups > 1 ? load_number(job->scale, row * job->groups + index, (format_t)job->floats) : 1.0f;
}

INLINE void core_rows(const job_t *job, int64_t row, int64_t count, int64_t begin, int64_t end, float *z,
                      int64_t stride, format_t format) {
    const int64_t ld = padded(job->columns), last = end < job->columns ? end : job->columns;
    const int64_t group = job->groups > 1 ? job->columns / job->groups : job->columns;
    for (int64_t r = row; r < row + count; r++) {
        const uint8_t *values = job->values + bytes_of(r * job->columns / 2, format);
        const uint8_t *bitmask = job->bitmask + r * job->columns / 8;
        for (int64_t t = 0; t < job->tokens; t++) {
            const float *x = job->inner + t * ld;
            for (int64_t column = begin; column < last;) {
                const int64_t index = column / group, stop = (index + 1) * group < last ? (index + 1) * group : last;
                float even = 0.0f, odd = 0.0f;
                for (; column < stop; column += 4) {
                    const int bits = bitmask[column / 8] >> (column & 4) & 15;
                    even += load_number(values, column / 2, format) * x[column + FIRST[bits]];
                    odd += load_number(values, column / 2 + 1, format) * x[column + SECOND[bits]];
                }
                z[t * stride + r - row] += (even + odd) * group_scale(job, r, index);
            }
        }
    }
}

static void core(const job_t *job, int64_t row, int64_t count, int64_t begin, int64_t end, float *z, int64_t stride) {
    switch ((format_t)job->format) {
    case BF16: core_rows(job, row, count, begin, end, z, stride, BF16); break;
    case FP16: core_rows(job, row, count, begin, end, z, stride, FP16); break;
    case FP32: core_rows(job, row, count, begin, end, z, stride, FP32); break;
    case INT8: core_rows(job, row, count, begin, end, z, stride, INT8); break;
    case INT4: core_rows(job, row, count, begin, end, z, stride, INT4); break;
    }
}

static void square(const uint8_t *matrix, int64_t size, format_t format, const float *in, int64_t in_stride, float *out,
                   int64_t out_stride, int64_t tokens) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < size; i++) {
            float sum = 0.0f;
            for (int64_t j = 0; j < size; j++) sum += load_number(matrix, i * size + j, format) * in[t * in_stride + j];
            out[t * out_stride + i] = sum;
        }
}

static void arrange(const job_t *job, int64_t token, const float *natural, int64_t column, int64_t count) {
    memcpy(job->inner + token * padded(job->columns) + column, natural, (size_t)count * sizeof(float));
}

const path_t SCALAR_PATH = {core, square, arrange, NULL};
