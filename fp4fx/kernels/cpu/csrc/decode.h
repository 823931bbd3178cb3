// A panel: rows of packed W decoded, scaled by their blocks and laid out for the inner loops of gemm.h.
#pragma once

#include "simd.h"

namespace fp4fx {
namespace FP4FX_TIER {

#if defined(__AMX_BF16__) || defined(FP4FX_EMULATE_AMX)
constexpr bool kAmx = true;
#else
constexpr bool kAmx = false;
#endif

// Rows of y whose sums stay in registers.
#if defined(__AVX512BW__)
constexpr int kRegisterRows = 7, kTileN = 4;  // 28 vectors of sums and 4 of weights in 32 registers, x from memory
#else
constexpr int kRegisterRows = 6, kTileN = 2;  // 12, 2 and one of x, of 16
#endif

// How operands are multiplied. A step is four bytes of a row of x and, of a panel, one vector: fp32 values of kLanes rows
// of W, pairs of bf16 values, or fours of int8. `put_block` writes the steps of one block of 16 values of kLanes rows,
// whose codes are 8 to a lane; its scales are byte `b` of the lanes of `scales`.
struct OpF32 {
  static constexpr int kValues = 1;  // per step
  static constexpr int kTileM = kRegisterRows;
  static constexpr bool kInteger = false;
  static constexpr int kZero = 0;  // every byte of a zero
  static constexpr DType kDType = DType::f32;
  struct RowScale {};  // what `put_block` needs of kLanes whole rows
  // Of rows from n0 on whose values [k0, k1) make a panel, and the factor that takes its sums back.
  FP4FX_INLINE RowScale row_scale(const Packed&, int64_t, int64_t, int64_t, vf*) { return {}; }
  FP4FX_INLINE vf multiply_add(vf acc, vi w, vi x) { return acc + (vf)x * (vf)w; }
  FP4FX_INLINE bool ordinary(vu) { return true; }
  template <bool>
  FP4FX_INLINE void put_block(const RowScale&, vi codes0, vi codes1, vu scales, int b, int32_t* panel) {
    const vf scale = e4m3((vi)(scales >> (8 * b) & 0xff));
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k)
      store_i(panel + k * kLanes, (vi)(e2m1((vi)((vu)(k < 8 ? codes0 : codes1) >> (4 * (k % 8)))) * scale));
  }
};

#if defined(__AVX512BF16__)
// Eight bits from bit `low` of every lane in its lower half, from bit `high` in its upper half; the rest undefined.
FP4FX_INLINE __m512i pick(vu v, int64_t low, int64_t high) {
  const int64_t lane = low | high << 16;
  return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(lane | (lane + 0x00200020) << 32), (__m512i)v);
}

struct OpBf16 {
  static constexpr int kValues = 2;
  static constexpr int kTileM = kAmx ? 32 : kRegisterRows;
  static constexpr bool kInteger = false;
  static constexpr int kZero = 0;
  static constexpr DType kDType = DType::bf16;
  struct RowScale {};
  FP4FX_INLINE RowScale row_scale(const Packed&, int64_t, int64_t, int64_t, vf*) { return {}; }
  FP4FX_INLINE vf multiply_add(vf acc, vi w, vi x) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
  }
  // Neither NaN nor subnormal.
  FP4FX_INLINE bool ordinary(vu scales) {
    const __m512i from_zero = _mm512_sub_epi8((__m512i)scales, _mm512_set1_epi8(8));
    return _mm512_cmplt_epu8_mask(from_zero, _mm512_set1_epi8(0x7f - 8)) == ~(__mmask64)0;
  }
  // An E2M1 value times an E4M3 scale has six significant bits, so bf16 holds it and an ordinary scale needs no
  // multiplication: the magnitude is 4s or 6s with its exponent lowered by up to 3, which a saturating subtraction does,
  // to zero if asked.
  template <bool Ordinary>
  FP4FX_INLINE void put_block(const RowScale&, vi codes0, vi codes1, vu scales, int b, int32_t* panel) {
    if (!Ordinary) {
      const vf scale = e4m3((vi)(scales >> (8 * b) & 0xff));
      for (int pair = 0; pair < 8; ++pair) {
        const vu v = (vu)(pair < 4 ? codes0 : codes1) >> (8 * (pair % 4));
        const vi even = (vi)(e2m1((vi)v) * scale), odd = (vi)(e2m1((vi)(v >> 4)) * scale);
        store_i(panel + pair * kLanes, (vi)((vu)even >> 16) | (odd & (int32_t)0xffff0000));
      }
      return;
    }
    // In both halves of a lane: the byte, and 4s in bf16 (bias 127 for 7, three bits of mantissa for seven).
    const __m512i byte = pick(scales, 8 * b, 8 * b), mask = _mm512_set1_epi16(0xff);
    const __m512i s4 = _mm512_add_epi16(_mm512_slli_epi16(_mm512_and_si512(byte, mask), 4), _mm512_set1_epi16(122 << 7));
    // 6s less 4s, by the mantissa of s; an index has bits of the exponent above it.
    const __m512i more = _mm512_permutexvar_epi16(
        byte, _mm512_broadcast_i32x4(_mm_setr_epi16(64, 72, 80, 84, 80, 76, 72, 68)));
    // By code: the sign, what to subtract (bits 7 to 14), and in the low bits a mask if 6s is meant. Bit 4 of an index is
    // a bit of the next code.
    const __m512i table = _mm512_broadcast_i64x4(
        _mm256_setr_epi16(0x7f80, 0x180, 0x100, 0x17f, 0x80, 0xff, 0, 0x7f, (short)0xff80, (short)0x8180, (short)0x8100,
                          (short)0x817f, (short)0x8080, (short)0x80ff, (short)0x8000, (short)0x807f));
    const __m512i sign = _mm512_set1_epi16((short)0x8000), amount = _mm512_set1_epi16(0x7f80);
#pragma GCC unroll 8
    for (int pair = 0; pair < 8; ++pair) {
      const __m512i index = pick((vu)(pair < 4 ? codes0 : codes1), 8 * (pair % 4), 8 * (pair % 4) + 4);
      const __m512i t = _mm512_permutexvar_epi16(index, table);
      const __m512i base = _mm512_add_epi16(s4, _mm512_and_si512(more, t));
      const __m512i magnitude = _mm512_subs_epu16(base, _mm512_and_si512(t, amount));
      // magnitude | (t & sign)
      store_i(panel + pair * kLanes, (vi)_mm512_ternarylogic_epi32(magnitude, t, sign, 0xf8));
    }
  }
};

// int8 for VNNI: x plus 128, which the panel takes back, and W rounded anew with one scale for what a panel holds of a
// row, which is then as good as eight bits get.
struct OpInt8 {
  static constexpr int kValues = 4;
  static constexpr int kTileM = kAmx ? 32 : kRegisterRows;
  static constexpr bool kInteger = true;
  static constexpr int kZero = 128;
  static constexpr DType kDType = DType::f32;  // before it is rounded
  // Of half a code: just below 10.5 in int8, so that of the largest scale 1, 2, 3, 4 and 6 are exact and no code is a tie,
  // which would round towards one side and add up over inputs of one sign.
  static constexpr int kUnit = 2687;
  struct RowScale {
    vf fraction;  // of the largest scale, times 2^15 - 1
  };
  FP4FX_INLINE vf multiply_add(vf acc, vi w, vi x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));  // of the intrinsic GCC 12 makes copies and spills them
    return acc;
  }
  FP4FX_INLINE bool ordinary(vu scales) { return OpBf16::ordinary(scales); }
  FP4FX_INLINE RowScale row_scale(const Packed& w, int64_t n0, int64_t k0, int64_t k1, vf* factor) {
    const int64_t from = k0 / 16, to = (k1 + 15) / 16;
    vi largest{};
    for (int r = 0; r < kLanes; ++r) {
      const uint8_t* scales = w.scales + smaller(n0 + r, w.n - 1) * w.blocks();
      __m512i most = _mm512_setzero_si512();
      for (int64_t b = from; b < to; b += 64)
        most = _mm512_max_epu8(most, _mm512_and_si512((__m512i)load_bytes(scales + b, smaller(64, to - b)),
                                                      _mm512_set1_epi8(0x7f)));
      __m256i m = _mm256_max_epu8(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
      __m128i s = _mm_max_epu8(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
      s = _mm_max_epu8(s, _mm_srli_si128(s, 8)), s = _mm_max_epu8(s, _mm_srli_si128(s, 4));
      s = _mm_max_epu8(s, _mm_srli_si128(s, 2)), s = _mm_max_epu8(s, _mm_srli_si128(s, 1));
      largest[r] = _mm_cvtsi128_si32(s) & 0xff;
    }
    const vf scale = e4m3(largest);  // a NaN makes all of its row NaN
    *factor = scale * (32768.f / 32767.f / 21);  // 126 for 6
    return {scale > 0.f ? 32767.f / scale : splat(0)};
  }

  template <bool Ordinary>
  FP4FX_INLINE void put_block(const RowScale& rows, vi codes0, vi codes1, vu scales, int b, int32_t* panel) {
    const vi byte = (vi)(scales >> (8 * b) & 0x7f);
    const vf scale = Ordinary ? (vf)((byte << 20) + (120 << 23)) : e4m3(byte);
    const __m512i low = _mm512_cvtps_epi32((__m512)(scale * rows.fraction));
    const __m512i fraction = _mm512_or_si512(low, _mm512_slli_epi32(low, 16));
    constexpr short u = kUnit;
    const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(0, u, 2 * u, 3 * u, 4 * u, 6 * u, 8 * u, 12 * u, 0, -u,
                                                                   -2 * u, -3 * u, -4 * u, -6 * u, -8 * u, -12 * u));
    const __m512i half = _mm512_set1_epi16(128), upper = _mm512_set1_epi16((short)0xff00);
#pragma GCC unroll 4
    for (int four = 0; four < 4; ++four) {
      const vu v = (vu)(four < 2 ? codes0 : codes1);
      const int at = 16 * (four % 2);
      __m512i even = _mm512_permutexvar_epi16(pick(v, at, at + 8), table);
      __m512i odd = _mm512_permutexvar_epi16(pick(v, at + 4, at + 12), table);
      even = _mm512_add_epi16(_mm512_mulhrs_epi16(even, fraction), half);  // int8 is the upper byte
      odd = _mm512_add_epi16(_mm512_mulhrs_epi16(odd, fraction), half);
      // even >> 8 | (odd & upper)
      store_i(panel + four * kLanes, (vi)_mm512_ternarylogic_epi32(_mm512_srli_epi16(even, 8), odd, upper, 0xf8));
    }
  }
};
#else
typedef OpF32 OpBf16;
typedef OpF32 OpInt8;  // without VNNI, products of bytes are no faster
#endif

// Values [k0, k1) of kLanes rows from row n0 on; k0 a multiple of 16. Rows behind the last repeat it. The panel has to
// hold whole blocks.
template <class Op>
static void decode_rows(const Packed& w, int64_t n0, int64_t k0, int64_t k1, const typename Op::RowScale& rows,
                        int32_t* panel) {
  const int64_t blocks = w.blocks(), end = (k1 + 15) / 16;
  constexpr int kBlocks = kLanes / 2;  // per vector of codes
  constexpr int64_t kStep = 16 / Op::kValues * kLanes;
  int64_t last = w.n - 1 - n0;
  const uint8_t* const codes = w.codes + n0 * blocks * 8;
  const uint8_t* const scales = w.scales + n0 * blocks;
  for (int64_t group = k0 / 16; group < end; group += 4 * kLanes) {  // as many blocks as a vector has bytes
    vi bytes[kLanes];
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r)
      bytes[r] = load_bytes(scales + smaller(r, last) * blocks + group, smaller(4 * kLanes, blocks - group));
    transpose(bytes);
    const int64_t stop = smaller(end, group + 4 * kLanes);
    for (int64_t block = group; block < stop; block += kBlocks, panel += kBlocks * kStep) {
      vi c[kLanes];
      const int64_t count = 8 * smaller(kBlocks, blocks - block);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        c[r] = load_bytes(codes + (smaller(r, last) * blocks + block) * 8, count);
        __builtin_prefetch(codes + ((r + kLanes) * blocks + block) * 8, 0, 2);  // the rows that come next
      }
      transpose(c);
#pragma GCC unroll 2
      for (int quad = 0; quad < kBlocks / 4; ++quad) {
        const vu s = (vu)bytes[(block - group) / 4 + quad];
        const bool ordinary = Op::ordinary(s), whole = block + 4 * quad + 4 <= stop;
        if (__builtin_expect(ordinary && whole, 1)) {
#pragma GCC unroll 4
          for (int b = 0; b < 4; ++b)
            Op::template put_block<true>(rows, c[8 * quad + 2 * b], c[8 * quad + 2 * b + 1], s, b,
                                         panel + (4 * quad + b) * kStep);
        } else {
          for (int b = 0; b < 4 && block + 4 * quad + b < stop; ++b)
            Op::template put_block<false>(rows, c[8 * quad + 2 * b], c[8 * quad + 2 * b + 1], s, b,
                                          panel + (4 * quad + b) * kStep);
        }
      }
    }
  }
}

}  // namespace FP4FX_TIER
}  // namespace fp4fx
