// SPDX-License-Identifier: Apache-2.0
// The kernels on CUDA, without torch: loops over the threads of threads.h. Nothing overlaps what another pointer names
// (__restrict__), so that the loads of a tap need not wait for the stores of the one before.
//
// Columns are written and read again. In LITv2-S's first token merging, at batch 64 in float16, input and output are
// 58 MB and columns 38.5 MB: a product that gathers as it goes would move 0.43 of the bytes at best. Columns stay: the
// weight's gradient needs them, and chunks of them (deform_conv.cpp) fit the caches of large GPUs.

#pragma once

#include "threads.h"

namespace litv2::dcn {

constexpr int kThreads = 256;
constexpr int kResidentBlocks = 4;  // of a multiprocessor: at most 64 registers a thread

// The compiler of a GPU before Hopper would make a vector's additions one by one, at addresses far apart.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
template <int V, typename A>
constexpr int kAddedAtOnce = V > 1 && std::is_same_v<A, float> ? 4 : 1;
#else
template <int V, typename A>
constexpr int kAddedAtOnce = 1;
#endif

__device__ inline int thread_number() { return blockIdx.x * kThreads + threadIdx.x; }
__device__ inline int all_threads() { return gridDim.x * kThreads; }

template <int V, typename T, typename A = accumulate_t<T>>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    gather_kernel(Chunk<V> chunk, const T* __restrict__ input, const A* __restrict__ offset,
                  const A* __restrict__ mask, T* __restrict__ columns) {
  using I = typename Chunk<V>::Index;
  const I threads = chunk.count * chunk.g.blocks * chunk.vectors;
  for (I i = thread_number(); i < threads; i += all_threads()) gather_thread(chunk, i, input, offset, mask, columns);
}

// 2^n threads for each (position, block).
template <int V, typename T, typename A = accumulate_t<T>>
__global__ void __launch_bounds__(kThreads, kResidentBlocks - 1)
    scatter_kernel(Chunk<V> chunk, int n, const T* __restrict__ column_gradient, const T* __restrict__ input,
                   const A* __restrict__ offset, const A* __restrict__ mask, A* __restrict__ input_gradient,
                   A* __restrict__ offset_gradient, A* __restrict__ mask_gradient) {
  using I = typename Chunk<V>::Index;
  const int lanes = 1 << n, lane = thread_number() & (lanes - 1);
  const unsigned team = (0xffffffffu >> (32 - lanes)) << (threadIdx.x % 32 - lane);
  const auto sum = [&](A(&dot)[4]) {
    for (A& value : dot) {
      for (int distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(team, value, distance);
    }
  };
  for (I i = thread_number() >> n; i < chunk.count * chunk.g.blocks; i += all_threads() >> n) {
    scatter_thread<kAddedAtOnce<V, A>>(chunk, i, lane, lanes, column_gradient, input, offset, mask, input_gradient,
                                       offset_gradient, mask_gradient, sum);
  }
}

template <int V, typename A>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    list_kernel(Chunk<V> chunk, typename Chunk<V>::Index first_image, typename Chunk<V>::Index nowhere,
                const A* __restrict__ offset, typename Chunk<V>::Index* __restrict__ entries) {
  using I = typename Chunk<V>::Index;
  const I threads = chunk.count * chunk.g.taps * chunk.g.offset_groups;
  for (I i = thread_number(); i < threads; i += all_threads()) {
    list_thread(chunk, first_image, nowhere, i, offset, entries);
  }
}

template <int V, typename T, typename A = accumulate_t<T>>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    collect_kernel(Chunk<V> chunk, typename Chunk<V>::Index first_image, typename Chunk<V>::Index pixels,
                   const int64_t* __restrict__ starts, const int64_t* __restrict__ order,
                   const A* __restrict__ offset, const A* __restrict__ mask,
                   const T* __restrict__ column_gradient, A* __restrict__ input_gradient) {
  using I = typename Chunk<V>::Index;
  const I threads = pixels * chunk.g.blocks * chunk.vectors;
  for (I i = thread_number(); i < threads; i += all_threads()) {
    collect_thread(chunk, first_image, i, starts, order, offset, mask, column_gradient, input_gradient);
  }
}

}  // namespace litv2::dcn
