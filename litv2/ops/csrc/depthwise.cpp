// SPDX-License-Identifier: Apache-2.0
// gelu(3 x 3 depthwise convolution + bias) of a channels-last map in one pass, and its gradients: for training and for
// the plain model. Backward keeps x alone: the convolution is computed again. Maps in bfloat16 are computed in float32, too,
// row by row.

#include <array>

#include "operators.h"

namespace litv2::native {
namespace {

// The last three rows that were asked for, in memory of the scope.
class ThreeRows {
 public:
  ThreeRows(int64_t floats, Scratch& scratch) : floats_(floats), rows_(scratch.take(3 * floats)) {}

  template <typename Compute>
  const float* get(int64_t i, const Compute& compute) {
    float* row = rows_ + i % 3 * floats_;
    if (held_[i % 3] != i) compute(row), held_[i % 3] = i;
    return row;
  }

 private:
  int64_t floats_;
  float* rows_;
  std::array<int64_t, 3> held_{-1, -1, -1};
};

// A map (images, height, width, channels) in float32 or bfloat16, of which a thread reads or writes rows in float32.
class Map {
 public:
  Map(const Kernels& k, const Tensor& map, Scratch& scratch)
      : k_(k),
        bytes_(static_cast<char*>(map.data_ptr())),
        row_(map.size(2) * map.size(3)),
        floats_(map.scalar_type() == at::kFloat),
        converted_(floats_ ? 0 : row_, scratch) {}

  // Rows are counted through all images.
  const float* row(int64_t i) {
    if (floats_) return at<float>(i);
    return converted_.get(i, [&](float* row) { k_.to_float32(row_, at<uint16_t>(i), row); });
  }

  // Calls write(row), which fills it.
  template <typename Write>
  void write(int64_t i, const Write& write) {
    if (floats_) return write(at<float>(i));
    converted_.get(i, [&](float* row) {
      write(row);
      k_.to_bfloat16(1, row_, row, row_, at<uint16_t>(i));
    });
  }

 private:
  template <typename T>
  T* at(int64_t i) const {
    return reinterpret_cast<T*>(bytes_) + i * row_;
  }

  const Kernels& k_;
  char* bytes_;
  int64_t row_;
  bool floats_;
  ThreeRows converted_;
};

// The rows above, at and below row i, counted through all images; those outside of its image are zeros.
struct Neighbours {
  int64_t height;
  const std::vector<float>& zeros;

  template <typename Row>
  std::array<const float*, 3> of(int64_t i, const Row& row) const {
    const int64_t y = i % height;
    const float* above = y > 0 ? row(i - 1) : zeros.data();
    const float* here = row(i);
    return {above, here, y + 1 < height ? row(i + 1) : zeros.data()};
  }
};

void check(const char* name, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const int64_t channels = x.size(3);
  check_sizes(name, {{weight, 9 * channels}, {bias, channels}});
  TORCH_CHECK_VALUE(channels % 16 == 0, name, ": ", channels, " channels, expected a multiple of 16");
}

}  // namespace

// weight: (9, C), see Kernels.
Tensor depthwise_gelu(const Tensor& x_, const Tensor& weight, const Tensor& bias) {
  const Kernels& k = kernels();
  const Tensor x = checked_map("depthwise_gelu", x_, true);
  check("depthwise_gelu", x, weight, bias);
  const Tensor out = at::empty_like(x);
  const int64_t width = x.size(2), C = x.size(3);
  const std::vector<float> zeros(width * C, 0.0f);
  const Neighbours neighbours{x.size(1), zeros};
  at::parallel_for(0, x.size(0) * x.size(1), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    Map from(k, x, scratch), to(k, out, scratch);
    for (int64_t i = begin; i < end; ++i) {
      const auto [above, here, below] = neighbours.of(i, [&](int64_t row) { return from.row(row); });
      to.write(i, [&, above = above, here = here, below = below](float* row) {
        k.depthwise_gelu(width, C, above, here, below, C, pointer(weight), C, pointer(bias), row, C);
      });
    }
  });
  return out;
}

// Gradients of x, weight (9, C) and bias.
std::tuple<Tensor, Tensor, Tensor> depthwise_gelu_backward(const Tensor& gradient_, const Tensor& x_,
                                                           const Tensor& weight, const Tensor& bias) {
  const Kernels& k = kernels();
  const Tensor x = checked_map("depthwise_gelu_backward", x_, true),
               gradient = checked_map("depthwise_gelu_backward", gradient_, true);
  check("depthwise_gelu_backward", x, weight, bias);
  TORCH_CHECK_VALUE(gradient.sizes() == x.sizes() && gradient.scalar_type() == x.scalar_type(),
                    "depthwise_gelu_backward: a gradient of ", gradient.sizes(), " ", gradient.scalar_type(), " for ",
                    x.sizes(), " ", x.scalar_type());
  const int64_t rows = x.size(0) * x.size(1), width = x.size(2), C = x.size(3);
  const int64_t pieces = std::min<int64_t>(rows, at::get_num_threads());
  const Tensor x_gradient = at::empty_like(x), sums = at::zeros({pieces, 10, C}, weight.options());
  const Tensor flipped = weight.flip(0).contiguous();  // the transpose of a convolution is that with its kernel turned
  const std::vector<float> zeros(width * C, 0.0f);
  const Neighbours neighbours{x.size(1), zeros};
  at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = rows * piece / pieces, last = rows * (piece + 1) / pieces;
      Scratch scratch;
      Map from(k, x, scratch), g(k, gradient, scratch), to(k, x_gradient, scratch);
      ThreeRows before_gelu(width * C, scratch);  // gradients there
      float* total = sums.data_ptr<float>() + piece * 10 * C;
      float* not_ours = scratch.take(10 * C);  // of rows next to the first and the last, which another piece sums
      const auto gradient_before_gelu = [&](int64_t i) {
        return before_gelu.get(i, [&](float* row) {
          const auto [above, here, below] = neighbours.of(i, [&](int64_t row) { return from.row(row); });
          float* sum = first <= i && i < last ? total : not_ours;
          k.depthwise_gelu_gradient(width, C, above, here, below, pointer(weight), pointer(bias), g.row(i), row, sum);
        });
      };
      for (int64_t i = first; i < last; ++i) {
        const auto [above, here, below] = neighbours.of(i, gradient_before_gelu);
        to.write(i, [&, above = above, here = here, below = below](float* row) {
          k.depthwise(width, C, above, here, below, C, pointer(flipped), C, row, C);
        });
      }
    }
  });
  const Tensor parameters = sums.sum(0);
  return {x_gradient, parameters.narrow(0, 0, 9).contiguous(), parameters[9].clone()};
}

}  // namespace litv2::native
