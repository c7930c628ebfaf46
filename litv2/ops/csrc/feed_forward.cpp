// SPDX-License-Identifier: Apache-2.0
// x + fc2(gelu(depthwise(fc1(norm(x))))), the feed-forward half of a block, in one pass over bands of rows: the hidden
// map, four times the size of x, never leaves the cache. Threads share the rows of the maps, or where these are few the
// hidden channels, and then sum what they have.

#include "operators.h"

namespace litv2::native {
namespace {

constexpr int64_t kBandTokens = 224;  // about so many tokens are worked on at once
constexpr int64_t kChunk = 192;       // hidden channels at once, whole panels; more where Strassen's algorithm multiplies them
constexpr int64_t kFewRows = 8;       // a thread with fewer would spend much on the rows around its own

struct FeedForward {
  const Kernels& k;
  int64_t height, width, channels, hidden, chunk_size;
  const float *norm_weight, *norm_bias;
  float eps;
  Matrix fc1, fc2;
  const float *fc1_bias, *depthwise, *depthwise_bias, *fc2_bias;

  // Rows first to last, counted through all images, band by band, of the hidden channels from `from` to `to`. Of each
  // chunk of these the cache holds `band + 2` rows: those of the band, one above and one below. The next band begins
  // with the last two. The first channels bring x and fc2's bias into the sum.
  void run(const float* x, float* out, int64_t first, int64_t last, int64_t from, int64_t to) const {
    const int64_t band = std::clamp<int64_t>((kBandTokens + width / 2) / width, 1, last - first);
    const int64_t row = width * channels, wide = round_up(channels, kColumns);
    Scratch scratch;
    float* tokens = scratch.take((band + 2) * row);
    Factor normed(fc1, (band + 2) * width, channels, scratch), factor(fc2, band * width, chunk_size, scratch);
    float* hidden_rows = scratch.take((band + 2) * width * (to - from));
    float* activated = scratch.take(band * width * chunk_size);
    float* sum = scratch.take(band * width * wide);
    const int64_t none = std::max(width * chunk_size, wide);
    float* zeros = scratch.take(none);
    std::fill_n(zeros, none, 0.0f);

    for (int64_t begin = first; begin < last; begin += band) {
      const int64_t rows = std::min(band, last - begin);
      // Hidden rows are counted from begin - 1. Those before `known` are there from the last band, or above the map.
      const int64_t known = begin > first ? 2 : begin % height == 0 ? 1 : 0;
      const int64_t end = begin + rows < last || last % height != 0 ? rows + 2 : rows + 1;
      k.layer_norm((end - known) * width, channels, x + (begin - 1 + known) * row, channels, norm_weight, norm_bias,
                   eps, tokens);
      normed.set(k, 0, (end - known) * width, tokens, channels);
      for (int64_t c = from; c < to; c += chunk_size) {
        const int64_t chunk = std::min(chunk_size, to - c), hidden_row = width * chunk;
        float* h = hidden_rows + (band + 2) * width * (c - from);
        if (known == 2) std::copy_n(h + band * hidden_row, 2 * hidden_row, h);
        product(k, (end - known) * width, normed, fc1, 0, c, chunk, fc1_bias + c, 0, h + known * hidden_row, chunk);
        factor.narrow(chunk);
        for (int64_t i = 0; i < rows; ++i) {
          const float* above = (begin + i) % height > 0 ? h + i * hidden_row : zeros;
          const float* below = (begin + i + 1) % height > 0 ? h + (i + 2) * hidden_row : zeros;
          float* row = factor.copies() ? activated : activated + i * hidden_row;  // one that stays in the first cache
          (factor.copies() ? k.depthwise_fast_gelu : k.depthwise_gelu)(width, chunk, above, h + (i + 1) * hidden_row,
                                                                       below, chunk, depthwise + c, hidden,
                                                                       depthwise_bias + c, row, chunk);
          factor.set(k, i * width, width, row, chunk);
        }
        const bool first_chunk = c == from;
        product(k, rows * width, factor, fc2, c, 0, channels, !first_chunk ? sum : from == 0 ? fc2_bias : zeros,
                first_chunk ? 0 : wide, sum, wide);
      }
      if (from == 0) {
        k.add(rows * width, channels, x + begin * row, channels, 1.0f, sum, wide, out + begin * row, channels);
      } else {
        for (int64_t i = 0; i < rows * width; ++i)
          std::copy_n(sum + i * wide, channels, out + begin * row + i * channels);
      }
    }
  }
};

}  // namespace

Tensor feed_forward(const Tensor& x_, const Tensor& norm_weight, const Tensor& norm_bias, double eps, const Tensor& fc1,
                    const Tensor& fc1_bias, const Tensor& depthwise, const Tensor& depthwise_bias, const Tensor& fc2,
                    const Tensor& fc2_bias) {
  const Kernels& k = kernels();
  const Tensor x = checked_map("feed_forward", x_);
  const int64_t height = x.size(1), channels = x.size(3), hidden = fc1_bias.numel();
  TORCH_CHECK_VALUE(hidden > 0 && hidden % kColumns == 0, "feed_forward: ", hidden,
                    " hidden channels, expected a multiple of ", kColumns);
  check_sizes("feed_forward", {{norm_weight, channels},
                               {norm_bias, channels},
                               {fc1_bias, hidden},
                               {depthwise, 9 * hidden},
                               {depthwise_bias, hidden},
                               {fc2_bias, round_up(channels, kColumns)}});
  const Matrix first = packed("fc1", fc1, channels, hidden), second = packed("fc2", fc2, hidden, channels);
  const int64_t rows = x.size(0) * height, row = x.size(2) * channels, threads = at::get_num_threads();
  const int64_t row_pieces = std::clamp<int64_t>(rows / kFewRows, 1, threads), wanted = threads / row_pieces;
  const int64_t chunk_size = second.dtype == at::kFloat && hidden >= wanted * kStrassenDepth ? kStrassenDepth : kChunk;
  const int64_t chunks = (hidden + chunk_size - 1) / chunk_size, hidden_pieces = std::clamp<int64_t>(wanted, 1, chunks);
  const FeedForward pass{k,
                         height,
                         x.size(2),
                         channels,
                         hidden,
                         chunk_size,
                         pointer(norm_weight),
                         pointer(norm_bias),
                         static_cast<float>(eps),
                         first,
                         second,
                         pointer(fc1_bias),
                         pointer(depthwise),
                         pointer(depthwise_bias),
                         pointer(fc2_bias)};
  const Tensor out = at::empty_like(x);
  const Tensor rest = at::empty({hidden_pieces - 1, rows * row}, x.options());
  float *sum = out.data_ptr<float>(), *others = rest.data_ptr<float>();
  at::parallel_for(0, row_pieces * hidden_pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t i = piece / hidden_pieces, j = piece % hidden_pieces;
      pass.run(pointer(x), j == 0 ? sum : others + (j - 1) * rows * row, rows * i / row_pieces,
               rows * (i + 1) / row_pieces, chunks * j / hidden_pieces * chunk_size,
               std::min(hidden, chunks * (j + 1) / hidden_pieces * chunk_size));
    }
  });
  if (hidden_pieces > 1) {
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = 0; j + 1 < hidden_pieces; ++j) {
        const float* other = others + j * rows * row;
        k.add((end - begin) * x.size(2), channels, sum + begin * row, channels, 1.0f, other + begin * row, channels,
              sum + begin * row, channels);
      }
    });
  }
  return out;
}

}  // namespace litv2::native
