/* What this extension's loops share: versions for wider vectors, chosen as it is loaded, and one row added to another. */
#ifndef ARMOR_SOLVER_VECTORS_H
#define ARMOR_SOLVER_VECTORS_H

#include <stdint.h>

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12 /* the first to know x86-64-v4 here */
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

#if defined(__GNUC__) || defined(__clang__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

/* y[0..n) += alpha * x[0..n) */
INLINE void axpy(float *restrict y, const float *restrict x, float alpha, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] += alpha * x[i];
}
#endif
