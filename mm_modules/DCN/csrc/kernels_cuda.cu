// The kernels on CUDA: one warp per sample, its lanes side by side on the channels of channels-last memory.

#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels.h"

namespace litv2::dcn {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int64_t kMaxThreadBlocks = 1 << 16;  // more samples are looped over

__device__ int64_t first_sample() { return (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp; }
__device__ int64_t samples_at_once() { return int64_t(gridDim.x) * blockDim.x / kWarp; }

unsigned thread_blocks(int64_t samples) {
  return static_cast<unsigned>(std::min(kMaxThreadBlocks, (samples * kWarp + kThreads - 1) / kThreads));
}

template <typename A>
__device__ A sum_over_warp(A value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

template <typename T, typename A>
__global__ void gather_kernel(Geometry g, int64_t first, int64_t count, const T* input, const A* offset, const A* mask,
                              T* columns) {
  const int lane = threadIdx.x % kWarp;
  const int64_t samples = count * g.taps() * g.blocks;
  for (int64_t i = first_sample(); i < samples; i += samples_at_once()) {
    const SampleIndex s = decode(g, first * g.taps() * g.blocks + i);
    gather(sample_corners(g, s, offset), sample_mask(g, s, mask), input + input_start(g, s), g.channels,
           columns + column_start(g, s, first, count), lane, g.block_channels(), kWarp);
  }
}

template <typename T, typename A>
__global__ void scatter_kernel(Geometry g, int64_t first, int64_t count, const T* column_gradient, const T* input,
                               const A* offset, const A* mask, A* input_gradient, A* offset_gradient,
                               A* mask_gradient) {
  const int lane = threadIdx.x % kWarp;
  const int64_t samples = count * g.taps() * g.blocks;
  for (int64_t i = first_sample(); i < samples; i += samples_at_once()) {
    const SampleIndex s = decode(g, first * g.taps() * g.blocks + i);
    const Corners<A> c = sample_corners(g, s, offset);
    const A m = sample_mask(g, s, mask);
    const T* gradient = column_gradient + column_start(g, s, first, count);
    if (input_gradient != nullptr) {
      scatter(c, m, gradient, input_gradient + input_start(g, s), g.channels, lane, g.block_channels(), kWarp);
    }
    if (offset_gradient == nullptr && mask_gradient == nullptr) continue;
    A dot[4];
    dots(c, gradient, input + input_start(g, s), g.channels, dot, lane, g.block_channels(), kWarp);
    for (A& sum : dot) sum = sum_over_warp(sum);
    if (lane == 0) store(sample_gradient(c, m, dot), offset_gradient_start(g, s), offset_gradient, mask_gradient);
  }
}

void gather_cuda(const Geometry& g, int64_t first, int64_t count, const at::Tensor& input, const at::Tensor& offset,
                 const at::Tensor& mask, const at::Tensor& columns) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, input.scalar_type(), "deform_conv2d", [&] {
    using A = accumulate_t<scalar_t>;
    gather_kernel<scalar_t, A>
        <<<thread_blocks(count * g.taps() * g.blocks), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
            g, first, count, pointer<scalar_t>(input), pointer<A>(offset), pointer<A>(mask),
            pointer<scalar_t>(columns));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

void scatter_cuda(const Geometry& g, int64_t first, int64_t count, const at::Tensor& column_gradient,
                  const at::Tensor& input, const at::Tensor& offset, const at::Tensor& mask,
                  const at::Tensor& input_gradient, const at::Tensor& offset_gradient,
                  const at::Tensor& mask_gradient) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, input.scalar_type(), "deform_conv2d_backward", [&] {
    using A = accumulate_t<scalar_t>;
    scatter_kernel<scalar_t, A>
        <<<thread_blocks(count * g.taps() * g.blocks), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
            g, first, count, pointer<scalar_t>(column_gradient), pointer<scalar_t>(input), pointer<A>(offset),
            pointer<A>(mask), pointer<A>(input_gradient), pointer<A>(offset_gradient), pointer<A>(mask_gradient));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace

const Kernels cuda_kernels = {gather_cuda, scatter_cuda, [] { return int64_t(1); }};

}  // namespace litv2::dcn
