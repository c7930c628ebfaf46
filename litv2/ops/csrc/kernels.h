// SPDX-License-Identifier: Apache-2.0
// The loops that the processor's vectors carry, float32. kernels.inl has them once; three files compile it, one per
// instruction set, and `kernels()` picks the widest that the processor runs.

#pragma once

#include <cstdint>

namespace litv2::native {

// Maps are channels-last: a row is `width` tokens of `channels` floats. A packed matrix (K x N) is cut into panels of
// `panel` columns, each K x panel and contiguous, the last filled up with zeros; results are written by whole panels,
// so their rows must have room for N rounded up.
struct Kernels {
  const char* name;
  int64_t panel;

  // C (M x N) = start + more + A (M x K) B. start has the rows of C, one for all with a stride of 0 (a bias), and may be C; more
  // has rows of one panel and needs N to be one; where one is nullptr it is 0. panel_stride is between panels of B; what is so
  // far after the last is fetched too.
  void (*product)(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B, int64_t panel_stride,
                  const float* start, int64_t start_stride, float* C, int64_t ldc, const float* more);

  // Rows of K numbers rounded to the nearest bfloat16 (its bits), one after the other.
  void (*to_bfloat16)(int64_t M, int64_t K, const float* A, int64_t lda, uint16_t* out);

  // Numbers in bfloat16 (their bits) as floats.
  void (*to_float32)(int64_t count, const uint16_t* x, float* out);

  // Rows of K numbers as bytes q, one after the other: each number is close to scale * (q - zero) with the scale and zero
  // of its row. The scale of a row that is not finite is NaN.
  void (*to_bytes)(int64_t M, int64_t K, const float* A, int64_t lda, uint8_t* out, float* scale, int32_t* zero);

  // The floats of M x kColumns sums of products of bytes: start + scale[m] * scales[n] * (sums - zero[m] * weights[n]),
  // where weights[n] is the sum of a column of B.
  void (*from_sums)(int64_t M, const int32_t* sums, const float* scale, const int32_t* zero, const float* scales,
                    const int32_t* weights, const float* start, int64_t start_stride, float* C, int64_t ldc);

  // Rows of `channels` normalised, scaled and shifted.
  void (*layer_norm)(int64_t rows, int64_t channels, const float* x, int64_t ldx, const float* weight,
                     const float* bias, float eps, float* out);

  // out = x + factor * y, row by row.
  void (*add)(int64_t rows, int64_t channels, const float* x, int64_t ldx, float factor, const float* y, int64_t ldy, float* out,
              int64_t ldo);

  // Whether all numbers are finite.
  bool (*finite)(int64_t rows, int64_t channels, const float* x, int64_t ldx);

  // The mean of each `size` rows of `channels`.
  void (*means)(int64_t count, int64_t size, int64_t channels, const float* x, float* out);

  // out = gelu(x), rows of `channels`.
  void (*gelu)(int64_t rows, int64_t channels, const float* x, int64_t ldx, float* out);

  // One row of the grid of a 2 x 2 deformable convolution with stride 2: for each of `width` places the bilinear
  // samples of its four taps, channels each, from an image of in_height x in_width tokens. offsets: (y, x) per tap,
  // `ldo` floats from place to place.
  void (*deformed_patches)(int64_t row, int64_t width, const float* image, int64_t in_height, int64_t in_width,
                           int64_t channels, const float* offsets, int64_t ldo, float* out);

  // One row of a 3 x 3 depthwise convolution with zero padding, then GELU. above, here, below: width x channels each,
  // `stride` floats between tokens; a row outside of the map is a row of zeros. weight is (9, ...) with `ldw` floats
  // between taps.
  void (*depthwise_gelu)(int64_t width, int64_t channels, const float* above, const float* here, const float* below,
                         int64_t stride, const float* weight, int64_t ldw, const float* bias, float* out,
                         int64_t out_stride);
  // The same with a polynomial for GELU, absolute error 5e-5: for results that are rounded to bfloat16 or bytes.
  void (*depthwise_fast_gelu)(int64_t width, int64_t channels, const float* above, const float* here,
                              const float* below, int64_t stride, const float* weight, int64_t ldw, const float* bias,
                              float* out, int64_t out_stride);

  // Softmax attention of T queries (rows, already scaled) to M keys, of one head. keys: d x M packed; values: M x d
  // packed. scratch has room for attention_scratch(M, d) floats.
  void (*attention)(int64_t T, int64_t M, int64_t d, const float* queries, int64_t ldq, const float* keys,
                    const float* values, float* out, int64_t ldo, float* scratch);
  int64_t (*attention_scratch)(int64_t M, int64_t d);

  // Softmax attention inside of windows of `size` tokens, one after the other, of one head: of a token of qkv, `ldq` floats
  // from the next, the queries are first, keys and values after `channels` and 2 * `channels` floats. scratch has room for
  // size * (size + 16) floats.
  void (*window_attention)(int64_t windows, int64_t size, int64_t d, const float* qkv, int64_t ldq, int64_t channels,
                           float* out, int64_t ldo, float* scratch);

  // The gradient before the GELU of a row of depthwise_gelu, from that of its result; those of the weight and the bias
  // are added to sums (10 x channels). Tokens are `channels` floats apart.
  void (*depthwise_gelu_gradient)(int64_t width, int64_t channels, const float* above, const float* here,
                                  const float* below, const float* weight, const float* bias, const float* gradient,
                                  float* out, float* sums);
  // The convolution alone, without a bias.
  void (*depthwise)(int64_t width, int64_t channels, const float* above, const float* here, const float* below,
                    int64_t stride, const float* weight, int64_t ldw, float* out, int64_t out_stride);
};

// Results of products of lower precision are written by so many columns.
constexpr int64_t kColumns = 32;

// Of one panel, in product_avx512.cpp: C (M x kColumns) = start + A (M x K) B of bfloat16 bits with sums in float32, K even,
// B with the rows of two inputs interleaved; numbers rounded to bfloat16, K a multiple of 32; and C = A B of bytes,
// unsigned in A and signed in B, K a multiple of 4, B with the rows of four inputs interleaved.
void avx512_bfloat16_product(int64_t M, int64_t K, const uint16_t* A, const uint16_t* B, const float* start,
                             int64_t start_stride, float* C, int64_t ldc);
void avx512_to_bfloat16(int64_t M, int64_t K, const float* A, int64_t lda, uint16_t* out);
void avx512_int8_product(int64_t M, int64_t K, const uint8_t* A, const int8_t* B, int32_t* C);

extern const Kernels baseline_kernels, avx2_kernels, avx512_kernels;
const Kernels& kernels();

}  // namespace litv2::native
