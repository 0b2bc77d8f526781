/* One Gauss-Seidel sweep over every group of a 2:4 core: the compiled form of armor_recipes/solver/sweep.py, which is its
 * reference and holds the mathematics. Compiled with -ffp-contract=off and without reassociation, so that every vector
 * width gives the same bits. Blocks [begin, end) of the J*K blocks are independent of each other. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

static const int FIRST[6] = {0, 0, 0, 1, 1, 2};
static const int SECOND[6] = {1, 2, 3, 2, 3, 3};

/* y[0..n) += alpha * x[0..n) */
static inline void axpy(float *restrict y, const float *restrict x, float alpha, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] += alpha * x[i];
}

/* Solve one group exactly; returns 1 and fills delta when the group changed. */
static inline int solve_group(const float *p, const float *shift, float *s, uint8_t *index, const float *gram,
                              int64_t width, const float *inverse, float pivot, int fixed_mask, float delta[4]) {
    float share[4], c[4], now = 0.0f;
    for (int i = 0; i < 4; i++) {
        share[i] = s[0] * gram[i] + s[1] * gram[width + i] + s[2] * gram[2 * width + i] + s[3] * gram[3 * width + i];
        c[i] = p[i] + pivot * (share[i] - shift[i]);
    }
    for (int i = 0; i < 4; i++) now += s[i] * (pivot * share[i] - 2.0f * c[i]);
    int best = *index;
    float best_score = -1.0f, v1 = 0.0f, v2 = 0.0f;
    for (int m = 0; m < 6; m++) {
        if (fixed_mask && m != *index) continue;
        const float ca = c[FIRST[m]], cb = c[SECOND[m]];
        const float a = inverse[3 * m] * ca + inverse[3 * m + 1] * cb;
        const float b = inverse[3 * m + 1] * ca + inverse[3 * m + 2] * cb;
        const float score = a * ca + b * cb;
        if (score > best_score) best_score = score, best = m, v1 = a, v2 = b;
    }
    if (!(-best_score / pivot < now)) return 0;
    for (int i = 0; i < 4; i++) delta[i] = -s[i];
    delta[FIRST[best]] += v1 / pivot;
    delta[SECOND[best]] += v2 / pivot;
    for (int i = 0; i < 4; i++) s[i] = 0.0f;
    s[FIRST[best]] = v1 / pivot;
    s[SECOND[best]] = v2 / pivot;
    *index = (uint8_t)best;
    return 1;
}

/* All rows and groups of one block; correlation is updated for the rows below, shift holds delta_row * G_B. */
CLONES
static void sweep_block(float *p, float *s, uint8_t *index, const float *gram_a, const float *gram_b,
                        const float *inverses, int64_t rows, int64_t width, int fixed_mask, float *shift) {
    const int64_t groups = width / 4;
    for (int64_t r = 0; r < rows; r++) {
        const float pivot = gram_a[r * rows + r];
        if (!(pivot > 0.0f)) continue;
        memset(shift, 0, (size_t)width * sizeof(float));
        for (int64_t g = 0; g < groups; g++) {
            float delta[4];
            const int64_t at = r * width + 4 * g;
            const float *gram = gram_b + 4 * g * width;
            if (!solve_group(p + at, shift + 4 * g, s + at, index + r * groups + g, gram + 4 * g, width,
                             inverses + 18 * g, pivot, fixed_mask, delta))
                continue;
            for (int i = 0; i < 4; i++)
                if (delta[i] != 0.0f) axpy(shift, gram + i * width, delta[i], width);
        }
        for (int64_t below = r + 1; below < rows; below++)
            axpy(p + below * width, shift, -gram_a[below * rows + r], width);
    }
}

/* correlation, core (J,K,rows,width); index (J,K,rows,width/4); gram_a (J,rows,rows); gram_b (K,width,width);
 * inverses (K,width/4,6,3); shift (width) is scratch. */
EXPORT void armor_sweep(float *correlation, float *core, uint8_t *index, const float *gram_a, const float *gram_b,
                        const float *inverses, float *shift, int64_t column_blocks, int64_t rows, int64_t width,
                        int64_t begin, int64_t end, int64_t fixed_mask) {
    for (int64_t block = begin; block < end; block++) {
        const int64_t j = block / column_blocks, k = block % column_blocks;
        sweep_block(correlation + block * rows * width, core + block * rows * width, index + block * rows * (width / 4),
                    gram_a + j * rows * rows, gram_b + k * width * width, inverses + k * (width / 4) * 18, rows, width,
                    (int)fixed_mask, shift);
    }
}

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", "Compiled sweep; entered through ctypes.", -1, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
