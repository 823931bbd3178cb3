// Convolutions as a gathering GEMM: taps of a kernel for a plain one, taps of a stride phase for a transposed one.
#pragma once

#include "linear.h"

namespace fp4fx {
namespace FP4FX_TIER {

// The patches of x as rows over (*kernel, cin/groups), group by group: [pixels of y][groups][padded K].
template <class Op>
static void unfold(const Conv& c, const char* x, int64_t pixel, char* out, const Pool& pool) {
  const int64_t each = c.cin / c.groups, k = volume(c.kernel) * each, padded = round_up(k, Op::kValues);
  const int64_t size = Operands<Op>::kBytes, rows = c.batch * volume(c.out);
  const int64_t pieces = smaller(rows, 4 * pool.threads);
  parallel(pool, pieces, [&](int64_t piece) {
    for (int64_t row = rows * piece / pieces; row < rows * (piece + 1) / pieces; ++row) {
      int64_t o[3], rest = row;
      for (int d = 2; d >= 0; --d) o[d] = rest % c.out[d], rest /= c.out[d];
      char* to = out + row * c.groups * padded * size;
      for (int64_t g = 0; g < c.groups; ++g, to += (padded - k) * size) {
        for (int64_t t = 0; t < volume(c.kernel); ++t, to += each * size) {
          int64_t tap[3], at = rest;
          tap[2] = t % c.kernel[2], tap[1] = t / c.kernel[2] % c.kernel[1], tap[0] = t / c.kernel[2] / c.kernel[1];
          bool inside = true;
          for (int d = 0; d < 3; ++d) {
            const int64_t i = o[d] * c.stride[d] - c.padding[d] + tap[d] * c.dilation[d];
            inside &= (uint64_t)i < (uint64_t)c.in[d];
            at = at * c.in[d] + i;
          }
          if (inside) std::memcpy(to, x + at * pixel + g * each * size, each * size);
          else std::memset(to, Op::kZero, each * size);
        }
        std::memset(to, Op::kZero, (padded - k) * size);
      }
    }
  });
}

// One phase along an axis of a transposed convolution: outputs start, start + stride, ... read these taps.
struct Phase {
  int64_t start, count;
};

template <class Op>
static void gather(const Conv& c, const Operands<Op>& x, int64_t channels, const Pool& pool) {
  const int64_t each = c.cin / c.groups;
  Scratch memory(volume(c.kernel) * sizeof(Tap));
  Tap* taps = (Tap*)memory.data;
  Gather g{};
  g.x = x.data(), g.pixel = x.row_bytes, g.batch = c.batch, g.channels = channels, g.groups = c.groups, g.taps = taps;
  g.factors = x.factors(), g.rows_per_factor = volume(c.out);
  for (int d = 0; d < 3; ++d) {
    g.in[d] = c.in[d], g.out[d] = c.out[d];
    g.step[d] = c.transposed ? 1 : c.stride[d];
    g.out_step[d] = c.transposed ? c.stride[d] : 1;
  }
  int64_t phases[3];
  for (int d = 0; d < 3; ++d) phases[d] = c.transposed ? smaller(c.stride[d], c.out[d]) : 1;
  for (int64_t p = 0; p < volume(phases); ++p) {
    const int64_t phase[3] = {p / phases[2] / phases[1], p / phases[2] % phases[1], p % phases[2]};
    for (int d = 0; d < 3; ++d) {
      g.out_start[d] = phase[d];
      g.count[d] = (c.out[d] - phase[d] + g.out_step[d] - 1) / g.out_step[d];
    }
    g.n_taps = 0;
    for (int64_t t = 0; t < volume(c.kernel); ++t) {
      const int64_t tap[3] = {t / c.kernel[2] / c.kernel[1], t / c.kernel[2] % c.kernel[1], t % c.kernel[2]};
      bool reads = true;
      for (int d = 0; d < 3; ++d) {
        int64_t& offset = taps[g.n_taps].offset[d];
        if (c.transposed) {
          const int64_t twice = phase[d] + c.padding[d] - tap[d] * c.dilation[d];
          reads &= twice % c.stride[d] == 0;
          offset = twice / c.stride[d];
        } else {
          offset = tap[d] * c.dilation[d] - c.padding[d];
        }
      }
      taps[g.n_taps].k = t * each;
      g.n_taps += reads;
    }
    gemm<Op>(g, c.w, columns_of(c), pool);
  }
}

template <class Op>
static void conv_with(const Conv& c, const Pool& pool) {
  const int64_t each = c.cin / c.groups, taps = volume(c.kernel), pixels = c.batch * volume(c.in);
  const Rows rows{c.x, c.x_scales, c.x_dtype, c.cin, c.cin};
  const bool whole = each % Op::kValues == 0;
  // Few channels make short inner loops, and an odd number of them a pair across two taps.
  const bool unfolded = !c.transposed && taps > 1 && (each < 8 || !whole);
  const Operands<Op> x(rows, pixels, unfolded ? 1 : c.groups, volume(c.in), pool);
  if (!unfolded) return gather<Op>(c, x, round_up(each, Op::kValues), pool);
  const int64_t k = round_up(taps * each, Op::kValues), patch = c.groups * k * Operands<Op>::kBytes;
  const int64_t pixels_of_y = c.batch * volume(c.out);
  Scratch patches(pixels_of_y * patch);
  unfold<Op>(c, x.data(), x.row_bytes, (char*)patches.data, pool);
  const Tap tap{{0, 0, 0}, 0};
  Gather g = line_of((const char*)patches.data, patch, pixels_of_y, k, c.groups, tap);
  g.factors = x.factors(), g.rows_per_factor = volume(c.out);
  gemm<Op>(g, c.w, columns_of(c), pool);
}

// Every pixel by itself.
FP4FX_INLINE bool pointwise(const Conv& c) {
  bool result = c.groups == 1 && !c.transposed;
  for (int d = 0; d < 3; ++d) result &= c.kernel[d] == 1 && c.stride[d] == 1 && c.padding[d] == 0;
  return result;
}

static void conv(const Conv& c, const Pool& pool) {
  if (c.batch * volume(c.out) == 0 || c.w.n == 0) return;
  if (pointwise(c)) {
    const int64_t pixels = c.batch * volume(c.in);
    return linear({c.x, c.x_scales, c.x_global_scale, c.x_dtype, c.y_dtype, pixels, c.cin, c.w, c.epilogue, c.compute,
                   c.y},
                  pool);
  }
  // A step must not reach from one tap into the next.
  const int64_t step = c.transposed && volume(c.kernel) > 1 ? c.cin / c.groups : 4;
  if (c.compute == Compute::fp32 || step % OpBf16::kValues) return conv_with<OpF32>(c, pool);
  if (c.compute == Compute::int8 && step % OpInt8::kValues == 0) return conv_with<OpInt8>(c, pool);
  conv_with<OpBf16>(c, pool);
}

}  // namespace FP4FX_TIER
}  // namespace fp4fx
