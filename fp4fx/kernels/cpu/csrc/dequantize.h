// Packed rows back to floating point: whole tensors, and the rows of a table.
#pragma once

#include "rows.h"

namespace fp4fx {
namespace FP4FX_TIER {

// The first `count` of kLanes bytes at p, one a lane; scales of 1 behind.
FP4FX_INLINE vi scale_bytes(const uint8_t* p, int64_t count) {
#if defined(__AVX512BW__)
  const __mmask16 there = (__mmask16)(count >= 16 ? 0xffff : (1 << count) - 1);
  return (vi)_mm512_cvtepu8_epi32(_mm_mask_loadu_epi8(_mm_set1_epi8(0x38), there, p));
#else
  uint8_t bytes[kLanes];
  std::memset(bytes, 0x38, sizeof bytes);
  std::memcpy(bytes, p, smaller(kLanes, count));
  vi lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = bytes[i];
  return lanes;
#endif
}

#if defined(__AVX512BF16__)
// Two blocks at once: the 16 values of each in bf16 are a table, which the codes index.
FP4FX_INLINE void decode_pair(const uint8_t* codes, const float* scale, char* out) {
  const __m512 e2m1 = _mm512_setr_ps(0, .5, 1, 1.5, 2, 3, 4, 6, -0.f, -.5, -1, -1.5, -2, -3, -4, -6);
  const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(e2m1, _mm512_set1_ps(scale[1])),
                                                     _mm512_mul_ps(e2m1, _mm512_set1_ps(scale[0])));
  const __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes));
  const __m512i low = _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi32(v, 12)), _mm512_set1_epi32(0x000f000f));
  const __m512i index = _mm512_mask_or_epi32(low, 0xff00, low, _mm512_set1_epi32(0x00100010));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
}
#endif

// One row of K values: code * (scale * global_scale) in fp32, rounded to the dtype.
template <DType D>
static void decode_row(const uint8_t* codes, const uint8_t* scales, float global_scale, int64_t k, char* out) {
  for (int64_t block = 0; 16 * block < k; block += kLanes) {  // a vector of scales at a time
    const int64_t count = smaller(kLanes, (k + 15) / 16 - block);
    float scale[kLanes];
    const vf unit = e4m3(scale_bytes(scales + block, count)) * global_scale;
    store(scale, unit);
    int64_t b = 0;
#if defined(__AVX512BF16__)
    if (D == DType::bf16 && !_mm512_cmp_ps_mask((__m512)unit, _mm512_set1_ps(0x1p-125f), _CMP_LT_OQ))
      for (; b + 2 <= count && 16 * (block + b + 2) <= k; b += 2)
        decode_pair(codes + 8 * (block + b), scale + b, out + 32 * (block + b));
#endif
    for (; b < count; ++b)
      for (int j = 0; j < 16; j += kLanes) {
        const int64_t at = 16 * (block + b) + j;
        if (at >= k) return;
        const vf v = values(codes + at / 2) * scale[b];
        char* const to = out + at * size_of(D);
        if (D == DType::bf16 && scale[b] < 0x1p-125f) {  // the hardware's conversion would give zeros for subnormals
          const vu bits = bf16_bits(v);
          for (int64_t i = 0; i < smaller(kLanes, k - at); ++i) ((uint16_t*)to)[i] = (uint16_t)bits[i];
        } else {
          store_some(to, v, D, k - at);
        }
      }
  }
}

FP4FX_INLINE void decode_row(const Packed& p, int64_t row, DType dtype, char* out) {
  const uint8_t *codes = p.codes + row * p.blocks() * 8, *scales = p.scales + row * p.blocks();
  switch (dtype) {
    case DType::f32:
      return decode_row<DType::f32>(codes, scales, p.global_scale, p.k, out);
    case DType::bf16:
      return decode_row<DType::bf16>(codes, scales, p.global_scale, p.k, out);
    case DType::f16:
      return decode_row<DType::f16>(codes, scales, p.global_scale, p.k, out);
  }
}

// Pieces of `rows` rows of k values that are worth a thread each.
FP4FX_INLINE int64_t pieces_of(int64_t rows, int64_t k, const Pool& pool) {
  return larger(1, smaller(smaller(rows, 4 * pool.threads), rows * k / 16384));
}

static void dequantize(const Dequantize& d, const Pool& pool) {
  const int64_t pieces = pieces_of(d.x.n, d.x.k, pool);
  parallel(pool, pieces, [&](int64_t piece) {
    for (int64_t row = d.x.n * piece / pieces; row < d.x.n * (piece + 1) / pieces; ++row)
      decode_row(d.x, row, d.dtype, (char*)d.y + row * d.x.k * size_of(d.dtype));
  });
}

// Where the next row of a table lies, no processor can foresee.
FP4FX_INLINE void prefetch_row(const Packed& p, int64_t row) {
  const int64_t blocks = p.blocks();
  for (int64_t at = 0; at < 8 * blocks; at += 64) __builtin_prefetch(p.codes + row * 8 * blocks + at);
  for (int64_t at = 0; at < blocks; at += 64) __builtin_prefetch(p.scales + row * blocks + at);
}

static void embedding(const Embedding& e, const Pool& pool) {
  const int64_t pieces = pieces_of(e.count, e.table.k, pool);
  parallel(pool, pieces, [&](int64_t piece) {
    const int64_t end = e.count * (piece + 1) / pieces;
    for (int64_t i = e.count * piece / pieces; i < end; ++i) {
      if (i + 1 < end) prefetch_row(e.table, e.indices[i + 1]);
      decode_row(e.table, e.indices[i], e.dtype, (char*)e.y + i * e.table.k * size_of(e.dtype));
    }
  });
}

}  // namespace FP4FX_TIER
}  // namespace fp4fx
