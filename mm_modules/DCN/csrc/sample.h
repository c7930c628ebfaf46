// SPDX-License-Identifier: Apache-2.0
// The arithmetic of one sample of a deformable convolution, for the CPU's loops and the CUDA kernels alike.
//
// A sample is one (image, output position, tap, channel block): where it reads, what it gathers, what it scatters back.
// The loops over channels are the CPU's; threads.h has those of CUDA's threads. Indices are of 64 bits, on CUDA of 32
// where the sizes allow that.

#pragma once

#if defined(__FAST_MATH__)
#error "A NaN position must be known as one: compile the deformable convolution without -ffast-math"
#endif

#include <c10/macros/Macros.h>
#include <c10/util/BFloat16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(_OPENMP) && !defined(__CUDA_ARCH__)
#define DCN_SIMD(clauses) _Pragma(C10_STRINGIZE(omp simd clauses))
#else
#define DCN_SIMD(clauses)
#endif

#if defined(__CUDACC__)
#define DCN_INLINE __host__ __device__ __forceinline__
#else
#define DCN_INLINE inline __attribute__((always_inline))  // into each clone of the caller, see kernels_cpu.cpp
#endif

namespace litv2::dcn {

// float64 is computed in float64, everything else in float32: offsets, masks, bilinear weights and sums.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

// To the nearest T. The CPU's vectors need bfloat16 without a branch.
template <typename T, typename A>
DCN_INLINE T rounded(A value) {
#if !defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // ties to even
    return c10::BFloat16(static_cast<uint16_t>(value == value ? nearest : 0x7fc0), c10::BFloat16::from_bits());
  }
#endif
  return static_cast<T>(value);
}

// A strided map of numbers per position: offsets, or a mask. Any memory format, nothing is copied.
template <typename I>
struct Strides {
  I image, channel, row, column;
};

// I counts and D divides: a number of the same type, or a prepared one (Divisor of threads.h).
template <typename I, typename D = I>
struct GeometryOf {
  I batch, channels, height, width;  // of the input
  D out_height, out_width;           // of the output
  I kernel_h;
  D kernel_w, taps;
  I stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  I groups, group_channels;
  D offset_groups;
  D blocks;  // of channels; a multiple of groups and of offset_groups
  D blocks_per_group, blocks_per_offset_group;
  I block_channels;
  Strides<I> offset, mask;

  DCN_INLINE I positions() const { return batch * out_height * out_width; }
};
using Geometry = GeometryOf<int64_t>;

inline void set_blocks(Geometry& g, int64_t blocks) {
  g.blocks = blocks;
  g.blocks_per_group = blocks / g.groups;
  g.blocks_per_offset_group = blocks / g.offset_groups;
  g.block_channels = g.channels / blocks;
}

template <typename I>
struct QuotientRemainder {
  I quotient, remainder;
};

// Of numbers that are not negative. A 64-bit division takes several times as long as a 32-bit one.
DCN_INLINE QuotientRemainder<int64_t> divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) {
    const uint32_t quotient = static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    return {quotient, static_cast<int64_t>(static_cast<uint32_t>(a) - quotient * static_cast<uint32_t>(b))};
  }
  return {a / b, a % b};
}

template <typename I>
struct SampleIndex {
  I position;  // flat: (image, out_row, out_column)
  I image, out_row, out_column;
  I tap, tap_row, tap_column;
  I block, offset_group;
};

// Of the sample of (position, tap, block).
template <typename I, typename D>
DCN_INLINE SampleIndex<I> sample_index(const GeometryOf<I, D>& g, I position, I tap, I block) {
  const auto row = divide(position, g.out_width);
  const auto image = divide(row.quotient, g.out_height);
  const auto tap_row = divide(tap, g.kernel_w);
  return {position,
          image.quotient,
          image.remainder,
          row.remainder,
          tap,
          tap_row.quotient,
          tap_row.remainder,
          block,
          divide(block, g.blocks_per_offset_group).quotient};
}

// Of a flat number that counts blocks fastest, then taps, then positions.
DCN_INLINE SampleIndex<int64_t> decode(const Geometry& g, int64_t sample) {
  const auto block = divide(sample, g.blocks);
  const auto tap = divide(block.quotient, g.taps);
  return sample_index(g, tap.quotient, tap.remainder, block.remainder);
}

// The bilinear interpolation at one place: the pixels top left, top right, bottom left, bottom right and their weights.
template <typename A, typename I = int64_t>
struct Corners {
  using Index = I;
  I pixel[4];  // row * width + column; -1 outside the image
  A weight[4];
  A dy, dx;  // distances from the top left pixel
  bool nan;  // the position is NaN: the sample is NaN, and no pixel is read or written
  bool all_inside;
};

// The one test of bounds. It is positive (false for NaN), and every pass reads and writes just the pixels it names.
// At exactly -1 a sample is outside: it has no gradient there, as in the original operator (torchvision's has one).
template <typename A, typename I>
DCN_INLINE Corners<A, I> corners(A y, A x, I height, I width) {
  Corners<A, I> c;
  c.nan = y != y || x != x;
  const bool inside = y > -1 && x > -1 && y < static_cast<A>(height) && x < static_cast<A>(width);
  const A top = inside ? std::floor(y) : A(0), left = inside ? std::floor(x) : A(0);
  const I row = static_cast<I>(top), column = static_cast<I>(left);
  c.dy = inside ? y - top : A(0);
  c.dx = inside ? x - left : A(0);
  const bool up = inside && row >= 0, down = inside && row + 1 < height;
  const bool west = column >= 0, east = column + 1 < width;
  c.all_inside = up && down && west && east;
  const I pixel = row * width + column;
  c.pixel[0] = up && west ? pixel : -1;
  c.pixel[1] = up && east ? pixel + 1 : -1;
  c.pixel[2] = down && west ? pixel + width : -1;
  c.pixel[3] = down && east ? pixel + width + 1 : -1;
  c.weight[0] = (1 - c.dy) * (1 - c.dx);
  c.weight[1] = (1 - c.dy) * c.dx;
  c.weight[2] = c.dy * (1 - c.dx);
  c.weight[3] = c.dy * c.dx;
  return c;
}

// Where the sample reads, by the offsets of all images.
template <typename A, typename I, typename D>
DCN_INLINE Corners<A, I> sample_corners(const GeometryOf<I, D>& g, const SampleIndex<I>& s, const A* offset) {
  const A* dy = offset + s.image * g.offset.image + (s.offset_group * g.taps + s.tap) * 2 * g.offset.channel +
                s.out_row * g.offset.row + s.out_column * g.offset.column;
  const A y = static_cast<A>(s.out_row * g.stride_h - g.padding_h + s.tap_row * g.dilation_h) + dy[0];
  const A x =
      static_cast<A>(s.out_column * g.stride_w - g.padding_w + s.tap_column * g.dilation_w) + dy[g.offset.channel];
  return corners(y, x, g.height, g.width);
}

template <typename A, typename I, typename D>
DCN_INLINE A sample_mask(const GeometryOf<I, D>& g, const SampleIndex<I>& s, const A* mask) {
  if (mask == nullptr) return A(1);
  return mask[s.image * g.mask.image + (s.offset_group * g.taps + s.tap) * g.mask.channel + s.out_row * g.mask.row +
              s.out_column * g.mask.column];
}

// First channel of the sample's block at pixel 0 of its image, in a channels-last input.
template <typename I, typename D>
DCN_INLINE I input_start(const GeometryOf<I, D>& g, const SampleIndex<I>& s) {
  return s.image * g.height * g.width * g.channels + s.block * g.block_channels;
}

// First channel of the sample's block in the columns (groups, positions, taps, channels / groups) of a chunk of
// `count` positions from `first` on.
template <typename I, typename D>
DCN_INLINE I column_start(const GeometryOf<I, D>& g, const SampleIndex<I>& s, I first, I count) {
  const auto group = divide(s.block, g.blocks_per_group);
  return ((group.quotient * count + s.position - first) * g.taps + s.tap) * g.group_channels +
         group.remainder * g.block_channels;
}

// Place of a sample's offset gradient (y, then x) in (blocks per offset group, images, rows, columns, channels), and
// half of it is the place of its mask gradient in the same order.
template <typename I, typename D>
DCN_INLINE I offset_gradient_start(const GeometryOf<I, D>& g, const SampleIndex<I>& s) {
  const I part = s.block - s.offset_group * g.blocks_per_offset_group;
  return (((part * g.positions() + s.position) * g.offset_groups + s.offset_group) * g.taps + s.tap) * 2;
}

// column[i] = mask * interpolated input, for the channels i of the block. `input` is the image's first pixel.
template <typename T, typename A>
DCN_INLINE void gather(const Corners<A>& c, A mask, const T* input, int64_t channels, T* column, int64_t begin,
                       int64_t end, int64_t step) {
  if (c.all_inside) {
    const T *p0 = input + c.pixel[0] * channels, *p1 = input + c.pixel[1] * channels;
    const T *p2 = input + c.pixel[2] * channels, *p3 = input + c.pixel[3] * channels;
    const A w0 = c.weight[0], w1 = c.weight[1], w2 = c.weight[2], w3 = c.weight[3];
    DCN_SIMD()
    for (int64_t i = begin; i < end; i += step) {
      const A value = w0 * static_cast<A>(p0[i]) + w1 * static_cast<A>(p1[i]) + w2 * static_cast<A>(p2[i]) +
                      w3 * static_cast<A>(p3[i]);
      column[i] = rounded<T>(mask * value);
    }
    return;
  }
  for (int64_t i = begin; i < end; i += step) {
    A value = c.nan ? static_cast<A>(NAN) : A(0);
    for (int j = 0; j < 4; ++j) {
      if (c.pixel[j] >= 0) value += c.weight[j] * static_cast<A>(input[c.pixel[j] * channels + i]);
    }
    column[i] = rounded<T>(mask * value);
  }
}

// Adds the column's gradient to the pixels that the sample has read: the transpose of gather.
template <typename T, typename A>
DCN_INLINE void scatter(const Corners<A>& c, A mask, const T* column_gradient, A* input_gradient, int64_t channels,
                        int64_t block_channels) {
  for (int j = 0; j < 4; ++j) {
    if (c.pixel[j] < 0) continue;
    A* pixel = input_gradient + c.pixel[j] * channels;
    const A weight = mask * c.weight[j];
    DCN_SIMD()
    for (int64_t i = 0; i < block_channels; ++i) pixel[i] += weight * static_cast<A>(column_gradient[i]);
  }
}

// Sums over the block's channels of (gradient of the column) * (pixel), for the four corners; 0 outside.
template <typename T, typename A>
DCN_INLINE void dots(const Corners<A>& c, const T* column_gradient, const T* input, int64_t channels, A (&dot)[4],
                     int64_t block_channels) {
  for (int j = 0; j < 4; ++j) {
    A sum = 0;
    if (c.pixel[j] >= 0) {
      const T* p = input + c.pixel[j] * channels;
      DCN_SIMD(reduction(+ : sum))
      for (int64_t i = 0; i < block_channels; ++i) sum += static_cast<A>(column_gradient[i]) * static_cast<A>(p[i]);
    }
    dot[j] = sum;
  }
}

// Gradients of the sample's mask and displacement from the four dot products.
template <typename A>
struct SampleGradient {
  A mask, y, x;
};

template <typename A, typename I>
DCN_INLINE SampleGradient<A> sample_gradient(const Corners<A, I>& c, A mask, const A (&dot)[4]) {
  if (c.nan) return {static_cast<A>(NAN), static_cast<A>(NAN), static_cast<A>(NAN)};
  const A value = c.weight[0] * dot[0] + c.weight[1] * dot[1] + c.weight[2] * dot[2] + c.weight[3] * dot[3];
  const A along_y = (1 - c.dx) * (dot[2] - dot[0]) + c.dx * (dot[3] - dot[1]);
  const A along_x = (1 - c.dy) * (dot[1] - dot[0]) + c.dy * (dot[3] - dot[2]);
  return {value, mask * along_y, mask * along_x};
}

template <typename A>
DCN_INLINE void store(const SampleGradient<A>& gradient, int64_t start, A* offset_gradient, A* mask_gradient) {
  if (offset_gradient != nullptr) {
    offset_gradient[start] = gradient.y;
    offset_gradient[start + 1] = gradient.x;
  }
  if (mask_gradient != nullptr) mask_gradient[start / 2] = gradient.mask;
}

}  // namespace litv2::dcn
