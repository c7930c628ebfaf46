// SPDX-License-Identifier: Apache-2.0
// x + HiLo(norm(x)), the attention half of a block. Tokens are in the order of the windows here, those of a window one after
// the other. A map that windows do not divide is padded with zeros after the norm and cropped at the end, as HiLo does.

#include "operators.h"

namespace litv2::native {
namespace {

constexpr int64_t kBandTokens = 112;  // about so many tokens are worked on at once
constexpr int64_t kPooledRows = 48;

struct HiLo {
  const Kernels& k;
  int64_t height, width, channels;         // of x
  int64_t window, h_heads, l_heads, head;  // head: channels of one

  int64_t h_channels() const { return h_heads * head; }
  int64_t l_channels() const { return l_heads * head; }
  int64_t across() const { return (width + window - 1) / window; }  // windows of a row of them
  int64_t cells() const { return (height + window - 1) / window * across(); }  // windows of an image, tokens of the pooled map
  int64_t size() const { return window * window; }
  bool pads() const { return cells() * size() > height * width; }
  // Of one token: Hi-Fi's q, k, v, then Lo-Fi's q, and k, v where nothing is pooled.
  int64_t projected() const { return 3 * h_channels() + (window == 1 ? 3 : 1) * l_channels(); }
  int64_t projected_stride() const { return round_up(projected(), kColumns); }

  // Calls use(first window, windows) for each band, on all threads that the image has. There is one for each of them, if there are
  // so many windows.
  template <typename Use>
  void for_each_band(const Use& use) const {
    const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    const int64_t bands = std::min(cells(), round_up((cells() * size() + kBandTokens - 1) / kBandTokens, threads));
    at::parallel_for(0, bands, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = cells() * i / bands, last = cells() * (i + 1) / bands;
        use(first, last - first);
      }
    });
  }

  // Calls use(token of the map, token of the band, count) for the tokens of each row of each window of a band, without padding.
  template <typename Use>
  void for_each_row(int64_t first, int64_t windows, const Use& use) const {
    for (int64_t i = 0; i < windows * window; ++i) {
      const int64_t w = first + i / window, y = w / across() * window + i % window, x = w % across() * window;
      if (y < height) use(y * width + x, i * window, std::min(window, width - x));
    }
  }
};

struct Linear {
  Matrix weight;
  const float* bias;
};

// x -> norm -> projected tokens, and the mean of the normalised tokens over each window.
void project(const HiLo& a, const float* x, const float* norm_weight, const float* norm_bias, float eps, Linear linear,
             float* projected, float* pooled) {
  const int64_t C = a.channels, stride = a.projected_stride();
  a.for_each_band([&](int64_t first, int64_t windows) {
    const int64_t T = windows * a.size();
    Scratch scratch;
    float* tokens = scratch.take(T * C);
    if (a.pads()) std::fill_n(tokens, T * C, 0.0f);
    a.for_each_row(first, windows, [&](int64_t from, int64_t to, int64_t count) {
      a.k.layer_norm(count, C, x + from * C, C, norm_weight, norm_bias, eps, tokens + to * C);
    });
    Factor factor(linear.weight, T, C, scratch);
    factor.set(a.k, 0, T, tokens, C);
    product(a.k, T, factor, linear.weight, 0, 0, a.projected(), linear.bias, 0, projected + first * a.size() * stride, stride);
    if (a.window > 1 && a.l_heads > 0) a.k.means(windows, a.size(), C, tokens, pooled + first * C);
  });
}

void project_pooled(const HiLo& a, const float* pooled, Linear linear, float* kv, int64_t stride) {
  const int64_t rows = a.cells();
  const int64_t pieces = std::min<int64_t>(rows, std::max<int64_t>(rows / kPooledRows, at::get_num_threads()));
  at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = rows * begin / pieces, last = rows * end / pieces;
    Scratch scratch;
    Factor factor(linear.weight, last - first, a.channels, scratch);
    factor.set(a.k, 0, last - first, pooled + first * a.channels, a.channels);
    product(a.k, last - first, factor, linear.weight, 0, 0, 2 * a.l_channels(), linear.bias, 0, kv + first * stride,
            stride);
  });
}

// Keys (transposed) and values of each head as packed matrices, one after the other.
void pack_heads(const HiLo& a, const float* kv, int64_t stride, float* keys, float* values) {
  const int64_t M = a.cells(), d = a.head, panel = a.k.panel, keys_size = round_up(M, panel) * d,
                values_size = round_up(d, panel) * M;
  at::parallel_for(0, a.l_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* from = kv + i * d;
      float *key = keys + i * keys_size, *value = values + i * values_size;
      for (int64_t m = 0; m < round_up(M, panel); ++m) {
        float* column = key + m / panel * panel * d + m % panel;
        for (int64_t c = 0; c < d; ++c) column[c * panel] = m < M ? from[m * stride + c] : 0.0f;
      }
      for (int64_t first = 0; first < d; first += panel, value += panel * M) {
        const int64_t count = std::min(panel, d - first);
        for (int64_t m = 0; m < M; ++m) {
          std::copy_n(from + m * stride + a.l_channels() + first, count, value + m * panel);
          std::fill_n(value + m * panel + count, panel - count, 0.0f);
        }
      }
    }
  });
}

// Attention of both kinds, their output projections, and the sum with x.
void attend(const HiLo& a, const float* x, const float* projected, const float* keys, const float* values,
            Linear h_proj, Linear l_proj, float* out) {
  const int64_t C = a.channels, d = a.head, M = a.cells(), panel = a.k.panel;
  const int64_t stride = a.projected_stride(), wide = round_up(C, kColumns) + kColumns, Dh = a.h_channels(),
                Dl = a.l_channels();
  const int64_t keys_size = round_up(M, panel) * d, values_size = round_up(d, panel) * M;
  a.for_each_band([&](int64_t first, int64_t windows) {
    const int64_t T = windows * a.size();
    const float* from = projected + first * a.size() * stride;
    Scratch scratch;
    float* mixed = scratch.take(T * C);
    float* sum = scratch.take(T * wide);
    if (Dh > 0) {
      float* logits = scratch.take(a.size() * (a.size() + 16));
      for (int64_t h = 0; h < a.h_heads; ++h)
        a.k.window_attention(windows, a.size(), d, from + h * d, stride, Dh, mixed + h * d, C, logits);
      Factor factor(h_proj.weight, T, Dh, scratch);
      factor.set(a.k, 0, T, mixed, C);
      product(a.k, T, factor, h_proj.weight, 0, 0, Dh, h_proj.bias, 0, sum, wide);
    }
    if (Dl > 0) {
      float* logits = scratch.take(a.k.attention_scratch(M, d));
      for (int64_t h = 0; h < a.l_heads; ++h)
        a.k.attention(T, M, d, from + 3 * Dh + h * d, stride, keys + h * keys_size, values + h * values_size,
                      mixed + Dh + h * d, C, logits);
      Factor factor(l_proj.weight, T, Dl, scratch);
      factor.set(a.k, 0, T, mixed + Dh, C);
      product(a.k, T, factor, l_proj.weight, 0, 0, Dl, l_proj.bias, 0, sum + Dh, wide);
    }
    a.for_each_row(first, windows, [&](int64_t token, int64_t of_band, int64_t count) {
      a.k.add(count, C, x + token * C, C, 1.0f, sum + of_band * wide, wide, out + token * C, C);
    });
  });
}

}  // namespace

Tensor hilo(const Tensor& x_, const Tensor& norm_weight, const Tensor& norm_bias, double eps, const Tensor& proj,
            const Tensor& proj_bias, const Tensor& kv, const Tensor& kv_bias, const Tensor& h_proj,
            const Tensor& h_proj_bias, const Tensor& l_proj, const Tensor& l_proj_bias, int64_t h_heads,
            int64_t l_heads, int64_t window_size) {
  const Kernels& k = kernels();
  const Tensor x = checked_map("hilo", x_);
  const int64_t C = x.size(3), s = window_size, heads = h_heads + l_heads;
  TORCH_CHECK_VALUE(s >= 1 && h_heads >= 0 && l_heads >= 0 && heads > 0 && C % heads == 0, "hilo: window_size=", s,
                    ", heads ", h_heads, " + ", l_heads, " for ", C, " channels: the number of heads must divide the channels");
  const HiLo a{k, x.size(1), x.size(2), C, s, h_heads, l_heads, C / heads};
  const int64_t Dh = a.h_channels(), Dl = a.l_channels();
  const bool pools = s > 1 && Dl > 0;
  check_sizes("hilo", {{norm_weight, C}, {norm_bias, C}});
  const auto linear = [](const char* name, bool used, const Tensor& weight, const Tensor& bias, int64_t in,
                         int64_t out) -> Linear {
    if (!used) return {};
    check_sizes(name, {{bias, round_up(out, kColumns)}});
    return {packed(name, weight, in, out), pointer(bias)};
  };
  const Linear projection = linear("hilo, proj", true, proj, proj_bias, C, a.projected());
  const Linear pooled_projection = linear("hilo, kv", pools, kv, kv_bias, C, 2 * Dl);
  const Linear h_out = linear("hilo, h_proj", Dh > 0, h_proj, h_proj_bias, Dh, Dh);
  const Linear l_out = linear("hilo, l_proj", Dl > 0, l_proj, l_proj_bias, Dl, Dl);

  const int64_t M = a.cells(), kv_stride = pools ? round_up(2 * Dl, kColumns) : a.projected_stride();
  const Tensor out = at::empty_like(x);
  const auto attend_to = [&](int64_t image) {
    Scratch scratch;
    float *projected = scratch.take(M * a.size() * a.projected_stride()), *pooled = scratch.take(pools ? M * C : 0),
          *pooled_kv = scratch.take(pools ? M * kv_stride : 0), *keys = scratch.take(l_heads * round_up(M, k.panel) * a.head),
          *values = scratch.take(l_heads * round_up(a.head, k.panel) * M);
    const int64_t first = image * a.height * a.width * C;
    project(a, pointer(x) + first, pointer(norm_weight), pointer(norm_bias), static_cast<float>(eps), projection, projected, pooled);
    if (pools) project_pooled(a, pooled, pooled_projection, pooled_kv, kv_stride);
    if (Dl > 0) pack_heads(a, pools ? pooled_kv : projected + 3 * Dh + Dl, kv_stride, keys, values);
    attend(a, pointer(x) + first, projected, keys, values, h_out, l_out, out.data_ptr<float>() + first);
  };
  // What is made of an image stays in the cache of the thread that has the image. Those that are not enough for all threads are
  // shared by them.
  const int64_t images = x.size(0), alone = images - images % at::get_num_threads();
  at::parallel_for(0, alone, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) attend_to(image);
  });
  for (int64_t image = alone; image < images; ++image) attend_to(image);
  return out;
}

}  // namespace litv2::native
