// SPDX-License-Identifier: Apache-2.0
// Operators made of others. Each call from Python takes 50 to 100 us where a model's maps have filled the caches, which a
// single image feels.

#include <ATen/Parallel.h>

#include "operators.h"

namespace litv2::native {
namespace {

// Takes the tensors and eps that the operators need, one after the other.
class Arguments {
 public:
  Arguments(const char* name, at::TensorList tensors, at::ArrayRef<double> eps) : name_(name), tensors_(tensors), eps_(eps) {}
  const at::Tensor* take(size_t count) {
    TORCH_CHECK_VALUE(tensors_.size() >= count, name_, ": too few tensors for its numbers");
    const at::Tensor* first = tensors_.data();
    tensors_ = tensors_.slice(count);
    return first;
  }
  double take_eps() {
    TORCH_CHECK_VALUE(!eps_.empty(), name_, ": too few eps for its numbers");
    const double first = eps_.front();
    eps_ = eps_.slice(1);
    return first;
  }
  bool empty() const { return tensors_.empty() && eps_.empty(); }
  void check_empty() const { TORCH_CHECK_VALUE(empty(), name_, ": more tensors or eps than its numbers need"); }

 private:
  const char* name_;
  at::TensorList tensors_;
  at::ArrayRef<double> eps_;
};

Tensor block(const Tensor& x, Arguments& arguments, int64_t h_heads, int64_t l_heads, int64_t window_size) {
  Tensor out = x;
  if (h_heads + l_heads > 0) {
    const Tensor* t = arguments.take(10);
    out = hilo(out, t[0], t[1], arguments.take_eps(), t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9], h_heads, l_heads,
               window_size);
  }
  const Tensor* t = arguments.take(8);
  return feed_forward(out, t[0], t[1], arguments.take_eps(), t[2], t[3], t[4], t[5], t[6], t[7]);
}

// x (B, H, W, C) -> (B, classes): the norm of each token, their mean, and a linear layer whose columns the threads share.
Tensor head(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps, const Tensor& weight,
            const Tensor& bias, int64_t classes) {
  const Kernels& k = kernels();
  const int64_t images = x.size(0), tokens = x.size(1) * x.size(2), C = x.size(3);
  const int64_t panels = round_up(classes, kColumns) / kColumns;
  const Matrix matrix = packed("classifier, head", weight, C, classes);
  check_sizes("classifier", {{norm_weight, C}, {norm_bias, C}, {bias, panels * kColumns}});
  const Tensor pooled = at::empty({images, C}, x.options()), out = at::empty({images, classes}, x.options());
  at::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    float* normed = scratch.take(tokens * C);
    for (int64_t image = begin; image < end; ++image) {
      k.layer_norm(tokens, C, pointer(x) + image * tokens * C, C, pointer(norm_weight), pointer(norm_bias),
                   static_cast<float>(eps), normed);
      k.means(1, tokens, C, normed, pooled.data_ptr<float>() + image * C);
    }
  });
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kColumns, last = std::min(end * kColumns, classes), wide = (end - begin) * kColumns;
    Scratch scratch;
    float* sum = scratch.take(images * wide);
    Factor factor(matrix, images, C, scratch);
    factor.set(k, 0, images, pointer(pooled), C);
    product(k, images, factor, matrix, 0, first, last - first, pointer(bias) + first, 0, sum, wide);
    for (int64_t image = 0; image < images; ++image)
      std::copy_n(sum + image * wide, last - first, out.data_ptr<float>() + image * classes + first);
  });
  return out;
}

}  // namespace

// tensors and eps: of each block those of hilo, if there are heads, and of feed_forward, in the order of their arguments.
Tensor blocks(const Tensor& x, at::TensorList tensors, at::ArrayRef<double> eps, int64_t h_heads, int64_t l_heads,
              int64_t window_size) {
  Arguments arguments("blocks", tensors, eps);
  TORCH_CHECK_VALUE(!arguments.empty(), "blocks: no tensors");
  Tensor out = x;
  while (!arguments.empty()) out = block(out, arguments, h_heads, l_heads, window_size);
  return out;
}

// Images -> logits. stages: of each stage the number of its blocks, h_heads, l_heads, window_size, and the channels of the
// merging after it, 0 for none. tensors and eps: of patch_embed, of each stage those of its blocks and of token_merging, of the
// last norm, and the weights of the classifier.
Tensor classifier(const Tensor& image, int64_t patch, at::TensorList tensors, at::ArrayRef<double> eps, at::IntArrayRef stages,
                  int64_t classes) {
  Arguments arguments("classifier", tensors, eps);
  TORCH_CHECK_VALUE(stages.size() % 5 == 0, "classifier: ", stages.size(), " numbers of stages, expected 5 of each");
  const Tensor* t = arguments.take(4);
  Tensor x = patch_embed(image, patch, t[0], t[1], t[2], t[3], arguments.take_eps());
  for (auto stage = stages.begin(); stage != stages.end(); stage += 5) {
    for (int64_t i = 0; i < stage[0]; ++i) x = block(x, arguments, stage[1], stage[2], stage[3]);
    if (stage[4] == 0) continue;
    t = arguments.take(5);
    x = token_merging(x, t[0], t[1], t[2], t[3], t[4], stage[4]);
  }
  t = arguments.take(4);
  x = head(x, t[0], t[1], arguments.take_eps(), t[2], t[3], classes);
  arguments.check_empty();
  return x;
}

}  // namespace litv2::native
