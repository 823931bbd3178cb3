// The inner loops of gemm.h on AMX: sums of 32 rows and 32 columns stay in four tiles over all of a panel.
#pragma once

#include "gemm.h"

#if defined(__AMX_BF16__) || defined(FP4FX_EMULATE_AMX)

namespace fp4fx {
namespace FP4FX_TIER {

// What LDTILECFG reads.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t column_bytes[16];
  uint8_t rows[16];
};

#if defined(FP4FX_EMULATE_AMX)
// The same in plain C++, so that everything around the instructions can be tested on any machine.
struct Tiles {
  TileConfig config;
  uint8_t data[8][16][64];
};
static thread_local Tiles tiles_of_thread;

FP4FX_INLINE void tiles_configure(const TileConfig& c) {
  tiles_of_thread.config = c;
  std::memset(tiles_of_thread.data, 0, sizeof tiles_of_thread.data);
}
FP4FX_INLINE void tiles_release() { tiles_of_thread.config = TileConfig{}; }
template <int T>
FP4FX_INLINE void tile_zero() {
  std::memset(tiles_of_thread.data[T], 0, 1024);
}
template <int T>
FP4FX_INLINE void tile_load(const void* p, int64_t stride) {
  for (int r = 0; r < tiles_of_thread.config.rows[T]; ++r)
    std::memcpy(tiles_of_thread.data[T][r], (const char*)p + r * stride, tiles_of_thread.config.column_bytes[T]);
}
template <int T>
FP4FX_INLINE void tile_store(void* p, int64_t stride) {
  for (int r = 0; r < tiles_of_thread.config.rows[T]; ++r)
    std::memcpy((char*)p + r * stride, tiles_of_thread.data[T][r], tiles_of_thread.config.column_bytes[T]);
}
template <int C, int A, int B>
FP4FX_INLINE void tile_multiply_bytes() {
  const TileConfig& c = tiles_of_thread.config;
  for (int m = 0; m < c.rows[C]; ++m)
    for (int k = 0; k < c.column_bytes[A] / 4; ++k)
      for (int n = 0; n < c.column_bytes[C] / 4; ++n)
        for (int i = 0; i < 4; ++i) {
          int32_t sum;
          std::memcpy(&sum, tiles_of_thread.data[C][m] + 4 * n, 4);
          sum += tiles_of_thread.data[A][m][4 * k + i] * (int8_t)tiles_of_thread.data[B][k][4 * n + i];
          std::memcpy(tiles_of_thread.data[C][m] + 4 * n, &sum, 4);
        }
}
template <int C, int A, int B>
FP4FX_INLINE void tile_multiply_bf16() {
  const TileConfig& c = tiles_of_thread.config;
  for (int m = 0; m < c.rows[C]; ++m)
    for (int k = 0; k < c.column_bytes[A] / 4; ++k)
      for (int n = 0; n < c.column_bytes[C] / 4; ++n)
        for (int half = 0; half < 2; ++half) {
          uint16_t a, b;
          std::memcpy(&a, tiles_of_thread.data[A][m] + 4 * k + 2 * half, 2);
          std::memcpy(&b, tiles_of_thread.data[B][k] + 4 * n + 2 * half, 2);
          float sum;
          std::memcpy(&sum, tiles_of_thread.data[C][m] + 4 * n, 4);
          sum += from_bf16(a) * from_bf16(b);
          std::memcpy(tiles_of_thread.data[C][m] + 4 * n, &sum, 4);
        }
}
#else
// Tiles are named in assembly: GCC's intrinsics are macros that want a digit where a template has its parameter.
FP4FX_INLINE void tiles_configure(const TileConfig& c) { asm volatile("ldtilecfg %0" ::"m"(c)); }
FP4FX_INLINE void tiles_release() { asm volatile("tilerelease"); }
template <int T>
FP4FX_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
FP4FX_INLINE void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
FP4FX_INLINE void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
FP4FX_INLINE void tile_multiply_bytes() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
FP4FX_INLINE void tile_multiply_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
#endif

template <class Op, int C, int A, int B>
FP4FX_INLINE void tile_multiply() {
  if (Op::kInteger) tile_multiply_bytes<C, A, B>();
  else tile_multiply_bf16<C, A, B>();
}

// Tiles 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 columns of W. `rows` of x, up to 32.
FP4FX_INLINE void amx_configure(int64_t rows) {
  TileConfig c{};
  c.palette = 1;
  const uint8_t upper = (uint8_t)smaller(rows, 16), lower = (uint8_t)larger(1, rows - 16);
  for (int t = 0; t < 8; ++t) {
    c.column_bytes[t] = 64;
    c.rows[t] = t >= 6 ? 16 : t == 2 || t == 3 || t == 5 ? lower : upper;
  }
  tiles_configure(c);
}

template <class Op, bool Two, bool Wide>
FP4FX_INLINE void amx_step(const char* upper, const char* lower, int64_t x_stride, const int32_t* w, int64_t stride) {
  tile_load<4>(upper, x_stride);
  tile_load<6>(w, 64);
  tile_multiply<Op, 0, 4, 6>();
  if (Wide) {
    tile_load<7>(w + stride, 64);
    tile_multiply<Op, 1, 4, 7>();
  }
  if (Two) {
    tile_load<5>(lower, x_stride);
    tile_multiply<Op, 2, 5, 6>();
    if (Wide) tile_multiply<Op, 3, 5, 7>();
  }
}

// Two vectors of columns, or one; sums in tiles over all taps.
template <class Op, bool Two, bool Wide>
static void amx_columns(const char* const* pointers, const Reach* reach, int64_t taps, int64_t steps, int64_t rows,
                        const int32_t* panel, int64_t stride, float* sums, bool first) {
  constexpr int64_t kRow = kColumns * 4;
  if (first) {
    tile_zero<0>();
    if (Wide) tile_zero<1>();
    if (Two) tile_zero<2>();
    if (Two && Wide) tile_zero<3>();
  } else {
    tile_load<0>(sums, kRow);
    if (Wide) tile_load<1>(sums + 16, kRow);
    if (Two) tile_load<2>(sums + 16 * kColumns, kRow);
    if (Two && Wide) tile_load<3>(sums + 16 * kColumns + 16, kRow);
  }
  alignas(64) char copy[32 * 64];
  for (int64_t t = 0; t < taps; ++t, pointers += Op::kTileM, panel += steps * kLanes) {
    if (reach[t] == Reach::none) continue;
    const int64_t x_stride = rows > 1 ? pointers[1] - pointers[0] : 0;
    bool even = true;
    for (int64_t m = 2; m < rows; ++m) even &= pointers[m] - pointers[m - 1] == x_stride;
    int64_t s = 0;
    if (even)
      for (; s + 16 <= steps; s += 16)
        amx_step<Op, Two, Wide>(pointers[0] + 4 * s, pointers[0] + 16 * x_stride + 4 * s, x_stride, panel + s * kLanes,
                            stride);
    for (; s < steps; s += 16) {  // a border, or the last steps: brought together, zeros behind
      const int64_t bytes = 4 * smaller(16, steps - s);
      for (int64_t m = 0; m < rows; ++m) {
        std::memcpy(copy + 64 * m, pointers[m] + 4 * s, bytes);
        std::memset(copy + 64 * m + bytes, 0, 64 - bytes);
      }
      amx_step<Op, Two, Wide>(copy, copy + 1024, 64, panel + s * kLanes, stride);
    }
  }
  tile_store<0>(sums, kRow);
  if (Wide) tile_store<1>(sums + 16, kRow);
  if (Two) tile_store<2>(sums + 16 * kColumns, kRow);
  if (Two && Wide) tile_store<3>(sums + 16 * kColumns + 16, kRow);
}

// As `multiply`, for up to 32 rows. The panel has 16 finite steps behind its last.
template <class Op>
static void amx_multiply(const char* const* pointers, const Reach* reach, int64_t taps, int64_t steps, int64_t rows,
                         int64_t vectors, const int32_t* panel, const int32_t* tail, int64_t stride, float* sums,
                         bool first) {
  alignas(64) float integers[Op::kInteger ? 32 * kColumns : 1];
  float* const to = Op::kInteger ? integers : sums;
  amx_configure(rows);  // the library's own kernels use other shapes between two calls
  for (int64_t v = 0; v < vectors; v += 2) {
    const bool wide = v + 1 < vectors;
    const auto columns = rows > 16 ? (wide ? amx_columns<Op, true, true> : amx_columns<Op, true, false>)
                                   : (wide ? amx_columns<Op, false, true> : amx_columns<Op, false, false>);
    columns(pointers, reach, taps, steps, rows, panel + v * stride, stride, to + v * kLanes, first || Op::kInteger);
  }
  tiles_release();
  if (!Op::kInteger) return;
  for (int64_t v = 0; v < vectors; ++v) {
    vi start = Tail::start(tail + v * stride);
    const vf factor = Tail::factor(tail + v * stride);
    for (int64_t t = 0; t < taps; ++t)
      if (reach[t] == Reach::none) start += Tail::tap(tail + v * stride, t);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t at = m * kColumns + v * kLanes;
      const vf sum = __builtin_convertvector(load_i(to + at) + start, vf) * factor;
      store(sums + at, first ? sum : sum + load(sums + at));
    }
  }
}

}  // namespace FP4FX_TIER
}  // namespace fp4fx

#endif
