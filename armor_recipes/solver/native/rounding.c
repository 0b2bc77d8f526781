/* One pass over every value of a rounded core: the compiled form of armor_recipes/solver/rounding.py, which is its reference and
 * holds the mathematics. Compiled with -ffp-contract=off and without reassociation, so that every vector width gives the same
 * bits. Blocks [begin, end) of the J*K blocks are independent of each other. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "export.h"
#include "vectors.h"

/* The nearest float8_e4m3fn, of values that it holds: steps are an eighth of the power of two below, of 2^-6 at least. */
INLINE float nearest_float8(float x) {
    int exponent;
    frexpf(x, &exponent);
    const float step = ldexpf(1.0f, (exponent < -5 ? -5 : exponent) - 4);
    return rintf(x / step) * step;
}

INLINE float nearest(float x, float low, float high, int float8) {
    const float held = x < low ? low : x > high ? high : x;
    return float8 ? nearest_float8(held) : rintf(held);
}

/* All values of one block, row by row; correlation is updated for the rows below, shift holds delta_row * G_B. */
CLONES
static void round_block(float *p, float *s, const float *scale, const float *gram_a, const float *gram_b, float *shift,
                        int64_t rows, int64_t width, float low, float high, int float8) {
    for (int64_t r = 0; r < rows; r++) {
        const float pivot = gram_a[r * rows + r];
        if (!(pivot > 0.0f)) continue;
        memset(shift, 0, (size_t)width * sizeof(float));
        for (int64_t c = 0; c < width; c++) {
            const int64_t at = r * width + c;
            const float curvature = pivot * gram_b[c * width + c];
            if (!(scale[at] > 0.0f) || !(curvature > 0.0f)) continue;
            const float wanted = s[at] + (p[at] - pivot * shift[c]) / curvature;
            const float found = nearest(wanted / scale[at], low, high, float8) * scale[at];
            const float delta = found - s[at];
            if (delta == 0.0f) continue;
            s[at] = found;
            axpy(shift, gram_b + c * width, delta, width);
        }
        for (int64_t below = r + 1; below < rows; below++)
            axpy(p + below * width, shift, -gram_a[below * rows + r], width);
    }
}

/* correlation, core, scale (J,K,rows,width); gram_a (J,rows,rows); gram_b (K,width,width); shift (width) is scratch. */
EXPORT void armor_round(float *correlation, float *core, const float *scale, const float *gram_a, const float *gram_b,
                        float *shift, int64_t column_blocks, int64_t rows, int64_t width, int64_t low, int64_t high,
                        int64_t float8, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
        const int64_t j = block / column_blocks, k = block % column_blocks, at = block * rows * width;
        round_block(correlation + at, core + at, scale + at, gram_a + j * rows * rows, gram_b + k * width * width, shift,
                    rows, width, (float)low, (float)high, (int)float8);
    }
}
