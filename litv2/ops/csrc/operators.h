// SPDX-License-Identifier: Apache-2.0
// What the operators share: checks, scratch memory, and how work is divided among threads.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace litv2::native {

using at::Tensor;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline const float* pointer(const Tensor& tensor) { return tensor.const_data_ptr<float>(); }

// Of products in lower precision: K is a multiple of it, what a tile of the matrix unit holds.
constexpr int64_t kInputs = 32;

constexpr int64_t kLargePage = 2 << 20;  // bytes

// The weights (K x N) of a product, packed (module.cpp and packing.py). The dtype is that of the product: both of its factors
// are rounded to it, sums are float32 or exact.
struct Matrix {
  at::ScalarType dtype;
  const void* panels;  // float32: of kernels().panel columns; else of kColumns, two (bfloat16) or four (int8) rows interleaved
  int64_t K, count;    // of the panels
};

// Strassen's algorithm (product.cpp) takes so many inputs at once, or what is left, and the float32 panels by two. Their number:
constexpr int64_t kStrassenDepth = 384;
inline int64_t strassen_pairs(int64_t K, int64_t panels) { return K % 64 == 0 && panels * kernels().panel >= 128 ? panels / 2 : 0; }

// Memory of whole pages of 2 MiB, if the system has such: a processor finds their places in memory, and reads ahead in them,
// at less cost than in pages of 4 KiB.
std::shared_ptr<char> large_pages(int64_t bytes);

// Memory of a thread that outlives the call, so that it is not mapped anew for each; what was taken from it is given
// back at the end of the scope. A taken block stays where it is.
class Scratch {
 public:
  Scratch() : before_(memory().position) {}
  ~Scratch() { memory().position = before_; }
  Scratch(const Scratch&) = delete;
  float* take(int64_t floats) {
    auto& [blocks, position] = memory();
    const int64_t bytes = round_up(floats * sizeof(float), 64);
    auto& [block, used] = position;
    if (used > 0 && used + bytes > blocks[block].bytes) ++block, used = 0;
    if (block == blocks.size()) blocks.emplace_back();
    if (used + bytes > blocks[block].bytes) blocks[block] = {large_pages(bytes), round_up(bytes, kLargePage)};  // nothing is taken of it
    used += bytes;
    return reinterpret_cast<float*>(blocks[block].start.get() + used - bytes);
  }

 private:
  struct Block {
    std::shared_ptr<char> start;
    int64_t bytes = 0;
  };
  struct Position {
    size_t block = 0;
    int64_t used = 0;  // bytes of it
  };
  struct Memory {
    std::vector<Block> blocks;
    Position position;
  };
  static Memory& memory() {
    static thread_local Memory memory;
    return memory;
  }
  Position before_;
};

// The left factor of products with a matrix, A (M x K), rounded as the matrix is, in memory of the scope: room for M x K.
class Factor {
 public:
  Factor(const Matrix& B, int64_t M, int64_t K, Scratch& scratch);

  // Rows from `first` on, read from A. For float32 nothing is copied: A must stay, and continue what was set before.
  void set(const Kernels& k, int64_t first, int64_t count, const float* A, int64_t lda);
  // From here on with fewer columns.
  void narrow(int64_t K) { K_ = K; }
  bool copies() const { return dtype_ != at::kFloat; }

 private:
  friend void product(const Kernels&, int64_t, const Factor&, const Matrix&, int64_t, int64_t, int64_t, const float*,
                      int64_t, float*, int64_t);
  at::ScalarType dtype_;
  int64_t K_, lda_ = 0;
  const float* floats_ = nullptr;
  uint16_t* bfloat16s_ = nullptr;
  uint8_t* bytes_ = nullptr;
  float* scale_ = nullptr;  // of the bytes, and the next too: see Kernels::to_bytes
  int32_t* zero_ = nullptr;
};

// C (M x N) = start + A (M x K) B, of the first M rows of A; B is K rows and N columns of the matrix from (row, column) on. start
// has the rows of C, one for all with a stride of 0 (a bias), and may be C; where it is nullptr the sums start at 0. In lower
// precision row and K are multiples of kInputs.
void product(const Kernels& k, int64_t M, const Factor& A, const Matrix& B, int64_t row, int64_t column, int64_t N,
             const float* start, int64_t start_stride, float* C, int64_t ldc);

// Who computes products in bfloat16 and in int8 on this processor, "" where it has no instructions for them.
std::string bfloat16_kernels();
std::string int8_kernels();

// Bytes of a panel of int8 weights: these, the scale of each column (float32), and the sums of its kInputs first weights, of
// the next and so on (int32).
inline int64_t int8_panel(int64_t K) { return kColumns * (K + 4 + 4 * (K / kInputs)); }

inline Matrix packed(const char* name, const Tensor& weight, int64_t K, int64_t N) {
  const auto dtype = weight.scalar_type();
  const int64_t panel = dtype == at::kFloat ? kernels().panel : kColumns, panels = round_up(N, panel) / panel;
  const bool fits =
      dtype == at::kFloat ? weight.sizes() == at::IntArrayRef({panels + 2 * strassen_pairs(K, panels), K, panel})
      : K % kInputs != 0  ? false
      : dtype == at::kBFloat16
          ? weight.sizes() == at::IntArrayRef({panels, K / 2, kColumns, 2})
          : dtype == at::kChar && weight.sizes() == at::IntArrayRef({panels, int8_panel(K)});
  TORCH_CHECK_VALUE(fits && weight.is_contiguous(), name, ": ", weight.sizes(), " ", dtype, ", expected weights of ", K,
                    " inputs and ", N, " outputs, packed by litv2.ops.packing.packed");
  return {dtype, weight.const_data_ptr(), K, panels};
}

inline void check_sizes(const char* name, std::initializer_list<std::pair<Tensor, int64_t>> vectors) {
  for (const auto& [vector, size] : vectors)
    TORCH_CHECK_VALUE(vector.numel() == size && vector.is_contiguous() && vector.scalar_type() == at::kFloat, name,
                      ": ", vector.sizes(), " ", vector.scalar_type(), ", expected ", size, " float32 numbers");
}

inline Tensor checked_map(const char* name, const Tensor& x, bool or_bfloat16 = false) {
  const bool known = x.scalar_type() == at::kFloat || (or_bfloat16 && x.scalar_type() == at::kBFloat16);
  TORCH_CHECK_VALUE(x.dim() == 4 && known && x.device().is_cpu() && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, name,
                    ": x is ", x.sizes(), " ", x.scalar_type(), " on ", x.device(), ", expected a float32 ",
                    or_bfloat16 ? "or bfloat16 " : "", "map (B, H, W, C) on the CPU");
  return x.contiguous();
}

// The operators. Weights: as `litv2/ops/packing.py` packs them.
Tensor feed_forward(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps, const Tensor& fc1,
                    const Tensor& fc1_bias, const Tensor& depthwise, const Tensor& depthwise_bias, const Tensor& fc2,
                    const Tensor& fc2_bias);
Tensor hilo(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps, const Tensor& proj,
            const Tensor& proj_bias, const Tensor& kv, const Tensor& kv_bias, const Tensor& h_proj,
            const Tensor& h_proj_bias, const Tensor& l_proj, const Tensor& l_proj_bias, int64_t h_heads,
            int64_t l_heads, int64_t window_size);
Tensor blocks(const Tensor& x, at::TensorList tensors, at::ArrayRef<double> eps, int64_t h_heads, int64_t l_heads,
              int64_t window_size);
Tensor classifier(const Tensor& image, int64_t patch, at::TensorList tensors, at::ArrayRef<double> eps, at::IntArrayRef stages,
                  int64_t classes);
Tensor patch_embed(const Tensor& image, int64_t patch, const Tensor& weight, const Tensor& bias,
                   const Tensor& norm_weight, const Tensor& norm_bias, double eps);
Tensor token_merging(const Tensor& x, const Tensor& offset_top, const Tensor& offset_bottom, const Tensor& offset_bias,
                     const Tensor& weight, const Tensor& bias, int64_t out_channels);
Tensor depthwise_gelu(const Tensor& x, const Tensor& weight, const Tensor& bias);
std::tuple<Tensor, Tensor, Tensor> depthwise_gelu_backward(const Tensor& gradient, const Tensor& x,
                                                           const Tensor& weight, const Tensor& bias);

}  // namespace litv2::native
