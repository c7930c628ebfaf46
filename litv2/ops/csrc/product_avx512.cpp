// SPDX-License-Identifier: Apache-2.0
// The products of lower precision of x86-64 processors with AVX-512: bfloat16 (AVX-512 BF16: AMD from Zen 4 on, Intel
// from Cooper Lake on) and int8 (AVX-512 VNNI: AMD from Zen 4 on, Intel from Cascade Lake on).

#include "kernels.h"

#ifdef __x86_64__
#include <immintrin.h>

#include <cstring>

namespace litv2::native {
namespace {

// At each function, which clang understands too.
#define WITH_BFLOAT16 __attribute__((target("avx512f,avx512bf16")))
#define WITH_VNNI __attribute__((target("avx512f,avx512vnni")))

constexpr int kRows = 12;  // of a tile: 24 sums, two vectors of B and one of A are in registers
// GCC keeps the sums in registers only if it unrolls the loops over rows early, which it does if it is told to.
#define EACH_ROW _Pragma("GCC unroll 12") for (int i = 0; i < R; ++i)

// Four bytes, the inputs that one instruction sums, in every lane.
__attribute__((target("avx512f"))) inline __m512i inputs(const void* A) {
  int bytes;
  std::memcpy(&bytes, A, sizeof(bytes));
  return _mm512_set1_epi32(bytes);
}

template <int R>
WITH_BFLOAT16 inline void bfloat16_tile(int64_t K, const uint16_t* A, const uint16_t* B, const float* start,
                                        int64_t start_stride, float* C, int64_t ldc) {
  __m512 c[R][2];
  EACH_ROW {
    for (int j = 0; j < 2; ++j)
      c[i][j] = start != nullptr ? _mm512_loadu_ps(start + i * start_stride + 16 * j) : _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < K; k += 2, B += 64) {
    const auto b0 = (__m512bh)_mm512_loadu_si512(B), b1 = (__m512bh)_mm512_loadu_si512(B + 32);
    EACH_ROW {
      const auto a = (__m512bh)inputs(A + i * K + k);
      c[i][0] = _mm512_dpbf16_ps(c[i][0], a, b0);
      c[i][1] = _mm512_dpbf16_ps(c[i][1], a, b1);
    }
  }
  EACH_ROW {
    for (int j = 0; j < 2; ++j) _mm512_storeu_ps(C + i * ldc + 16 * j, c[i][j]);
  }
}

template <int R>
WITH_VNNI inline void int8_tile(int64_t K, const uint8_t* A, const int8_t* B, int32_t* C) {
  __m512i c[R][2];
  EACH_ROW {
    for (int j = 0; j < 2; ++j) c[i][j] = _mm512_setzero_si512();
  }
  for (int64_t k = 0; k < K; k += 4, B += 128) {
    const auto b0 = _mm512_loadu_si512(B), b1 = _mm512_loadu_si512(B + 64);
    EACH_ROW {
      const auto a = inputs(A + i * K + k);
      c[i][0] = _mm512_dpbusd_epi32(c[i][0], a, b0);
      c[i][1] = _mm512_dpbusd_epi32(c[i][1], a, b1);
    }
  }
  EACH_ROW {
    for (int j = 0; j < 2; ++j) _mm512_storeu_si512(C + 32 * i + 16 * j, c[i][j]);
  }
}

template <int R>
WITH_BFLOAT16 void last_bfloat16_rows(int64_t rows, int64_t K, const uint16_t* A, const uint16_t* B, const float* start,
                                      int64_t start_stride, float* C, int64_t ldc) {
  if constexpr (R > 0) {
    if (rows == R) return bfloat16_tile<R>(K, A, B, start, start_stride, C, ldc);
    last_bfloat16_rows<R - 1>(rows, K, A, B, start, start_stride, C, ldc);
  }
}

template <int R>
WITH_VNNI void last_int8_rows(int64_t rows, int64_t K, const uint8_t* A, const int8_t* B, int32_t* C) {
  if constexpr (R > 0) {
    if (rows == R) return int8_tile<R>(K, A, B, C);
    last_int8_rows<R - 1>(rows, K, A, B, C);
  }
}

}  // namespace

WITH_BFLOAT16 void avx512_bfloat16_product(int64_t M, int64_t K, const uint16_t* A, const uint16_t* B,
                                           const float* start, int64_t start_stride, float* C, int64_t ldc) {
  const auto from = [&](int64_t m) { return start != nullptr ? start + m * start_stride : nullptr; };
  int64_t m = 0;
  for (; m + kRows <= M; m += kRows)
    bfloat16_tile<kRows>(K, A + m * K, B, from(m), start_stride, C + m * ldc, ldc);
  last_bfloat16_rows<kRows - 1>(M - m, K, A + m * K, B, from(m), start_stride, C + m * ldc, ldc);
}

WITH_BFLOAT16 void avx512_to_bfloat16(int64_t M, int64_t K, const float* A, int64_t lda, uint16_t* out) {
  for (int64_t m = 0; m < M; ++m, A += lda, out += K) {
    for (int64_t k = 0; k < K; k += 32) {
      const auto low = _mm512_loadu_ps(A + k), high = _mm512_loadu_ps(A + k + 16);
      _mm512_storeu_si512(out + k, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }
}

WITH_VNNI void avx512_int8_product(int64_t M, int64_t K, const uint8_t* A, const int8_t* B, int32_t* C) {
  int64_t m = 0;
  for (; m + kRows <= M; m += kRows) int8_tile<kRows>(K, A + m * K, B, C + 32 * m);
  last_int8_rows<kRows - 1>(M - m, K, A + m * K, B, C + 32 * m);
}

}  // namespace litv2::native
#endif
