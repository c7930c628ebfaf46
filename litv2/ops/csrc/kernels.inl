// SPDX-License-Identifier: Apache-2.0
// Included by kernels_*.cpp with VECTOR_FLOATS (floats in a vector), PRODUCT_ROWS (rows of the inner product's tile)
// and KERNELS (the name of the table) defined. GCC's and clang's vector types; nothing here is called by another file's
// code but through the table, so that no instruction reaches a processor that lacks it.

namespace litv2::native {
namespace {

constexpr int64_t V = VECTOR_FLOATS, kPanel = 2 * V;
typedef float Vector __attribute__((vector_size(4 * VECTOR_FLOATS), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * VECTOR_FLOATS), aligned(4), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(VECTOR_FLOATS), aligned(1), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * VECTOR_FLOATS), aligned(2), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define ALWAYS_INLINE __attribute__((always_inline))  // of a lambda

INLINE Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
INLINE void store(float* p, Vector x) { *reinterpret_cast<Vector*>(p) = x; }
INLINE Vector all(float x) { return Vector{} + x; }
INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }  // b where one is NaN

// The numbers of a vector of N combined, half with half.
template <int N, typename Numbers, typename Combine>
INLINE float reduced(Numbers x, const Combine& combine) {
  if constexpr (N > 1) {
    typedef float Half __attribute__((vector_size(2 * N)));
    Half halves[2];
    __builtin_memcpy(halves, &x, sizeof(x));
    return reduced<N / 2>(combine(halves[0], halves[1]), combine);
  } else {
    return x[0];
  }
}

INLINE float sum(Vector x) {
  return reduced<V>(x, [](auto a, auto b) ALWAYS_INLINE { return a + b; });
}

// c[0] x^(N-1) + ... + c[N-1]
template <int N>
INLINE Vector polynomial(Vector x, const float (&c)[N]) {
  Vector p = all(c[0]);
  for (int i = 1; i < N; ++i) p = p * x + c[i];
  return p;
}

// 2^(x log2 e) as 2^n 2^f: a polynomial for f in [-1/2, 1/2], relative error 2e-9 before rounding, n into the exponent.
INLINE Vector exponential(Vector x) {
  const Vector limit = all(-87.0f);
  x = larger(limit, x) * 1.44269504f;  // a NaN stays one
  x = x > 127.0f ? all(127.0f) : x;
  const Vector magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vector n = (x + magic) - magic, f = x - n;
  const Vector p = polynomial(
      f, {1.53458116e-4f, 1.33999312e-3f, 9.61848896e-3f, 5.55032878e-2f, 2.40226469e-1f, 6.93147206e-1f, 1.0f});
  const Integers exponent = (__builtin_convertvector(n, Integers) + 127) << 23;
  return p * reinterpret_cast<const Vector&>(exponent);
}

// The normal distribution's function as 1/2 + x P(x^2) / Q(x^2), fitted for |x| <= 5.5 (error 2e-7 in float32); 0 and 1 beyond,
// where float32 has nothing else.
INLINE Vector normal(Vector x) {
  const Vector t = x * x;
  const Vector p = polynomial(t, {1.11141004e-10f, -2.20631817e-08f, 3.25879397e-06f, 1.72195050e-04f, 4.52098027e-03f,
                                  3.61024027e-02f, 3.98942151e-01f});
  const Vector q = polynomial(t, {6.29134756e-05f, 1.84132369e-03f, 2.91964962e-02f, 2.57159810e-01f, 1.0f});
  const Vector inside = x * p / q;
  const Vector upper = x > 5.5154f ? all(0.5f) : inside;
  return 0.5f + (x < -5.5154f ? all(-0.5f) : upper);
}

// gelu as x (1/2 + z P(z^2)) with z = x between -4.3 and 4.3, absolute error 5e-5.
INLINE Vector fast_gelu(Vector x) {
  const Vector low = all(-4.3f), high = all(4.3f);
  Vector z = larger(low, x);  // a NaN stays one
  z = z > high ? high : z;
  const Vector p = polynomial(z * z, {2.8475526e-11f, -3.1543999e-09f, 1.5347385e-07f, -4.346182e-06f, 8.0284604e-05f,
                                      -1.0304698e-03f, 9.560858e-03f, -6.5944925e-02f, 3.986908e-01f});
  return x * (0.5f + z * p);
}

INLINE Vector gelu(Vector x) { return x * normal(x); }

// d gelu(x) / dx
INLINE Vector gelu_slope(Vector x) { return normal(x) + x * 0.39894228f * exponential(-0.5f * x * x); }

// R rows of C, one panel wide. B's rows are one panel apart. What is `ahead` of them is fetched into the second cache.
template <int R, bool Fetch = false>
INLINE void tile(int64_t K, const float* A, int64_t lda, const float* B, const float* start, int64_t start_stride,
                 const float* more, float* C, int64_t ldc, int64_t ahead = 0) {
  Vector c[R][2];
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < 2; ++j) c[i][j] = start != nullptr ? load(start + i * start_stride + j * V) : Vector{};
  }
  if (more != nullptr) {
    for (int i = 0; i < R; ++i) {
      for (int j = 0; j < 2; ++j) c[i][j] += load(more + i * kPanel + j * V);
    }
  }
  for (int64_t k = 0; k < K; ++k) {
    const Vector b0 = load(B + k * kPanel), b1 = load(B + k * kPanel + V);
    if constexpr (Fetch) {
      for (int64_t i = 0; i < kPanel; i += 16) __builtin_prefetch(B + k * kPanel + ahead + i, 0, 2);
    }
    for (int i = 0; i < R; ++i) {
      const float a = A[i * lda + k];
      c[i][0] += a * b0;
      c[i][1] += a * b1;
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < 2; ++j) store(C + i * ldc + j * V, c[i][j]);
  }
}

template <int R>
void last_rows(int64_t rows, int64_t K, const float* A, int64_t lda, const float* B, const float* start,
               int64_t start_stride, const float* more, float* C, int64_t ldc) {
  if constexpr (R > 0) {
    if (rows == R) return tile<R>(K, A, lda, B, start, start_stride, more, C, ldc);
    last_rows<R - 1>(rows, K, A, lda, B, start, start_stride, more, C, ldc);
  }
}

void product(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B, int64_t panel_stride,
             const float* start, int64_t start_stride, float* C, int64_t ldc, const float* more = nullptr) {
  constexpr int64_t kDepth = 512;  // of a panel's part that stays in the first cache
  for (int64_t k = 0; k < K; k += kDepth) {
    const int64_t depth = K - k < kDepth ? K - k : kDepth;
    if (k > 0) start = C, start_stride = ldc, more = nullptr;
    for (int64_t n = 0; n < N; n += kPanel) {
      const float* panel = B + n / kPanel * panel_stride + k * kPanel;
      const auto from = [&](int64_t m) { return start != nullptr ? start + m * start_stride + n : nullptr; };
      const auto with = [&](int64_t m) { return more != nullptr ? more + m * kPanel + n : nullptr; };
      int64_t m = 0;
      if (M >= PRODUCT_ROWS) {
        tile<PRODUCT_ROWS, true>(depth, A + k, lda, panel, from(0), start_stride, with(0), C + n, ldc, panel_stride);
        m = PRODUCT_ROWS;
      }
      for (; m + PRODUCT_ROWS <= M; m += PRODUCT_ROWS)
        tile<PRODUCT_ROWS>(depth, A + m * lda + k, lda, panel, from(m), start_stride, with(m), C + m * ldc + n, ldc);
      last_rows<PRODUCT_ROWS - 1>(M - m, depth, A + m * lda + k, lda, panel, from(m), start_stride, with(m),
                                  C + m * ldc + n, ldc);
    }
  }
}

INLINE Integers bfloat16_bits(Vector x) {
  const Integers bits = reinterpret_cast<const Integers&>(x);
  const Integers rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest, ties to even
  return x == x ? rounded : Integers{} + 0x7fc0;
}

void to_bfloat16(int64_t M, int64_t K, const float* A, int64_t lda, uint16_t* out) {
  for (int64_t m = 0; m < M; ++m, A += lda, out += K) {
    int64_t k = 0;
    for (; k + V <= K; k += V)
      *reinterpret_cast<Halves*>(out + k) = __builtin_convertvector(bfloat16_bits(load(A + k)), Halves);
    for (; k < K; ++k) out[k] = static_cast<uint16_t>(bfloat16_bits(all(A[k]))[0]);
  }
}

void to_float32(int64_t count, const uint16_t* x, float* out) {
  int64_t i = 0;
  for (; i + V <= count; i += V) {
    const Integers bits = __builtin_convertvector(*reinterpret_cast<const Halves*>(x + i), Integers) << 16;
    store(out + i, reinterpret_cast<const Vector&>(bits));
  }
  for (; i < count; ++i) {
    const uint32_t bits = uint32_t(x[i]) << 16;
    out[i] = reinterpret_cast<const float&>(bits);
  }
}

// A row's numbers are scaled to 254.99 steps: two roundings to the nearest cannot leave the 256 values then.
void to_bytes(int64_t M, int64_t K, const float* A, int64_t lda, uint8_t* out, float* scale, int32_t* zero) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the last bits are
  for (int64_t m = 0; m < M; ++m, A += lda, out += K) {
    Vector low{}, high{}, strange{};
    int64_t k = 0;
    for (; k + V <= K; k += V) {
      const Vector x = load(A + k);
      low = x < low ? x : low;
      high = x > high ? x : high;
      strange += 0.0f * x;  // not zero where x is not finite
    }
    float least = 0, most = 0, rest = sum(strange);
    for (int i = 0; i < V; ++i) least = low[i] < least ? low[i] : least, most = high[i] > most ? high[i] : most;
    for (; k < K; ++k) least = A[k] < least ? A[k] : least, most = A[k] > most ? A[k] : most, rest += 0.0f * A[k];
    const float range = most - least;
    const bool zeros = range < 1e-30f, huge = !(range < 1e38f);
    const float steps = zeros || huge ? 0.0f : 254.99f / range;
    const float start = zeros || huge ? 0.0f : (magic - least * steps) - magic;
    scale[m] = huge ? __builtin_nanf("") : range / 254.99f + rest;
    zero[m] = static_cast<int32_t>(start);
    for (k = 0; k + V <= K; k += V) {
      const Vector q = (load(A + k) * steps + magic) + start;
      const Integers bits = reinterpret_cast<const Integers&>(q) & 0xff;
      *reinterpret_cast<Bytes*>(out + k) = __builtin_convertvector(bits, Bytes);
    }
    for (; k < K; ++k) out[k] = static_cast<uint8_t>((A[k] * steps + magic) - magic + start);
  }
}

void from_sums(int64_t M, const int32_t* sums, const float* scale, const int32_t* zero, const float* scales,
               const int32_t* weights, const float* start, int64_t start_stride, float* C, int64_t ldc) {
  for (int64_t m = 0; m < M; ++m, sums += kColumns, C += ldc) {
    for (int64_t n = 0; n < kColumns; n += V) {
      const Integers difference = *reinterpret_cast<const Integers*>(sums + n) -
                                  zero[m] * *reinterpret_cast<const Integers*>(weights + n);
      const Vector from = start != nullptr ? load(start + m * start_stride + n) : Vector{};
      store(C + n, from + scale[m] * load(scales + n) * __builtin_convertvector(difference, Vector));
    }
  }
}

void layer_norm(int64_t rows, int64_t channels, const float* x, int64_t ldx, const float* weight, const float* bias,
                float eps, float* out) {
  const int64_t whole = channels - channels % V;
  for (int64_t row = 0; row < rows; ++row, x += ldx, out += channels) {
    Vector total{};
    for (int64_t c = 0; c < whole; c += V) total += load(x + c);
    float mean = sum(total);
    for (int64_t c = whole; c < channels; ++c) mean += x[c];
    mean /= channels;
    Vector squares{};
    for (int64_t c = 0; c < whole; c += V) {
      const Vector d = load(x + c) - mean;
      squares += d * d;
    }
    float variance = sum(squares);
    for (int64_t c = whole; c < channels; ++c) variance += (x[c] - mean) * (x[c] - mean);
    const float factor = 1.0f / __builtin_sqrtf(variance / channels + eps);
    for (int64_t c = 0; c < whole; c += V)
      store(out + c, (load(x + c) - mean) * factor * load(weight + c) + load(bias + c));
    for (int64_t c = whole; c < channels; ++c) out[c] = (x[c] - mean) * factor * weight[c] + bias[c];
  }
}

void add(int64_t rows, int64_t channels, const float* x, int64_t ldx, float factor, const float* y, int64_t ldy, float* out,
         int64_t ldo) {
  for (int64_t row = 0; row < rows; ++row, x += ldx, y += ldy, out += ldo) {
    int64_t c = 0;
    for (; c + V <= channels; c += V) store(out + c, load(x + c) + factor * load(y + c));
    for (; c < channels; ++c) out[c] = x[c] + factor * y[c];
  }
}

bool finite(int64_t rows, int64_t channels, const float* x, int64_t ldx) {
  Vector strange{};  // NaN from the first that is not
  float rest = 0;
  for (int64_t row = 0; row < rows; ++row, x += ldx) {
    int64_t c = 0;
    for (; c + V <= channels; c += V) strange += 0.0f * load(x + c);
    for (; c < channels; ++c) rest += 0.0f * x[c];
  }
  return sum(strange) + rest == 0;
}

void means(int64_t count, int64_t size, int64_t channels, const float* x, float* out) {
  const float share = 1.0f / size;
  for (int64_t i = 0; i < count; ++i, x += size * channels, out += channels) {
    int64_t c = 0;
    for (; c + V <= channels; c += V) {
      Vector total = load(x + c);
      for (int64_t j = 1; j < size; ++j) total += load(x + j * channels + c);
      store(out + c, total * share);
    }
    for (; c < channels; ++c) {
      float total = x[c];
      for (int64_t j = 1; j < size; ++j) total += x[j * channels + c];
      out[c] = total * share;
    }
  }
}

void gelu_rows(int64_t rows, int64_t channels, const float* x, int64_t ldx, float* out) {
  for (int64_t row = 0; row < rows; ++row, x += ldx, out += channels) {
    int64_t c = 0;
    for (; c + V <= channels; c += V) store(out + c, gelu(load(x + c)));
    for (; c < channels; ++c) out[c] = gelu(all(x[c]))[0];
  }
}

void deformed_patches(int64_t row, int64_t width, const float* image, int64_t in_height, int64_t in_width,
                      int64_t channels, const float* offsets, int64_t ldo, float* out) {
  for (int64_t x = 0; x < width; ++x, offsets += ldo) {
    for (int64_t tap = 0; tap < 4; ++tap, out += channels) {
      const auto c = dcn::corners(2 * row + tap / 2 + offsets[2 * tap], 2 * x + tap % 2 + offsets[2 * tap + 1],
                                  in_height, in_width);
      dcn::gather(c, 1.0f, image, channels, out, 0, channels, 1);
    }
  }
}

// Calls use(token, value, columns) along a row with the value of the convolution, a vector of channels, and the numbers that
// it is made of: those left of the token, at it, and right of it, above, here and below. Each is read once.
template <typename Use>
INLINE void convolve(int64_t width, const float* const (&rows)[3], int64_t stride, const float* weight, int64_t ldw,
                     Vector start, const Use& use) {
  Vector w[3][3], columns[3][3];
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) w[i][j] = load(weight + (3 * i + j) * ldw);
    columns[0][i] = Vector{}, columns[1][i] = load(rows[i]);
  }
  for (int64_t x = 0; x < width; ++x) {
    Vector value = start;
    for (int i = 0; i < 3; ++i) {
      columns[2][i] = x + 1 < width ? load(rows[i] + (x + 1) * stride) : Vector{};
      for (int j = 0; j < 3; ++j) value += columns[j][i] * w[i][j];
    }
    use(x, value, columns);
    for (int i = 0; i < 3; ++i) columns[0][i] = columns[1][i], columns[1][i] = columns[2][i];
  }
}

// The same for all channels; calls use(token, channel, value).
template <typename Use>
INLINE void convolve_row(int64_t width, int64_t channels, const float* above, const float* here, const float* below,
                         int64_t stride, const float* weight, int64_t ldw, const float* bias, const Use& use) {
  for (int64_t c = 0; c < channels; c += V) {
    const float* rows[3] = {above + c, here + c, below + c};
    convolve(width, rows, stride, weight + c, ldw, bias != nullptr ? load(bias + c) : Vector{},
             [&](int64_t x, Vector value, const Vector(&)[3][3]) ALWAYS_INLINE { use(x, c, value); });
  }
}

void depthwise_gelu(int64_t width, int64_t channels, const float* above, const float* here, const float* below,
                    int64_t stride, const float* weight, int64_t ldw, const float* bias, float* out,
                    int64_t out_stride) {
  convolve_row(width, channels, above, here, below, stride, weight, ldw, bias,
               [&](int64_t x, int64_t c, Vector value) ALWAYS_INLINE { store(out + x * out_stride + c, gelu(value)); });
}

void depthwise_fast_gelu(int64_t width, int64_t channels, const float* above, const float* here, const float* below,
                         int64_t stride, const float* weight, int64_t ldw, const float* bias, float* out,
                         int64_t out_stride) {
  convolve_row(width, channels, above, here, below, stride, weight, ldw, bias,
               [&](int64_t x, int64_t c, Vector value) ALWAYS_INLINE { store(out + x * out_stride + c, fast_gelu(value)); });
}

void depthwise(int64_t width, int64_t channels, const float* above, const float* here, const float* below,
               int64_t stride, const float* weight, int64_t ldw, float* out, int64_t out_stride) {
  convolve_row(width, channels, above, here, below, stride, weight, ldw, nullptr,
               [&](int64_t x, int64_t c, Vector value) ALWAYS_INLINE { store(out + x * out_stride + c, value); });
}

void depthwise_gelu_gradient(int64_t width, int64_t channels, const float* above, const float* here, const float* below,
                             const float* weight, const float* bias, const float* gradient, float* out, float* sums) {
  for (int64_t c = 0; c < channels; c += V) {
    const float* rows[3] = {above + c, here + c, below + c};
    Vector total{}, products[3][3];  // the sum of the gradients, and of their products with what is under each tap
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) products[i][j] = Vector{};
    }
    convolve(width, rows, channels, weight + c, channels, load(bias + c),
             [&](int64_t x, Vector value, const Vector(&columns)[3][3]) ALWAYS_INLINE {
               const Vector g = load(gradient + x * channels + c) * gelu_slope(value);
               store(out + x * channels + c, g);
               total += g;
               for (int i = 0; i < 3; ++i) {
                 for (int j = 0; j < 3; ++j) products[i][j] += g * columns[j][i];
               }
             });
    const auto add_to = [](float* sum, Vector x) ALWAYS_INLINE { store(sum, load(sum) + x); };
    for (int tap = 0; tap < 9; ++tap) add_to(sums + tap * channels + c, products[tap / 3][tap % 3]);
    add_to(sums + 9 * channels + c, total);
  }
}

constexpr int64_t kStrip = 4 * PRODUCT_ROWS;  // queries whose logits are in the cache at once

INLINE int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

int64_t attention_scratch(int64_t M, int64_t d) { return kStrip * (panels(M) + panels(d)) + panels(M); }

constexpr float kNothing = -3.0e38f;  // a logit whose exponential counts for nothing

// exp(x - max) of M numbers in place, where kNothing fills up the last vector; returns their sum.
INLINE float exponentials(float* x, int64_t M) {
  const int64_t whole = (M + V - 1) / V * V;
  Vector top = load(x);
  for (int64_t j = V; j < whole; j += V) top = larger(top, load(x + j));
  const float most = reduced<V>(top, [](auto a, auto b) ALWAYS_INLINE { return a > b ? a : b; });
  Vector total{};
  for (int64_t j = 0; j < whole; j += V) {
    const Vector e = exponential(load(x + j) - most);
    store(x + j, e);
    total += e;
  }
  return sum(total);
}

void attention(int64_t T, int64_t M, int64_t d, const float* queries, int64_t ldq, const float* keys,
               const float* values, float* out, int64_t ldo, float* scratch) {
  const int64_t wide = panels(M), deep = panels(d);
  float *logits = scratch, *mix = scratch + kStrip * wide, *start = mix + kStrip * deep;
  for (int64_t m = 0; m < wide; ++m) start[m] = m < M ? 0.0f : kNothing;
  for (int64_t t = 0; t < T; t += kStrip) {
    const int64_t rows = T - t < kStrip ? T - t : kStrip;
    product(rows, M, d, queries + t * ldq, ldq, keys, d * kPanel, start, 0, logits, wide);
    float factor[kStrip];
    for (int64_t i = 0; i < rows; ++i) factor[i] = 1.0f / exponentials(logits + i * wide, M);
    product(rows, d, M, logits, wide, values, M * kPanel, nullptr, 0, mix, deep);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < d; ++c) out[(t + i) * ldo + c] = mix[i * deep + c] * factor[i];
    }
  }
}

void window_attention(int64_t windows, int64_t size, int64_t d, const float* qkv, int64_t ldq, int64_t channels, float* out,
                      int64_t ldo, float* scratch) {
  const int64_t wide = (size + V - 1) / V * V;
  for (int64_t w = 0; w < windows; ++w, qkv += size * ldq, out += size * ldo) {
    const float *keys = qkv + channels, *values = keys + channels;
    for (int64_t i = 0; i < size; ++i) {
      const float* q = qkv + i * ldq;
      store(scratch + (i + 1) * wide - V, all(kNothing));
      for (int64_t j = 0; j < size; ++j) {
        const float* k = keys + j * ldq;
        Vector dots{};
        int64_t c = 0;
        for (; c + V <= d; c += V) dots += load(q + c) * load(k + c);
        float dot = sum(dots);
        for (; c < d; ++c) dot += q[c] * k[c];
        scratch[i * wide + j] = dot;
      }
    }
    for (int64_t i = 0; i < size; ++i) {
      float *p = scratch + i * wide, *y = out + i * ldo;
      const float factor = 1.0f / exponentials(p, size);
      int64_t c = 0;
      for (; c + V <= d; c += V) {
        Vector mix{};
        for (int64_t j = 0; j < size; ++j) mix += p[j] * load(values + j * ldq + c);
        store(y + c, mix * factor);
      }
      for (; c < d; ++c) {
        float mix = 0;
        for (int64_t j = 0; j < size; ++j) mix += p[j] * values[j * ldq + c];
        y[c] = mix * factor;
      }
    }
  }
}

}  // namespace

const Kernels KERNELS = {KERNELS_NAME,
                         kPanel,
                         product,
                         to_bfloat16,
                         to_float32,
                         to_bytes,
                         from_sums,
                         layer_norm,
                         add,
                         finite,
                         means,
                         gelu_rows,
                         deformed_patches,
                         depthwise_gelu,
                         depthwise_fast_gelu,
                         attention,
                         attention_scratch,
                         window_attention,
                         depthwise_gelu_gradient,
                         depthwise};

}  // namespace litv2::native
