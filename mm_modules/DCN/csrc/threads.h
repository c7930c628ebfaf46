// SPDX-License-Identifier: Apache-2.0
// How CUDA's threads share the passes of the deformable convolution: which channels of which samples each one has, 128
// bits at once. Plain functions of a thread's number, so that tests can run them on the CPU.

#pragma once

#include <algorithm>

#include "sample.h"

namespace litv2::dcn {

// Division of numbers below 2^31 by one that the host knows: a multiplication and a shift (Granlund, Montgomery 1994).
struct Divisor {
  int32_t value;
  uint32_t multiplier, shift = 0;

  explicit Divisor(int64_t number) : value(static_cast<int32_t>(number)) {
    while ((int64_t(1) << shift) < number) ++shift;
    multiplier = static_cast<uint32_t>((((int64_t(1) << shift) - number) << 32) / number + 1);
  }
  DCN_INLINE operator int32_t() const { return value; }
};

DCN_INLINE QuotientRemainder<int32_t> divide(int32_t a, const Divisor& b) {
  const uint32_t n = static_cast<uint32_t>(a), high = static_cast<uint32_t>((uint64_t(n) * b.multiplier) >> 32);
  const int32_t quotient = static_cast<int32_t>((n + high) >> b.shift);
  return {quotient, a - quotient * b.value};
}

// What a launch works on: `count` positions from `first` on. A thread has V channels at once. Sizes that are too large
// for 32-bit indices and channels that are no multiple of a vector are rare, and share the way of V = 1.
template <int V>
struct Chunk {
  static constexpr int kVector = V;
  using Index = std::conditional_t<V == 1, int64_t, int32_t>;
  using Divider = std::conditional_t<V == 1, int64_t, Divisor>;
  GeometryOf<Index, Divider> g;
  Index first, count;
  Divider vectors;  // of V channels in a block
};

template <int V>
Chunk<V> make_chunk(const Geometry& g, int64_t first, int64_t count) {
  using I = typename Chunk<V>::Index;
  using D = typename Chunk<V>::Divider;
  const auto strides = [](const Strides<int64_t>& s) {
    return Strides<I>{I(s.image), I(s.channel), I(s.row), I(s.column)};
  };
  return {{I(g.batch), I(g.channels), I(g.height), I(g.width), D(g.out_height), D(g.out_width),
           I(g.kernel_h), D(g.kernel_w), D(g.taps),
           I(g.stride_h), I(g.stride_w), I(g.padding_h), I(g.padding_w), I(g.dilation_h), I(g.dilation_w),
           I(g.groups), I(g.group_channels), D(g.offset_groups),
           D(g.blocks), D(g.blocks_per_group), D(g.blocks_per_offset_group), I(g.block_channels),
           strides(g.offset), strides(g.mask)},
          I(first),
          I(count),
          D(g.block_channels / V)};
}

// Whether 32 bits hold every index of a chunk, with room for the step of a loop that goes beyond the last one.
inline bool is_small(const Geometry& g, int64_t count) {
  const int64_t samples = g.offset_groups * g.taps;
  const auto extent = [&](const Strides<int64_t>& s, int64_t channels) {
    return (g.batch - 1) * s.image + (channels - 1) * s.channel + (g.out_height - 1) * s.row +
           (g.out_width - 1) * s.column;
  };
  return std::max({g.batch * g.height * g.width * g.channels, count * g.taps * g.channels, 4 * count * samples,
                   g.blocks_per_offset_group * g.positions() * samples * 2, extent(g.offset, 2 * samples),
                   extent(g.mask, samples), g.height + 2 * g.padding_h, g.width + 2 * g.padding_w}) < int64_t(1) << 30;
}

template <typename T, int V>
struct alignas(V * sizeof(T)) Vector {
  T at[V];
};

template <int V, typename T>
DCN_INLINE Vector<T, V> load(const T* place) {
  return *reinterpret_cast<const Vector<T, V>*>(place);
}

template <int V, typename T>
DCN_INLINE void store(T* place, const Vector<T, V>& vector) {
  *reinterpret_cast<Vector<T, V>*>(place) = vector;
}

// Adds to memory that other threads add to as well. A GPU rounds float32 sums that are almost zero to it.
template <typename A>
DCN_INLINE void add(A* place, const Vector<A, 1>& vector) {
#if defined(__CUDA_ARCH__)
  atomicAdd(place, vector.at[0]);
#else
  *place += vector.at[0];
#endif
}

DCN_INLINE void add(float* place, const Vector<float, 4>& vector) {
  const auto& x = vector.at;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  atomicAdd(reinterpret_cast<float4*>(place), make_float4(x[0], x[1], x[2], x[3]));
#else
  for (int k = 0; k < 4; ++k) add(place + k, Vector<float, 1>{x[k]});
#endif
}

// The vectors at the four corners; zeros outside the image. All are asked for before the first is used.
template <int V, typename T, typename A, typename I>
DCN_INLINE void load_corners(const Corners<A, I>& c, const T* input, I channels, Vector<T, V> (&pixel)[4]) {
  for (int j = 0; j < 4; ++j) pixel[j] = c.pixel[j] < 0 ? Vector<T, V>{} : load<V>(input + c.pixel[j] * channels);
}

// The columns of one vector of one block of one position. Vectors count fastest, then blocks, then positions.
template <int V, typename T, typename A>
DCN_INLINE void gather_thread(const Chunk<V>& chunk, typename Chunk<V>::Index thread, const T* input, const A* offset,
                              const A* mask, T* columns) {
  using I = typename Chunk<V>::Index;
  const auto& g = chunk.g;
  const auto vector = divide(thread, chunk.vectors);
  const auto block = divide(vector.quotient, g.blocks);
  const I channel = vector.remainder * V;
  for (I tap = 0; tap < g.taps; ++tap) {
    const auto s = sample_index(g, chunk.first + block.quotient, tap, block.remainder);
    const auto c = sample_corners(g, s, offset);
    const A m = sample_mask(g, s, mask);
    Vector<T, V> pixel[4], column;
    load_corners(c, input + input_start(g, s) + channel, g.channels, pixel);
    for (int k = 0; k < V; ++k) {
      A value = c.nan ? static_cast<A>(NAN) : A(0);
      for (int j = 0; j < 4; ++j) value += c.weight[j] * static_cast<A>(pixel[j].at[k]);
      column.at[k] = rounded<T>(m * value);
    }
    store(columns + column_start(g, s, chunk.first, chunk.count) + channel, column);
  }
}

// The channels of a sample are shared by 2^n lanes of a warp.
inline int lanes_exponent(int64_t vectors) {
  int n = 0;
  while (n < 5 && int64_t(1) << n < vectors) ++n;
  return n;
}

// A lane's part of scatter, W channels at once.
template <int W, typename T, typename A, typename I>
DCN_INLINE void scatter_lane(const Corners<A, I>& c, A mask, const T* column_gradient, A* input_gradient,
                             typename Corners<A, I>::Index channels, typename Corners<A, I>::Index block_channels,
                             typename Corners<A, I>::Index lane, typename Corners<A, I>::Index lanes) {
  for (I i = lane * W; i < block_channels; i += lanes * W) {
    const auto gradient = load<W>(column_gradient + i);
    for (int j = 0; j < 4; ++j) {
      if (c.pixel[j] < 0) continue;
      const A weight = mask * c.weight[j];
      Vector<A, W> part;
      for (int k = 0; k < W; ++k) part.at[k] = weight * static_cast<A>(gradient.at[k]);
      add(input_gradient + c.pixel[j] * channels + i, part);
    }
  }
}

// A lane's part of dots, V channels at once.
template <int V, typename T, typename A, typename I>
DCN_INLINE void dots_lane(const Corners<A, I>& c, const T* column_gradient, const T* input,
                          typename Corners<A, I>::Index channels, A (&dot)[4],
                          typename Corners<A, I>::Index block_channels, typename Corners<A, I>::Index lane,
                          typename Corners<A, I>::Index lanes) {
  for (A& sum : dot) sum = 0;
  for (I i = lane * V; i < block_channels; i += lanes * V) {
    const auto gradient = load<V>(column_gradient + i);
    Vector<T, V> pixel[4];
    load_corners(c, input + i, channels, pixel);
    for (int j = 0; j < 4; ++j) {
      for (int k = 0; k < V; ++k) dot[j] += static_cast<A>(gradient.at[k]) * static_cast<A>(pixel[j].at[k]);
    }
  }
  for (int j = 0; j < 4; ++j) dot[j] = c.pixel[j] < 0 ? A(0) : dot[j];  // even where the gradient is infinite
}

// One of the 2^n lanes that share the block of a position. `sum` replaces a lane's dot products by those of all lanes.
template <int W, int V, typename T, typename A, typename Sum>
DCN_INLINE void scatter_thread(const Chunk<V>& chunk, typename Chunk<V>::Index team, int lane, int lanes,
                               const T* column_gradient, const T* input, const A* offset, const A* mask,
                               A* input_gradient, A* offset_gradient, A* mask_gradient, const Sum& sum) {
  const auto& g = chunk.g;
  const auto block = divide(team, g.blocks);
  for (typename Chunk<V>::Index tap = 0; tap < g.taps; ++tap) {
    const auto s = sample_index(g, chunk.first + block.quotient, tap, block.remainder);
    const auto c = sample_corners(g, s, offset);
    const A m = sample_mask(g, s, mask);
    const T* gradient = column_gradient + column_start(g, s, chunk.first, chunk.count);
    if (input_gradient != nullptr) {
      scatter_lane<W>(c, m, gradient, input_gradient + input_start(g, s), g.channels, g.block_channels, lane, lanes);
    }
    if (offset_gradient == nullptr && mask_gradient == nullptr) continue;
    A dot[4];
    dots_lane<V>(c, gradient, input + input_start(g, s), g.channels, dot, g.block_channels, lane, lanes);
    sum(dot);
    if (lane == 0) store(sample_gradient(c, m, dot), offset_gradient_start(g, s), offset_gradient, mask_gradient);
  }
}

// Scatter without atomic additions, whose order is left to chance: each corner of each sample is an entry, entries are
// sorted by the pixel that they add to, and a thread adds up those of its pixel. Each offset group has its own.
//
// Entries count corners fastest, then offset groups, taps and positions. Pixels count from the image `first_image` on.
template <int V, typename A>
DCN_INLINE void list_thread(const Chunk<V>& chunk, typename Chunk<V>::Index first_image,
                            typename Chunk<V>::Index nowhere, typename Chunk<V>::Index thread, const A* offset,
                            typename Chunk<V>::Index* entries) {
  using I = typename Chunk<V>::Index;
  const auto& g = chunk.g;
  const auto group = divide(thread, g.offset_groups);
  const auto tap = divide(group.quotient, g.taps);
  const I block = group.remainder * g.blocks_per_offset_group;
  const auto s = sample_index(g, chunk.first + tap.quotient, tap.remainder, block);
  const auto c = sample_corners(g, s, offset);
  const I image = (s.image - first_image) * g.height * g.width;
  Vector<I, 4> pixels;
  for (int j = 0; j < 4; ++j) {
    pixels.at[j] = c.pixel[j] < 0 ? nowhere : (image + c.pixel[j]) * g.offset_groups + s.offset_group;
  }
  store(entries + 4 * thread, pixels);
}

// Adds the entries order[starts[n]] to order[starts[n + 1] - 1] to (pixel, offset group) n, for one vector of channels.
// Vectors count fastest, then blocks, then pixels.
template <int V, typename T, typename A>
DCN_INLINE void collect_thread(const Chunk<V>& chunk, typename Chunk<V>::Index first_image,
                               typename Chunk<V>::Index thread, const int64_t* starts, const int64_t* order,
                               const A* offset, const A* mask, const T* column_gradient, A* input_gradient) {
  using I = typename Chunk<V>::Index;
  const auto& g = chunk.g;
  const auto vector = divide(thread, chunk.vectors);
  const auto block = divide(vector.quotient, g.blocks);
  const I pixel = block.quotient, channel = vector.remainder * V;
  const I n = pixel * g.offset_groups + divide(block.remainder, g.blocks_per_offset_group).quotient;
  A* place = input_gradient + (first_image * g.height * g.width + pixel) * g.channels +
             block.remainder * g.block_channels + channel;
  auto sum = load<V>(place);
  for (int64_t i = starts[n]; i < starts[n + 1]; ++i) {
    const I entry = static_cast<I>(order[i]);
    const auto tap = divide(divide(entry / 4, g.offset_groups).quotient, g.taps);
    const auto s = sample_index(g, chunk.first + tap.quotient, tap.remainder, block.remainder);
    const auto c = sample_corners(g, s, offset);
    // c.weight[entry % 4], for which the compiler would put the array into memory.
    const A weight = (entry & 2 ? c.dy : 1 - c.dy) * (entry & 1 ? c.dx : 1 - c.dx) * sample_mask(g, s, mask);
    const auto gradient = load<V>(column_gradient + column_start(g, s, chunk.first, chunk.count) + channel);
    for (int k = 0; k < V; ++k) sum.at[k] += weight * static_cast<A>(gradient.at[k]);
  }
  store(place, sum);
}

}  // namespace litv2::dcn
