/* One Gauss-Seidel sweep over every group of an N:M core, M <= 8: the compiled form of armor_recipes/solver/sweep.py, which is its
 * reference and holds the mathematics. Compiled with -ffp-contract=off and without reassociation, so that every vector
 * width gives the same bits. Blocks [begin, end) of the J*K blocks are independent of each other. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#include "export.h"
#include "vectors.h"

#define MOST 8 /* entries of a group */

/* The masks of a pattern: `count` lists of `keep` of the `group` entries. */
typedef struct {
    int keep, group, count;
    const uint8_t *lanes;
} masks_t;

static const uint8_t PAIRS[12] = {0, 1, 0, 2, 0, 3, 1, 2, 1, 3, 2, 3};

/* Solve one group exactly; returns 1 and fills delta when the group changed. */
INLINE int solve_group(const float *p, const float *shift, float *s, uint8_t *index, const float *gram, int64_t width,
                       const float *inverse, float pivot, int fixed_mask, const masks_t masks, float delta[MOST]) {
    float share[MOST], c[MOST], best_value[MOST] = {0}, now = 0.0f;
    for (int i = 0; i < masks.group; i++) {
        share[i] = s[0] * gram[i];
        for (int l = 1; l < masks.group; l++) share[i] += s[l] * gram[l * width + i];
        c[i] = p[i] + pivot * (share[i] - shift[i]);
    }
    for (int i = 0; i < masks.group; i++) now += s[i] * (pivot * share[i] - 2.0f * c[i]);
    int best = *index;
    float best_score = -1.0f;
    for (int m = 0; m < masks.count; m++) {
        if (fixed_mask && m != *index) continue;
        const uint8_t *lane = masks.lanes + m * masks.keep;
        const float *rows = inverse + m * masks.keep * masks.keep;
        float value[MOST], score = 0.0f;
        for (int i = 0; i < masks.keep; i++) {
            value[i] = rows[i * masks.keep] * c[lane[0]];
            for (int l = 1; l < masks.keep; l++) value[i] += rows[i * masks.keep + l] * c[lane[l]];
            score += value[i] * c[lane[i]];
        }
        if (score > best_score) {
            best_score = score, best = m;
            for (int i = 0; i < masks.keep; i++) best_value[i] = value[i];
        }
    }
    if (!(-best_score / pivot < now)) return 0;
    const uint8_t *lane = masks.lanes + best * masks.keep;
    for (int i = 0; i < masks.group; i++) delta[i] = -s[i], s[i] = 0.0f;
    for (int i = 0; i < masks.keep; i++) {
        s[lane[i]] = best_value[i] / pivot;
        delta[lane[i]] += s[lane[i]];
    }
    *index = (uint8_t)best;
    return 1;
}

/* All rows and groups of one block; correlation is updated for the rows below, shift holds delta_row * G_B. */
INLINE void sweep_block(float *p, float *s, uint8_t *index, const float *gram_a, const float *gram_b,
                        const float *inverses, int64_t rows, int64_t width, int fixed_mask, float *shift,
                        const masks_t masks) {
    const int64_t size = masks.group, groups = width / size, stride = masks.count * masks.keep * masks.keep;
    for (int64_t r = 0; r < rows; r++) {
        const float pivot = gram_a[r * rows + r];
        if (!(pivot > 0.0f)) continue;
        memset(shift, 0, (size_t)width * sizeof(float));
        for (int64_t g = 0; g < groups; g++) {
            float delta[MOST];
            const int64_t at = r * width + size * g;
            const float *gram = gram_b + size * g * width;
            if (!solve_group(p + at, shift + size * g, s + at, index + r * groups + g, gram + size * g, width,
                             inverses + stride * g, pivot, fixed_mask, masks, delta))
                continue;
            for (int i = 0; i < masks.group; i++)
                if (delta[i] != 0.0f) axpy(shift, gram + i * width, delta[i], width);
        }
        for (int64_t below = r + 1; below < rows; below++)
            axpy(p + below * width, shift, -gram_a[below * rows + r], width);
    }
}

/* 2:4 with its numbers known to the compiler, and any other pattern; the operations are the same. */
CLONES
static void sweep_pairs(float *p, float *s, uint8_t *index, const float *gram_a, const float *gram_b,
                        const float *inverses, int64_t rows, int64_t width, int fixed_mask, float *shift) {
    const masks_t masks = {2, 4, 6, PAIRS};
    sweep_block(p, s, index, gram_a, gram_b, inverses, rows, width, fixed_mask, shift, masks);
}

CLONES
static void sweep_any(float *p, float *s, uint8_t *index, const float *gram_a, const float *gram_b,
                      const float *inverses, int64_t rows, int64_t width, int fixed_mask, float *shift, masks_t masks) {
    sweep_block(p, s, index, gram_a, gram_b, inverses, rows, width, fixed_mask, shift, masks);
}

/* correlation, core (J,K,rows,width); index (J,K,rows,width/group); gram_a (J,rows,rows); gram_b (K,width,width);
 * inverses (K,width/group,count,keep,keep); lanes (count,keep); shift (width) is scratch. */
EXPORT void armor_sweep(float *correlation, float *core, uint8_t *index, const float *gram_a, const float *gram_b,
                        const float *inverses, const uint8_t *lanes, float *shift, int64_t column_blocks, int64_t rows,
                        int64_t width, int64_t keep, int64_t group, int64_t count, int64_t begin, int64_t end,
                        int64_t fixed_mask) {
    const masks_t masks = {(int)keep, (int)group, (int)count, lanes};
    const int64_t groups = width / group;
    for (int64_t block = begin; block < end; block++) {
        const int64_t j = block / column_blocks, k = block % column_blocks;
        float *p = correlation + block * rows * width, *s = core + block * rows * width;
        uint8_t *numbers = index + block * rows * groups;
        const float *a = gram_a + j * rows * rows, *b = gram_b + k * width * width;
        const float *inverse = inverses + k * groups * count * keep * keep;
        if (keep == 2 && group == 4)
            sweep_pairs(p, s, numbers, a, b, inverse, rows, width, (int)fixed_mask, shift);
        else
            sweep_any(p, s, numbers, a, b, inverse, rows, width, (int)fixed_mask, shift, masks);
    }
}

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", "Compiled sweep; entered through ctypes.", -1, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
