// SPDX-License-Identifier: Apache-2.0
// Products with packed weights. Those in bfloat16 and int8 are oneDNN's where the processor has matrix units (AMX), else our
// own (product_avx512.cpp) where it has the instructions; where it has neither, plain loops compute the same, for tests.

#include <ATen/native/CPUBlas.h>

#include "operators.h"

namespace litv2::native {

namespace {

// C (M x kColumns) = start + A (M x K) B.
using Bfloat16Product = void (*)(int64_t M, int64_t K, const uint16_t* A, const uint16_t* B, const float* start,
                                 int64_t start_stride, float* C, int64_t ldc);
// C (M x kColumns) = A (M x K) B.
using Int8Product = void (*)(int64_t M, int64_t K, const uint8_t* A, const int8_t* B, int32_t* C);

void plain_bfloat16_product(int64_t M, int64_t K, const uint16_t* A, const uint16_t* B, const float* start,
                            int64_t start_stride, float* C, int64_t ldc) {
  const auto value = [](uint16_t bits) { return static_cast<float>(at::BFloat16(bits, at::BFloat16::from_bits())); };
  for (int64_t m = 0; m < M; ++m, A += K, C += ldc) {
    float sum[kColumns];
    for (int64_t n = 0; n < kColumns; ++n) sum[n] = start != nullptr ? start[m * start_stride + n] : 0.0f;
    for (int64_t k = 0; k < K; k += 2) {
      const float first = value(A[k]), second = value(A[k + 1]);
      const uint16_t* pairs = B + k * kColumns;
      for (int64_t n = 0; n < kColumns; ++n) sum[n] += first * value(pairs[2 * n]) + second * value(pairs[2 * n + 1]);
    }
    std::copy_n(sum, kColumns, C);
  }
}

void plain_int8_product(int64_t M, int64_t K, const uint8_t* A, const int8_t* B, int32_t* C) {
  for (int64_t m = 0; m < M; ++m, A += K, C += kColumns) {
    std::fill_n(C, kColumns, 0);
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t n = 0; n < kColumns; ++n) C[n] += int32_t(A[k]) * B[k / 4 * 4 * kColumns + 4 * n + k % 4];
    }
  }
}

void onednn_bfloat16_product(int64_t M, int64_t K, const uint16_t* A, const uint16_t* B, const float* start,
                             int64_t start_stride, float* C, int64_t ldc) {
  if (start != nullptr && start != C) {
    for (int64_t m = 0; m < M; ++m) std::copy_n(start + m * start_stride, kColumns, C + m * ldc);
  }
  at::native::cpublas::brgemm(M, kColumns, K, K, kColumns, ldc, start != nullptr,
                              reinterpret_cast<const at::BFloat16*>(A), reinterpret_cast<const at::BFloat16*>(B), C);
}

// One dtype's.
struct Backend {
  const char* name;  // nullptr for the loops
  Bfloat16Product bfloat16 = nullptr;
  Int8Product int8 = nullptr;
  decltype(Kernels::to_bfloat16) to_bfloat16 = nullptr;  // better than the kernels' own
};

// Not where LITV2_NATIVE_KERNELS asks for those of a lesser processor.
bool has_matrix_units(at::ScalarType dtype) {
#ifdef __x86_64__
  return &kernels() == &avx512_kernels && at::native::cpublas::could_pack(dtype);
#else
  return false;
#endif
}

Backend bfloat16_backend() {
  if (has_matrix_units(at::kBFloat16)) return {"oneDNN", onednn_bfloat16_product};
#ifdef __x86_64__
  if (&kernels() == &avx512_kernels && __builtin_cpu_supports("avx512bf16"))
    return {"AVX-512 BF16", avx512_bfloat16_product, nullptr, avx512_to_bfloat16};
#endif
  return {nullptr, plain_bfloat16_product};
}

Backend int8_backend() {
#ifdef CPUBLAS_BRGEMM_U8I8I32  // torch 2.7 and later
  if (has_matrix_units(at::kChar)) {
    return {"oneDNN", nullptr, [](int64_t M, int64_t K, const uint8_t* A, const int8_t* B, int32_t* C) {
              at::native::cpublas::brgemm(M, kColumns, K, K, kColumns, kColumns, false, A, B, C);
            }};
  }
#endif
#ifdef __x86_64__
  if (&kernels() == &avx512_kernels && __builtin_cpu_supports("avx512vnni"))
    return {"AVX-512 VNNI", nullptr, avx512_int8_product};
#endif
  return {nullptr, nullptr, plain_int8_product};
}

const Backend& chosen(at::ScalarType dtype) {
  static const Backend bfloat16 = bfloat16_backend(), int8 = int8_backend();
  return dtype == at::kBFloat16 ? bfloat16 : int8;
}

std::string name(at::ScalarType dtype) { return chosen(dtype).name == nullptr ? "" : chosen(dtype).name; }

// In memory of T, a multiple of 64 bytes away from others.
template <typename T>
T* take(Scratch& scratch, int64_t count) {
  return reinterpret_cast<T*>(scratch.take((count * sizeof(T) + sizeof(float) - 1) / sizeof(float)));
}

}  // namespace

std::string bfloat16_kernels() { return name(at::kBFloat16); }
std::string int8_kernels() { return name(at::kChar); }

Factor::Factor(const Matrix& B, int64_t M, int64_t K, Scratch& scratch) : dtype_(B.dtype), K_(K) {
  if (dtype_ == at::kBFloat16) bfloat16s_ = take<uint16_t>(scratch, M * K);
  if (dtype_ == at::kChar) {
    bytes_ = take<uint8_t>(scratch, M * K);
    scale_ = take<float>(scratch, M);
    zero_ = take<int32_t>(scratch, M);
  }
}

void Factor::set(const Kernels& k, int64_t first, int64_t count, const float* A, int64_t lda) {
  if (dtype_ == at::kFloat) {
    floats_ = A - first * lda, lda_ = lda;
  } else if (dtype_ == at::kChar) {
    k.to_bytes(count, K_, A, lda, bytes_ + first * K_, scale_ + first, zero_ + first);
  } else {
    const auto own = chosen(dtype_).to_bfloat16;
    (own != nullptr ? own : k.to_bfloat16)(count, K_, A, lda, bfloat16s_ + first * K_);
  }
}

namespace {

// C (M x N) = start + A (M x depth) B for pairs of panels and even M and depth, by Strassen's algorithm in Winograd's form: of the
// quarters of A, of B (half the depth of a panel each) and of C, 7 products instead of 8. `sums` are those of B's, see pack_floats.
void strassen(const Kernels& k, int64_t M, int64_t N, int64_t depth, int64_t K, const float* A, int64_t lda, const float* panels,
              const float* sums, const float* start, int64_t start_stride, float* C, int64_t ldc) {
  const int64_t rows = M / 2, half = depth / 2, panel = k.panel, quarter = half * panel;
  Scratch scratch;
  const auto take = [&](int64_t columns) { return scratch.take(rows * columns); };
  float *s1 = take(half), *s2 = take(half), *s3 = take(half), *s4 = take(half), *x = take(panel), *y = take(panel), *z = take(panel);
  const float *a11 = A, *a12 = A + half, *a21 = A + rows * lda, *a22 = a21 + half;
  k.add(rows, half, a21, lda, 1.0f, a22, lda, s1, half);
  k.add(rows, half, s1, half, -1.0f, a11, lda, s2, half);
  k.add(rows, half, a11, lda, -1.0f, a21, lda, s3, half);
  k.add(rows, half, a12, lda, -1.0f, s2, half, s4, half);
  if (!k.finite(rows, half, s4, half)) {  // holds all of A: a token that is not finite would reach others
    k.product(M, N, depth, A, lda, panels, panel * K, start, start_stride, C, ldc, nullptr);
    return;
  }
  // c = from + more + a b. `next` is what b is next.
  const auto times = [&](const float* a, int64_t lda, const float* b, const float* next, const float* from, int64_t stride,
                         const float* more, float* c, int64_t ldc) {
    k.product(rows, panel, half, a, lda, b, next - b, from, stride, c, ldc, more);
  };
  for (int64_t n = 0; n < N; n += 2 * panel) {
    const float *b11 = panels + n * K, *b21 = b11 + quarter, *b12 = b11 + K * panel, *b22 = b12 + quarter;
    const float *t1 = sums + n * K, *t2 = t1 + quarter, *t3 = t2 + quarter, *t4 = t3 + quarter;
    float *c11 = C + n, *c12 = c11 + panel, *c21 = c11 + rows * ldc, *c22 = c21 + panel;
    const float *from11 = start + n, *from12 = from11 + panel, *from21 = from11 + rows * start_stride, *from22 = from21 + panel;
    times(a11, lda, b11, b21, nullptr, 0, nullptr, x, panel);
    times(a12, lda, b21, t2, from11, start_stride, x, c11, ldc);
    times(s2, half, t2, t3, x, panel, nullptr, x, panel);
    times(s3, half, t3, t4, x, panel, nullptr, y, panel);
    times(a22, lda, t4, t1, from21, start_stride, y, c21, ldc);
    times(s1, half, t1, b22, nullptr, 0, nullptr, z, panel);
    k.add(rows, panel, y, panel, 1.0f, z, panel, y, panel);
    k.add(rows, panel, from22, start_stride, 1.0f, y, panel, c22, ldc);
    k.add(rows, panel, x, panel, 1.0f, z, panel, x, panel);
    times(s4, half, b22, b11 + 2 * K * panel, from12, start_stride, x, c12, ldc);
  }
}

constexpr int64_t kManyRows = 64;  // with fewer Strassen's quarters do not hide the time to read them

void float_product(const Kernels& k, int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const Matrix& B, int64_t row,
                   int64_t column, const float* start, int64_t start_stride, float* C, int64_t ldc) {
  const int64_t panel = k.panel, pair = 2 * panel;
  const float* panels = static_cast<const float*>(B.panels) + column * B.K + row * panel;
  const auto plain = [&](int64_t m, int64_t M, int64_t n, int64_t N) {
    k.product(M, N, K, A + m * lda, lda, panels + n * B.K, panel * B.K, start != nullptr ? start + m * start_stride + n : nullptr,
              start_stride, C + m * ldc + n, ldc, nullptr);
  };
  const int64_t pairs = strassen_pairs(B.K, B.count), whole = std::min(N / pair, pairs - column / pair) * pair;
  const bool blocks = row % kStrassenDepth == 0 && (K % kStrassenDepth == 0 || row + K == B.K) && column % pair == 0;
  if (M < kManyRows || whole <= 0 || start == nullptr || !blocks) return plain(0, M, 0, N);
  const int64_t even = M / 2 * 2;
  plain(even, M - even, 0, N);
  plain(0, even, whole, N - whole);
  const float* sums = static_cast<const float*>(B.panels) + (B.count * panel + column) * B.K + 2 * row * panel;
  for (int64_t k0 = 0; k0 < K; k0 += kStrassenDepth) {
    strassen(k, even, whole, std::min(kStrassenDepth, K - k0), B.K, A + k0, lda, panels + k0 * panel, sums + 2 * k0 * panel, start,
             start_stride, C, ldc);
    start = C, start_stride = ldc;
  }
}

}  // namespace

void product(const Kernels& k, int64_t M, const Factor& A, const Matrix& B, int64_t row, int64_t column, int64_t N,
             const float* start, int64_t start_stride, float* C, int64_t ldc) {
  if (B.dtype == at::kFloat)
    return float_product(k, M, N, A.K_, A.floats_, A.lda_, B, row, column, start, start_stride, C, ldc);
  const auto from = [&](int64_t m, int64_t n) { return start != nullptr ? start + m * start_stride + n : nullptr; };
  const Backend& backend = chosen(B.dtype);
  if (B.dtype == at::kBFloat16) {
    const uint16_t* panels = static_cast<const uint16_t*>(B.panels) + column * B.K + row * kColumns;
    for (int64_t n = 0; n < N; n += kColumns)
      backend.bfloat16(M, A.K_, A.bfloat16s_, panels + n * B.K, from(0, n), start_stride, C + n, ldc);
  } else {
    constexpr int64_t kRows = 96;  // whose sums stay in the first cache
    alignas(64) int32_t sums[kRows * kColumns], weights[kColumns];
    for (int64_t n = 0; n < N; n += kColumns) {
      const auto* panel = static_cast<const int8_t*>(B.panels) + (column + n) / kColumns * int8_panel(B.K);
      const auto* scales = reinterpret_cast<const float*>(panel + B.K * kColumns);
      const auto* parts = reinterpret_cast<const int32_t*>(scales + kColumns) + row / kInputs * kColumns;
      std::copy_n(parts, kColumns, weights);
      for (int64_t i = kColumns; i < A.K_; ++i) weights[i % kColumns] += parts[i];
      for (int64_t m = 0; m < M; m += kRows) {
        const int64_t rows = std::min(kRows, M - m);
        backend.int8(rows, A.K_, A.bytes_ + m * A.K_, panel + row * kColumns, sums);
        k.from_sums(rows, sums, A.scale_ + m, A.zero_ + m, scales, weights, from(m, n), start_stride, C + m * ldc + n,
                    ldc);
      }
    }
  }
  if (has_matrix_units(B.dtype))
    at::native::cpublas::brgemm_release();  // what this thread computes next may set up the matrix unit anew
}

}  // namespace litv2::native
