// y = x W^T for a few rows of x: one pass over the packed weight, codes multiplied before their scale is.
//
// A vector of codes holds, in each 32-bit lane, 8 consecutive codes of one row: half a block. x is brought into the same
// order once (`Staged`), so that decoding needs no shuffle across lanes and a block's scale multiplies two lanes' sums.
#pragma once

#include "epilogue.h"
#include "rows.h"

namespace fp4fx {
namespace FP4FX_TIER {

constexpr int kChunk = 8 * kLanes;  // values per vector of codes

// Operands in fp32: element j of lane d is the value at 8 d + j.
struct DotF32 {
  static constexpr int kBytes = 4 * kChunk;

  FP4FX_INLINE void stage(const float* x, char* out) {
    for (int j = 0; j < 8; ++j)
      for (int d = 0; d < kLanes; ++d) ((float*)out)[j * kLanes + d] = x[8 * d + j];
  }

  struct Codes {
    vf w[8];
  };
  FP4FX_INLINE Codes decode(vi v) {
    Codes c;
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) c.w[j] = e2m1((vi)((vu)v >> (4 * j)));
    return c;
  }
  FP4FX_INLINE vf dot(const Codes& c, const char* x, vf scale, vf acc) {
    vf t = c.w[0] * load((const float*)x), u = c.w[1] * load((const float*)x + kLanes);
#pragma GCC unroll 3
    for (int j = 2; j < 8; j += 2) {
      t += c.w[j] * load((const float*)x + j * kLanes);
      u += c.w[j + 1] * load((const float*)x + (j + 1) * kLanes);
    }
    return acc + (t + u) * scale;
  }
};

#if defined(__AVX512BF16__)
// Operands in bf16: element j of 16-bit lane l is the value at 4 l + j.
struct DotBf16 {
  static constexpr int kBytes = 2 * kChunk;

  FP4FX_INLINE void stage(const float* x, char* out) {
    for (int j = 0; j < 4; ++j)
      for (int l = 0; l < 32; ++l) ((uint16_t*)out)[j * 32 + l] = to_bf16(x[4 * l + j]);
  }

  struct Codes {
    __m512i w[4];
  };
  FP4FX_INLINE Codes decode(vi v) {
    // Of a 16-bit index the permute reads five bits: the code and one bit of the next, which must not matter.
    const __m512i half = _mm512_setr_epi32(0x3f000000, 0x3fc03f80, 0x40404000, 0x40c04080, (int)0xbf008000,
                                           (int)0xbfc0bf80, (int)0xc040c000, (int)0xc0c0c080, 0x3f000000, 0x3fc03f80,
                                           0x40404000, 0x40c04080, (int)0xbf008000, (int)0xbfc0bf80, (int)0xc040c000,
                                           (int)0xc0c0c080);
    Codes c;
    c.w[0] = _mm512_permutexvar_epi16((__m512i)v, half);
    c.w[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)v, 4), half);
    c.w[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)v, 8), half);
    c.w[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)v, 12), half);
    return c;
  }
  FP4FX_INLINE vf dot(const Codes& c, const char* x, vf scale, vf acc) {
    __m512 t = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      t = _mm512_dpbf16_ps(t, (__m512bh)c.w[j], (__m512bh)_mm512_loadu_si512(x + 64 * j));
    return acc + (vf)t * scale;
  }
};
#else
typedef DotF32 DotBf16;  // fp32 products are as fast here
#endif

// x in int8 with a scale per block of 16: codes are doubled to integers and made unsigned by adding 12, which is taken
// back through the sum of x. Even and odd elements of a row lie apart, as low and high nibbles do.
struct DotInt8 {
  static constexpr int kBytes = kChunk + 8 * kLanes;

  FP4FX_INLINE void stage(const float* x, char* out) {
    int8_t* even = (int8_t*)out;
    int8_t* odd = even + kChunk / 2;
    int32_t* correction = (int32_t*)(out + kChunk);
    float* scale = (float*)(out + kChunk + 4 * kLanes);
    for (int b = 0; b < kChunk / 16; ++b) {
      float amax = 0;
      for (int i = 0; i < 16; ++i) amax = __builtin_fabsf(x[16 * b + i]) > amax ? __builtin_fabsf(x[16 * b + i]) : amax;
      float to_int = amax > 0 ? 127.f / amax : 0.f;
      bool finite = true;
      for (int i = 0; i < 16; ++i) finite &= __builtin_isfinite(x[16 * b + i]);
      for (int half = 0; half < 2; ++half) {
        int32_t total = 0;
        for (int i = 0; i < 8; ++i) {
          int q = finite ? (int)__builtin_rintf(x[16 * b + 8 * half + i] * to_int) : 0;
          int8_t* to = i % 2 ? odd : even;
          to[8 * b + 4 * half + i / 2] = (int8_t)q;
          total += q;
        }
        correction[2 * b + half] = -12 * total;
        scale[2 * b + half] = finite ? amax / 254.f : __builtin_nanf("");  // of doubled codes
      }
    }
  }

  struct Codes {
    vi low, high;
  };
  FP4FX_INLINE Codes decode(vi v) {
    Codes c;
#if defined(__AVX512BW__)
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    const __m512i mask = _mm512_set1_epi8(15);
    c.low = (vi)_mm512_shuffle_epi8(table, _mm512_and_si512((__m512i)v, mask));
    c.high = (vi)_mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16((__m512i)v, 4), mask));
#elif defined(__AVX2__)
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    const __m256i mask = _mm256_set1_epi8(15);
    c.low = (vi)_mm256_shuffle_epi8(table, _mm256_and_si256((__m256i)v, mask));
    c.high = (vi)_mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16((__m256i)v, 4), mask));
#else
    static const uint8_t table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    uint8_t bytes[4 * kLanes], low[4 * kLanes], high[4 * kLanes];
    store_i(bytes, v);
    for (int i = 0; i < 4 * kLanes; ++i) low[i] = table[bytes[i] & 15], high[i] = table[bytes[i] >> 4];
    c.low = load_i(low), c.high = load_i(high);
#endif
    return c;
  }
  FP4FX_INLINE vi dot4(vi acc, vi w, const char* x) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_loadu_si512(x));
#elif defined(__AVX512BW__)
    __m512i pairs = _mm512_maddubs_epi16((__m512i)w, _mm512_loadu_si512(x));  // at most 2 * 24 * 127
    return acc + (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
    __m256i pairs = _mm256_maddubs_epi16((__m256i)w, _mm256_loadu_si256((const __m256i*)x));
    return acc + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    uint8_t bytes[4 * kLanes];
    store_i(bytes, w);
    for (int i = 0; i < 4 * kLanes; ++i) acc[i / 4] += bytes[i] * ((const int8_t*)x)[i];
    return acc;
#endif
  }
  FP4FX_INLINE vf dot(const Codes& c, const char* x, vf scale, vf acc) {
    vi t = dot4(dot4(load_i(x + kChunk), c.low, x), c.high, x + kChunk / 2);
    return acc + __builtin_convertvector(t, vf) * (scale * load((const float*)(x + kChunk + 4 * kLanes)));
  }
};

// R rows of W from row n on, times M rows of staged x; column n + r of result row m goes to out[m][r].
template <class Dot, int R, int M>
FP4FX_INLINE void dot_rows(const Packed& w, int64_t n, const char* x, int64_t x_stride, float (*out)[16]) {
  constexpr int kBlocks = kChunk / 16;
  const int64_t blocks = w.blocks(), whole = blocks / kBlocks;
  const uint8_t* codes[R];
  const uint8_t* scales[R];
  vf acc[R][M];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    codes[r] = w.codes + (n + r) * blocks * 8;
    scales[r] = w.scales + (n + r) * blocks;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) acc[r][m] = vf{};
  }
  int64_t c = 0;
  for (; c + 2 <= whole; c += 2) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      vf scale[2];
      scales_twice(scales[r] + c * kBlocks, scale);
      if (c % 8 == 0) __builtin_prefetch(scales[r] + c * kBlocks + R * blocks, 0, 2);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        __builtin_prefetch(codes[r] + (c + i) * kChunk / 2 + R * blocks * 8, 0, 2);  // the rows that come next
        typename Dot::Codes decoded = Dot::decode(load_i(codes[r] + (c + i) * kChunk / 2));
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
          acc[r][m] = Dot::dot(decoded, x + m * x_stride + (c + i) * Dot::kBytes, scale[i], acc[r][m]);
      }
    }
  }
  for (; c * kBlocks < blocks; ++c) {
    const int64_t count = smaller(kBlocks, blocks - c * kBlocks);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      typename Dot::Codes decoded = Dot::decode(load_bytes(codes[r] + c * kChunk / 2, count * 8));
      vf scale = scales_twice(scales[r] + c * kBlocks, count);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) acc[r][m] = Dot::dot(decoded, x + m * x_stride + c * Dot::kBytes, scale, acc[r][m]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) out[m][r] = sum(acc[r][m]);
}

// 16 rows of W (fewer at the end), M rows of x.
template <class Dot, int R, int M>
static void dot_tile(const Packed& w, int64_t n0, int64_t rows, const char* x, int64_t x_stride, const Columns& columns,
                     int64_t m0) {
  float out[M][16] = {};
  int64_t r = 0;
  for (; r + R <= rows; r += R) dot_rows<Dot, R, M>(w, n0 + r, x, x_stride, (float(*)[16])(&out[0][r]));
  for (; r < rows; ++r) dot_rows<Dot, 1, M>(w, n0 + r, x, x_stride, (float(*)[16])(&out[0][r]));
  int64_t to[M];
  for (int m = 0; m < M; ++m) to[m] = m0 + m;
  Columns::finish(columns, out[0], 16, to, nullptr, M, n0, rows);
}

template <class Dot>
static void gemv(const Linear& a, const Pool& pool) {
  const int64_t chunks = (a.w.k + kChunk - 1) / kChunk, x_stride = chunks * Dot::kBytes;
  Scratch staged(a.m * x_stride);
  const int64_t parts = a.quantize_x != 0 ? larger(1, smaller(a.m, a.m * a.w.k / 16384)) : 1;  // worth a thread each
  parallel(pool, parts, [&](int64_t part) {
    Scratch row(chunks * kChunk * 4);
    for (int64_t m = a.m * part / parts; m < a.m * (part + 1) / parts; ++m) {
      read_row(rows_of(a), m, (float*)row.data, chunks * kChunk);
      for (int64_t c = 0; c < chunks; ++c)
        Dot::stage((const float*)row.data + c * kChunk, (char*)staged.data + m * x_stride + c * Dot::kBytes);
    }
  });
  const Columns columns = columns_of(a);
  const int64_t tiles = (a.w.n + 15) / 16, pieces = smaller(tiles, 4 * pool.threads);
  parallel(pool, pieces, [&](int64_t piece) {
    for (int64_t t = tiles * piece / pieces; t < tiles * (piece + 1) / pieces; ++t) {
      const int64_t n0 = 16 * t, rows = smaller(16, a.w.n - n0);
      const char* x = (const char*)staged.data;
      int64_t m = 0;
      for (; m + 4 <= a.m; m += 4) dot_tile<Dot, 2, 4>(a.w, n0, rows, x + m * x_stride, x_stride, columns, m);
      switch (a.m - m) {
        case 3:
          dot_tile<Dot, 2, 3>(a.w, n0, rows, x + m * x_stride, x_stride, columns, m);
          break;
        case 2:
          dot_tile<Dot, 4, 2>(a.w, n0, rows, x + m * x_stride, x_stride, columns, m);
          break;
        case 1:
          dot_tile<Dot, 4, 1>(a.w, n0, rows, x + m * x_stride, x_stride, columns, m);
          break;
        default:
          break;
      }
    }
  });
}

}  // namespace FP4FX_TIER
}  // namespace fp4fx
