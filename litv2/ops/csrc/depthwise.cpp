// gelu(3 x 3 depthwise convolution + bias) of a channels-last map in one pass, and its gradients: for training and for
// the plain model. Backward keeps x alone: the convolution is computed again.

#include "operators.h"

namespace litv2::native {
namespace {

// (images, rows, width, channels) cut into blocks of channels; a block has its rows, and zeros for those outside.
struct Rows {
  int64_t images, height, width, channels;
  std::vector<float> zeros;

  explicit Rows(const Tensor& x)
      : images(x.size(0)), height(x.size(1)), width(x.size(2)), channels(x.size(3)), zeros(width * channels, 0.0f) {}

  const float* row(const float* x, int64_t image, int64_t y) const {
    return y < 0 || y >= height ? zeros.data() : x + (image * height + y) * width * channels;
  }
};

void check(const char* name, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const int64_t channels = x.size(3);
  check_sizes(name, {{weight, 9 * channels}, {bias, channels}});
  TORCH_CHECK_VALUE(channels % 16 == 0, name, ": ", channels, " channels, expected a multiple of 16");
}

}  // namespace

// weight: (9, C), see Kernels. Of bfloat16 maps only x and the result are bfloat16.
Tensor depthwise_gelu(const Tensor& x_, const Tensor& weight, const Tensor& bias) {
  if (x_.scalar_type() == at::kBFloat16) return depthwise_gelu(x_.to(at::kFloat), weight, bias).to(at::kBFloat16);
  const Kernels& k = kernels();
  const Tensor x = checked_map("depthwise_gelu", x_);
  check("depthwise_gelu", x, weight, bias);
  const Rows map(x);
  const Tensor out = at::empty_like(x);
  const float* from = pointer(x);
  float* to = out.data_ptr<float>();
  const int64_t C = map.channels;
  at::parallel_for(0, map.images * map.height, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / map.height, y = i % map.height;
      k.depthwise_gelu(map.width, C, map.row(from, image, y - 1), map.row(from, image, y), map.row(from, image, y + 1),
                       C, pointer(weight), C, pointer(bias), to + i * map.width * C, C);
    }
  });
  return out;
}

// Gradients of x, weight (9, C) and bias.
std::tuple<Tensor, Tensor, Tensor> depthwise_gelu_backward(const Tensor& gradient_, const Tensor& x_,
                                                           const Tensor& weight, const Tensor& bias) {
  if (x_.scalar_type() == at::kBFloat16) {
    TORCH_CHECK_VALUE(gradient_.scalar_type() == at::kBFloat16, "depthwise_gelu_backward: gradient is ",
                      gradient_.scalar_type(), ", expected ", x_.scalar_type(), ", the dtype of x");
    auto gradients = depthwise_gelu_backward(gradient_.to(at::kFloat), x_.to(at::kFloat), weight, bias);
    std::get<0>(gradients) = std::get<0>(gradients).to(at::kBFloat16);
    return gradients;
  }
  const Kernels& k = kernels();
  const Tensor x = checked_map("depthwise_gelu_backward", x_),
               gradient = checked_map("depthwise_gelu_backward", gradient_);
  check("depthwise_gelu_backward", x, weight, bias);
  TORCH_CHECK_VALUE(gradient.sizes() == x.sizes(), "depthwise_gelu_backward: a gradient of ", gradient.sizes(), " for ",
                    x.sizes());
  const Rows map(x);
  const int64_t C = map.channels;
  const int64_t pieces = std::min<int64_t>(map.images * map.height, at::get_num_threads());
  const Tensor x_gradient = at::empty_like(x), sums = at::zeros({pieces, 10, C}, x.options());
  const Tensor linear = at::empty_like(x);  // the gradient before GELU
  const float *from = pointer(x), *g = pointer(gradient);
  float *z = linear.data_ptr<float>(), *to = x_gradient.data_ptr<float>(), *total = sums.data_ptr<float>();
  const auto range = [&](int64_t piece) { return map.images * map.height * piece / pieces; };
  at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      for (int64_t i = range(piece); i < range(piece + 1); ++i) {
        const int64_t image = i / map.height, y = i % map.height, at = i * map.width * C;
        k.depthwise_gelu_gradient(map.width, C, map.row(from, image, y - 1), map.row(from, image, y),
                                  map.row(from, image, y + 1), C, pointer(weight), C, pointer(bias), g + at, C, z + at,
                                  total + piece * 10 * C, total + piece * 10 * C + 9 * C);
      }
    }
  });
  const Tensor flipped = weight.flip(0).contiguous();  // the transpose of a convolution is that with its kernel turned
  at::parallel_for(0, map.images * map.height, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / map.height, y = i % map.height;
      k.depthwise(map.width, C, map.row(z, image, y - 1), map.row(z, image, y), map.row(z, image, y + 1), C,
                  pointer(flipped), C, to + i * map.width * C, C);
    }
  });
  const Tensor parameters = sums.sum(0);
  return {x_gradient, parameters.narrow(0, 0, 9).contiguous(), parameters[9].clone()};
}

}  // namespace litv2::native
