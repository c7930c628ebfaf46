// SPDX-License-Identifier: Apache-2.0
// Launches the kernels on CUDA, and sorts for the deterministic one.

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels.h"
#include "kernels_cuda.cuh"

namespace litv2::dcn {
namespace {

constexpr int64_t kMaxThreadBlocks = 1 << 16;  // more threads are looped over

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, int64_t threads, Arguments... arguments) {
  const auto blocks = static_cast<unsigned>(std::min(kMaxThreadBlocks, (threads + kThreads - 1) / kThreads));
  kernel<<<blocks, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(arguments...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

bool is_aligned(const at::Tensor& tensor, int bytes) {
  return !tensor.defined() || reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
}

// Calls function(chunk) with the chunk for vectors of 128 bits where sizes and addresses allow them.
template <typename T, typename Function>
void with_chunk(const Geometry& g, int64_t first, int64_t count, bool aligned, const Function& function) {
  constexpr int kVector = 16 / sizeof(T);
  if (aligned && g.block_channels % kVector == 0 && is_small(g, count)) {
    function(make_chunk<kVector>(g, first, count));
  } else {
    function(make_chunk<1>(g, first, count));
  }
}

void gather_cuda(const Geometry& g, int64_t first, int64_t count, const at::Tensor& input, const at::Tensor& offset,
                 const at::Tensor& mask, const at::Tensor& columns) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, input.scalar_type(), "deform_conv2d", [&] {
    using A = accumulate_t<scalar_t>;
    with_chunk<scalar_t>(g, first, count, is_aligned(input, 16) && is_aligned(columns, 16), [&](const auto& chunk) {
      constexpr int V = std::decay_t<decltype(chunk)>::kVector;
      launch(gather_kernel<V, scalar_t>, count * g.blocks * chunk.vectors, chunk, pointer<scalar_t>(input),
             pointer<A>(offset), pointer<A>(mask), pointer<scalar_t>(columns));
    });
  });
}

// Adds to the gradient of the input in a fixed order.
template <typename T, int V>
void collect(const Geometry& g, const Chunk<V>& chunk, const at::Tensor& column_gradient, const at::Tensor& offset,
             const at::Tensor& mask, const at::Tensor& input_gradient) {
  using A = accumulate_t<T>;
  using I = typename Chunk<V>::Index;
  const int64_t count = chunk.count, per_image = g.out_height * g.out_width;
  const int64_t first_image = chunk.first / per_image, last_image = (chunk.first + count - 1) / per_image;
  const int64_t pixels = (last_image - first_image + 1) * g.height * g.width, nowhere = pixels * g.offset_groups;
  const int64_t samples = count * g.taps * g.offset_groups;

  const auto indices = offset.options().dtype(c10::CppTypeToScalarType<I>::value);
  const at::Tensor entries = at::empty({4 * samples}, indices);
  launch(list_kernel<V, A>, samples, chunk, I(first_image), I(nowhere), pointer<A>(offset), pointer<I>(entries));
  const auto [sorted, order] = at::sort(entries, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const at::Tensor starts = at::searchsorted(sorted, at::arange(nowhere + 1, indices));
  launch(collect_kernel<V, T>, pixels * g.blocks * chunk.vectors, chunk, I(first_image), I(pixels),
         pointer<int64_t>(starts), pointer<int64_t>(order), pointer<A>(offset), pointer<A>(mask),
         pointer<T>(column_gradient), pointer<A>(input_gradient));
}

void scatter_cuda(const Geometry& g, int64_t first, int64_t count, const at::Tensor& column_gradient,
                  const at::Tensor& input, const at::Tensor& offset, const at::Tensor& mask,
                  const at::Tensor& input_gradient, const at::Tensor& offset_gradient,
                  const at::Tensor& mask_gradient) {
  // Nothing is left to alertNotDeterministic: the sums over channels and the matrix products have a fixed order anyway.
  const bool deterministic = input_gradient.defined() && at::globalContext().deterministicAlgorithms();
  const bool aligned = is_aligned(column_gradient, 16) && is_aligned(input, 16) && is_aligned(input_gradient, 32);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, input.scalar_type(), "deform_conv2d_backward", [&] {
    using A = accumulate_t<scalar_t>;
    with_chunk<scalar_t>(g, first, count, aligned, [&](const auto& chunk) {
      constexpr int V = std::decay_t<decltype(chunk)>::kVector;
      if (deterministic) collect<scalar_t>(g, chunk, column_gradient, offset, mask, input_gradient);
      if (deterministic && !offset_gradient.defined() && !mask_gradient.defined()) return;
      const int n = lanes_exponent(chunk.vectors);
      launch(scatter_kernel<V, scalar_t>, (count * g.blocks) << n, chunk, n, pointer<scalar_t>(column_gradient),
             pointer<scalar_t>(input), pointer<A>(offset), pointer<A>(mask),
             deterministic ? nullptr : pointer<A>(input_gradient), pointer<A>(offset_gradient),
             pointer<A>(mask_gradient));
    });
  });
}

}  // namespace

const Kernels cuda_kernels = {gather_cuda, scatter_cuda, [] { return int64_t(1); }};

bool cuda_kernels_fit() {
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, gather_kernel<1, float>) == cudaSuccess;
  static_cast<void>(cudaGetLastError());  // a missing kernel is an answer here, not an error of the next launch
  return found;
}

}  // namespace litv2::dcn
