// SPDX-License-Identifier: Apache-2.0
// For x86-64 processors with AVX2 and FMA.

#include "kernels.h"
#include "sample.h"

#ifdef __x86_64__
#pragma GCC target("avx2,fma")
#define VECTOR_FLOATS 8
#define PRODUCT_ROWS 6
#define KERNELS avx2_kernels
#define KERNELS_NAME "AVX2"
#include "kernels.inl"
#endif
