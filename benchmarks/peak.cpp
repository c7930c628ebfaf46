// SPDX-License-Identifier: Apache-2.0
// What the processor's multiply-add instructions give when nothing is in their way: loops over registers, without memory.
// peak.py compiles this file, and takes of the loops of a dtype that the processor can run the fastest.

#include <cstring>
#include <thread>
#include <vector>

#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__) && __has_include(<amxtileintrin.h>)
#include <sys/syscall.h>
#include <unistd.h>
#define WITH_AMX
#endif
#endif

namespace {

// Every loop has several sums that do not wait for each other, enough for the latency of its instruction. They begin with
// different values, and the result depends on all of them: no compiler can merge or leave out any.

#ifdef __x86_64__

__attribute__((target("avx2,fma"))) double avx2_fma(long iterations) {
  __m256 sums[12], x = _mm256_set1_ps(0.5f), y = _mm256_set1_ps(1.0f);
  for (int c = 0; c < 12; ++c) sums[c] = _mm256_set1_ps(c);
  for (long i = 0; i < iterations; ++i) {
    for (auto& sum : sums) sum = _mm256_fmadd_ps(sum, x, y);
  }
  for (int c = 1; c < 12; ++c) sums[0] = _mm256_add_ps(sums[0], sums[c]);
  return _mm256_cvtss_f32(sums[0]);
}

__attribute__((target("avx512f"))) double avx512_fma(long iterations) {
  __m512 sums[16], x = _mm512_set1_ps(0.5f), y = _mm512_set1_ps(1.0f);
  for (int c = 0; c < 16; ++c) sums[c] = _mm512_set1_ps(c);
  for (long i = 0; i < iterations; ++i) {
    for (auto& sum : sums) sum = _mm512_fmadd_ps(sum, x, y);
  }
  for (int c = 1; c < 16; ++c) sums[0] = _mm512_add_ps(sums[0], sums[c]);
  return _mm512_cvtss_f32(sums[0]);
}

__attribute__((target("avx512f,avx512bf16"))) double avx512_bf16(long iterations) {
  __m512 sums[16];
  const auto x = (__m512bh)_mm512_set1_epi16(0x3f80), y = x;  // ones
  for (int c = 0; c < 16; ++c) sums[c] = _mm512_set1_ps(c);
  for (long i = 0; i < iterations; ++i) {
    for (auto& sum : sums) sum = _mm512_dpbf16_ps(sum, x, y);
  }
  for (int c = 1; c < 16; ++c) sums[0] = _mm512_add_ps(sums[0], sums[c]);
  return _mm512_cvtss_f32(sums[0]);
}

__attribute__((target("avx512f,avx512vnni"))) double avx512_vnni(long iterations) {
  __m512i sums[16], x = _mm512_set1_epi8(1), y = x;
  for (int c = 0; c < 16; ++c) sums[c] = _mm512_set1_epi32(c);
  for (long i = 0; i < iterations; ++i) {
    for (auto& sum : sums) sum = _mm512_dpbusd_epi32(sum, x, y);
  }
  for (int c = 1; c < 16; ++c) sums[0] = _mm512_add_epi32(sums[0], sums[c]);
  return _mm512_reduce_add_epi32(sums[0]);
}

__attribute__((target("avx2,avxvnni"))) double avx_vnni(long iterations) {
  __m256i sums[12], x = _mm256_set1_epi8(1), y = x;
  for (int c = 0; c < 12; ++c) sums[c] = _mm256_set1_epi32(c);
  for (long i = 0; i < iterations; ++i) {
    for (auto& sum : sums) sum = _mm256_dpbusd_avx_epi32(sum, x, y);
  }
  for (int c = 1; c < 12; ++c) sums[0] = _mm256_add_epi32(sums[0], sums[c]);
  return _mm_cvtsi128_si32(_mm256_castsi256_si128(sums[0]));
}

// Bits of what the processor says of itself, see Intel's manual, CPUID, leaf 7.
unsigned leaf7(int subleaf, int reg) {
  unsigned a[4] = {};
  return __get_cpuid_count(7, subleaf, &a[0], &a[1], &a[2], &a[3]) ? a[reg] : 0;
}
enum { EAX, EBX, ECX, EDX };

// __builtin_cpu_supports asks the operating system too, whether it keeps the registers.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() { return __builtin_cpu_supports("avx512f"); }
bool has_avx512_bf16() { return has_avx512() && (leaf7(1, EAX) >> 5 & 1); }
bool has_avx512_vnni() { return has_avx512() && (leaf7(0, ECX) >> 11 & 1); }
bool has_avx_vnni() { return has_avx2() && (leaf7(1, EAX) >> 4 & 1); }

#ifdef WITH_AMX

// Six tiles of sums and two of ones, 16 rows of 64 bytes each.
__attribute__((target("amx-tile"))) void fill_tiles() {
  struct alignas(64) {
    unsigned char palette = 1, first_row = 0, reserved[14] = {};
    unsigned short bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shape;
  static_assert(sizeof(shape) == 64);
  alignas(64) char zeros[1024] = {};
  _tile_loadconfig(&shape);
  _tile_loadd(0, zeros, 64);
  _tile_loadd(1, zeros, 64);
  _tile_loadd(2, zeros, 64);
  _tile_loadd(3, zeros, 64);
  _tile_loadd(4, zeros, 64);
  _tile_loadd(5, zeros, 64);
  _tile_loadd(6, zeros, 64);
  _tile_loadd(7, zeros, 64);
}

__attribute__((target("amx-tile,amx-bf16"))) double amx_bf16(long iterations) {
  fill_tiles();
  for (long i = 0; i < iterations; ++i) {
    _tile_dpbf16ps(0, 6, 7);
    _tile_dpbf16ps(1, 6, 7);
    _tile_dpbf16ps(2, 6, 7);
    _tile_dpbf16ps(3, 6, 7);
    _tile_dpbf16ps(4, 6, 7);
    _tile_dpbf16ps(5, 6, 7);
  }
  _tile_release();
  return 0;
}

__attribute__((target("amx-tile,amx-int8"))) double amx_int8(long iterations) {
  fill_tiles();
  for (long i = 0; i < iterations; ++i) {
    _tile_dpbssd(0, 6, 7);
    _tile_dpbssd(1, 6, 7);
    _tile_dpbssd(2, 6, 7);
    _tile_dpbssd(3, 6, 7);
    _tile_dpbssd(4, 6, 7);
    _tile_dpbssd(5, 6, 7);
  }
  _tile_release();
  return 0;
}

// Linux gives a process the tiles' registers when it asks for them.
bool allowed_tiles() {
  constexpr int kAskPermission = 0x1023, kTileData = 18;
  return (leaf7(0, EDX) >> 24 & 1) && syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
}
bool has_amx_bf16() { return (leaf7(0, EDX) >> 22 & 1) && allowed_tiles(); }
bool has_amx_int8() { return (leaf7(0, EDX) >> 25 & 1) && allowed_tiles(); }

#endif  // WITH_AMX
#endif  // __x86_64__

#ifdef __aarch64__

double neon_fma(long iterations) {
  typedef float Vector __attribute__((vector_size(16)));
  const Vector x = {0.5f, 0.5f, 0.5f, 0.5f}, y = {1.0f, 1.0f, 1.0f, 1.0f};
  Vector sums[16];
  for (int c = 0; c < 16; ++c) sums[c] = y * float(c);
  for (long i = 0; i < iterations; ++i) {
    for (auto& sum : sums) sum = sum * x + y;  // one instruction: compilers contract it
  }
  for (int c = 1; c < 16; ++c) sums[0] += sums[c];
  return sums[0][0];
}

#endif

bool always() { return true; }

struct Loop {
  const char *dtype, *name;
  bool (*runs_here)();
  double (*run)(long iterations);
  double multiply_adds;  // of an iteration
};

const Loop loops[] = {
#ifdef __x86_64__
    {"float32", "AVX2 FMA", has_avx2, avx2_fma, 12 * 8},
    {"float32", "AVX-512 FMA", has_avx512, avx512_fma, 16 * 16},
    {"bfloat16", "AVX-512 BF16", has_avx512_bf16, avx512_bf16, 16 * 32},
    {"int8", "AVX-512 VNNI", has_avx512_vnni, avx512_vnni, 16 * 64},
    {"int8", "AVX-VNNI", has_avx_vnni, avx_vnni, 12 * 32},
#ifdef WITH_AMX
    {"bfloat16", "AMX BF16", has_amx_bf16, amx_bf16, 6 * 16 * 16 * 32},
    {"int8", "AMX INT8", has_amx_int8, amx_int8, 6 * 16 * 16 * 64},
#endif
#endif
#ifdef __aarch64__
    {"float32", "NEON FMA", always, neon_fma, 16 * 4},
#endif
    {"", "", always, nullptr, 0},  // the end
};

// The i-th loop of a dtype that this processor can run, or null after the last.
const Loop* find(const char* dtype, int i) {
  for (const Loop& loop : loops) {
    if (std::strcmp(loop.dtype, dtype) == 0 && loop.runs_here() && i-- == 0) return &loop;
  }
  return nullptr;
}

}  // namespace

extern "C" const char* loop_name(const char* dtype, int i) {
  const Loop* loop = find(dtype, i);
  return loop == nullptr ? nullptr : loop->name;
}

// Runs the loop in that many threads; returns the multiply-adds that all have done together.
extern "C" double multiply_adds(const char* dtype, int i, int threads, long iterations) {
  const Loop* loop = find(dtype, i);
  if (loop == nullptr) return 0;
  std::vector<double> results(threads);
  const auto work = [&](int thread) { results[thread] = loop->run(iterations); };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (auto& other : others) other.join();
  return loop->multiply_adds * threads * iterations;
}
