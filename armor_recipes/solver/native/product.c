/* y = x Sᵀ for many rows of x and a sparse S in float32: the compiled form of `SparseMatrix.times` in
 * armor_recipes/solver/sparse.py. 64 rows of x at a time are laid out column by column, so that one kept value of S meets 64
 * numbers side by side and a value that is not kept costs nothing; 64 columns of them stay in the first cache while all
 * rows of S pass over them. The order of each sum is that of S's columns, whatever the number of threads. */
#include <stdint.h>
#include <string.h>

#include "export.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define ARMOR_X86 1
#else
#define ARMOR_X86 0
#endif

#define TILE 64  /* rows of x at a time */
#define PANEL 64 /* columns of S at a time */

/* A kept value: a bfloat16 number in the upper half, its column within the panel in the lower. */
typedef uint32_t entry_t;

static float value_of(entry_t entry) {
    const uint32_t bits = entry & 0xffff0000u;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Add to y `(rows, TILE)` what one panel of S gives with x `(PANEL, TILE)`; `starts` has rows + 1 places in `entries`. */
typedef void panel_t(const entry_t *entries, const int64_t *starts, int64_t rows, const float *x, float *y);

static void panel_plain(const entry_t *entries, const int64_t *starts, int64_t rows, const float *x, float *y) {
    for (int64_t row = 0; row < rows; row++, y += TILE)
        for (int64_t at = starts[row]; at < starts[row + 1]; at++) {
            const float value = value_of(entries[at]), *column = x + (entries[at] & 0xffffu) * TILE;
            for (int i = 0; i < TILE; i++) y[i] += value * column[i];
        }
}

#if ARMOR_X86
__attribute__((target("avx2,fma"))) static void panel_avx2(const entry_t *entries, const int64_t *starts, int64_t rows,
                                                           const float *x, float *y) {
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000u);
    for (int64_t row = 0; row < rows; row++, y += TILE) {
        __m256 s0 = _mm256_loadu_ps(y), s1 = _mm256_loadu_ps(y + 8), s2 = _mm256_loadu_ps(y + 16),
               s3 = _mm256_loadu_ps(y + 24), s4 = _mm256_loadu_ps(y + 32), s5 = _mm256_loadu_ps(y + 40),
               s6 = _mm256_loadu_ps(y + 48), s7 = _mm256_loadu_ps(y + 56);
        for (int64_t at = starts[row]; at < starts[row + 1]; at++) {
            const __m256 value =
                _mm256_castsi256_ps(_mm256_and_si256(_mm256_set1_epi32((int)entries[at]), upper));
            const float *column = x + (entries[at] & 0xffffu) * TILE;
            s0 = _mm256_fmadd_ps(value, _mm256_loadu_ps(column), s0);
            s1 = _mm256_fmadd_ps(value, _mm256_loadu_ps(column + 8), s1);
            s2 = _mm256_fmadd_ps(value, _mm256_loadu_ps(column + 16), s2);
            s3 = _mm256_fmadd_ps(value, _mm256_loadu_ps(column + 24), s3);
            s4 = _mm256_fmadd_ps(value, _mm256_loadu_ps(column + 32), s4);
            s5 = _mm256_fmadd_ps(value, _mm256_loadu_ps(column + 40), s5);
            s6 = _mm256_fmadd_ps(value, _mm256_loadu_ps(column + 48), s6);
            s7 = _mm256_fmadd_ps(value, _mm256_loadu_ps(column + 56), s7);
        }
        _mm256_storeu_ps(y, s0), _mm256_storeu_ps(y + 8, s1), _mm256_storeu_ps(y + 16, s2), _mm256_storeu_ps(y + 24, s3);
        _mm256_storeu_ps(y + 32, s4), _mm256_storeu_ps(y + 40, s5), _mm256_storeu_ps(y + 48, s6), _mm256_storeu_ps(y + 56, s7);
    }
}
#endif

static panel_t *best_panel(void) {
#if ARMOR_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return panel_avx2;
#endif
    return panel_plain;
}

/* out[c * TILE + t] = in[t * stride + c] for c < columns, t < tokens <= TILE; zeros beyond the tokens. */
static void lay_out(const float *in, int64_t stride, int64_t tokens, int64_t columns, float *out) {
    if (tokens < TILE) memset(out, 0, (size_t)columns * TILE * sizeof *out);
    for (int64_t t = 0; t < tokens; t += 8) {
        const int64_t most = tokens - t < 8 ? tokens - t : 8;
        for (int64_t c = 0; c < columns; c++)
            for (int64_t i = 0; i < most; i++) out[c * TILE + t + i] = in[(t + i) * stride + c];
    }
}

static void lay_back(const float *in, int64_t stride, int64_t tokens, int64_t rows, float *out) {
    for (int64_t r = 0; r < rows; r += 8) {
        const int64_t most = rows - r < 8 ? rows - r : 8;
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t i = 0; i < most; i++) out[t * stride + r + i] = in[(r + i) * TILE + t];
    }
}

/* x (tokens, columns), y (tokens, rows); starts (panels, rows + 1); scratch: PANEL * TILE + rows * TILE floats. `plain` keeps to C. */
EXPORT void armor_product(const float *x, float *y, const entry_t *entries, const int64_t *starts, float *scratch,
                          int64_t tokens, int64_t columns, int64_t rows, int64_t plain) {
    panel_t *const panel = plain ? panel_plain : best_panel();
    float *const tile = scratch, *const sums = scratch + PANEL * TILE;
    for (int64_t token = 0; token < tokens; token += TILE) {
        const int64_t count = tokens - token < TILE ? tokens - token : TILE;
        memset(sums, 0, (size_t)(rows * TILE) * sizeof *sums);
        for (int64_t begin = 0, number = 0; begin < columns; begin += PANEL, number++) {
            const int64_t width = columns - begin < PANEL ? columns - begin : PANEL;
            lay_out(x + token * columns + begin, columns, count, width, tile);
            panel(entries, starts + number * (rows + 1), rows, tile, sums);
        }
        lay_back(sums, rows, count, rows, y + token * rows);
    }
}
