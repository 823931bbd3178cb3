// Rows of an activation in whatever form they come, read as fp32 or brought to operands.
#pragma once

#include "decode.h"

namespace fp4fx {
namespace FP4FX_TIER {

// `count` values a row, rows `stride` elements apart; or, if `scales` is not null, packed codes (and no global scale).
struct Rows {
  const void* data;
  const uint8_t* scales;
  DType dtype;
  int64_t stride, count;
};

FP4FX_INLINE Rows rows_of(const Linear& a) { return {a.x, a.x_scales, a.dtype, a.x_stride, a.w.k}; }

// kLanes values of the codes at p.
FP4FX_INLINE vf values(const uint8_t* p) {
#if defined(__AVX512BW__)
  __m512i v = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)p));
  return e2m1((vi)_mm512_or_si512(v, _mm512_slli_epi64(v, 28)));
#else
  vi v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i / 2] >> (i % 2 * 4);
  return e2m1(v);
#endif
}

// Row `row` as fp32, zeros from `count` to `padded`, a multiple of kLanes and 16.
static void read_row(const Rows& r, int64_t row, float* out, int64_t padded) {
  int64_t i = 0;
  if (r.scales) {
    const int64_t blocks = (r.count + 15) / 16;
    const uint8_t* codes = (const uint8_t*)r.data + row * blocks * 8;
    for (int64_t b = 0; b < blocks; ++b) {
      const vf scale = splat(e4m3(r.scales[row * blocks + b]));
      for (int j = 0; j < 16; j += kLanes, i += kLanes) store(out + i, values(codes + b * 8 + j / 2) * scale);
    }
    i = r.count;
  } else {
    const char* x = (const char*)r.data + row * r.stride * size_of(r.dtype);
    for (; i + kLanes <= r.count; i += kLanes) store(out + i, load_as_f32(x + i * size_of(r.dtype), r.dtype));
    if (i < r.count) store(out + i, load_some(x + i * size_of(r.dtype), r.dtype, r.count - i)), i = r.count;
  }
  for (; i < padded; ++i) out[i] = 0;
}

// Values as operands of Op, `count` of them.
template <class Op>
FP4FX_INLINE void to_operands(const float* values, char* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes)
    store_some(out + i * size_of(Op::kDType), load_some(values + i, DType::f32, count - i), Op::kDType, count - i);
}

// Operands of a call: where they lie and how far apart the rows are, in bytes.
template <class Op>
struct Operands {
  // Whether rows can be read where they are.
  FP4FX_INLINE bool direct(const Rows& r) {
    return !r.scales && r.dtype == Op::kDType && r.count % Op::kValues == 0;
  }
  // `n` rows split into `groups` equal parts, each padded to whole steps.
  FP4FX_INLINE int64_t bytes(const Rows& r, int64_t groups) {
    return groups * round_up(r.count / groups, Op::kValues) * size_of(Op::kDType);
  }
  static void stage(const Rows& r, int64_t n, int64_t groups, char* out, const Pool& pool) {
    const int64_t each = r.count / groups, padded = round_up(each, Op::kValues), row_bytes = bytes(r, groups);
    const int64_t pieces = larger(1, smaller(4 * pool.threads, n * r.count / 4096));
    parallel(pool, pieces, [&](int64_t piece) {
      const int64_t room = round_up(r.count, 16) + kLanes;
      Scratch row(room * 4);
      float* values = (float*)row.data;
      for (int64_t i = n * piece / pieces; i < n * (piece + 1) / pieces; ++i) {
        read_row(r, i, values, round_up(r.count, 16));
        if (padded == each || groups == 1) {
          to_operands<Op>(values, out + i * row_bytes, groups == 1 ? padded : r.count);
        } else {
          float part[kLanes] = {};
          for (int64_t g = 0; g < groups; ++g)
            for (int64_t j = 0; j < padded; j += kLanes) {
              for (int64_t l = 0; l < kLanes; ++l) part[l] = j + l < each ? values[g * each + j + l] : 0.f;
              to_operands<Op>(part, out + i * row_bytes + (g * padded + j) * size_of(Op::kDType),
                              smaller(kLanes, padded - j));
            }
        }
      }
    });
  }
};

}  // namespace FP4FX_TIER
}  // namespace fp4fx
