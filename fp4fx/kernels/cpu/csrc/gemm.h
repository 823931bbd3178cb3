// y = x W^T for many rows, where a row of y may read several rows of x, one per tap of a convolution. Weights are decoded
// panel by panel into cache; x is read where it lies.
#pragma once

#include "decode.h"
#include "epilogue.h"

namespace fp4fx {
namespace FP4FX_TIER {

#if defined(__AVX512BW__)
constexpr int64_t kPanelSteps = 1024;
constexpr int64_t kPanelBytes = 512 << 10;
#else
constexpr int64_t kPanelSteps = 2048;
constexpr int64_t kPanelBytes = 192 << 10;
#endif
constexpr int64_t kColumns = kTileN * kLanes;

// One tap: where it reads, relative to the point that a row of y starts from, and where its weights begin in a row of W.
struct Tap {
  int64_t offset[3];
  int64_t k;
};

// Rows of y are the points of a grid, per image; a point reads x at point * step + offset of the tap, zero outside.
struct Gather {
  const char* x;  // operands, channels innermost
  int64_t pixel;  // bytes from one position to the next
  int64_t batch, in[3];
  int64_t count[3], step[3];                  // the grid
  int64_t out[3], out_start[3], out_step[3];  // where its points lie in y
  int64_t channels;                           // per group, operands of a tap
  int64_t groups;
  const Tap* taps;
  int64_t n_taps;
  const float* factors;  // of x, one for so many rows of y; null: 1
  int64_t rows_per_factor;

  // Tiles are pieces of the grid's lines, so that the border of an image is the border of tiles.
  int64_t tiles_per_line(int64_t rows) const { return (count[2] + rows - 1) / rows; }
  int64_t tiles(int64_t rows) const { return batch * count[0] * count[1] * tiles_per_line(rows); }
};

FP4FX_INLINE int64_t volume(const int64_t (&v)[3]) { return v[0] * v[1] * v[2]; }

// Rows of y that each read the row of x at the same place: one tap, which the caller keeps.
FP4FX_INLINE Gather line_of(const char* x, int64_t row_bytes, int64_t rows, int64_t channels, int64_t groups,
                            const Tap& tap) {
  Gather g{};
  g.x = x, g.pixel = row_bytes, g.batch = 1, g.channels = channels, g.groups = groups, g.taps = &tap, g.n_taps = 1;
  for (int d = 0; d < 3; ++d) {
    g.in[d] = g.count[d] = g.out[d] = d == 2 ? rows : 1;
    g.step[d] = g.out_step[d] = 1;
  }
  return g;
}

// The taps and the slice of channels that one panel holds.
struct Slice {
  int64_t tap0, tap1, c0, c1;
};

// All of a problem, or several taps at a time, or part of the channels of one.
struct Slices {
  int64_t taps, channels, taps_each, channels_each;

  template <class Op>
  FP4FX_INLINE Slices of(const Gather& g) {
    const int64_t most = kPanelSteps * Op::kValues;
    if (g.channels > most) return {g.n_taps, g.channels, 1, most};
    return {g.n_taps, g.channels, larger(1, smaller(g.n_taps, most / larger(1, g.channels))), g.channels};
  }
  int64_t per_tap() const { return channels ? (channels + channels_each - 1) / channels_each : 1; }
  int64_t size() const { return larger(1, (taps + taps_each - 1) / taps_each * per_tap()); }
  Slice operator[](int64_t i) const {
    const int64_t t = i / per_tap() * taps_each, c = i % per_tap() * channels_each;
    return {t, smaller(taps, t + taps_each), c, smaller(channels, c + channels_each)};
  }
};

// Which rows of a tile a tap reads: all, none (of an image's border), or all but the first or the last.
enum class Reach : int32_t { all, none, but_first, but_last };

// A tile of up to Op::kTileM points of one line.
struct Tile {
  int64_t per_line, each, longer;    // tiles of a line, their points, and how many have one more
  int64_t part, point[2], image;     // which it is
  int64_t rows, y[32];               // its points, and where they lie in y
  float factors[32];                 // of x there, if it has any

  FP4FX_INLINE Tile at(const Gather& g, int64_t index, int64_t most_rows) {
    Tile t;
    t.per_line = g.tiles_per_line(most_rows), t.each = g.count[2] / t.per_line, t.longer = g.count[2] % t.per_line;
    t.part = index % t.per_line, index /= t.per_line;
    t.point[1] = index % g.count[1], index /= g.count[1];
    t.point[0] = index % g.count[0], t.image = index / g.count[0];
    return t;
  }

  FP4FX_INLINE void next(Tile& t, const Gather& g) {
    if (++t.part < t.per_line) return;
    t.part = 0;
    if (++t.point[1] < g.count[1]) return;
    t.point[1] = 0;
    if (++t.point[0] < g.count[0]) return;
    t.point[0] = 0, ++t.image;
  }

  // Finds the rows of y, and where every tap of a slice reads.
  template <class Op>
  static void locate(Tile& tile, const Gather& g, int64_t group, const Slice& slice, const char* zeros,
                     const char** pointers, Reach* reach) {
    const int64_t from = tile.part * tile.each + smaller(tile.part, tile.longer);
    const int64_t* point = tile.point;
    tile.rows = tile.each + (tile.part < tile.longer);
    int64_t y = tile.image;
    for (int d = 0; d < 2; ++d) y = y * g.out[d] + g.out_start[d] + point[d] * g.out_step[d];
    y = y * g.out[2] + g.out_start[2] + from * g.out_step[2];
    for (int64_t m = 0; m < tile.rows; ++m) tile.y[m] = y + m * g.out_step[2];
    if (g.factors)
      for (int64_t m = 0; m < tile.rows; ++m)
        tile.factors[m] = g.factors[g.rows_per_factor == 1 ? tile.y[m] : tile.y[m] / g.rows_per_factor];

    const char* x = g.x + tile.image * g.in[0] * g.in[1] * g.in[2] * g.pixel;
    x += (group * g.channels + slice.c0) * (4 / Op::kValues);
    for (int64_t t = slice.tap0; t < slice.tap1; ++t, pointers += Op::kTileM, ++reach) {
      const int64_t* o = g.taps[t].offset;
      const int64_t a = point[0] * g.step[0] + o[0], b = point[1] * g.step[1] + o[1];
      int64_t c = from * g.step[2] + o[2];
      if ((uint64_t)a >= (uint64_t)g.in[0] || (uint64_t)b >= (uint64_t)g.in[1]) {
        *reach = Reach::none;
        continue;
      }
      const char* line_x = x + (a * g.in[1] + b) * g.in[2] * g.pixel;
      int64_t outside = 0;
      for (int64_t m = 0; m < tile.rows; ++m, c += g.step[2]) {
        const bool inside = (uint64_t)c < (uint64_t)g.in[2];
        pointers[m] = inside ? line_x + c * g.pixel : zeros;
        outside += !inside;
      }
      const bool first = pointers[0] == zeros, last = pointers[tile.rows - 1] == zeros;
      *reach = outside == 0             ? Reach::all
               : outside == tile.rows   ? Reach::none
               : outside == 1 && first  ? Reach::but_first
               : outside == 1 && last   ? Reach::but_last
                                        : Reach::all;
    }
  }
};

// Behind the panel of a vector of columns, for sums of integers: the factor that takes them back, what they start from
// (128 times the weights, less), and for each tap what leaving it out takes from that.
struct Tail {
  FP4FX_INLINE int64_t size(int64_t taps) { return (2 + taps) * kLanes; }
  FP4FX_INLINE vf factor(const int32_t* tail) { return (vf)load_i(tail); }
  FP4FX_INLINE vi start(const int32_t* tail) { return load_i(tail + kLanes); }
  FP4FX_INLINE vi tap(const int32_t* tail, int64_t t) { return load_i(tail + (2 + t) * kLanes); }
};

// Adds rows [From, To) of a tile for one tap.
template <class Op, int From, int To, int M, int N>
FP4FX_INLINE void add_tap(vf (&acc)[M][N], const char* const* pointers, int64_t steps, const int32_t* panel,
                          int64_t stride) {
  // Integers need a register for x: of 28 sums and 4 weights, the last weights are read from memory.
  constexpr bool crowded = Op::kInteger && (To - From) * N > 27;
  const char* x[M];
#pragma GCC unroll 8
  for (int m = From; m < To; ++m) x[m] = pointers[m];
  for (int64_t s = 0; s < steps; ++s) {
    vi w[N];
#pragma GCC unroll 4
    for (int n = 0; n < N - crowded; ++n) w[n] = load_i(panel + s * kLanes + n * stride);
#pragma GCC unroll 8
    for (int m = From; m < To; ++m) {
      int32_t value;
      std::memcpy(&value, x[m] + 4 * s, 4);
      const vi v = splat_i(value);
#pragma GCC unroll 4
      for (int n = 0; n < N - crowded; ++n) acc[m][n] = Op::multiply_add(acc[m][n], w[n], v);
#if defined(__AVX512VNNI__)
      if (crowded)
        asm("vpdpbusd %2, %1, %0" : "+v"(acc[m][N - 1]) : "v"(v), "m"(*(const vi*)(panel + s * kLanes + (N - 1) * stride)));
#endif
    }
  }
}

// Rows [From, To) of integer sums for a tap that is left out.
template <int From, int To, int M, int N>
FP4FX_INLINE void skip_tap(vf (&acc)[M][N], const int32_t* tail, int64_t t, int64_t stride) {
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
    for (int m = From; m < To; ++m) acc[m][n] = (vf)((vi)acc[m][n] + Tail::tap(tail + n * stride, t));
}

// Sums of M rows and N vectors of columns over the taps of a panel, added to `sums` unless they are the first.
template <class Op, int M, int N>
__attribute__((noinline)) static void multiply(const char* const* pointers, const Reach* reach, int64_t taps,
                                               int64_t steps, const int32_t* panel, const int32_t* tail, int64_t stride,
                                               float* sums, bool first) {
  constexpr bool I = Op::kInteger;
  vf acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      acc[m][n] = I ? (vf)Tail::start(tail + n * stride) : first ? vf{} : load(sums + m * kColumns + n * kLanes);
  for (int64_t t = 0; t < taps; ++t, pointers += Op::kTileM, panel += steps * kLanes) {
    if (reach[t] == Reach::none) {
      if (I) skip_tap<0, M>(acc, tail, t, stride);
    } else if (M > 1 && reach[t] == Reach::but_first) {
      add_tap<Op, M == 1 ? 0 : 1, M>(acc, pointers, steps, panel, stride);
      if (I) skip_tap<0, 1>(acc, tail, t, stride);
    } else if (M > 1 && reach[t] == Reach::but_last) {
      add_tap<Op, 0, M == 1 ? 1 : M - 1>(acc, pointers, steps, panel, stride);
      if (I) skip_tap<M - 1, M>(acc, tail, t, stride);
    } else {
      add_tap<Op, 0, M>(acc, pointers, steps, panel, stride);
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const vf factor = I ? Tail::factor(tail + n * stride) : vf{};
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      float* const to = sums + m * kColumns + n * kLanes;
      if (I) acc[m][n] = __builtin_convertvector((vi)acc[m][n], vf) * factor + (first ? vf{} : load(to));
      store(to, acc[m][n]);
    }
  }
}

typedef void (*Multiply)(const char* const*, const Reach*, int64_t, int64_t, const int32_t*, const int32_t*, int64_t,
                         float*, bool);

template <class Op, int N>
FP4FX_INLINE Multiply multiply_rows(int64_t m) {
  static const Multiply table[] = {
      multiply<Op, 1, N>, multiply<Op, 2, N>, multiply<Op, 3, N>, multiply<Op, 4, N>,
      multiply<Op, 5, N>, multiply<Op, 6, N>,
#if defined(__AVX512BW__)
      multiply<Op, 7, N>,
#endif
  };
  return table[m - 1];
}

#if defined(__AMX_BF16__) || defined(FP4FX_EMULATE_AMX)
template <class Op>
static void amx_multiply(const char* const*, const Reach*, int64_t taps, int64_t steps, int64_t rows, int64_t vectors,
                         const int32_t* panel, const int32_t* tail, int64_t stride, float* sums, bool first);
#endif

template <class Op>
FP4FX_INLINE void multiply_tile(int64_t rows, int64_t vectors, const char* const* pointers, const Reach* reach,
                                int64_t taps, int64_t steps, const int32_t* panel, const int32_t* tail,
                                int64_t stride, float* sums, bool first) {
#if defined(__AMX_BF16__) || defined(FP4FX_EMULATE_AMX)
  if (Op::kValues > 1)
    return amx_multiply<Op>(pointers, reach, taps, steps, rows, vectors, panel, tail, stride, sums, first);
#endif
  const Multiply chosen =
#if defined(__AVX512BW__)
      vectors == 4   ? multiply_rows<Op, 4>(rows)
      : vectors == 3 ? multiply_rows<Op, 3>(rows) :
#endif
      vectors == 2 ? multiply_rows<Op, 2>(rows)
                   : multiply_rows<Op, 1>(rows);
  chosen(pointers, reach, taps, steps, panel, tail, stride, sums, first);
}

// The tail of a panel whose steps begin at `weights`, for the factor of its sums.
template <class Op>
FP4FX_INLINE void fill_tail(const int32_t* weights, int64_t taps, int64_t steps, vf factor, int32_t* tail) {
  vi total{};
  for (int64_t t = 0; t < taps; ++t, weights += steps * kLanes) {
    vf sum{};
    for (int64_t s = 0; s < steps; ++s)
      sum = Op::multiply_add(sum, load_i(weights + s * kLanes), splat_i((int32_t)0x80808080));
    store_i(tail + (2 + t) * kLanes, (vi)sum);
    total += (vi)sum;
  }
  store_i(tail, (vi)factor);
  store_i(tail + kLanes, -total);
}

// Weights of one slice for up to kColumns columns from n0 on: one vector of rows after the other, taps one after the
// other without gaps; then, if Op needs it, the tail. `room` is scratch for one tap's blocks. Returns where in a vector's
// panel the steps begin.
template <class Op>
static int64_t fill_panel(const Gather& g, const Packed& w, const Slice& slice, int64_t n0, int64_t vectors,
                          int32_t* panel, int64_t tail, int64_t stride, int32_t* room) {
  const int64_t taps = slice.tap1 - slice.tap0, channels = slice.c1 - slice.c0;
  const bool empty = taps == 0 || channels == 0;
  bool adjacent = true;
  for (int64_t t = slice.tap0 + 1; t < slice.tap1; ++t) adjacent &= g.taps[t].k == g.taps[t - 1].k + g.channels;
  const int64_t first = empty ? 0 : g.taps[slice.tap0].k + slice.c0;
  const int64_t last = empty ? 0 : smaller(w.k, g.taps[slice.tap1 - 1].k + slice.c1);
  const int64_t k0 = adjacent ? first : 0, k1 = adjacent ? last : w.k, from = k0 / 16 * 16;
  const int64_t start = adjacent ? (k0 - from) / Op::kValues * kLanes : 0, tap_size = channels / Op::kValues * kLanes;
  for (int64_t v = 0; v < vectors; ++v, n0 += kLanes, panel += stride) {
    vf factor{};
    const typename Op::RowScale rows = Op::row_scale(w, n0, k0, k1, &factor);
    if (empty) {
    } else if (adjacent) {
      decode_rows<Op>(w, n0, from, k1, rows, panel);
      if (kAmx) std::memset(panel + (round_up(k1, 16) - from) / Op::kValues * kLanes, 0, 1024);
    } else {
      for (int64_t t = 0; t < taps; ++t) {  // the taps of one phase of a transposed convolution
        const int64_t k = g.taps[slice.tap0 + t].k + slice.c0, base = k / 16 * 16;
        decode_rows<Op>(w, n0, base, k + channels, rows, room);
        std::memcpy(panel + t * tap_size, room + (k - base) / Op::kValues * kLanes, tap_size * 4);
        if (kAmx) std::memset(panel + (t + 1) * tap_size, 0, 1024);
      }
    }
    if (Op::kInteger) fill_tail<Op>(panel + start, taps, channels / Op::kValues, factor, panel + tail);
  }
  return start;
}

template <class Op>
static void gemm(const Gather& g, const Packed& w, const Columns& columns, const Pool& pool) {
  const int64_t tiles = g.tiles(Op::kTileM), per_group = w.n / g.groups;
  if (tiles == 0 || w.n == 0) return;
  const Slices slices = Slices::of<Op>(g);
  const bool sliced = slices.size() > 1;
  const int64_t span = slices.channels_each * slices.taps_each;
  const int64_t tail = (round_up(span, 16) + 32) / Op::kValues * kLanes + 16 * kLanes;  // of a vector of rows
  const int64_t stride = tail + (Op::kInteger ? Tail::size(slices.taps_each) : 0);
  const int64_t all_blocks = (per_group + kColumns - 1) / kColumns;
  // Columns whose panels fit the cache together: x is read and y written once for all of them.
  const int64_t fit = sliced ? 1 : larger(1, kPanelBytes / (stride * 4 * kTileN));
  // With few rows decoding counts, and threads share it out by columns; with many, whole rows are written at a time.
  const bool few = g.batch * volume(g.count) < 1024;
  const int64_t least = (all_blocks + fit - 1) / fit, even = few ? round_up(least, pool.threads) : least;
  const int64_t bands_each = even <= all_blocks ? even : least, bands = bands_each * g.groups;
  const int64_t together = (all_blocks + bands_each - 1) / bands_each;
  int64_t heights = sliced ? (tiles + 69) / 70 : 1;  // rows in so many parts: as few as keep all threads busy
  while (heights < tiles / 4 && 16 * bands * heights < 15 * round_up(bands * heights, pool.threads)) ++heights;
  const int64_t height = (tiles + heights - 1) / heights;
  const int64_t units = bands * heights;
  const bool tiny = tiles * Op::kTileM * w.n * span < 1 << 18;  // done before another thread has begun
  const int64_t pieces = tiny ? 1 : smaller(units, pool.threads);
  Scratch zeros(larger(1, g.channels) * 4);
  std::memset(zeros.data, Op::kZero, larger(1, g.channels) * 4);
  parallel(pool, pieces, [&](int64_t piece) {
    Scratch panels((together * kTileN + 1) * stride * 4), sums((sliced ? height : 1) * Op::kTileM * kColumns * 4);
    Scratch pointers(larger(1, slices.taps_each) * Op::kTileM * sizeof(char*)), reach(larger(1, slices.taps_each) * 4);
    int32_t* const panel = (int32_t*)panels.data;
    int32_t* const room = panel + together * kTileN * stride;
    int64_t decoded = -1, start = 0;
    for (int64_t unit = units * piece / pieces; unit < units * (piece + 1) / pieces; ++unit) {
      const int64_t band = unit / heights, group = band / bands_each, in_group = band % bands_each;
      const int64_t n0 = group * per_group + all_blocks * in_group / bands_each * kColumns;
      const int64_t n1 = group * per_group + smaller(per_group, all_blocks * (in_group + 1) / bands_each * kColumns);
      const int64_t t0 = tiles * (unit % heights) / heights, t1 = tiles * (unit % heights + 1) / heights;
      for (int64_t i = 0; i < slices.size(); ++i) {
        const Slice slice = slices[i];
        const int64_t steps = (slice.c1 - slice.c0) / Op::kValues;
        if (sliced || decoded != band)
          for (int64_t n = n0, at = 0; n < n1; n += kColumns, at += kTileN * stride)
            start = fill_panel<Op>(g, w, slice, n, (smaller(kColumns, n1 - n) + kLanes - 1) / kLanes, panel + at, tail,
                                   stride, room);
        decoded = band;
        Tile tile = Tile::at(g, t0, Op::kTileM);
        for (int64_t t = t0; t < t1; ++t, Tile::next(tile, g)) {
          Tile::locate<Op>(tile, g, group, slice, (const char*)zeros.data, (const char**)pointers.data,
                           (Reach*)reach.data);
          float* const to = (float*)sums.data + (sliced ? (t - t0) * Op::kTileM * kColumns : 0);
          for (int64_t n = n0, at = 0; n < n1; n += kColumns, at += kTileN * stride) {
            const int64_t count = smaller(kColumns, n1 - n);
            multiply_tile<Op>(tile.rows, (count + kLanes - 1) / kLanes, (const char* const*)pointers.data,
                              (const Reach*)reach.data, slice.tap1 - slice.tap0, steps, panel + at + start,
                              panel + at + tail, stride, to, i == 0);
            if (i == slices.size() - 1)
              Columns::finish(columns, to, kColumns, tile.y, g.factors ? tile.factors : nullptr, tile.rows, n, count);
          }
        }
      }
    }
  });
}

}  // namespace FP4FX_TIER
}  // namespace fp4fx
