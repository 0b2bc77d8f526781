/* The compiled form of A (S (B x)) + bias, entered through ctypes; armor_recipes/runtime/kernel.py is its other half. A job is
 * split in parts that any number of threads share: blocks of B, then blocks of A with the core rows that they need. No sum is
 * ever split, so bits do not depend on the number of threads. */
#define PY_SSIZE_T_CLEAN
#ifndef ARMOR_STANDALONE
#include <Python.h>
#endif
#include "linear.h"

#ifdef _WIN32
#include <windows.h>
static void yield(void) { SwitchToThread(); }
#else
#include <sched.h>
static void yield(void) { sched_yield(); }
#endif

#define ROWS_AT_ONCE 64 /* core rows that pass over one chunk of x while it is in the first cache */
#define CHUNK_NUMBERS 4096 /* numbers of x in that chunk */

enum { SCALAR = 0, AVX2 = 1, AVX512 = 2 };

static const path_t *path_of(const job_t *job) {
#if ARMOR_X86
    if (job->groups > 1 && job->columns / job->groups % STRIP) return &SCALAR_PATH; /* scales change within a vector */
    /* dpbf16 multiplies bf16 by bf16: right for bf16 activations only, as the rounded B x of integer cores is. */
    const int halves = job->format == INT4 && job->groups > 1 && job->columns / job->groups % BLOCK; /* scales within a block */
    if (job->path == AVX512 && job->floats == BF16 && job->activation == BF16 && !halves) return &AVX512_PATH;
    if (job->path >= AVX2) return &AVX2_PATH;
#else
    (void)job;
#endif
    return &SCALAR_PATH;
}

/* The paths that this build holds and this machine can run, one bit each. */
EXPORT int64_t armor_paths(void) {
    int64_t paths = 1 << SCALAR;
#if ARMOR_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) paths |= 1 << AVX2;
    if (paths & 1 << AVX2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16") &&
        __builtin_cpu_supports("avx512vnni"))
        paths |= 1 << AVX512;
#endif
    return paths;
}

/* Blocks that are taken together, so that small ones (1 x 1, for a core without factors) do not cost a pass each. */
static int64_t blocks_at_once(int64_t size) { return size < ROWS_AT_ONCE ? ROWS_AT_ONCE / size : 1; }

/* `count` blocks of a block-diagonal factor times all tokens: in and out are (tokens, count * size). */
static void factor(const job_t *job, const path_t *path, const uint8_t *blocks, int64_t count, int64_t size,
                   const float *in, float *out) {
    const format_t format = (format_t)job->floats;
    const int64_t stride = count * size;
    for (int64_t block = 0; block < count; block++) {
        const uint8_t *matrix = blocks + block * size * size * width(format);
        if (size > 1) {
            path->square(matrix, size, format, in + block * size, stride, out + block * size, stride, job->tokens);
            continue;
        }
        const float number = load_number(matrix, 0, format);
        for (int64_t t = 0; t < job->tokens; t++) out[t * stride + block] = number * in[t * stride + block];
    }
}

/* Blocks [begin, end) of B. `work` holds 2 * max(b_i, ROWS_AT_ONCE) * tokens floats. */
static void input_blocks(const job_t *job, float *work, int64_t begin, int64_t end) {
    const path_t *path = path_of(job);
    const int64_t size = job->b_i, most = blocks_at_once(size), bytes = size * size * width((format_t)job->floats);
    const uint8_t *blocks = job->b + begin * bytes;
    for (int64_t block = begin; block < end; block += most) {
        const int64_t count = end - block < most ? end - block : most, wide = count * size;
        float *out = work + wide * job->tokens;
        for (int64_t t = 0; t < job->tokens; t++)
            load_numbers(job->x, t * job->columns + block * size, wide, (format_t)job->activation, work + t * wide);
        factor(job, path, blocks, count, size, work, out);
        blocks += count * bytes;
        for (int64_t t = 0; t < job->tokens; t++)
            path->arrange(job, t, out + t * wide, block * size, wide);
    }
    if (end * size < job->columns) return;
    const float zeros[STRIP] = {0};
    for (int64_t t = 0; t < job->tokens; t++)
        path->arrange(job, t, zeros, job->columns, padded(job->columns) - job->columns);
}

/* Columns of x that pass over ROWS_AT_ONCE rows at a time. */
static int64_t chunk_of(const job_t *job) {
    /* One token's x stays in the first cache whole; the longer the runs, the better weights stream from memory. */
    if (job->tokens == 1) return job->format >= INT8 ? GROUPED_COLUMNS : padded(job->columns);
    const int64_t wide = CHUNK_NUMBERS / job->tokens / BLOCK * BLOCK;
    return wide < 512 ? 512 : wide;
}

/* z (tokens, count) = core rows [row, row + count) times `inner`, by chunks of columns that fit the first cache. */
static void core_rows(const job_t *job, const path_t *path, int64_t row, int64_t count, float *z) {
    const int64_t ld = padded(job->columns), chunk = chunk_of(job);
    memset(z, 0, (size_t)(count * job->tokens) * sizeof(float));
    for (int64_t r = 0; r < count; r += ROWS_AT_ONCE) {
        const int64_t rows = count - r < ROWS_AT_ONCE ? count - r : ROWS_AT_ONCE;
        for (int64_t c = 0; c < ld; c += chunk)
            path->core(job, row + r, rows, c, c + chunk < ld ? c + chunk : ld, z + r, count);
    }
    if (job->groups != 1) return;
    for (int64_t r = 0; r < count; r++) {
        const float scale = load_number(job->scale, row + r, (format_t)job->floats);
        for (int64_t t = 0; t < job->tokens; t++) z[t * count + r] *= scale;
    }
}

/* Blocks [begin, end) of A, after all of B. `work` holds 2 * max(b_o, ROWS_AT_ONCE) * tokens floats. */
static void output_blocks(const job_t *job, float *work, int64_t begin, int64_t end) {
    const path_t *path = path_of(job);
    const int64_t size = job->b_o, most = blocks_at_once(size);
    const format_t format = (format_t)job->floats;
    const int64_t bytes = size * size * width(format);
    for (int64_t block = begin; block < end; block += most) {
        const int64_t count = end - block < most ? end - block : most, rows = count * size;
        float *out = work + rows * job->tokens;
        const uint8_t *blocks = job->a + block * bytes;
        core_rows(job, path, block * size, rows, work);
        factor(job, path, blocks, count, size, work, out);
        for (int64_t t = 0; t < job->tokens; t++) {
            if (job->bias)
                for (int64_t i = 0; i < rows; i++) out[t * rows + i] += load_number(job->bias, block * size + i, format);
            store_numbers(job->y, t * job->rows + block * size, rows, (format_t)job->activation, out + t * rows);
        }
    }
}

/* Groups of four [begin, end) of the core; integers times `scale`. */
INLINE void unpack(const job_t *job, uint8_t *out, format_t format, format_t out_format, int64_t begin, int64_t end,
                   float scale) {
    const int64_t out_width = width(out_format);
    for (int64_t group = begin; group < end; group++) {
        const int bits = job->bitmask[group / 2] >> (group & 1) * 4 & 15;
        float first = load_number(job->values, 2 * group, format), second = load_number(job->values, 2 * group + 1, format);
        if (format >= INT8) first *= scale, second *= scale;
        uint8_t *place = out + 4 * group * out_width;
        memset(place, 0, (size_t)(4 * out_width));
        store_number(place, FIRST[bits], out_format, first);
        store_number(place, SECOND[bits], out_format, second);
    }
}

INLINE void unpack_integers(const job_t *job, uint8_t *out, format_t format, format_t out_format, int64_t begin, int64_t end) {
    const int64_t fours = job->columns / 4 / job->groups;
    for (int64_t group = begin * job->groups; group < end * job->groups; group++)
        unpack(job, out, format, out_format, group * fours, (group + 1) * fours,
               load_number(job->scale, group, (format_t)job->floats));
}

INLINE void unpack_integers_to(const job_t *job, uint8_t *out, format_t format, format_t out_format, int64_t begin, int64_t end) {
    switch (out_format) {
    case BF16: unpack_integers(job, out, format, BF16, begin, end); break;
    case FP16: unpack_integers(job, out, format, FP16, begin, end); break;
    default: unpack_integers(job, out, format, FP32, begin, end);
    }
}

/* Rows [begin, end) of the core (rows, columns), zero where nothing is kept: in FP32, or in the format of the job's floats.
 * Of the job it reads values, scale and bitmask, and what tells their sizes. */
static void unpack_rows(const job_t *job, uint8_t *out, int64_t out_format, int64_t begin, int64_t end) {
    const int64_t first = begin * job->columns / 4, last = end * job->columns / 4;
    const format_t format = (format_t)job->format;
    if (format == INT8) {
        unpack_integers_to(job, out, INT8, (format_t)out_format, begin, end);
    } else if (format == INT4) {
        unpack_integers_to(job, out, INT4, (format_t)out_format, begin, end);
    } else if (format == FP32) {
        unpack(job, out, FP32, FP32, first, last, 1.0f);
    } else if (out_format != FP32) { /* bits of 16-bit numbers pass through bf16 unchanged, NaNs aside, which checks refuse */
        unpack(job, out, BF16, BF16, first, last, 1.0f);
    } else if (format == FP16) {
        unpack(job, out, FP16, FP32, first, last, 1.0f);
    } else {
        unpack(job, out, BF16, FP32, first, last, 1.0f);
    }
}

void wait_until(atomic_int_fast64_t *number, int64_t least) {
    for (int spins = 0; atomic_load(number) < least; spins++)
        if (spins >= 1000) yield(); /* whoever is to raise it may wait for this processor */
}

/* Run by every thread of a team with the same task: each takes the next part until none is left. What a thread waits for is done
 * by threads that run already, however many of them there are. */
EXPORT void armor_run(task_t *task) {
    const job_t *job = task->job;
    const int64_t columns = job->columns / job->b_i, rows = job->rows / job->b_o, inputs = task->inputs, outputs = task->outputs;
    for (int64_t part; (part = atomic_fetch_add(&task->next, 1)) < inputs + outputs;) {
        float *work = task->work + part * task->work_size;
        if (part < inputs) {
            input_blocks(job, work, columns * part / inputs, columns * (part + 1) / inputs);
            if (atomic_fetch_add(&task->done, 1) + 1 < inputs) continue;
            const path_t *path = path_of(job);
            if (path->prepare) path->prepare(job);
            atomic_store(&task->ready, 1);
        } else {
            wait_until(&task->ready, 1);
            output_blocks(job, work, rows * (part - inputs) / outputs, rows * (part - inputs + 1) / outputs);
        }
    }
}

EXPORT void armor_unpack(unpack_t *task) {
    const int64_t rows = task->job->rows;
    for (int64_t part; (part = atomic_fetch_add(&task->next, 1)) < task->parts;)
        unpack_rows(task->job, task->out, task->out_format, rows * part / task->parts, rows * (part + 1) / task->parts);
}

#ifndef ARMOR_STANDALONE
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", "Compiled linear layer; entered through ctypes.", -1,
                                    NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
#endif
