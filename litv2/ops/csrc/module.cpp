// SPDX-License-Identifier: Apache-2.0
// Registers the operators litv2::native_*, picks the kernels, and packs weights for them.

#include <Python.h>
#include <torch/library.h>
#include <torch/version.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <string_view>

#include "operators.h"

namespace litv2::native {
namespace {

const Kernels& widest() {
  // For tests: a processor also runs the kernels of lesser ones.
  const char* wanted = std::getenv("LITV2_NATIVE_KERNELS");
  const auto allowed = [&](const Kernels& k) {
    return wanted == nullptr || *wanted == '\0' || wanted == std::string_view(k.name);
  };
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && allowed(avx512_kernels))
    return avx512_kernels;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && allowed(avx2_kernels)) return avx2_kernels;
#endif
  TORCH_CHECK_VALUE(allowed(baseline_kernels), "LITV2_NATIVE_KERNELS=", wanted, ": this processor has no such kernels");
  return baseline_kernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = widest();
  return chosen;
}

std::shared_ptr<char> large_pages(int64_t bytes) {
  const int64_t size = round_up(bytes, kLargePage);
  std::shared_ptr<char> memory(static_cast<char*>(std::aligned_alloc(kLargePage, size)), std::free);
  TORCH_CHECK(memory != nullptr, "no memory left for ", size, " bytes");
#ifdef __linux__
  madvise(memory.get(), size, MADV_HUGEPAGE);
#endif
  return memory;
}

namespace {

// Weights, which every call reads.
Tensor empty_weights(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const int64_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  if (bytes < kLargePage / 2) return at::empty(sizes, options);
  const auto memory = large_pages(bytes);
  return at::from_blob(memory.get(), sizes, [memory](void*) {}, options);
}

// (N, K) -> (panels, K, panel), see Kernels, and then for each pair of panels the sums of its quarters that Strassen's algorithm
// takes: for each kStrassenDepth inputs four, of half the inputs of a panel each.
Tensor pack_floats(const Tensor& weight) {
  const int64_t N = weight.size(0), K = weight.size(1), panel = kernels().panel, panels = round_up(N, panel) / panel;
  const int64_t pairs = strassen_pairs(K, panels);
  const Tensor out = empty_weights({panels + 2 * pairs, K, panel}, weight.options());
  const float* from = pointer(weight);
  float* to = out.data_ptr<float>();
  constexpr int64_t kBlock = 16;  // a line of the cache of each row at a time
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t columns = std::min(panel, N - p * panel);
      const float* rows = from + p * panel * K;
      float* packed = to + p * panel * K;
      if (columns < panel) std::fill_n(packed, panel * K, 0.0f);
      for (int64_t k = 0; k < K; k += kBlock) {
        const int64_t last = std::min(K, k + kBlock);
        for (int64_t n = 0; n < columns; ++n) {
          for (int64_t i = k; i < last; ++i) packed[i * panel + n] = rows[n * K + i];
        }
      }
    }
  });
  at::parallel_for(0, pairs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t k = 0; k < K; k += kStrassenDepth) {
        const int64_t quarter = std::min(kStrassenDepth, K - k) / 2 * panel;
        const float *b11 = to + 2 * p * K * panel + k * panel, *b21 = b11 + quarter, *b12 = b11 + K * panel, *b22 = b12 + quarter;
        float* sums = to + (panels + 2 * p) * K * panel + 2 * k * panel;
        for (int64_t i = 0; i < quarter; ++i) {
          sums[i] = b12[i] - b11[i];
          sums[quarter + i] = b22[i] - sums[i];
          sums[2 * quarter + i] = b22[i] - b12[i];
          sums[3 * quarter + i] = b21[i] - sums[quarter + i];
        }
      }
    }
  });
  return out;
}

// (N, K) -> (panels, K / 2, kColumns, 2): two rows of the matrix interleaved.
Tensor pack_bfloat16s(const Tensor& weight) {
  const int64_t N = weight.size(0), K = weight.size(1), panels = round_up(N, kColumns) / kColumns;
  TORCH_CHECK_VALUE(K % kInputs == 0, "pack: bfloat16 weights of ", K, " inputs, expected a multiple of ", kInputs);
  const Tensor filled = at::constant_pad_nd(weight, {0, 0, 0, panels * kColumns - N});
  return empty_weights({panels, K / 2, kColumns, 2}, weight.options())
      .copy_(filled.view({panels, kColumns, K / 2, 2}).transpose(1, 2));
}

Tensor pack(const Tensor& weight) {
  const bool bfloat16s = weight.scalar_type() == at::kBFloat16;
  TORCH_CHECK_VALUE(weight.dim() == 2 && (weight.scalar_type() == at::kFloat || bfloat16s) && weight.device().is_cpu(),
                    "pack: ", weight.sizes(), " ", weight.scalar_type(),
                    ", expected a float32 or bfloat16 matrix on the CPU");
  return bfloat16s ? pack_bfloat16s(weight) : pack_floats(weight.contiguous());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(litv2, m) {
  m.def("native_panel() -> int", [] { return kernels().panel; });
  m.def("native_columns() -> int", [] { return kColumns; });
  m.def("native_bfloat16_kernels() -> str", bfloat16_kernels);
  m.def("native_int8_kernels() -> str", int8_kernels);
  m.def("native_pack(Tensor weight) -> Tensor");
  m.def("native_kernels() -> str", [] { return std::string(kernels().name); });
  m.def(
      "native_feed_forward(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor fc1, Tensor fc1_bias, "
      "Tensor depthwise, Tensor depthwise_bias, Tensor fc2, Tensor fc2_bias) -> Tensor");
  m.def(
      "native_hilo(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor proj, Tensor proj_bias, Tensor "
      "kv, "
      "Tensor kv_bias, Tensor h_proj, Tensor h_proj_bias, Tensor l_proj, Tensor l_proj_bias, int h_heads, int l_heads, "
      "int window_size) -> Tensor");
  m.def(
      "native_blocks(Tensor x, Tensor[] tensors, float[] eps, int h_heads, int l_heads, int window_size) -> Tensor");
  m.def(
      "native_classifier(Tensor image, int patch, Tensor[] tensors, float[] eps, int[] stages, int classes) -> Tensor");
  m.def(
      "native_patch_embed(Tensor image, int patch, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, "
      "float eps) -> "
      "Tensor");
  m.def(
      "native_token_merging(Tensor x, Tensor offset_top, Tensor offset_bottom, Tensor offset_bias, Tensor weight, "
      "Tensor bias, "
      "int out_channels) -> Tensor");
  m.def("native_depthwise_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor");
  m.def(
      "native_depthwise_gelu_backward(Tensor gradient, Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor, "
      "Tensor)");
}

TORCH_LIBRARY_IMPL(litv2, CPU, m) {
  m.impl("native_pack", pack);
  m.impl("native_feed_forward", feed_forward);
  m.impl("native_hilo", hilo);
  m.impl("native_blocks", blocks);
  m.impl("native_classifier", classifier);
  m.impl("native_patch_embed", patch_embed);
  m.impl("native_token_merging", token_merging);
  m.impl("native_depthwise_gelu", depthwise_gelu);
  m.impl("native_depthwise_gelu_backward", depthwise_gelu_backward);
}

// glibc gives a freed block that is larger than any freed before back to the system, so that every operator's output costs
// page faults again, 3 % of the time of the model. After this block it keeps what it can: blocks of up to 32 MiB.
void keep_freed_blocks() {
  void* volatile block = std::malloc((32 << 20) - (64 << 10));  // volatile: else the compiler leaves out both calls
  std::free(block);
#ifdef __linux__
  // The next blocks come from the heap; the pages of this one will be large (large_pages).
  block = std::malloc((32 << 20) - (128 << 10));
  const int64_t first = round_up(reinterpret_cast<int64_t>(block), kLargePage);
  madvise(reinterpret_cast<void*>(first), 28 << 20, MADV_HUGEPAGE);
  std::free(block);
#endif
}

}  // namespace litv2::native

// Importing the module is all that Python needs to do: the registrations above run then. Before, the loader looks for the end of
// the documentation in the file (mm_modules/extension.py).
PyMODINIT_FUNC PyInit__C() {
  litv2::native::keep_freed_blocks();
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C",
      "Operators litv2::native_*, built for torch " TORCH_VERSION
      " from the sources " C10_STRINGIZE(LITV2_SOURCES) ".", -1};
  return PyModule_Create(&module);
}
