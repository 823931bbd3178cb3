// From sums to results: scale, bias, residual, activation, one rounding.
#pragma once

#include "simd.h"

namespace fp4fx {
namespace FP4FX_TIER {

// Where results go, and what they need. `scale` is the product of the global scales.
struct Columns {
  const Epilogue& e;
  DType dtype;
  float scale;
  void* y;
  int64_t row_stride;  // of y and the residual, in elements

  // Columns [n, n + count) of `rows` rows: row i is sums[i * stride ...], times factors[i] if there are any, and row to[i]
  // of y.
  static void finish(const Columns& c, const float* sums, int64_t stride, const int64_t* to, const float* factors,
                     int64_t rows, int64_t n, int64_t count) {
    switch (c.dtype) {  // constants for the compiler
      case DType::f32:
        return finish_as<DType::f32>(c, sums, stride, to, factors, rows, n, count);
      case DType::bf16:
        return finish_as<DType::bf16>(c, sums, stride, to, factors, rows, n, count);
      case DType::f16:
        return finish_as<DType::f16>(c, sums, stride, to, factors, rows, n, count);
    }
  }

  template <DType D>
  FP4FX_INLINE void finish_as(const Columns& c, const float* sums, int64_t stride, const int64_t* to,
                              const float* factors, int64_t rows, int64_t n, int64_t count) {
    const int64_t whole = count / kLanes * kLanes;
    for (int64_t v = 0; v < whole; v += kLanes) finish_vector<D>(c, sums + v, stride, to, factors, rows, n + v, kLanes);
    if (whole < count) finish_vector<D>(c, sums + whole, stride, to, factors, rows, n + whole, count - whole);
  }

  template <DType D>
  FP4FX_INLINE void finish_vector(const Columns& c, const float* sums, int64_t stride, const int64_t* to,
                                  const float* factors, int64_t rows, int64_t n, int64_t count) {
    vf scale = splat(c.scale), bias = vf{};
    if (c.e.channel_scale) scale *= load_some(c.e.channel_scale + n, DType::f32, count);
    if (c.e.bias) bias = load_some(c.e.bias + n, DType::f32, count);
    const char* residual = (const char*)c.e.residual;
    const bool plain = c.e.activation == Activation::none;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (to[i] * c.row_stride + n) * size_of(D);
      vf y = load(sums + i * stride) * (factors ? scale * factors[i] : scale) + bias;
      if (residual) y += load_some(residual + at, D, count);
      if (!plain) y = activate(y, c.e.activation);
      store_some((char*)c.y + at, y, D, count);
    }
  }
};

// Of a Linear or a Conv.
template <class Args>
FP4FX_INLINE Columns columns_of(const Args& a) {
  const float scale = a.w.global_scale * (a.x_scales ? a.x_global_scale : 1.f);
  return {a.epilogue, a.y_dtype, scale, a.y, a.w.n};
}

}  // namespace FP4FX_TIER
}  // namespace fp4fx
