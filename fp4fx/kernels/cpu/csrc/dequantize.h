// Packed rows back to floating point: whole tensors, and the rows of a table.
#pragma once

#include "rows.h"

namespace fp4fx {
namespace FP4FX_TIER {

// One row of K values: code * (scale * global_scale) in fp32, rounded to the dtype.
template <DType D>
static void decode_row(const uint8_t* codes, const uint8_t* scales, float global_scale, int64_t k, char* out) {
  for (int64_t block = 0; 16 * block < k; block += kLanes) {  // a vector of scales at a time
    const int64_t count = smaller(kLanes, (k + 15) / 16 - block);
    vi bytes;
    for (int i = 0; i < kLanes; ++i) bytes[i] = i < count ? scales[block + i] : 0;
    float scale[kLanes];
    store(scale, e4m3(bytes) * global_scale);
    for (int64_t b = 0; b < count; ++b)
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

static void embedding(const Embedding& e, const Pool& pool) {
  const int64_t pieces = pieces_of(e.count, e.table.k, pool);
  parallel(pool, pieces, [&](int64_t piece) {
    for (int64_t i = e.count * piece / pieces; i < e.count * (piece + 1) / pieces; ++i)
      decode_row(e.table, e.indices[i], e.dtype, (char*)e.y + i * e.table.k * size_of(e.dtype));
  });
}

}  // namespace FP4FX_TIER
}  // namespace fp4fx
