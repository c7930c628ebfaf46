// SPDX-License-Identifier: Apache-2.0
// Operators litv2::deform_conv2d and its backward: checks, chunks, matrix products; the device's kernels do the rest.
// Autograd and shape inference are registered in Python (compiled.py), which also says whether to multiply bfloat16
// numbers in float32: `wide_products`, for processors that have no instructions for bfloat16.

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <Python.h>
#include <torch/library.h>
#include <torch/version.h>

#include <numeric>

#include "kernels.h"

namespace litv2::dcn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The columns of one chunk take at most this much memory; more positions are worked off in several chunks.
constexpr int64_t kColumnBytes = int64_t(32) << 20;
// float32 tells every pixel of such a side from its neighbours.
constexpr int64_t kMaxSide = int64_t(1) << 24;
// Channel blocks are not cut smaller than this to keep more threads busy.
constexpr int64_t kMinBlockChannels = 16;

const Kernels& kernels_of(const Tensor& input) {
#ifdef DCN_WITH_CUDA
  if (input.is_cuda()) return cuda_kernels;
#endif
  return cpu_kernels;
}

at::ScalarType position_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

Strides<int64_t> strides_of(const Tensor& map) { return {map.stride(0), map.stride(1), map.stride(2), map.stride(3)}; }

// Checks everything that the kernels rely on to stay inside of the tensors.
Geometry check(const Tensor& input, const Tensor& offset, const Tensor& weight, const Tensor& bias, const Tensor& mask,
               at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
#define DCN_CHECK(condition, ...) TORCH_CHECK_VALUE(condition, "deform_conv2d: ", __VA_ARGS__)
  const auto dtype = input.scalar_type();
  DCN_CHECK(dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, "input is ",
            dtype, ", expected float64, float32, bfloat16 or float16");
  const auto check_tensor = [&](const char* name, const Tensor& tensor, int64_t rank, at::ScalarType expected) {
    if (!tensor.defined()) return;
    DCN_CHECK(tensor.dim() == rank, name, " must be ", rank, "-D, got shape ", tensor.sizes());
    DCN_CHECK(tensor.scalar_type() == expected, name, " is ", tensor.scalar_type(), ", expected ", expected,
              " for an input of ", dtype);
    DCN_CHECK(tensor.device() == input.device(), name, " is on ", tensor.device(), ", but input is on ",
              input.device());
  };
  check_tensor("input", input, 4, dtype);
  check_tensor("offset", offset, 4, position_dtype(dtype));
  check_tensor("weight", weight, 4, dtype);
  check_tensor("bias", bias, 1, dtype);
  check_tensor("mask", mask, 4, position_dtype(dtype));
  DCN_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0, "stride=", stride,
            ", expected two numbers of at least 1");
  DCN_CHECK(padding.size() == 2 && padding[0] >= 0 && padding[1] >= 0, "padding=", padding,
            ", expected two numbers of at least 0");
  DCN_CHECK(dilation.size() == 2 && dilation[0] > 0 && dilation[1] > 0, "dilation=", dilation,
            ", expected two numbers of at least 1");

  Geometry g;
  g.batch = input.size(0), g.channels = input.size(1), g.height = input.size(2), g.width = input.size(3);
  g.kernel_h = weight.size(2), g.kernel_w = weight.size(3), g.taps = g.kernel_h * g.kernel_w;
  g.stride_h = stride[0], g.stride_w = stride[1];
  g.padding_h = padding[0], g.padding_w = padding[1];
  g.dilation_h = dilation[0], g.dilation_w = dilation[1];
  DCN_CHECK(weight.numel() > 0 && g.channels > 0 && g.channels % weight.size(1) == 0, "weight ", weight.sizes(),
            " does not fit input ", input.sizes());
  DCN_CHECK(std::max(g.height, g.width) <= kMaxSide, "input ", input.sizes(), " has a side of more than ", kMaxSide);
  g.groups = g.channels / weight.size(1), g.group_channels = weight.size(1);
  DCN_CHECK(weight.size(0) % g.groups == 0, "weight ", weight.sizes(), " has ", weight.size(0), " outputs for ",
            g.groups, " groups");
  DCN_CHECK(!bias.defined() || bias.size(0) == weight.size(0), "bias ", bias.sizes(), " does not fit weight ",
            weight.sizes());
  g.offset_groups = offset.size(1) / (2 * g.taps);
  DCN_CHECK(
      g.offset_groups > 0 && offset.size(1) == 2 * g.taps * g.offset_groups && g.channels % g.offset_groups == 0,
      "offset ", offset.sizes(), " does not fit input ", input.sizes(), " and a kernel of ", g.taps, " taps");
  const auto outputs = [](int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
  };
  g.out_height = outputs(g.height, g.kernel_h, g.stride_h, g.padding_h, g.dilation_h);
  g.out_width = outputs(g.width, g.kernel_w, g.stride_w, g.padding_w, g.dilation_w);
  DCN_CHECK(g.out_height > 0 && g.out_width > 0, "the output would be ", g.out_height, " x ", g.out_width,
            " for input ", input.sizes());
  const auto check_map = [&](const char* name, const Tensor& map, int64_t channels) {
    DCN_CHECK(map.sizes() == at::IntArrayRef({g.batch, channels, g.out_height, g.out_width}), name, " has shape ",
              map.sizes(), ", expected [", g.batch, ", ", channels, ", ", g.out_height, ", ", g.out_width, "]");
  };
  check_map("offset", offset, 2 * g.taps * g.offset_groups);
  g.offset = strides_of(offset);
  g.mask = {0, 0, 0, 0};
  if (mask.defined()) {
    check_map("mask", mask, g.taps * g.offset_groups);
    g.mask = strides_of(mask);
  }
  set_blocks(g, std::lcm(g.groups, g.offset_groups));
  return g;
#undef DCN_CHECK
}

// Calls function(first, count, columns) for each chunk of positions, with room for its columns.
template <typename Function>
void for_each_chunk(const Geometry& g, const at::TensorOptions& options, const Function& function) {
  const int64_t per_position = g.channels * g.taps;
  const int64_t bytes = per_position * static_cast<int64_t>(options.dtype().itemsize());
  const int64_t chunks =
      (g.positions() + std::max<int64_t>(1, kColumnBytes / bytes) - 1) / std::max<int64_t>(1, kColumnBytes / bytes);
  if (chunks == 0) return;
  const int64_t most = (g.positions() + chunks - 1) / chunks;
  const Tensor room = at::empty({most * per_position}, options);
  for (int64_t first = 0; first < g.positions(); first += most) {
    const int64_t count = std::min(most, g.positions() - first);
    function(first, count, room.narrow(0, 0, count * per_position).view({g.groups, count, per_position / g.groups}));
  }
}

// (B, C, H, W) of any memory format -> (B, H, W, C), contiguous; a view of channels-last input.
Tensor channels_last(const Tensor& x) { return x.permute({0, 2, 3, 1}).contiguous(); }

// (O, C / groups, kh, kw) -> (groups, O / groups, taps * C / groups); a view of a channels-last weight.
Tensor weight_matrices(const Tensor& weight, const Geometry& g) {
  return weight.permute({0, 2, 3, 1}).reshape({g.groups, weight.size(0) / g.groups, g.taps * weight.size(1)});
}

// The part of group i of a matrix with the outputs of all groups in a row.
Tensor group_outputs(const Tensor& matrix, const Geometry& g, int64_t i) {
  const int64_t outputs = matrix.size(-1) / g.groups;
  return matrix.narrow(-1, i * outputs, outputs);
}

// A matrix as a factor of a product.
Tensor factor(const Tensor& matrix, bool wide) { return wide ? matrix.to(at::kFloat) : matrix; }

// out = A B + bias
void product(Tensor out, const Tensor& A, const Tensor& B, bool wide, const Tensor& bias = {}) {
  const Tensor a = factor(A, wide), b = factor(B, wide);
  if (a.scalar_type() != out.scalar_type()) {
    out.copy_(bias.defined() ? at::addmm(bias.to(a.scalar_type()), a, b) : at::mm(a, b));
  } else if (bias.defined()) {
    at::addmm_out(out, bias, a, b);
  } else {
    at::mm_out(out, a, b);
  }
}

// A B in float32, for factors of less; the CPU and an older torch round it to theirs.
Tensor sums_of_product(const Tensor& A, const Tensor& B) {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 8
  if (A.is_cuda()) return at::mm(A, B, at::kFloat);
#endif
  return at::mm(A, B);
}

Tensor deform_conv2d(const Tensor& input, const Tensor& offset, const Tensor& weight,
                     const OptionalTensor& bias_or_none, const OptionalTensor& mask_or_none, at::IntArrayRef stride,
                     at::IntArrayRef padding, at::IntArrayRef dilation, bool wide_products) {
  const Tensor bias = bias_or_none.value_or(Tensor()), mask = mask_or_none.value_or(Tensor());
  const Geometry g = check(input, offset, weight, bias, mask, stride, padding, dilation);
  const c10::DeviceGuard guard(input.device());
  const Kernels& kernels = kernels_of(input);
  const bool wide = wide_products && input.is_cpu() && input.scalar_type() == at::kBFloat16;
  const Tensor pixels = channels_last(input), matrices = weight_matrices(weight, g);
  const Tensor out = at::empty({g.positions(), weight.size(0)}, input.options());
  for_each_chunk(g, input.options(), [&](int64_t first, int64_t count, const Tensor& columns) {
    kernels.gather(g, first, count, pixels, offset, mask, columns);
    for (int64_t i = 0; i < g.groups; ++i) {
      product(group_outputs(out.narrow(0, first, count), g, i), columns[i], matrices[i].t(),
              wide, bias.defined() ? group_outputs(bias, g, i) : bias);
    }
  });
  return out.view({g.batch, g.out_height, g.out_width, weight.size(0)}).permute({0, 3, 1, 2});
}

// Channel blocks that give scatter enough pieces: it divides its work by (image, block), so that no two write the same
// pixel.
int64_t blocks_for_scatter(const Geometry& g, int64_t pieces) {
  int64_t blocks = g.blocks;
  while (g.batch * blocks < pieces) {
    int64_t next = blocks + g.blocks;
    while (next <= g.channels && g.channels % next != 0) next += g.blocks;
    if (next > g.channels || g.channels / next < kMinBlockChannels) break;
    blocks = next;
  }
  return blocks;
}

// Gradients of input, offset, weight and mask; those that are not needed are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv2d_backward(const Tensor& gradient, const Tensor& input,
                                                                  const Tensor& offset, const Tensor& weight,
                                                                  const OptionalTensor& mask_or_none,
                                                                  at::IntArrayRef stride, at::IntArrayRef padding,
                                                                  at::IntArrayRef dilation, bool need_input,
                                                                  bool need_offset, bool need_weight, bool need_mask,
                                                                  bool wide_products) {
  const Tensor mask = mask_or_none.value_or(Tensor());
  Geometry g = check(input, offset, weight, Tensor(), mask, stride, padding, dilation);
  TORCH_CHECK_VALUE(gradient.sizes() == at::IntArrayRef({g.batch, weight.size(0), g.out_height, g.out_width}) &&
                        gradient.scalar_type() == input.scalar_type() && gradient.device() == input.device(),
                    "deform_conv2d_backward: gradient is ", gradient.sizes(), " ", gradient.scalar_type(), " on ",
                    gradient.device(), " for input ", input.sizes(), " ", input.scalar_type(), " on ", input.device());
  TORCH_CHECK_VALUE(mask.defined() || !need_mask,
                    "deform_conv2d_backward: the gradient of a mask was asked for, but mask is None");
  const c10::DeviceGuard guard(input.device());
  const Kernels& kernels = kernels_of(input);
  const bool wide = wide_products && input.is_cpu() && input.scalar_type() == at::kBFloat16;
  const Tensor pixels = channels_last(input), matrices = weight_matrices(weight, g);
  const Tensor gradients = channels_last(gradient).view({g.positions(), weight.size(0)});

  Geometry pieces = g;
  set_blocks(pieces, blocks_for_scatter(g, kernels.pieces()));
  const auto sums = input.options().dtype(position_dtype(input.scalar_type()));
  const int64_t parts = pieces.blocks_per_offset_group, samples = g.offset_groups * g.taps;
  Tensor input_gradient, offset_gradient, mask_gradient, weight_gradient;
  if (need_input) input_gradient = at::zeros(pixels.sizes(), sums);
  if (need_offset) offset_gradient = at::empty({parts, g.batch, g.out_height, g.out_width, 2 * samples}, sums);
  if (need_mask) mask_gradient = at::empty({parts, g.batch, g.out_height, g.out_width, samples}, sums);
  if (need_weight) weight_gradient = at::zeros(matrices.sizes(), sums);

  for_each_chunk(g, input.options(), [&](int64_t first, int64_t count, const Tensor& columns) {
    const Tensor rows = gradients.narrow(0, first, count);
    if (need_weight) {
      kernels.gather(g, first, count, pixels, offset, mask, columns);
      for (int64_t i = 0; i < g.groups; ++i) {
        const Tensor gradient_of_outputs = factor(group_outputs(rows, g, i), wide).t(),
                     inputs = factor(columns[i], wide);
        if (sums.dtype() == inputs.dtype()) {
          weight_gradient[i].addmm_(gradient_of_outputs, inputs);
        } else {
          weight_gradient[i] += sums_of_product(gradient_of_outputs, inputs);
        }
      }
    }
    if (need_input || need_offset || need_mask) {
      for (int64_t i = 0; i < g.groups; ++i) {
        product(columns[i], group_outputs(rows, g, i), matrices[i], wide);
      }
      kernels.scatter(pieces, first, count, columns, pixels, offset, mask, input_gradient, offset_gradient,
                      mask_gradient);
    }
  });

  const auto none = [&] { return at::empty({0}, input.options()); };
  const auto channels_first = [](const Tensor& x) { return x.permute({0, 3, 1, 2}); };
  return {
      need_input ? channels_first(input_gradient.to(input.scalar_type())) : none(),
      need_offset ? channels_first(offset_gradient.sum(0)) : none(),
      need_weight
          ? channels_first(
                weight_gradient.view({weight.size(0), g.kernel_h, g.kernel_w, weight.size(1)}).to(weight.scalar_type()))
          : none(),
      need_mask ? channels_first(mask_gradient.sum(0)) : none(),
  };
}

// Values in autocast's precision, positions in float32.
template <c10::DeviceType device>
Tensor deform_conv2d_autocast(const Tensor& input, const Tensor& offset, const Tensor& weight,
                              const OptionalTensor& bias, const OptionalTensor& mask, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation, bool wide_products) {
  const c10::impl::ExcludeDispatchKeyGuard guard(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto value = [](const Tensor& x) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), x, device);
  };
  const auto position = [](const Tensor& x) { return at::autocast::cached_cast(at::kFloat, x, device); };
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("litv2::deform_conv2d", "").typed<decltype(deform_conv2d)>();
  return op.call(value(input), position(offset), value(weight), bias ? OptionalTensor(value(*bias)) : bias,
                 mask ? OptionalTensor(position(*mask)) : mask, stride, padding, dilation, wide_products);
}

}  // namespace

TORCH_LIBRARY(litv2, m) {
  m.def(
      "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, "
      "int[2] stride, int[2] padding, int[2] dilation, bool wide_products=False) -> Tensor");
  m.def(
      "deform_conv2d_backward(Tensor gradient, Tensor input, Tensor offset, Tensor weight, Tensor? mask, "
      "int[2] stride, int[2] padding, int[2] dilation, bool need_input, bool need_offset, bool need_weight, "
      "bool need_mask, bool wide_products=False) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(litv2, CPU, m) {
  m.impl("deform_conv2d", deform_conv2d);
  m.impl("deform_conv2d_backward", deform_conv2d_backward);
}

#ifdef DCN_WITH_CUDA
TORCH_LIBRARY_IMPL(litv2, CUDA, m) {
  m.impl("deform_conv2d", deform_conv2d);
  m.impl("deform_conv2d_backward", deform_conv2d_backward);
}
#endif

TORCH_LIBRARY_IMPL(litv2, AutocastCPU, m) { m.impl("deform_conv2d", deform_conv2d_autocast<c10::kCPU>); }
TORCH_LIBRARY_IMPL(litv2, AutocastCUDA, m) { m.impl("deform_conv2d", deform_conv2d_autocast<c10::kCUDA>); }

}  // namespace litv2::dcn

// The registrations above run when the module is imported. Before, the loader looks for the end of the documentation in
// the file (mm_modules/extension.py). The module has one function, which asks about the GPU and not about a tensor.
PyMODINIT_FUNC PyInit__C() {
  static PyMethodDef methods[] = {
#ifdef DCN_WITH_CUDA
      {"cuda_kernels_fit",
       [](PyObject*, PyObject*) { return PyBool_FromLong(litv2::dcn::cuda_kernels_fit()); }, METH_NOARGS,
       "Whether the current GPU is one of those that the kernels were compiled for."},
#endif
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C",
      "Operators litv2::deform_conv2d and its backward, built for torch " TORCH_VERSION
      " from the sources " C10_STRINGIZE(LITV2_SOURCES) ".", -1, methods};
  return PyModule_Create(&module);
}
