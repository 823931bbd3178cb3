// Blocks of 16 values to codes and a scale, with the bits of nvfp4.quantize_rows: every sum, product and division is
// the one that stands there, in its order.
#pragma once

#include "simd.h"

namespace fp4fx {
namespace FP4FX_TIER {

constexpr int kParts = 16 / kLanes;  // vectors of a block

// A value that the compiler must round before it goes on: no fused multiply-add.
FP4FX_INLINE vf rounded(vf v) {
#if defined(__AVX512BW__)
  asm("" : "+v"(v));
#elif defined(__AVX2__)
  asm("" : "+x"(v));
#else
  asm("" : "+m"(v));
#endif
  return v;
}

FP4FX_INLINE vf magnitude(vf v) { return (vf)((vi)v & 0x7fffffff); }

FP4FX_INLINE float largest(vf v) {
#if defined(__AVX512BW__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float result = v[0];
  for (int i = 1; i < kLanes; ++i) result = v[i] > result ? v[i] : result;
  return result;
#endif
}

FP4FX_INLINE int32_t total(vi v) {
#if defined(__AVX512BW__)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
#endif
}

FP4FX_INLINE bool any(vi mask) {
#if defined(__AVX512BW__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int32_t all = 0;
  for (int i = 0; i < kLanes; ++i) all |= mask[i];
  return all;
#endif
}

// E4M3 bits of a value that is not negative: nearest, ties to even, at most 448.
FP4FX_INLINE uint8_t to_e4m3(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (bits > 0x7f800000) return 0x7f;
  bits = bits < 0x43e00000 ? bits : 0x43e00000;
  if (bits >= 121u << 23) return (uint8_t)(((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3));
  float small;
  std::memcpy(&small, &bits, 4);
  small += 0x1p14f;  // where the spacing is that of subnormal E4M3
  std::memcpy(&bits, &small, 4);
  return (uint8_t)(bits - (141u << 23));
}

// E2M1 codes of values: nearest, ties to even, saturating; NaN gives 0.
FP4FX_INLINE vi to_e2m1(vf x) {
  const vf magic = splat(0x1.8p23f);  // adding it rounds to an integer
  vf a = magnitude(x);
  a = a == a ? a : splat(0);
  a = a > 16.f ? splat(16) : a;
  const vf twice = (a * 2.f + magic) - magic, once = (a + magic) - magic, half = (a * .5f + magic) - magic;
  const vf index = minimum(minimum(minimum(twice, once + 2.f), half + 4.f), splat(7));
  return __builtin_convertvector(index, vi) | (x < 0.f ? splat_i(8) : splat_i(0));
}

// 16 codes to 8 bytes.
FP4FX_INLINE void pack(const vi (&codes)[kParts], uint8_t* out) {
#if defined(__AVX512BW__)
  const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)codes[0]);
  const __m128i pairs = _mm_maddubs_epi16(bytes, _mm_set1_epi16(0x1001));
  _mm_storel_epi64((__m128i*)out, _mm_packus_epi16(pairs, pairs));
#else
  for (int i = 0; i < 8; ++i) {
    const vi part = codes[2 * i / kLanes];
    out[i] = (uint8_t)(part[2 * i % kLanes] | part[2 * i % kLanes + 1] << 4);
  }
#endif
}

// The values of one block, zeros behind the row's end.
struct Block {
  vf v[kParts];

  // The greatest finite magnitude; sets `poisoned` if a value is NaN.
  FP4FX_INLINE float amax(const Block& b, bool& poisoned) {
    vf most = vf{};
    for (int p = 0; p < kParts; ++p) {
      const vi bits = (vi)magnitude(b.v[p]);
      poisoned |= any(bits > 0x7f800000);
      most = maximum(bits < 0x7f800000 ? (vf)bits : vf{}, most);
    }
    return largest(most);
  }

  FP4FX_INLINE void encode(const Block& b, float scale, vi (&codes)[kParts]) {
    for (int p = 0; p < kParts; ++p) codes[p] = to_e2m1(b.v[p] / splat(scale));
  }

  // Finite magnitudes in units of `scale`, at most 16.
  FP4FX_INLINE Block in_units(const Block& b, float scale) {
    Block result;
    for (int p = 0; p < kParts; ++p) {
      const vi bits = (vi)magnitude(b.v[p]);
      const vf x = (bits < 0x7f800000 ? (vf)bits : vf{}) / splat(scale);
      result.v[p] = minimum(x, splat(16));
    }
    return result;
  }

  // Sum of weight * (x - code * scale)^2, or of magnitudes instead of squares, each a whole number of 2^-19.
  FP4FX_INLINE int32_t error(const Block& b, float scale, bool squared, const Block& weights) {
    vi codes[kParts], sum = vi{};
    encode(b, scale, codes);
    for (int p = 0; p < kParts; ++p) {
      const vf d = b.v[p] - rounded(e2m1(codes[p]) * scale);
      sum += __builtin_convertvector((squared ? d * d : magnitude(d)) * weights.v[p] * 0x1p19f, vi);
    }
    return total(sum);
  }
};

// The byte of least error, the first of equals; `start` is s rounded.
static uint8_t best_scale(const Block& b, ScaleRule rule, float s, uint8_t start, float global_scale,
                          const float* weights) {
  uint8_t best = start;
  int32_t least = INT32_MAX;
  const float unit = e4m3(start);
  const bool squared = rule != ScaleRule::four_over_six_mae;
  const Block x = Block::in_units(b, unit * global_scale);
  Block factors;
  for (int p = 0; p < kParts; ++p) factors.v[p] = weights ? load(weights + p * kLanes) : splat(1);
  const auto consider = [&](int candidate) {
    const int32_t error = Block::error(x, e4m3((uint8_t)candidate) / unit, squared, factors);
    if (error < least) least = error, best = (uint8_t)candidate;
  };
  if (rule == ScaleRule::search) {
    for (int byte = start > 3 ? start - 3 : 1; byte <= start + 7 && byte < 0x7f; ++byte) consider(byte);
  } else {
    consider(start);
    consider(to_e4m3(s * 1.5f));
  }
  return best;
}

// The scale byte of a block with this greatest magnitude; weights of its errors, or null.
FP4FX_INLINE uint8_t scale_of(const Block& b, ScaleRule rule, float amax, bool poisoned, float global_scale,
                              const float* weights) {
  if (poisoned) return 0x7f;
  if (amax == 0) return 0x38;  // 1
  float s = amax / (6.f * global_scale);
  s = s < 0x1p-9f ? 0x1p-9f : s > 448.f ? 448.f : s;
  const uint8_t start = to_e4m3(s);
  return rule == ScaleRule::max ? start : best_scale(b, rule, s, start, global_scale, weights);
}

}  // namespace FP4FX_TIER
}  // namespace fp4fx
