// Codes of a convolution moved so that errors cancel where it adds them up; fp4fx/balance.py defines every bit.
#pragma once

#include <algorithm>
#include <cstring>

#include "dequantize.h"

namespace fp4fx {
namespace FP4FX_TIER {

constexpr int kZero = 7;  // the place of 0 among the 15 values of E2M1 in their order
constexpr int kDoubled[15] = {-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12};

struct Move {
  int64_t loss;
  int32_t index, step;
  bool operator<(const Move& other) const {  // the least loss on top of a heap
    return loss != other.loss ? loss > other.loss : index > other.index;
  }
};

static int32_t scale_of(uint8_t byte) {  // in units of 2**-9
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  return byte == 0x7f ? 0 : exponent ? (8 + mantissa) << (exponent - 1) : mantissa;
}

// The memory of one row; templates of the standard library only see types of this tier, lest another tier's be taken.
struct Balanced {
  Scratch memory;
  Move* moves;
  int32_t *w, *scale;
  int8_t* place;

  explicit Balanced(int64_t k) : memory(k * int64_t(sizeof(Move) + 9)) {
    moves = (Move*)memory.data;
    w = (int32_t*)(moves + k);
    scale = w + k;
    place = (int8_t*)(scale + k);
  }

  // Values begin, begin + stride, ...; a sum of `length` errors counts by a / b beside the errors themselves.
  void move(int64_t begin, int64_t stride, int64_t length, int64_t a, int64_t b) {
    int64_t total = 0;
    for (int64_t i = 0, at = begin; i < length; ++i, at += stride) total += w[at] - kDoubled[place[at]] * scale[at];
    if (!total) return;
    const int way = total > 0 ? 1 : -1;
    Move* end = moves;
    for (int64_t i = 0, at = begin; i < length; ++i, at += stride) {
      const int now = place[at], then = now + way;
      const int32_t towards = (w[at] - kDoubled[now] * scale[at]) * way;
      if (towards <= 0 || then < 0 || then > 2 * kZero || !scale[at]) continue;
      const int32_t step = (kDoubled[then] - kDoubled[now]) * way * scale[at];
      *end++ = {int64_t(step) - 2 * int64_t(towards), int32_t(i), step};
    }
    int64_t root = 0, rest = total * way;
    while ((root + 1) * (root + 1) <= length) ++root;
    std::make_heap(moves, end);
    for (int64_t most = 4 * root + 4; end != moves && most; --end, --most) {
      std::pop_heap(moves, end);
      const Move& next = end[-1];
      if (a * (2 * rest - next.step) <= b * next.loss) return;
      place[begin + next.index * stride] += int8_t(way);
      rest -= next.step;
    }
  }
};

static int place_of(int code) { return code > kZero ? kZero - (code & 7) : kZero + code; }

static void balance_row(const Balance& b, int64_t n, Balanced& row) {
  const int64_t k = b.packed.k, blocks = b.packed.blocks(), channels = k / b.taps;
  const uint8_t* const before = b.packed.codes + n * blocks * 8;
  uint8_t* const after = b.codes + n * blocks * 8;
  for (int64_t i = 0; i < k; ++i) {
    const float value = b.rows[n * k + i];
    const int32_t scale = scale_of(b.packed.scales[n * blocks + i / 16]);
    const int place = place_of(before[i / 2] >> i % 2 * 4 & 15);
    const bool counts = scale && __builtin_isfinite(value);
    row.place[i] = int8_t(place);
    row.scale[i] = scale;
    row.w[i] = counts ? int32_t(__builtin_nearbyintf(value / b.packed.global_scale * 1024)) : kDoubled[place] * scale;
  }
  if (b.taps > 1)
    for (int64_t c = 0; c < channels; ++c) row.move(c, channels, b.taps, 1, 1);
  row.move(0, 1, k, 1, 2);
  memcpy(after, before, size_t(blocks) * 8);
  for (int64_t i = 0; i < k; ++i) {
    const int shift = i % 2 * 4, place = row.place[i];
    if (place == place_of(before[i / 2] >> shift & 15)) continue;
    const int code = place < kZero ? 2 * kZero + 1 - place : place - kZero;
    after[i / 2] = uint8_t((after[i / 2] & ~(15 << shift)) | code << shift);
  }
}

static void balance(const Balance& b, const Pool& pool) {
  const int64_t pieces = pieces_of(b.packed.n, b.packed.k, pool);
  parallel(pool, pieces, [&](int64_t piece) {
    Balanced row(b.packed.k);
    for (int64_t n = b.packed.n * piece / pieces; n < b.packed.n * (piece + 1) / pieces; ++n) balance_row(b, n, row);
  });
}

}  // namespace FP4FX_TIER
}  // namespace fp4fx
