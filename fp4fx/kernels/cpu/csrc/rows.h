// Rows of an activation in whatever form they come, read as fp32 or brought to operands.
#pragma once

#include "block.h"
#include "decode.h"

namespace fp4fx {
namespace FP4FX_TIER {

// `count` values a row, rows `stride` elements apart; or, if `scales` is not null, packed codes (and no global scale).
struct Rows {
  const void* data;
  const uint8_t* scales;
  DType dtype;
  int64_t stride, count;
  float quantize;  // not 0: values are rounded to NVFP4 with this global scale, and become multiples of it
  ScaleRule rule;  // by which they are
};

FP4FX_INLINE Rows rows_of(const Linear& a) {
  return {a.x, a.x_scales, a.x_dtype, a.x_stride, a.w.k, a.quantize_x, a.x_rule};
}

// kLanes values of the codes at p.
FP4FX_INLINE vf values(const uint8_t* p) {
#if defined(__AVX512BW__)
  __m512i v = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)p));
  return e2m1((vi)_mm512_or_si512(v, _mm512_slli_epi64(v, 28)));
#else
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return e2m1((vi)((vu{} + word) >> vu{0, 4, 8, 12, 16, 20, 24, 28}));
#endif
}

// A block of values to what its codes and scale say.
FP4FX_INLINE void quantize_block(float* values, float global_scale, ScaleRule rule) {
  Block block;
  for (int p = 0; p < kParts; ++p) block.v[p] = load(values + p * kLanes);
  bool poisoned = false;
  const float amax = Block::amax(block, poisoned);
  const float unit = e4m3(scale_of(block, rule, amax, poisoned, global_scale, nullptr));
  vi codes[kParts];
  Block::encode(block, unit * global_scale, codes);
  for (int p = 0; p < kParts; ++p) store(values + p * kLanes, e2m1(codes[p]) * unit);
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
  if (r.quantize != 0)
    for (i = 0; i < r.count; i += 16) quantize_block(out + i, r.quantize, r.rule);
}

// Values as operands of Op, `count` of them.
template <class Op>
FP4FX_INLINE void to_operands(const float* values, char* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes)
    store_some(out + i * size_of(Op::kDType), load_some(values + i, DType::f32, count - i), Op::kDType, count - i);
}

// f(i, values i to i + kLanes, of which some may be behind the end and zero) over row `row`.
template <DType D, class F>
FP4FX_INLINE void each_vector_of(const char* x, int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, load_as_f32(x + i * size_of(D), D));
  if (i < count) f(i, load_some(x + i * size_of(D), D, count - i));
}

template <class F>
FP4FX_INLINE void each_vector(const Rows& r, int64_t row, float* room, const F& f) {
  if (r.scales || r.quantize != 0) {
    read_row(r, row, room, round_up(r.count, 16));
    return each_vector_of<DType::f32>((const char*)room, r.count, f);
  }
  const char* x = (const char*)r.data + row * r.stride * size_of(r.dtype);
  switch (r.dtype) {  // constants for the compiler
    case DType::f32:
      return each_vector_of<DType::f32>(x, r.count, f);
    case DType::bf16:
      return each_vector_of<DType::bf16>(x, r.count, f);
    case DType::f16:
      return each_vector_of<DType::f16>(x, r.count, f);
  }
}

// The bits of the largest magnitude of a row, which is that of a NaN if there is one.
static int32_t largest_bits(const Rows& r, int64_t row, float* room) {
  vi most{};
  each_vector(r, row, room, [&](int64_t, vf v) {
    const vi bits = (vi)v & 0x7fffffff;
    most = bits > most ? bits : most;
  });
#if defined(__AVX512BW__)
  return _mm512_reduce_max_epi32((__m512i)most);
#else
  int32_t largest = 0;
  for (int l = 0; l < kLanes; ++l) largest = larger(largest, most[l]);
  return largest;
#endif
}

// How values of that magnitude become int8, and the factor back. What is not finite makes everything NaN.
struct Int8Scale {
  float to_integer, factor;

  explicit Int8Scale(int32_t largest) {
    float amax;
    std::memcpy(&amax, &largest, 4);
    const bool finite = largest < 0x7f800000;
    to_integer = finite && amax > 1e-36f ? 127.f / amax : 0.f;
    factor = finite ? amax / 127.f : __builtin_nanf("");
  }
};

// `n` rows split into `groups` equal parts, each padded to whole steps, as operands: read where they are, or brought
// together. Integers have a factor for every `per_factor` rows, and 128 added.
template <class Op>
struct Operands {
  static constexpr int64_t kBytes = 4 / Op::kValues;  // of one

  const Rows rows;
  const int64_t n, groups, per_factor;
  const bool direct;
  const int64_t row_bytes;
  Scratch memory, factors_memory;

  Operands(const Rows& r, int64_t n, int64_t groups, int64_t per_factor, const Pool& pool)
      : rows(r), n(n), groups(groups), per_factor(per_factor),
        direct(!Op::kInteger && !r.scales && r.quantize == 0 && r.dtype == Op::kDType && r.count / groups % Op::kValues == 0),
        row_bytes(direct ? r.stride * kBytes : groups * round_up(r.count / groups, Op::kValues) * kBytes),
        memory(direct ? 0 : n * row_bytes), factors_memory(Op::kInteger ? n * 4 : 0) {
    if (Op::kInteger) stage_integers(pool);
    else if (!direct) each_row(pool, [&](int64_t i, float* room) { put(i, room); });
  }

  const char* data() const { return direct ? (const char*)rows.data : (const char*)memory.data; }
  const float* factors() const { return Op::kInteger ? (const float*)factors_memory.data : nullptr; }

 private:
  char* row(int64_t i) const { return (char*)memory.data + i * row_bytes; }

  template <class F>
  void each_row(const Pool& pool, const F& f) {
    const int64_t pieces = larger(1, smaller(4 * pool.threads, n * rows.count / 4096));
    parallel(pool, pieces, [&](int64_t piece) {
      Scratch room((round_up(rows.count, 16) + kLanes) * 4);
      for (int64_t i = n * piece / pieces; i < n * (piece + 1) / pieces; ++i) f(i, (float*)room.data);
    });
  }

  void put(int64_t i, float* values) {
    const int64_t part = rows.count / groups, padded = round_up(part, Op::kValues);
    read_row(rows, i, values, round_up(rows.count, 16));
    if (padded == part || groups == 1) return to_operands<Op>(values, row(i), groups == 1 ? padded : rows.count);
    float lanes[kLanes] = {};
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t j = 0; j < padded; j += kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) lanes[l] = j + l < part ? values[g * part + j + l] : 0.f;
        to_operands<Op>(lanes, row(i) + (g * padded + j) * kBytes, smaller(kLanes, padded - j));
      }
  }

  void stage_integers(const Pool& pool) {
    float* const factors = (float*)factors_memory.data;
    int32_t* const largest = (int32_t*)factors_memory.data;
    if (per_factor == 1)
      return each_row(pool, [&](int64_t i, float* room) {
        const Int8Scale scale(largest_bits(rows, i, room));
        factors[i] = scale.factor;
        put_integers(i, room, scale.to_integer);
      });
    each_row(pool, [&](int64_t i, float* room) { largest[i] = largest_bits(rows, i, room); });
    for (int64_t f = 0; f < n / per_factor; ++f) {
      int32_t all = 0;
      for (int64_t i = f * per_factor; i < (f + 1) * per_factor; ++i) all = larger(all, largest[i]);
      largest[f] = all;
    }
    each_row(pool, [&](int64_t i, float* room) { put_integers(i, room, Int8Scale(largest[i / per_factor]).to_integer); });
    for (int64_t f = 0; f < n / per_factor; ++f) factors[f] = Int8Scale(largest[f]).factor;
  }

  void put_integers(int64_t i, float* room, float to_integer) {
#if defined(__AVX512BF16__)
    const int64_t part = rows.count / groups, padded = round_up(part, Op::kValues);
    const bool apart = padded != part && groups > 1;
    uint8_t* const to = apart ? (uint8_t*)room : (uint8_t*)row(i);
    const __m512 scale = _mm512_set1_ps(to_integer), magic = _mm512_set1_ps(0x1.8p23f + 128);
    each_vector(rows, i, room, [&](int64_t at, vf v) {  // of the sum, the last byte is the integer
      const __m512i sum = (__m512i)_mm512_fmadd_ps((__m512)v, scale, magic);
      if (apart || at + kLanes <= row_bytes) return _mm_storeu_si128((__m128i*)(to + at), _mm512_cvtepi32_epi8(sum));
      _mm512_mask_cvtepi32_storeu_epi8(to + at, (__mmask16)((1 << (row_bytes - at)) - 1), sum);
    });
    for (int64_t g = 0; apart && g < groups; ++g) {
      std::memcpy(row(i) + g * padded, to + g * part, part);
      std::memset(row(i) + g * padded + part, Op::kZero, padded - part);
    }
#endif
  }
};

}  // namespace FP4FX_TIER
}  // namespace fp4fx
