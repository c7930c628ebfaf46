// SPDX-License-Identifier: Apache-2.0
// For every processor: vectors of four floats.

#include "kernels.h"
#include "sample.h"

#define VECTOR_FLOATS 4
#define PRODUCT_ROWS 6
#define KERNELS baseline_kernels
#define KERNELS_NAME "baseline"
#include "kernels.inl"
