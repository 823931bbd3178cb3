// What the kernels compute, as plain loops in double: the reference of sanitize.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "api.h"

namespace naive {

using namespace fp4fx;

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float load(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  if (dtype == DType::bf16) return from_bits(static_cast<uint32_t>(bits) << 16);
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(1.0f * mantissa, -24));
}

// Rounds to nearest even; fp16 through the spacing of its binade.
inline void store(void* data, DType dtype, int64_t i, double value) {
  if (dtype == DType::f32) {
    static_cast<float*>(data)[i] = static_cast<float>(value);
    return;
  }
  uint16_t& out = static_cast<uint16_t*>(data)[i];
  const uint32_t bits = to_bits(static_cast<float>(value));
  if (dtype == DType::bf16) {
    out = static_cast<uint16_t>(value != value ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    return;
  }
  const uint16_t sign = bits >> 31 ? 0x8000 : 0;
  const double a = std::fabs(static_cast<float>(value));
  if (!(a < 65520)) {
    out = sign | (a != a ? 0x7E00 : 0x7C00);
    return;
  }
  const int exponent = a < 0x1p-14 ? -14 : std::ilogb(a);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(a, 10 - exponent)));  // in [0, 2048]
  out = static_cast<uint16_t>(sign | (steps + ((exponent + 14) << 10)));
}

inline float e2m1(int code) {
  static const float magnitude[] = {0, .5, 1, 1.5, 2, 3, 4, 6};
  return code & 8 ? -magnitude[code & 7] : magnitude[code & 7];
}

inline float e4m3(uint8_t byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const float sign = byte & 0x80 ? -1.0f : 1.0f;
  if ((byte & 0x7F) == 0x7F) return NAN;
  return sign * (exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(1.0f * mantissa, -9));
}

inline float decoded(const uint8_t* codes, const uint8_t* scales, float global_scale, int64_t blocks, int64_t row,
                     int64_t k) {
  const uint8_t pair = codes[(row * blocks * 16 + k) / 2];
  return e2m1(k % 2 ? pair >> 4 : pair & 15) * (e4m3(scales[row * blocks + k / 16]) * global_scale);
}

inline float decoded(const Packed& w, int64_t row, int64_t k) {
  return decoded(w.codes, w.scales, w.global_scale, w.blocks(), row, k);
}

inline double activate(Activation activation, double v) {
  switch (activation) {
    case Activation::none:
      return v;
    case Activation::relu:
      return v > 0 ? v : 0;
    case Activation::relu6:
      return v < 0 ? 0 : v > 6 ? 6 : v;
    case Activation::silu:
      return v / (1 + std::exp(-v));
    case Activation::gelu:
      return v * 0.5 * (1 + std::erf(v / std::sqrt(2.0)));
    case Activation::gelu_tanh:
      return 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
    case Activation::hardswish:
      return v * (v < -3 ? 0 : v > 3 ? 6 : v + 3) / 6;
    case Activation::hardsigmoid:
      return (v < -3 ? 0 : v > 3 ? 6 : v + 3) / 6;
    case Activation::sigmoid:
      return 1 / (1 + std::exp(-v));
  }
  return NAN;
}

// A result, and the sum of the magnitudes that rounding errors are relative to.
struct Value {
  double value, magnitude;
};

inline std::vector<Value> conv(const Conv& c) {
  const int64_t in = c.in[0] * c.in[1] * c.in[2], out = c.out[0] * c.out[1] * c.out[2], n = c.w.n;
  const int64_t cin = c.cin / c.groups, cout = n / c.groups, blocks = (c.cin + 15) / 16;
  std::vector<Value> y(c.batch * out * n);
  for (int64_t i = 0; i < static_cast<int64_t>(y.size()); ++i) {
    const int64_t row = i % n, pixel = i / n % out, b = i / n / out, group = row / cout;
    const int64_t at[3] = {pixel / (c.out[1] * c.out[2]), pixel / c.out[2] % c.out[1], pixel % c.out[2]};
    double sum = 0, magnitude = 0;
    for (int64_t tap = 0; tap < c.kernel[0] * c.kernel[1] * c.kernel[2]; ++tap) {
      const int64_t step[3] = {tap / (c.kernel[1] * c.kernel[2]), tap / c.kernel[2] % c.kernel[1], tap % c.kernel[2]};
      int64_t from[3];
      bool inside = true;
      for (int d = 0; d < 3; ++d) {
        if (c.transposed) {
          const int64_t scattered = at[d] + c.padding[d] - step[d] * c.dilation[d];
          from[d] = scattered / c.stride[d];
          inside = inside && scattered % c.stride[d] == 0 && scattered >= 0;
        } else {
          from[d] = at[d] * c.stride[d] - c.padding[d] + step[d] * c.dilation[d];
        }
        inside = inside && from[d] >= 0 && from[d] < c.in[d];
      }
      if (!inside) continue;
      const int64_t x_row = b * in + (from[0] * c.in[1] + from[1]) * c.in[2] + from[2];
      for (int64_t channel = 0; channel < cin; ++channel) {
        const int64_t k = group * cin + channel;
        const double x = c.x_scales
                             ? decoded(static_cast<const uint8_t*>(c.x), c.x_scales, c.x_global_scale, blocks, x_row, k)
                             : load(c.x, c.x_dtype, x_row * c.cin + k);
        const double term = x * decoded(c.w, row, tap * cin + channel);
        sum += term;
        magnitude += std::fabs(term);
      }
    }
    const Epilogue& e = c.epilogue;
    if (e.channel_scale) sum *= e.channel_scale[row], magnitude *= std::fabs(e.channel_scale[row]);
    if (e.bias) sum += e.bias[row];
    if (e.residual) sum += load(e.residual, c.y_dtype, i);
    y[i] = {activate(e.activation, sum), magnitude};
  }
  return y;
}

// A linear layer is a convolution over one pixel; rows of x must be contiguous here.
inline Conv as_conv(const Linear& l) {
  Conv c = {};
  c.x = l.x, c.x_scales = l.x_scales, c.x_global_scale = l.x_global_scale;
  c.x_dtype = l.x_dtype, c.y_dtype = l.y_dtype;
  c.batch = l.m, c.cin = l.w.k, c.groups = 1;
  for (int d = 0; d < 3; ++d) c.in[d] = c.out[d] = c.kernel[d] = c.stride[d] = c.dilation[d] = 1;
  c.w = l.w, c.epilogue = l.epilogue, c.compute = l.compute, c.y = l.y;
  return c;
}

// The nearest of the codes [0, count), of two the even one; codes decode to rising values.
template <typename Decode>
int nearest(float value, int count, Decode decode) {
  int best = 0;
  for (int code = 1; code < count; ++code) {
    const float old = std::fabs(decode(best) - value), distance = std::fabs(decode(code) - value);
    if (distance < old || (distance == old && code % 2 == 0)) best = code;
  }
  return best;
}

inline int encode_e2m1(float value) {
  const float a = std::fabs(value);
  return a != a ? 0 : nearest(a > 6 ? 6 : a, 8, e2m1) | (value < 0 ? 8 : 0);
}

// Writes what the rule "max" says.
inline void quantize(const Quantize& q) {
  const int64_t blocks = (q.k + 15) / 16;
  const auto at = [&](int64_t row, int64_t k) { return k < q.k ? load(q.x, q.dtype, row * q.x_stride + k) : 0.0f; };
  const auto larger = [](float amax, float value) {
    const float a = std::fabs(value);
    return a < INFINITY && a > amax ? a : amax;
  };
  if (*q.global_scale == 0) {
    float amax = 0;
    for (int64_t i = 0; i < q.n * q.k; ++i) amax = larger(amax, at(i / q.k, i % q.k));
    *q.global_scale = amax == 0 ? 1 : std::fmax(amax / 2688, 0x1p-126f);
  }
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t first = 0; first < q.n; first += q.block_rows) {
      const int64_t last = first + q.block_rows < q.n ? first + q.block_rows : q.n;
      float amax = 0;
      bool poisoned = false;
      for (int64_t i = first * 16; i < last * 16; ++i) {
        const float value = at(i / 16, block * 16 + i % 16);
        amax = larger(amax, value);
        poisoned = poisoned || value != value;
      }
      const float wanted = amax == 0 ? 1 : std::fmin(std::fmax(amax / (6 * *q.global_scale), 0x1p-9f), 448.0f);
      const uint8_t scale = poisoned ? 0x7F : nearest(wanted, 127, e4m3);
      for (int64_t row = first; row < last; ++row) {
        q.scales[row * blocks + block] = scale;
        for (int64_t k = block * 16; k < block * 16 + 16; k += 2) {
          const float step = e4m3(scale) * *q.global_scale;
          q.codes[(row * blocks * 16 + k) / 2] = encode_e2m1(at(row, k) / step) | encode_e2m1(at(row, k + 1) / step)
                                                                                      << 4;
        }
      }
    }
  }
}

}  // namespace naive
