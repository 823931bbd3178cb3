// Vectors of the tier that is being compiled: 16 lanes of 32 bits with AVX-512, 8 otherwise. GCC's vector extensions do
// the arithmetic; what they cannot say well (permutes, conversions, masks) is written per instruction set.
#pragma once

#include <immintrin.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "api.h"

#ifndef FP4FX_TIER
#error "compile tier.cpp, which includes this, with -DFP4FX_TIER=<name>"
#endif

#define FP4FX_INLINE static inline __attribute__((always_inline))

namespace fp4fx {
namespace FP4FX_TIER {

#if defined(__AVX512BW__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float vf __attribute__((vector_size(4 * kLanes), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * kLanes), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes), may_alias));

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

FP4FX_INLINE vf splat(float x) { return x - vf{}; }  // which keeps the sign of a zero
FP4FX_INLINE vi splat_i(int32_t x) { return vi{} + x; }
FP4FX_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
FP4FX_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
FP4FX_INLINE vi load_i(const void* p) {
  vi v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
FP4FX_INLINE void store_i(void* p, vi v) { std::memcpy(p, &v, sizeof v); }

// The first `count` bytes at p, zeros behind; reads nothing else.
FP4FX_INLINE vi load_bytes(const uint8_t* p, int64_t count) {
  if (count >= 4 * kLanes) return load_i(p);
#if defined(__AVX512BW__)
  return (vi)_mm512_maskz_loadu_epi8(((uint64_t)1 << count) - 1, p);
#else
  vi v{};
  std::memcpy(&v, p, count);
  return v;
#endif
}

FP4FX_INLINE vf minimum(vf a, vf b) { return a < b ? a : b; }  // of a NaN in a: b
FP4FX_INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }

FP4FX_INLINE float sum(vf v) {
#if defined(__AVX512BW__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  total = v[0];
  return total;
#endif
}

// --- 16-bit floats ---------------------------------------------------------------------------------------------------

FP4FX_INLINE float from_bf16(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

FP4FX_INLINE float from_f16(uint16_t x) {
#if defined(__F16C__)
  return _cvtsh_ss(x);
#else
  _Float16 value;
  std::memcpy(&value, &x, 2);
  return (float)value;
#endif
}

FP4FX_INLINE uint16_t to_f16(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  _Float16 value = (_Float16)x;
  uint16_t bits;
  std::memcpy(&bits, &value, 2);
  return bits;
#endif
}

// kLanes values of a dtype from memory, and back.
FP4FX_INLINE vf load_as_f32(const void* p, DType dtype) {
  if (dtype == DType::f32) return load((const float*)p);
  uint16_t h[kLanes];
  std::memcpy(h, p, sizeof h);
#if defined(__AVX512BW__)
  __m256i x = _mm256_loadu_si256((const __m256i*)h);
  if (dtype == DType::f16) return (vf)_mm512_cvtph_ps(x);
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
#elif defined(__AVX2__)
  __m128i x = _mm_loadu_si128((const __m128i*)h);
  if (dtype == DType::f16) return (vf)_mm256_cvtph_ps(x);
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16);
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = dtype == DType::bf16 ? from_bf16(h[i]) : from_f16(h[i]);
  return v;
#endif
}

// fp32 lanes rounded to bf16, each in the low half of its lane.
FP4FX_INLINE vu bf16_bits(vf v) {
  vu bits = (vu)v;
  vu rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x40) : rounded;
}

FP4FX_INLINE void store_as(void* p, vf v, DType dtype) {
  if (dtype == DType::f32) return store((float*)p, v);
#if defined(__AVX512BF16__)
  if (dtype == DType::bf16) return _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#endif
#if defined(__AVX512BW__)
  __m256i h = dtype == DType::f16 ? _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                                  : _mm512_cvtepi32_epi16((__m512i)bf16_bits(v));
  _mm256_storeu_si256((__m256i*)p, h);
#else
#if defined(__AVX2__)
  if (dtype == DType::f16)
    return _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  uint16_t h[kLanes];
  vu bits = bf16_bits(v);
  for (int i = 0; i < kLanes; ++i) h[i] = dtype == DType::bf16 ? (uint16_t)bits[i] : to_f16(v[i]);
  std::memcpy(p, h, sizeof h);
#endif
}

// The first `count` of kLanes values; zeros behind, or nothing written there.
FP4FX_INLINE vf load_some(const void* p, DType dtype, int64_t count) {
  if (count >= kLanes) return load_as_f32(p, dtype);
  float full[kLanes] = {};
  std::memcpy(full, p, count * size_of(dtype));
  return load_as_f32(full, dtype);
}

FP4FX_INLINE void store_some(void* p, vf v, DType dtype, int64_t count) {
  if (count >= kLanes) return store_as(p, v, dtype);
  float full[kLanes];
  store_as(full, v, dtype);
  std::memcpy(p, full, count * size_of(dtype));
}

// --- NVFP4 -----------------------------------------------------------------------------------------------------------

// E2M1 values of the low four bits of every lane.
FP4FX_INLINE vf e2m1(vi code) {
#if defined(__AVX512BW__)
  const __m512 table = _mm512_setr_ps(0, .5, 1, 1.5, 2, 3, 4, 6, -0.f, -.5, -1, -1.5, -2, -3, -4, -6);
  return (vf)_mm512_permutexvar_ps((__m512i)code, table);
#elif defined(__AVX2__)
  const __m256 table = _mm256_setr_ps(0, .5, 1, 1.5, 2, 3, 4, 6);
  return (vf)((vi)_mm256_permutevar8x32_ps(table, (__m256i)code) ^ (vi)((vu)code << 28 & 0x80000000));
#else
  vi i = code & 7;
  vi magnitude = i < 2 ? (vi)(__builtin_convertvector(i, vf) * 0.5f) : (i << 22) + (126 << 23);
  return (vf)(magnitude | (vi)((vu)code << 28 & 0x80000000));
#endif
}

// E4M3 values of the low eight bits of every lane; the sign bit of a scale is never set.
FP4FX_INLINE vf e4m3(vi byte) {
  vi bits = byte & 0x7f;
  vf value = bits < 8 ? __builtin_convertvector(bits, vf) * 0x1p-9f : (vf)((bits << 20) + (120 << 23));
  return bits == 0x7f ? splat(__builtin_nanf("")) : value;
}

FP4FX_INLINE float e4m3(uint8_t byte) {
  uint32_t magnitude = byte & 0x7f, bits = (magnitude << 20) + (120u << 23);
  float value;
  std::memcpy(&value, &bits, 4);
  return magnitude == 0x7f ? __builtin_nanf("") : magnitude < 8 ? magnitude * 0x1p-9f : value;
}

// kLanes x kLanes transpose of 32-bit lanes, in place.
FP4FX_INLINE void transpose(vi r[kLanes]) {
#if defined(__AVX512BW__)
  __m512i a[16], b[16];
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_epi32((__m512i)r[2 * i], (__m512i)r[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32((__m512i)r[2 * i], (__m512i)r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    __m512i x = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88), y = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
    __m512i z = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88), w = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
    r[i] = (vi)_mm512_shuffle_i32x4(x, z, 0x88);
    r[4 + i] = (vi)_mm512_shuffle_i32x4(y, w, 0x88);
    r[8 + i] = (vi)_mm512_shuffle_i32x4(x, z, 0xdd);
    r[12 + i] = (vi)_mm512_shuffle_i32x4(y, w, 0xdd);
  }
#else
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      int32_t t = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = t;
    }
#endif
}

// --- activations -----------------------------------------------------------------------------------------------------

// e^x to about 1 ulp; 0 below -87.3 and infinity above 88.7, as fp32 has it (no subnormals).
FP4FX_INLINE vf exponential(vf x) {
  vf n = x * 1.44269504f;
  vf magic = splat(0x1.8p23f);
  n = (n + magic) - magic;  // nearest integer, |n| < 2^22
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  vi exponent = __builtin_convertvector(minimum(maximum(n, splat(-126)), splat(127)), vi);
  vf y = p * (vf)((exponent + 127) << 23);
  y = x > 88.7228f ? splat(__builtin_inff()) : y;
  y = x < -87.3365f ? splat(0) : y;
  return x != x ? x : y;
}

FP4FX_INLINE vf sigmoid(vf x) { return 1.f / (1.f + exponential(-x)); }

// erf by Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7.
FP4FX_INLINE vf error_function(vf x) {
  vf a = (vf)((vi)x & 0x7fffffff);
  vf t = 1.f / (1.f + 0.3275911f * a);
  vf p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  vf y = 1.f - p * exponential(-(a * a));
  return (vf)((vi)y | ((vi)x & (vi)splat(-0.f)));
}

FP4FX_INLINE vf activate(vf x, Activation activation) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return x < 0.f ? splat(0) : x;  // a NaN stays one
    case Activation::relu6:
      x = x < 0.f ? splat(0) : x;
      return x > 6.f ? splat(6) : x;
    case Activation::silu:
      return x * sigmoid(x);
    case Activation::gelu:
      return 0.5f * x * (1.f + error_function(x * 0.70710678f));
    case Activation::gelu_tanh: {
      vf u = 1.5957691216f * (x + 0.044715f * x * x * x);  // 1 + tanh(u/2) = 2 sigmoid(u)
      return x * sigmoid(u);
    }
    case Activation::hardswish:
    case Activation::hardsigmoid: {
      vf gate = x + 3.f;
      gate = gate < 0.f ? splat(0) : gate;
      gate = (gate > 6.f ? splat(6) : gate) * (1.f / 6.f);
      return activation == Activation::hardsigmoid ? gate : x * gate;
    }
    case Activation::sigmoid:
      return sigmoid(x);
  }
  return x;
}

// --- threads ---------------------------------------------------------------------------------------------------------

// f(i) for i in [0, count), on the pool's threads.
template <class F>
FP4FX_INLINE void parallel(const Pool& pool, int64_t count, const F& f) {
  if (count == 1) return f(0);
  pool.run(
      count,
      [](void* context, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) (*(const F*)context)(i);
      },
      (void*)&f);
}

// Memory of one thread or one call, aligned for every vector.
struct Scratch {
  void* data;
  explicit Scratch(int64_t bytes) : data(aligned_alloc(64, round_up(bytes + 64, 64))) {
    if (!data) throw std::bad_alloc();
  }
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

}  // namespace FP4FX_TIER
}  // namespace fp4fx
