// Floating point to packed rows, with the bits of nvfp4.quantize_rows: every sum, product and division is the one that
// stands there, in its order.
#pragma once

#include "dequantize.h"

namespace fp4fx {
namespace FP4FX_TIER {

FP4FX_INLINE Block block_of(const Quantize& q, int64_t row, int64_t block) {
  Block result;
  for (int p = 0; p < kParts; ++p) {
    const int64_t at = 16 * block + p * kLanes;
    const char* x = (const char*)q.x + (row * q.x_stride + at) * size_of(q.dtype);
    result.v[p] = at < q.k ? load_some(x, q.dtype, q.k - at) : vf{};
  }
  return result;
}

static float find_global_scale(const Quantize& q, const Pool& pool) {
  const int64_t pieces = pieces_of(q.n, q.k, pool);
  Scratch memory(pieces * 4);
  float* const most = (float*)memory.data;
  parallel(pool, pieces, [&](int64_t piece) {
    float amax = 0;
    bool poisoned = false;
    for (int64_t row = q.n * piece / pieces; row < q.n * (piece + 1) / pieces; ++row)
      for (int64_t block = 0; 16 * block < q.k; ++block) {
        const float found = Block::amax(block_of(q, row, block), poisoned);
        amax = found > amax ? found : amax;
      }
    most[piece] = amax;
  });
  float amax = 0;
  for (int64_t piece = 0; piece < pieces; ++piece) amax = most[piece] > amax ? most[piece] : amax;
  if (amax == 0) return 1;
  const float g = amax / (q.rule == ScaleRule::max ? 6.f * 448.f : 6.f * 256.f);
  return g < 0x1p-126f ? 0x1p-126f : g;
}

static void quantize(const Quantize& q, const Pool& pool) {
  if (*q.global_scale == 0) *q.global_scale = find_global_scale(q, pool);
  if (!q.codes) return;
  const float g = *q.global_scale;
  const int64_t blocks = (q.k + 15) / 16, groups = (q.n + q.block_rows - 1) / q.block_rows;
  const int64_t pieces = pieces_of(groups, q.k * q.block_rows, pool);
  parallel(pool, pieces, [&](int64_t piece) {
    for (int64_t group = groups * piece / pieces; group < groups * (piece + 1) / pieces; ++group) {
      const int64_t row0 = group * q.block_rows, row1 = smaller(q.n, row0 + q.block_rows);
      for (int64_t block = 0; block < blocks; ++block) {
        float amax = 0;
        bool poisoned = false;
        for (int64_t row = row0; row < row1; ++row) {
          const float found = Block::amax(block_of(q, row, block), poisoned);
          amax = found > amax ? found : amax;
        }
        const float* weights = q.weights ? q.weights + (row0 / q.weight_rows * blocks + block) * 16 : nullptr;
        const uint8_t byte = scale_of(block_of(q, row0, block), q.rule, amax, poisoned, g, weights);
        const float scale = e4m3(byte) * g;
        for (int64_t row = row0; row < row1; ++row) {
          vi codes[kParts];
          Block::encode(block_of(q, row, block), scale, codes);
          pack(codes, q.codes + (row * blocks + block) * 8);
          q.scales[row * blocks + block] = byte;
        }
      }
    }
  });
}

}  // namespace FP4FX_TIER
}  // namespace fp4fx
