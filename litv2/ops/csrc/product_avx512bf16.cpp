// The bfloat16 product of processors with AVX-512 BF16 (AMD from Zen 4 on, Intel from Cooper Lake on).

#include "kernels.h"

#ifdef __x86_64__
#include <immintrin.h>

#include <cstring>

namespace litv2::native {
namespace {

// At each function, which clang understands too.
#define WITH_BFLOAT16 __attribute__((target("avx512f,avx512bf16")))

constexpr int kRows = 12;  // of a tile: 24 sums, two vectors of B and one of A are in registers

template <int R>
WITH_BFLOAT16 inline void tile(int64_t K, const uint16_t* A, const uint16_t* B, bool add, float* C, int64_t ldc) {
  __m512 c[R][2];
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < 2; ++j) c[i][j] = add ? _mm512_loadu_ps(C + i * ldc + 16 * j) : _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < K; k += 2, B += 64) {
    const auto b0 = (__m512bh)_mm512_loadu_si512(B), b1 = (__m512bh)_mm512_loadu_si512(B + 32);
    for (int i = 0; i < R; ++i) {
      int pair;  // two inputs that follow each other
      std::memcpy(&pair, A + i * K + k, sizeof(pair));
      const auto a = (__m512bh)_mm512_set1_epi32(pair);
      c[i][0] = _mm512_dpbf16_ps(c[i][0], a, b0);
      c[i][1] = _mm512_dpbf16_ps(c[i][1], a, b1);
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < 2; ++j) _mm512_storeu_ps(C + i * ldc + 16 * j, c[i][j]);
  }
}

template <int R>
WITH_BFLOAT16 void last_rows(int64_t rows, int64_t K, const uint16_t* A, const uint16_t* B, bool add, float* C,
                             int64_t ldc) {
  if constexpr (R > 0) {
    if (rows == R) return tile<R>(K, A, B, add, C, ldc);
    last_rows<R - 1>(rows, K, A, B, add, C, ldc);
  }
}

}  // namespace

WITH_BFLOAT16 void avx512bf16_product(int64_t M, int64_t K, const uint16_t* A, const uint16_t* B, bool add, float* C,
                                      int64_t ldc) {
  int64_t m = 0;
  for (; m + kRows <= M; m += kRows) tile<kRows>(K, A + m * K, B, add, C + m * ldc, ldc);
  last_rows<kRows - 1>(M - m, K, A + m * K, B, add, C + m * ldc, ldc);
}

}  // namespace litv2::native
#endif
