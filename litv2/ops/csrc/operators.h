// What the operators share: checks, scratch memory, and how work is divided among threads.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace litv2::native {

using at::Tensor;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline const float* pointer(const Tensor& tensor) { return tensor.const_data_ptr<float>(); }

// Results of products are written by so many columns: their rows and biases are filled up to a multiple of it.
constexpr int64_t kColumns = 32;

// Of bfloat16 products: a multiple of it, what a tile of the matrix unit holds.
constexpr int64_t kInputs = 32;

// The weights (K x N) of a product, packed (module.cpp): float32, or bfloat16 for bfloat16 products.
struct Matrix {
  const float* floats;            // panels of kernels().panel columns
  const at::BFloat16* bfloat16s;  // or panels of kColumns, two rows interleaved
  int64_t K;
};

// C (M x N) = bias + A (M x K) B, B being K rows and N columns of the matrix from (row, column) on, or C += A B; see
// Kernels::product. In bfloat16 A is rounded to it, sums are float32; row and K are multiples of kInputs then.
void product(const Kernels& k, int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const Matrix& B,
             int64_t row, int64_t column, const float* bias, bool add, float* C, int64_t ldc);

// Who computes bfloat16 products on this processor, "" where it has no instructions for them.
std::string bfloat16_kernels();

inline Matrix packed(const char* name, const Tensor& weight, int64_t K, int64_t N) {
  const int64_t panel = kernels().panel;
  const bool floats =
      weight.scalar_type() == at::kFloat && weight.sizes() == at::IntArrayRef({round_up(N, panel) / panel, K, panel});
  const bool bfloat16s = weight.scalar_type() == at::kBFloat16 && K % kInputs == 0 &&
                         weight.sizes() == at::IntArrayRef({round_up(N, kColumns) / kColumns, K / 2, kColumns, 2});
  TORCH_CHECK_VALUE((floats || bfloat16s) && weight.is_contiguous(), name, ": ", weight.sizes(), " ",
                    weight.scalar_type(), ", expected weights of ", K, " inputs and ", N,
                    " outputs, packed by native_pack");
  return {floats ? weight.const_data_ptr<float>() : nullptr,
          bfloat16s ? weight.const_data_ptr<at::BFloat16>() : nullptr, K};
}

inline void check_sizes(const char* name, std::initializer_list<std::pair<Tensor, int64_t>> vectors) {
  for (const auto& [vector, size] : vectors)
    TORCH_CHECK_VALUE(vector.numel() == size && vector.is_contiguous() && vector.scalar_type() == at::kFloat, name,
                      ": ", vector.sizes(), " ", vector.scalar_type(), ", expected ", size, " float32 numbers");
}

inline Tensor checked_map(const char* name, const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.scalar_type() == at::kFloat && x.device().is_cpu() && x.size(1) > 0 &&
                        x.size(2) > 0 && x.size(3) > 0,
                    name, ": x is ", x.sizes(), " ", x.scalar_type(), " on ", x.device(),
                    ", expected a float32 map (B, H, W, C) on the CPU");
  return x.contiguous();
}

// Memory of a thread that outlives the call, so that it is not mapped anew for each; what was taken from it is given
// back at the end of the scope. A taken block stays where it is.
class Scratch {
 public:
  Scratch() : used_(0) {}
  float* take(int64_t floats) {
    auto& blocks = memory();
    if (used_ == blocks.size()) blocks.emplace_back();
    auto& block = blocks[used_++];
    if (static_cast<int64_t>(block.size()) < floats + 16) block.resize(floats + 16);  // 16: to align the address
    const auto address = reinterpret_cast<uintptr_t>(block.data());
    return block.data() + (64 - address % 64) % 64 / sizeof(float);
  }

 private:
  static std::vector<std::vector<float>>& memory() {
    static thread_local std::vector<std::vector<float>> blocks(8);
    return blocks;
  }
  size_t used_;
};

// The operators. Weights: as `litv2/ops/packing.py` packs them.
Tensor feed_forward(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps, const Tensor& fc1,
                    const Tensor& fc1_bias, const Tensor& depthwise, const Tensor& depthwise_bias, const Tensor& fc2,
                    const Tensor& fc2_bias);
Tensor hilo(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps, const Tensor& proj,
            const Tensor& proj_bias, const Tensor& kv, const Tensor& kv_bias, const Tensor& h_proj,
            const Tensor& h_proj_bias, const Tensor& l_proj, const Tensor& l_proj_bias, int64_t h_heads,
            int64_t l_heads, int64_t window_size);
Tensor patch_embed(const Tensor& image, int64_t patch, const Tensor& weight, const Tensor& bias,
                   const Tensor& norm_weight, const Tensor& norm_bias, double eps);
Tensor token_merging(const Tensor& x, const Tensor& offset_top, const Tensor& offset_bottom, const Tensor& offset_bias,
                     const Tensor& weight, const Tensor& bias, int64_t out_channels);
Tensor depthwise_gelu(const Tensor& x, const Tensor& weight, const Tensor& bias);
std::tuple<Tensor, Tensor, Tensor> depthwise_gelu_backward(const Tensor& gradient, const Tensor& x,
                                                           const Tensor& weight, const Tensor& bias);

}  // namespace litv2::native
