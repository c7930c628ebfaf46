// SPDX-License-Identifier: Apache-2.0
// For x86-64 processors with AVX-512.

#include "kernels.h"
#include "sample.h"

#ifdef __x86_64__
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,fma")
#define VECTOR_FLOATS 16
#define PRODUCT_ROWS 14
#define KERNELS avx512_kernels
#define KERNELS_NAME "AVX-512"
#include "kernels.inl"
#endif
