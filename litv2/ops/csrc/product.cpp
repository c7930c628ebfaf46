// Products with packed weights. In bfloat16 they are oneDNN's where the processor has matrix units (AMX), else our own
// (product_avx512bf16.cpp) where it has AVX-512 BF16; where it has neither, a plain loop computes the same, for tests.

#include <ATen/native/CPUBlas.h>

#include "operators.h"

namespace litv2::native {

namespace {

// C (M x kColumns) = A (M x K) B, or C += A B.
using Bfloat16Product = void (*)(int64_t M, int64_t K, const at::BFloat16* A, const at::BFloat16* B, bool add, float* C,
                                 int64_t ldc);

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

void onednn_product(int64_t M, int64_t K, const at::BFloat16* A, const at::BFloat16* B, bool add, float* C,
                    int64_t ldc) {
  at::native::cpublas::brgemm(M, kColumns, K, K, kColumns, ldc, add, A, B, C);
}

struct Bfloat16Backend {
  const char* name;  // nullptr for the loop
  Bfloat16Product product;
};

Bfloat16Backend bfloat16_backend() {
  if (at::native::cpublas::could_pack(at::kBFloat16)) return {"oneDNN", onednn_product};
#ifdef __x86_64__
  if (&kernels() == &avx512_kernels && __builtin_cpu_supports("avx512bf16")) {
    return {"AVX-512 BF16", [](int64_t M, int64_t K, const at::BFloat16* A, const at::BFloat16* B, bool add, float* C,
                               int64_t ldc) {
              avx512bf16_product(M, K, reinterpret_cast<const uint16_t*>(A), reinterpret_cast<const uint16_t*>(B), add,
                                 C, ldc);
            }};
  }
#endif
  return {nullptr, plain_product};
}

const Bfloat16Backend& chosen() {
  static const Bfloat16Backend backend = bfloat16_backend();
  return backend;
}

}  // namespace

std::string bfloat16_kernels() { return chosen().name == nullptr ? "" : chosen().name; }

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
  const bool sum = add || bias != nullptr;
  for (int64_t n = 0; n < N; n += kColumns)
    chosen().product(M, K, a, B.bfloat16s + (column + n) * B.K + row * kColumns, sum, C + n, ldc);
  if (chosen().product == onednn_product)
    at::native::cpublas::brgemm_release();  // what this thread computes next may set up the matrix unit anew
}

}  // namespace litv2::native
