// SPDX-License-Identifier: Apache-2.0
// What a device brings to the deformable convolution: the two passes around its matrix products.

#pragma once

#include <ATen/core/Tensor.h>

#include "sample.h"

namespace litv2::dcn {

// A chunk is `count` output positions from `first` on. Offsets, masks and every gradient but the columns' have the
// accumulation dtype (accumulate_t). A tensor that is not defined is absent (mask) or not wanted (gradients).
struct Kernels {
  // input (B, H, W, C) contiguous -> columns (groups, count, taps * C / groups)
  void (*gather)(const Geometry&, int64_t first, int64_t count, const at::Tensor& input, const at::Tensor& offset,
                 const at::Tensor& mask, const at::Tensor& columns);
  // column_gradient, like columns -> is added to input_gradient (B, H, W, C), and fills the chunk's part of
  // offset_gradient (see offset_gradient_start) and of mask_gradient, which has half its size.
  void (*scatter)(const Geometry&, int64_t first, int64_t count, const at::Tensor& column_gradient,
                  const at::Tensor& input, const at::Tensor& offset, const at::Tensor& mask,
                  const at::Tensor& input_gradient, const at::Tensor& offset_gradient, const at::Tensor& mask_gradient);
  // Into how many independent (image, channel block) pieces scatter's work should be cut at least.
  int64_t (*pieces)();
};

extern const Kernels cpu_kernels;
// The rest only where DCN_WITH_CUDA is defined.
extern const Kernels cuda_kernels;
// Whether the current GPU is one of those that the kernels were compiled for.
bool cuda_kernels_fit();

template <typename T>
T* pointer(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.data_ptr<T>() : nullptr;
}

}  // namespace litv2::dcn
