// y = x W^T for a few rows of x: one pass over the packed weight, codes multiplied before their scale is.
//
// Two vectors of codes are read at a time, and their 32-bit lanes, half a block each, are brought into another two: the
// first halves of blocks, and the second. A lane is then a block, and a block's scale multiplies one sum. x is brought
// into the same order once (`stage`).
#pragma once

#include "epilogue.h"
#include "rows.h"

namespace fp4fx {
namespace FP4FX_TIER {

constexpr int kChunk = 16 * kLanes;  // values that are read at a time of a row: a block for every lane

// Which block of a chunk is in a lane, so that a shuffle within 128 bits does: of four lanes two are of each vector read.
constexpr int block_of(int lane) { return 2 * (lane / 4) + lane % 2 + (lane % 4 < 2 ? 0 : kLanes / 2); }

// The first halves of those blocks, and the second.
FP4FX_INLINE void halves(vi a, vi b, vi (&out)[2]) {
#if defined(__AVX512BW__)
  out[0] = (vi)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88);
  out[1] = (vi)_mm512_shuffle_ps((__m512)a, (__m512)b, 0xdd);
#elif defined(__AVX2__)
  out[0] = (vi)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
  out[1] = (vi)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd);
#else
  for (int l = 0; l < kLanes; ++l) {
    const int from = 2 * (block_of(l) % (kLanes / 2));
    for (int half = 0; half < 2; ++half) out[half][l] = (l % 4 < 2 ? a : b)[from + half];
  }
#endif
}

// The scales of a chunk's blocks, of which `count` exist.
FP4FX_INLINE vf chunk_scales(const uint8_t* p, int64_t count) {
  uint8_t bytes[16] = {};
  std::memcpy(bytes, p, count >= kLanes ? kLanes : count);
#if defined(__AVX512BW__)
  const __m128i b = _mm_loadu_si128((const __m128i*)bytes);
  __m256i h = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_unpacklo_epi16(b, _mm_srli_si128(b, 8))), 7);  // fp16, by 256
  h = _mm256_mask_set1_epi16(h, _mm256_cmpeq_epi16_mask(h, _mm256_set1_epi16(0x7f << 7)), 0x7fff);
  return (vf)_mm512_cvtph_ps(h) * 256.f;
#else
  vi lanes;
  for (int l = 0; l < kLanes; ++l) lanes[l] = bytes[block_of(l)];
  return e4m3(lanes);
#endif
}

// The values of a chunk of x: vector j holds value j of every block.
FP4FX_INLINE void blocks_of(const float* x, vf (&out)[16]) {
  for (int j = 0; j < 16; j += kLanes) {
    vi rows[kLanes];
    for (int l = 0; l < kLanes; ++l) rows[l] = load_i(x + 16 * block_of(l) + j);
    transpose(rows);
    for (int l = 0; l < kLanes; ++l) out[j + l] = (vf)rows[l];
  }
}

// Operands in fp32: vector j holds value j of every block.
struct DotF32 {
  static constexpr int kBytes = 4 * kChunk;
  static constexpr int kParts = 16;
  static constexpr bool kBytewise = false;
  typedef vf Sum;

  FP4FX_INLINE void stage(const vf (&x)[16], char* out) {
    for (int j = 0; j < 16; ++j) store((float*)out + j * kLanes, x[j]);
  }
  FP4FX_INLINE void decode(const vi (&v)[2], vi (&out)[kParts]) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) out[j] = (vi)e2m1((vi)((vu)v[j / 8] >> (4 * (j % 8))));
  }
  FP4FX_INLINE Sum start(const char*) { return vf{}; }
  FP4FX_INLINE Sum add(Sum sum, vi w, vi x) { return sum + (vf)w * (vf)x; }
  FP4FX_INLINE vf scaled(Sum sum, vf scale, const char*) { return sum * scale; }
};

#if defined(__AVX512BF16__)
// Operands in bf16: 16-bit lane i of vector j holds, of block i / 2, value 8 (j / 4) + 4 (i % 2) + j % 4.
struct DotBf16 {
  static constexpr int kBytes = 2 * kChunk;
  static constexpr int kParts = 8;
  static constexpr bool kBytewise = false;
  typedef vf Sum;

  FP4FX_INLINE void stage(const vf (&x)[16], char* out) {
    for (int j = 0; j < 8; ++j) {
      const int low = j / 4 * 8 + j % 4;
      store_i(out + j * 4 * kLanes, (vi)(bf16_bits(x[low]) | bf16_bits(x[low + 4]) << 16));
    }
  }
  FP4FX_INLINE void decode(const vi (&v)[2], vi (&out)[kParts]) {
    // Of a 16-bit index the permute reads five bits: the code and one bit of the next, which must not matter.
    const __m512i table = _mm512_broadcast_i64x4(
        _mm256_setr_epi32(0x3f000000, 0x3fc03f80, 0x40404000, 0x40c04080, (int)0xbf008000, (int)0xbfc0bf80,
                          (int)0xc040c000, (int)0xc0c0c080));
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j)
      out[j] = (vi)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)v[j / 4], 4 * (j % 4)), table);
  }
  FP4FX_INLINE Sum start(const char*) { return vf{}; }
  FP4FX_INLINE Sum add(Sum sum, vi w, vi x) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x); }
  FP4FX_INLINE vf scaled(Sum sum, vf scale, const char*) { return sum * scale; }
};
#else
typedef DotF32 DotBf16;  // fp32 products are as fast here
#endif

#if defined(__AVX2__)
// x in int8 with a scale per block of 16: codes are doubled to integers and made unsigned by adding 12, which is taken
// back through the sum of x. Byte i of vector j holds, of block i / 4, value 8 (j / 2) + 2 (i % 4) + j % 2. Behind them,
// what a block's sum starts from, and its scale.
struct DotInt8 {
  static constexpr int kBytes = kChunk + 8 * kLanes;
  static constexpr int kParts = 4;
  static constexpr bool kBytewise = true;
  typedef vi Sum;

  FP4FX_INLINE void stage(const vf (&x)[16], char* out) {
    vi most{}, total{};  // the bits of the largest magnitude, which is that of a NaN if there is one
    for (int j = 0; j < 16; ++j) {
      const vi bits = (vi)x[j] & 0x7fffffff;
      most = bits > most ? bits : most;
    }
    const vf amax = (vf)most, to_integer = most < 0x7f800000 && amax > 1e-36f ? 127.f / amax : splat(0);
    for (int part = 0; part < 4; ++part) {
      vi bytes{};
      for (int i = 0; i < 4; ++i) {
        const vf finite = most < 0x7f800000 ? x[part / 2 * 8 + 2 * i + part % 2] : splat(0);
        const vi q = (vi)(finite * to_integer + 0x1.8p23f) - 0x4b400000;
        total += q;
        bytes |= (vi)((vu)(q & 0xff) << (8 * i));
      }
      store_i(out + part * 4 * kLanes, bytes);
    }
    store_i(out + kChunk, total * -12);
    store((float*)(out + kChunk) + kLanes, most < 0x7f800000 ? amax / 254.f : splat(__builtin_nanf("")));  // of doubled codes
  }
  FP4FX_INLINE void decode(const vi (&v)[2], vi (&out)[kParts]) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) out[j] = integers((vi)((vu)v[j / 2] >> (4 * (j % 2))));
  }
  // 12 + 2 E2M1 values of the low four bits of every byte.
  FP4FX_INLINE vi integers(vi v) {
#if defined(__AVX512VBMI__)
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    return (vi)_mm512_permutexvar_epi8((__m512i)v, table);  // which reads six bits; the table repeats
#elif defined(__AVX512BW__)
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    return (vi)_mm512_shuffle_epi8(table, _mm512_and_si512((__m512i)v, _mm512_set1_epi8(15)));
#else
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    return (vi)_mm256_shuffle_epi8(table, _mm256_and_si256((__m256i)v, _mm256_set1_epi8(15)));
#endif
  }
  FP4FX_INLINE Sum start(const char* x) { return load_i(x + kChunk); }
  FP4FX_INLINE Sum add(Sum sum, vi w, vi x) {
#if defined(__AVX512VNNI__)
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));  // of the intrinsic GCC 12 makes copies and spills them
    return sum;
#elif defined(__AVX512BW__)
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)w, (__m512i)x);  // at most 2 * 24 * 127
    return sum + (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#else
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)x);
    return sum + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
  }
  FP4FX_INLINE vf scaled(Sum sum, vf scale, const char* x) {
    return __builtin_convertvector(sum, vf) * (scale * load((const float*)(x + kChunk + 4 * kLanes)));
  }
};
#else
typedef DotF32 DotInt8;  // nothing multiplies bytes
#endif

// One chunk of R rows of W, at codes[r] and scales[r], of which `blocks` exist, times M rows of staged x.
template <class Dot, int R, int M, bool Whole>
FP4FX_INLINE void dot_chunk(const uint8_t* const* codes, const uint8_t* const* scales, int64_t blocks, const char* x,
                            int64_t x_stride, vf (*acc)[M]) {
  constexpr int kBytes = 4 * kLanes;
  constexpr bool kTwoSums = R == 1 && Dot::kParts > 4;  // where one would wait for its own additions
  vi w[R][Dot::kParts];
  vf scale[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const vi a = Whole ? load_i(codes[r]) : load_bytes(codes[r], smaller(kBytes, 8 * blocks));
    const vi b = Whole ? load_i(codes[r] + kBytes) : load_bytes(codes[r] + kBytes, larger(0, 8 * blocks - kBytes));
    vi v[2];
    halves(a, b, v);
    Dot::decode(v, w[r]);
    scale[r] = chunk_scales(scales[r], Whole ? kLanes : blocks);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const char* const own = x + m * x_stride;
    typename Dot::Sum sum[R], other[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[r] = Dot::start(own), other[r] = typename Dot::Sum{};
#pragma GCC unroll 16
    for (int j = 0; j < Dot::kParts; ++j) {
      const vi part = load_i(own + j * kBytes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        typename Dot::Sum& to = kTwoSums && j % 2 ? other[r] : sum[r];
        to = Dot::add(to, w[r][j], part);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[r][m] += Dot::scaled(kTwoSums ? sum[r] + other[r] : sum[r], scale[r], own);
  }
}

// R rows of W from row n on, times M rows of staged x; column n + r of result row m goes to out[m][r]. x is read once for
// two rows of W where their values fit registers.
template <class Dot, int R, int M>
FP4FX_INLINE void dot_rows(const Packed& w, int64_t n, const char* x, int64_t x_stride, float (*out)[16]) {
  constexpr int kTogether = M > 1 && R > 1 && (kLanes == 16 || Dot::kBytewise) ? 2 : 1;
  const int64_t blocks = w.blocks(), row = blocks * 8;
  const uint8_t* codes[R];
  const uint8_t* scales[R];
  vf acc[R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    codes[r] = w.codes + (n + r) * row;
    scales[r] = w.scales + (n + r) * blocks;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[r][m] = vf{};
  }
  int64_t block = 0;
  for (; block + kLanes <= blocks; block += kLanes, x += Dot::kBytes) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r += kTogether) {
#pragma GCC unroll 2
      for (int t = r; t < r + kTogether; ++t) {  // the rows that come next
        __builtin_prefetch(codes[t] + R * row, 0, 2);
        __builtin_prefetch(codes[t] + R * row + 4 * kLanes, 0, 2);
        if (block % (4 * kLanes) == 0) __builtin_prefetch(scales[t] + R * blocks, 0, 2);
      }
      dot_chunk<Dot, kTogether, M, true>(codes + r, scales + r, kLanes, x, x_stride, acc + r);
#pragma GCC unroll 2
      for (int t = r; t < r + kTogether; ++t) codes[t] += 8 * kLanes, scales[t] += kLanes;
    }
  }
  if (block < blocks)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) dot_chunk<Dot, 1, M, false>(codes + r, scales + r, blocks - block, x, x_stride, acc + r);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
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
      for (int64_t c = 0; c < chunks; ++c) {
        vf x[16];
        blocks_of((const float*)row.data + c * kChunk, x);
        Dot::stage(x, (char*)staged.data + m * x_stride + c * Dot::kBytes);
      }
    }
  });
  const Columns columns = columns_of(a);
  const int64_t tiles = (a.w.n + 15) / 16, pieces = smaller(tiles, 4 * pool.threads);
  parallel(pool, pieces, [&](int64_t piece) {
    for (int64_t t = tiles * piece / pieces; t < tiles * (piece + 1) / pieces; ++t) {
      const int64_t n0 = 16 * t, rows = smaller(16, a.w.n - n0);
      const char* x = (const char*)staged.data;
      int64_t m = 0;
      if constexpr (Dot::kBytewise)  // whose weights leave room for the sums of eight rows
        for (; m + 8 <= a.m; m += 8) dot_tile<Dot, 2, 8>(a.w, n0, rows, x + m * x_stride, x_stride, columns, m);
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
