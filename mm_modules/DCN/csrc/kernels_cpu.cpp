// SPDX-License-Identifier: Apache-2.0
// The kernels on the CPU: threads by at::parallel_for, vectors by the compiler, one clone of each loop per instruction
// set.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include "kernels.h"

// One binary for every x86-64: the loader picks the clone that the processor can run. That is enough here, where the
// compiler chooses how wide the vectors are; litv2/ops/csrc has kernels written for a width, and a file for each.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define DCN_CLONES __attribute__((target_clones("default", "arch=haswell", "arch=x86-64-v4")))
#else
#define DCN_CLONES
#endif

namespace litv2::dcn {
namespace {

template <typename T>
struct Gather {
  using A = accumulate_t<T>;
  Geometry g;
  int64_t first, count;
  const T* input;
  const A *offset, *mask;
  T* columns;

  DCN_INLINE void run(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const SampleIndex s = decode(g, first * g.taps * g.blocks + i);
      gather(sample_corners(g, s, offset), sample_mask(g, s, mask), input + input_start(g, s), g.channels,
             columns + column_start(g, s, first, count), 0, g.block_channels, 1);
    }
  }
};

template <typename T>
struct Scatter {
  using A = accumulate_t<T>;
  Geometry g;
  int64_t first, count;
  const T *column_gradient, *input;
  const A *offset, *mask;
  A *input_gradient, *offset_gradient, *mask_gradient;

  // A piece is one channel block of one image: no two pieces write the same place.
  DCN_INLINE void run(int64_t begin, int64_t end) const {
    const int64_t per_image = g.out_height * g.out_width, channels = g.block_channels;
    for (int64_t piece = begin; piece < end; ++piece) {
      const auto [image, block] = divide(piece, g.blocks);
      const int64_t from = std::max(first, image * per_image), to = std::min(first + count, (image + 1) * per_image);
      for (int64_t position = from; position < to; ++position) {
        for (int64_t tap = 0; tap < g.taps; ++tap) {
          const SampleIndex s = sample_index(g, position, tap, block);
          const Corners<A> c = sample_corners(g, s, offset);
          const A m = sample_mask(g, s, mask);
          const T* gradient = column_gradient + column_start(g, s, first, count);
          if (input_gradient != nullptr)
            scatter(c, m, gradient, input_gradient + input_start(g, s), g.channels, channels);
          if (offset_gradient == nullptr && mask_gradient == nullptr) continue;
          A dot[4];
          dots(c, gradient, input + input_start(g, s), g.channels, dot, channels);
          store(sample_gradient(c, m, dot), offset_gradient_start(g, s), offset_gradient, mask_gradient);
        }
      }
    }
  }
};

#define DCN_INSTANTIATE(T)                                                                         \
  DCN_CLONES void run(const Gather<T>& pass, int64_t begin, int64_t end) { pass.run(begin, end); } \
  DCN_CLONES void run(const Scatter<T>& pass, int64_t begin, int64_t end) { pass.run(begin, end); }
DCN_INSTANTIATE(double)
DCN_INSTANTIATE(float)
DCN_INSTANTIATE(at::BFloat16)
DCN_INSTANTIATE(at::Half)

void gather_cpu(const Geometry& g, int64_t first, int64_t count, const at::Tensor& input, const at::Tensor& offset,
                const at::Tensor& mask, const at::Tensor& columns) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, input.scalar_type(), "deform_conv2d", [&] {
    using A = accumulate_t<scalar_t>;
    const Gather<scalar_t> pass{
        g, first, count, pointer<scalar_t>(input), pointer<A>(offset), pointer<A>(mask), pointer<scalar_t>(columns)};
    const int64_t grain = std::max<int64_t>(1, 16384 / g.block_channels);
    at::parallel_for(0, count * g.taps * g.blocks, grain, [&](int64_t begin, int64_t end) { run(pass, begin, end); });
  });
}

void scatter_cpu(const Geometry& g, int64_t first, int64_t count, const at::Tensor& column_gradient,
                 const at::Tensor& input, const at::Tensor& offset, const at::Tensor& mask,
                 const at::Tensor& input_gradient, const at::Tensor& offset_gradient, const at::Tensor& mask_gradient) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, input.scalar_type(), "deform_conv2d_backward", [&] {
    using A = accumulate_t<scalar_t>;
    const Scatter<scalar_t> pass{g,
                                 first,
                                 count,
                                 pointer<scalar_t>(column_gradient),
                                 pointer<scalar_t>(input),
                                 pointer<A>(offset),
                                 pointer<A>(mask),
                                 pointer<A>(input_gradient),
                                 pointer<A>(offset_gradient),
                                 pointer<A>(mask_gradient)};
    const int64_t per_image = g.out_height * g.out_width;
    const int64_t first_image = first / per_image, last_image = (first + count - 1) / per_image;
    at::parallel_for(first_image * g.blocks, (last_image + 1) * g.blocks, 1,
                     [&](int64_t begin, int64_t end) { run(pass, begin, end); });
  });
}

}  // namespace

const Kernels cpu_kernels = {gather_cpu, scatter_cpu, [] { return static_cast<int64_t>(at::get_num_threads()); }};

}  // namespace litv2::dcn
