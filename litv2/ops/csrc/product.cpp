// Products with packed weights. In bfloat16 they are oneDNN's, which uses the matrix units (AMX) and the bfloat16
// instructions that a processor has; where it has neither, a plain loop computes the same, for tests.

#include <ATen/native/CPUBlas.h>

#include "operators.h"

namespace litv2::native {

bool has_bfloat16() { return at::native::cpublas::could_pack(at::kBFloat16); }

namespace {

void plain_product(int64_t M, int64_t K, const at::BFloat16* A, const at::BFloat16* B, bool add, float* C,
                   int64_t ldc) {
  for (int64_t m = 0; m < M; ++m, A += K, C += ldc) {
    float sum[kColumns];
    for (int64_t n = 0; n < kColumns; ++n) sum[n] = add ? C[n] : 0.0f;
    for (int64_t k = 0; k < K; k += 2) {
      const float first = A[k], second = A[k + 1];
      const at::BFloat16* pairs = B + k * kColumns;
      for (int64_t n = 0; n < kColumns; ++n)
        sum[n] += first * static_cast<float>(pairs[2 * n]) + second * static_cast<float>(pairs[2 * n + 1]);
    }
    std::copy_n(sum, kColumns, C);
  }
}

}  // namespace

void product(const Kernels& k, int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const Matrix& B,
             int64_t row, int64_t column, const float* bias, bool add, float* C, int64_t ldc) {
  if (B.floats != nullptr)
    return k.product(M, N, K, A, lda, B.floats + column * B.K + row * k.panel, k.panel * B.K, bias, add, C, ldc);
  static thread_local std::vector<at::BFloat16> memory;
  if (static_cast<int64_t>(memory.size()) < M * K) memory.resize(M * K);
  at::BFloat16* a = memory.data();
  k.to_bfloat16(M, K, A, lda, reinterpret_cast<uint16_t*>(a));
  if (bias != nullptr) {
    for (int64_t m = 0; m < M; ++m) std::copy_n(bias, round_up(N, kColumns), C + m * ldc);
  }
  const bool sum = add || bias != nullptr, fast = has_bfloat16();
  for (int64_t n = 0; n < N; n += kColumns) {
    const at::BFloat16* b = B.bfloat16s + (column + n) * B.K + row * kColumns;
    if (fast)
      at::native::cpublas::brgemm(M, kColumns, K, K, kColumns, ldc, sum, a, b, C + n);
    else
      plain_product(M, K, a, b, sum, C + n, ldc);
  }
  if (fast) at::native::cpublas::brgemm_release();  // what this thread computes next may set up the matrix unit anew
}

}  // namespace litv2::native
