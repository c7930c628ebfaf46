// SPDX-License-Identifier: Apache-2.0
// The two layers that make tokens of several: the patch embedding, and gelu(norm(deformable 2 x 2 convolution)), the
// merging between stages, with its batch norm folded into the weights.

#include "operators.h"

namespace litv2::native {
namespace {

constexpr int64_t kTokens = 112;  // about so many are made at once

// Calls use(first, last) for bands of rows, counted through all images, on all threads: as many for each, if there are so many.
template <typename Use>
void for_each_band(int64_t rows, int64_t width, const Use& use) {
  const int64_t wanted = round_up((rows * width + kTokens - 1) / kTokens, at::get_num_threads()), bands = std::min(rows, wanted);
  at::parallel_for(0, bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) use(rows * i / bands, rows * (i + 1) / bands);
  });
}

}  // namespace

// image (B, in, H, W) of any strides, H and W multiples of `patch`; weight: packed, its inputs ordered (in, y, x).
Tensor patch_embed(const Tensor& image, int64_t patch, const Tensor& weight, const Tensor& bias,
                   const Tensor& norm_weight, const Tensor& norm_bias, double eps) {
  const Kernels& k = kernels();
  TORCH_CHECK_VALUE(image.dim() == 4 && image.scalar_type() == at::kFloat && image.device().is_cpu() && patch > 0 &&
                        image.size(2) % patch == 0 && image.size(3) % patch == 0 && image.size(1) > 0 &&
                        image.size(2) > 0 && image.size(3) > 0,
                    "patch_embed: an image of ", image.sizes(), " ", image.scalar_type(),
                    ", expected float32 (B, C, H, W) of whole ", patch, " x ", patch, " patches");
  const int64_t in = image.size(1), K = in * patch * patch, C = norm_weight.numel(), wide = round_up(C, kColumns);
  const Matrix matrix = packed("patch_embed", weight, K, C);
  check_sizes("patch_embed", {{bias, wide}, {norm_bias, C}, {norm_weight, C}});
  const int64_t height = image.size(2) / patch, width = image.size(3) / patch;
  const Tensor out =
      at::empty({image.size(0), height, width, C}, image.options().memory_format(at::MemoryFormat::Contiguous));
  const float* pixels = pointer(image);
  float* to = out.data_ptr<float>();
  const int64_t per_image = image.stride(0), per_channel = image.stride(1), per_row = image.stride(2),
                per_column = image.stride(3);
  for_each_band(image.size(0) * height, width, [&](int64_t first, int64_t last) {
    const int64_t tokens = (last - first) * width;
    Scratch scratch;
    float *columns = scratch.take(tokens * K), *sum = scratch.take(tokens * wide), *column = columns;
    for (int64_t row = first; row < last; ++row) {
      for (int64_t x = 0; x < width; ++x) {
        const float* corner =
            pixels + row / height * per_image + row % height * patch * per_row + x * patch * per_column;
        for (int64_t c = 0; c < in; ++c) {
          for (int64_t i = 0; i < patch; ++i) {
            const float* from = corner + c * per_channel + i * per_row;
            for (int64_t j = 0; j < patch; ++j) *column++ = from[j * per_column];
          }
        }
      }
    }
    Factor factor(matrix, tokens, K, scratch);
    factor.set(k, 0, tokens, columns, K);
    product(k, tokens, factor, matrix, 0, 0, C, pointer(bias), 0, sum, wide);
    k.layer_norm(tokens, C, sum, wide, pointer(norm_weight), pointer(norm_bias), static_cast<float>(eps),
                 to + first * width * C);
  });
  return out;
}

// x (B, H, W, C) -> (B, H / 2, W / 2, out). offset_top and offset_bottom: the offset convolution's weights of the upper
// and of the lower row of a patch, packed, 2 C inputs ordered (column, channel) and 8 outputs, (y, x) per tap. weight:
// packed, 4 C inputs ordered (tap, channel).
Tensor token_merging(const Tensor& x_, const Tensor& offset_top, const Tensor& offset_bottom, const Tensor& offset_bias,
                     const Tensor& weight, const Tensor& bias, int64_t out_channels) {
  const Kernels& k = kernels();
  const Tensor x = checked_map("token_merging", x_);
  const int64_t H = x.size(1), W = x.size(2), C = x.size(3), height = H / 2, width = W / 2;
  TORCH_CHECK_VALUE(height > 0 && width > 0, "token_merging: a map of ", H, " x ", W, ", expected at least 2 x 2");
  const int64_t wide = round_up(out_channels, kColumns), positions = round_up(8, kColumns);
  const Matrix top = packed("token_merging, offsets", offset_top, 2 * C, 8);
  const Matrix bottom = packed("token_merging, offsets", offset_bottom, 2 * C, 8);
  const Matrix matrix = packed("token_merging", weight, 4 * C, out_channels);
  check_sizes("token_merging", {{offset_bias, positions}, {bias, wide}});
  const Tensor out = at::empty({x.size(0), height, width, out_channels}, x.options());
  const float* tokens = pointer(x);
  float* to = out.data_ptr<float>();
  for_each_band(x.size(0) * height, width, [&](int64_t first, int64_t last) {
    const int64_t count = (last - first) * width;
    Scratch scratch;
    float *offsets = scratch.take(width * positions), *columns = scratch.take(count * 4 * C),
          *sum = scratch.take(count * wide);
    Factor upper_factor(top, width, 2 * C, scratch), lower_factor(bottom, width, 2 * C, scratch),
        factor(matrix, count, 4 * C, scratch);
    for (int64_t row = first; row < last; ++row) {
      const float* image = tokens + row / height * H * W * C;
      const float* upper = image + row % height * 2 * W * C;
      upper_factor.set(k, 0, width, upper, 2 * C);
      lower_factor.set(k, 0, width, upper + W * C, 2 * C);
      product(k, width, upper_factor, top, 0, 0, 8, pointer(offset_bias), 0, offsets, positions);
      product(k, width, lower_factor, bottom, 0, 0, 8, offsets, positions, offsets, positions);
      k.deformed_patches(row % height, width, image, H, W, C, offsets, positions,
                         columns + (row - first) * width * 4 * C);
    }
    factor.set(k, 0, count, columns, 4 * C);
    product(k, count, factor, matrix, 0, 0, out_channels, pointer(bias), 0, sum, wide);
    k.gelu(count, out_channels, sum, wide, to + first * width * out_channels);
  });
  return out;
}

}  // namespace litv2::native
