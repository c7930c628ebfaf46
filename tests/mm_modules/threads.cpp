// SPDX-License-Identifier: Apache-2.0
// The threads of the CUDA kernels one after the other on the CPU, for test_cuda_threads.py.

#include <c10/util/Half.h>

#include <vector>

#include "threads.h"

using namespace litv2::dcn;

namespace {

// From the fields batch to dilation_w, groups, offset_groups, and the strides of offset and mask.
Geometry geometry(const int64_t* f) {
  Geometry g;
  g.batch = f[0], g.channels = f[1], g.height = f[2], g.width = f[3], g.out_height = f[4], g.out_width = f[5];
  g.kernel_h = f[6], g.kernel_w = f[7], g.taps = f[6] * f[7];
  g.stride_h = f[8], g.stride_w = f[9], g.padding_h = f[10], g.padding_w = f[11], g.dilation_h = f[12];
  g.dilation_w = f[13], g.groups = f[14], g.group_channels = f[1] / f[14], g.offset_groups = f[15];
  g.offset = {f[17], f[18], f[19], f[20]};
  g.mask = {f[21], f[22], f[23], f[24]};
  set_blocks(g, f[16]);
  return g;
}

// Lane 0 comes last and gets the sums of all: what a warp does with shuffles.
template <typename A>
struct SumOfLanes {
  std::vector<A>& totals;
  mutable size_t at = 0;

  void operator()(A (&dot)[4]) const {
    for (A& value : dot) value = totals[at++] += value;
  }
};

template <int V, typename T>
void gather_all(const int64_t* fields, int64_t first, int64_t count, const T* input, const accumulate_t<T>* offset,
                const accumulate_t<T>* mask, T* columns) {
  const auto chunk = make_chunk<V>(geometry(fields), first, count);
  const int64_t threads = count * chunk.g.blocks * chunk.vectors;
  for (int64_t i = 0; i < threads; ++i) gather_thread(chunk, i, input, offset, mask, columns);
}

template <int V, int W, typename T, typename A = accumulate_t<T>>
void scatter_all(const int64_t* fields, int64_t first, int64_t count, const T* column_gradient, const T* input,
                 const A* offset, const A* mask, A* input_gradient, A* offset_gradient, A* mask_gradient) {
  const auto chunk = make_chunk<V>(geometry(fields), first, count);
  const int lanes = 1 << lanes_exponent(chunk.vectors);
  for (int64_t i = 0; i < count * chunk.g.blocks; ++i) {
    std::vector<A> totals(4 * chunk.g.taps);
    for (int lane = lanes - 1; lane >= 0; --lane) {
      scatter_thread<W>(chunk, i, lane, lanes, column_gradient, input, offset, mask, input_gradient, offset_gradient,
                        mask_gradient, SumOfLanes<A>{totals});
    }
  }
}

template <int V, typename A>
void list_all(const int64_t* fields, int64_t first, int64_t count, int64_t first_image, int64_t nowhere,
              const A* offset, typename Chunk<V>::Index* entries) {
  const auto chunk = make_chunk<V>(geometry(fields), first, count);
  const int64_t threads = count * chunk.g.taps * chunk.g.offset_groups;
  for (int64_t i = 0; i < threads; ++i) list_thread(chunk, first_image, nowhere, i, offset, entries);
}

template <int V, typename T, typename A = accumulate_t<T>>
void collect_all(const int64_t* fields, int64_t first, int64_t count, int64_t first_image, int64_t pixels,
                 const int64_t* starts, const int64_t* order, const A* offset, const A* mask, const T* column_gradient,
                 A* input_gradient) {
  const auto chunk = make_chunk<V>(geometry(fields), first, count);
  const int64_t threads = pixels * chunk.g.blocks * chunk.vectors;
  for (int64_t i = 0; i < threads; ++i) {
    collect_thread(chunk, first_image, i, starts, order, offset, mask, column_gradient, input_gradient);
  }
}

}  // namespace

// W is how many additions the GPU makes at once: see kAddedAtOnce in kernels_cuda.cuh.
#define EXPORT(NAME, T, V, W)                                                                                         \
  extern "C" void gather_##NAME(const int64_t* g, int64_t first, int64_t count, const T* input,                       \
                                const accumulate_t<T>* offset, const accumulate_t<T>* mask, T* columns) {             \
    gather_all<V>(g, first, count, input, offset, mask, columns);                                                     \
  }                                                                                                                   \
  extern "C" void scatter_##NAME(const int64_t* g, int64_t first, int64_t count, const T* column_gradient,            \
                                 const T* input, const accumulate_t<T>* offset, const accumulate_t<T>* mask,          \
                                 accumulate_t<T>* input_gradient, accumulate_t<T>* offset_gradient,                   \
                                 accumulate_t<T>* mask_gradient) {                                                    \
    scatter_all<V, W>(g, first, count, column_gradient, input, offset, mask, input_gradient, offset_gradient,         \
                      mask_gradient);                                                                                 \
  }                                                                                                                   \
  extern "C" void list_##NAME(const int64_t* g, int64_t first, int64_t count, int64_t first_image, int64_t nowhere,   \
                              const accumulate_t<T>* offset, Chunk<V>::Index* entries) {                              \
    list_all<V>(g, first, count, first_image, nowhere, offset, entries);                                              \
  }                                                                                                                   \
  extern "C" void collect_##NAME(const int64_t* g, int64_t first, int64_t count, int64_t first_image, int64_t pixels, \
                                 const int64_t* starts, const int64_t* order, const accumulate_t<T>* offset,          \
                                 const accumulate_t<T>* mask, const T* column_gradient,                               \
                                 accumulate_t<T>* input_gradient) {                                                   \
    collect_all<V>(g, first, count, first_image, pixels, starts, order, offset, mask, column_gradient,                \
                   input_gradient);                                                                                   \
  }

EXPORT(float64_2, double, 2, 1)
EXPORT(float64_1, double, 1, 1)
EXPORT(float32_4, float, 4, 4)
EXPORT(float16_8, c10::Half, 8, 4)
EXPORT(bfloat16_8, c10::BFloat16, 8, 1)
EXPORT(bfloat16_1, c10::BFloat16, 1, 1)

extern "C" bool is_small_geometry(const int64_t* fields, int64_t count) { return is_small(geometry(fields), count); }

extern "C" void divide_all(const int32_t* a, const int32_t* b, int64_t count, int32_t* quotient, int32_t* remainder) {
  for (int64_t i = 0; i < count; ++i) {
    const auto result = divide(a[i], Divisor(b[i]));
    quotient[i] = result.quotient, remainder[i] = result.remainder;
  }
}
