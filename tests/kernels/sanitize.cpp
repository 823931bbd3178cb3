// Every kernel of every tier on odd shapes, in buffers that end where the data ends, against plain loops. Built with
// AddressSanitizer and UBSan by sanitize.py; the exit status says whether everything was right.
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <vector>

#include "naive.h"

namespace {

using namespace fp4fx;

// --- data ------------------------------------------------------------------------------------------------------------

uint32_t random_bits() {
  static uint64_t state = 88172645463325252u;
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return static_cast<uint32_t>(state >> 32);
}

// Magnitudes in [0.5, 1]: then errors relative to the largest value of a block are relative to each.
float random_value() {
  const float magnitude = 0.5f + random_bits() % 4096 / 8192.0f;
  return random_bits() & 1 ? -magnitude : magnitude;
}

// Heap memory of exactly this size, which begins off any alignment but that of `align`; guarded where it ends.
struct Buffer {
  explicit Buffer(int64_t size, int64_t align = 1) : offset(align), memory(std::malloc(size + offset)) {
    std::memset(memory, 0x5A, size + offset);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(memory); }

  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(static_cast<char*>(memory) + offset);
  }

  int64_t offset;
  void* memory;
};

struct Values : Buffer {
  Values(int64_t count, DType dtype) : Buffer(count * size_of(dtype), size_of(dtype)) {
    for (int64_t i = 0; i < count; ++i) naive::store(as<void>(), dtype, i, random_value());
  }
};

// Random codes, with zeros behind the end of a row; scales between 1/4 and 2.
struct Codes {
  Codes(int64_t n, int64_t k) : codes(n * ((k + 15) / 16) * 8), scales(n * ((k + 15) / 16)) {
    const int64_t blocks = (k + 15) / 16;
    for (int64_t i = 0; i < n * blocks * 8; ++i) {
      const int64_t at = i % (blocks * 8) * 2;
      const int low = at < k ? random_bits() & 15 : 0, high = at + 1 < k ? random_bits() & 15 : 0;
      codes.as<uint8_t>()[i] = static_cast<uint8_t>(low | high << 4);
    }
    for (int64_t i = 0; i < n * blocks; ++i) scales.as<uint8_t>()[i] = static_cast<uint8_t>(40 + random_bits() % 24);
    view = {codes.as<uint8_t>(), scales.as<uint8_t>(), 0.125f, n, k};
  }

  Buffer codes, scales;
  Packed view;
};

// --- pools: one thread, and three whose pieces come in another order
// ---------------------------------------------------

const Pool kSerial = {1, [](int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
                        if (count > 0) body(context, 0, count);
                      }};

const Pool kThree = {3, [](int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
                       for (int piece = 2; piece >= 0; --piece) {
                         const int64_t begin = count * piece / 3, end = count * (piece + 1) / 3;
                         if (begin < end) body(context, begin, end);
                       }
                     }};

// --- checks ----------------------------------------------------------------------------------------------------------

int checks = 0, failures = 0;

void expect(bool good, const Tier& tier, const char* what, int64_t a, int64_t b, int64_t c, double found = 0,
            double wanted = 0) {
  ++checks;
  if (good) return;
  if (++failures <= 20) {
    std::fprintf(stderr, "%s: %s (%ld, %ld, %ld): found %g, expected %g\n", tier.name, what, static_cast<long>(a),
                 static_cast<long>(b), static_cast<long>(c), found, wanted);
  }
}

void expect_close(const Tier& tier, const char* what, const Conv& c, int64_t count,
                  const std::vector<naive::Value>& wanted) {
  const double operands = c.compute == Compute::fp32 ? 0x1p-16 : c.compute == Compute::bf16 ? 0x1p-7 : 0x1p-6;
  const double least = c.compute == Compute::int8 ? c.w.k * 1.5 * 1.5 / 127 : 0;  // relative to the largest of a row
  const double rounding = c.y_dtype == DType::f32 ? 0x1p-20 : c.y_dtype == DType::f16 ? 0x1p-10 : 0x1p-8;
  for (int64_t i = 0; i < count; ++i) {
    const double found = naive::load(c.y, c.y_dtype, i), error = std::fabs(found - wanted[i].value);
    const bool good = error <= 1.2 * operands * wanted[i].magnitude + least + rounding * std::fabs(wanted[i].value) + 1e-6;
    if (!good || i + 1 == count) {
      expect(good, tier, what, c.batch, c.w.n, c.w.k, found, wanted[i].value);
      return;
    }
  }
}

struct Finish {
  Finish(int64_t n, int64_t count, DType dtype, int kind)
      : scale(n, DType::f32), bias(n, DType::f32), residual(count, dtype) {
    view = {kind & 1 ? scale.as<float>() : nullptr, kind & 2 ? bias.as<float>() : nullptr,
            kind & 4 ? residual.as<void>() : nullptr, static_cast<Activation>(random_bits() % 9)};
    if (kind == 0) view.activation = Activation::none;
  }

  Values scale, bias, residual;
  Epilogue view;
};

constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16};
constexpr Compute kComputes[] = {Compute::bf16, Compute::fp32, Compute::int8};

void linear(const Tier& tier, const Pool& pool, int64_t m, int64_t n, int64_t k, DType dtype, Compute compute, int kind,
            bool quantized) {
  const int64_t gap = quantized ? 0 : random_bits() % 3, stride = k + gap;
  Codes w(n, k), x_codes(quantized ? m : 0, k);
  Values x(quantized || m == 0 ? 0 : (m - 1) * stride + k, dtype), dense(quantized ? 0 : m * k, dtype);
  for (int64_t i = 0; !quantized && i < m * k; ++i) {
    naive::store(dense.as<void>(), dtype, i, naive::load(x.as<void>(), dtype, i / k * stride + i % k));
  }
  const DType y_dtype = kTypes[random_bits() % 3];
  Buffer y(m * n * size_of(y_dtype), size_of(y_dtype));
  const Finish finish(n, m * n, y_dtype, kind);
  Linear call = {x.as<void>(), nullptr, 1,       dtype,          y_dtype, m,
                 stride,       w.view,  finish.view, compute, y.as<void>()};
  if (quantized) call.x = x_codes.view.codes, call.x_scales = x_codes.view.scales, call.x_global_scale = 0.125f;
  tier.linear(call, pool);
  if (!quantized) call.x = dense.as<void>();
  const Conv same = naive::as_conv(call);
  expect_close(tier, quantized ? "linear, packed x" : "linear", same, m * n, naive::conv(same));
}

struct Shape {
  bool transposed;
  int64_t batch, cin, n, groups;
  int64_t in[3], kernel[3], stride[3], padding[3], dilation[3], extra[3];
};

constexpr Shape kConvs[] = {
    {false, 2, 6, 8, 1, {1, 1, 20}, {1, 1, 3}, {1, 1, 1}, {0, 0, 1}, {1, 1, 1}, {}},
    {false, 2, 8, 12, 1, {1, 9, 11}, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, {1, 1, 1}, {}},
    {false, 1, 8, 12, 2, {1, 9, 9}, {1, 3, 3}, {1, 1, 1}, {0, 2, 2}, {1, 2, 2}, {}},
    {false, 1, 3, 5, 1, {1, 8, 8}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}, {}},
    {false, 3, 32, 17, 1, {1, 7, 5}, {1, 1, 1}, {1, 2, 1}, {0, 0, 0}, {1, 1, 1}, {}},
    {false, 1, 2, 3, 1, {1, 9, 9}, {1, 2, 2}, {1, 4, 3}, {0, 0, 0}, {1, 1, 1}, {}},
    {false, 1, 16, 16, 16, {1, 6, 6}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, {}},
    {false, 2, 48, 40, 1, {1, 5, 5}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, {}},
    {false, 1, 3, 8, 1, {1, 12, 12}, {1, 7, 7}, {1, 2, 2}, {0, 3, 3}, {1, 1, 1}, {}},
    {false, 1, 1, 1, 1, {1, 1, 1}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, {}},
    {false, 1, 4, 6, 1, {5, 6, 7}, {2, 3, 2}, {1, 2, 1}, {0, 1, 0}, {1, 1, 1}, {}},
    {true, 2, 8, 6, 1, {1, 1, 5}, {1, 1, 3}, {1, 1, 2}, {0, 0, 1}, {1, 1, 1}, {0, 0, 1}},
    {true, 2, 8, 6, 2, {1, 5, 5}, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, {1, 1, 1}, {0, 1, 1}},
    {true, 1, 32, 20, 1, {1, 4, 6}, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, {1, 1, 1}, {}},
    {true, 1, 5, 7, 1, {1, 4, 4}, {1, 3, 2}, {1, 3, 1}, {0, 0, 0}, {1, 2, 2}, {0, 2, 0}},
    {true, 1, 8, 6, 2, {3, 4, 3}, {2, 3, 3}, {1, 2, 3}, {0, 1, 1}, {1, 1, 1}, {0, 1, 0}},
};

void conv(const Tier& tier, const Pool& pool, const Shape& s, DType dtype, Compute compute, int kind, bool quantized) {
  Conv call = {};
  call.x_dtype = dtype, call.y_dtype = kTypes[random_bits() % 3], call.compute = compute;
  call.transposed = s.transposed, call.batch = s.batch, call.cin = s.cin, call.groups = s.groups;
  int64_t pixels = s.batch, results = s.batch * s.n, taps = 1;
  for (int d = 0; d < 3; ++d) {
    call.in[d] = s.in[d], call.kernel[d] = s.kernel[d], call.stride[d] = s.stride[d], call.padding[d] = s.padding[d];
    call.dilation[d] = s.dilation[d];
    const int64_t reach = s.dilation[d] * (s.kernel[d] - 1) + 1;
    call.out[d] = s.transposed ? (s.in[d] - 1) * s.stride[d] - 2 * s.padding[d] + reach + s.extra[d]
                               : (s.in[d] + 2 * s.padding[d] - reach) / s.stride[d] + 1;
    pixels *= s.in[d], results *= call.out[d], taps *= s.kernel[d];
  }
  Codes w(s.n, taps * s.cin / s.groups), x_codes(quantized ? pixels : 0, s.cin);
  Values x(quantized ? 0 : pixels * s.cin, dtype);
  Buffer y(results * size_of(call.y_dtype), size_of(call.y_dtype));
  const Finish finish(s.n, results, call.y_dtype, kind);
  call.x = x.as<void>(), call.x_global_scale = 1, call.w = w.view, call.epilogue = finish.view, call.y = y.as<void>();
  if (quantized) call.x = x_codes.view.codes, call.x_scales = x_codes.view.scales, call.x_global_scale = 0.125f;
  tier.conv(call, pool);
  expect_close(tier, s.transposed ? "conv_transpose" : "conv", call, results, naive::conv(call));
}

void codec(const Tier& tier, const Pool& pool, int64_t n, int64_t k, DType dtype) {
  Codes w(n, k);
  Buffer y(n * k * size_of(dtype), size_of(dtype)), wanted(n * k * size_of(dtype), size_of(dtype));
  for (int64_t i = 0; i < n * k; ++i) naive::store(wanted.as<void>(), dtype, i, naive::decoded(w.view, i / k, i % k));
  tier.dequantize({w.view, dtype, y.as<void>()}, pool);
  expect(!std::memcmp(y.as<void>(), wanted.as<void>(), n * k * size_of(dtype)), tier, "dequantize", n, k, 0);

  const int64_t count = n ? 5 : 0;
  Buffer indices(count * 8, 8), rows(count * k * size_of(dtype), size_of(dtype));
  for (int64_t i = 0; i < count; ++i) indices.as<int64_t>()[i] = i ? random_bits() % n : n - 1;
  tier.embedding({w.view, indices.as<int64_t>(), count, dtype, rows.as<void>()}, pool);
  for (int64_t i = 0; i < count; ++i) {
    const char* row = wanted.as<char>() + indices.as<int64_t>()[i] * k * size_of(dtype);
    const bool good = !std::memcmp(rows.as<char>() + i * k * size_of(dtype), row, k * size_of(dtype));
    expect(good, tier, "embedding", n, k, indices.as<int64_t>()[i]);
  }

  const int64_t stride = k + random_bits() % 3, blocks = (k + 15) / 16;
  Values near(n * k, DType::f32);
  for (const int64_t taps : {int64_t{1}, k % 5 == 0 ? int64_t{5} : k, k}) {
    Buffer moved(n * blocks * 8), again(n * blocks * 8);
    tier.balance({near.as<float>(), w.view, taps, moved.as<uint8_t>()}, pool);
    tier_portable.balance({near.as<float>(), w.view, taps, again.as<uint8_t>()}, kSerial);
    expect(!std::memcmp(moved.as<void>(), again.as<void>(), n * blocks * 8), tier, "balance", n, k, taps);
  }
  Values x(n ? (n - 1) * stride + k : 0, dtype);
  if (n * k > 100) naive::store(x.as<void>(), dtype, 3, NAN), naive::store(x.as<void>(), dtype, 40, INFINITY);
  for (const int block_rows : {1, 16}) {
    for (const float given : {0.0f, 0.003f}) {
      float g = given, wanted_g = given;
      Buffer codes(n * blocks * 8), scales(n * blocks), wanted_codes(n * blocks * 8), wanted_scales(n * blocks);
      Quantize call = {x.as<void>(),        dtype, n, k, stride, ScaleRule::max, block_rows, &g, codes.as<uint8_t>(),
                       scales.as<uint8_t>(), nullptr, 1};
      tier.quantize(call, pool);
      Quantize plain = call;
      plain.global_scale = &wanted_g, plain.codes = wanted_codes.as<uint8_t>(),
      plain.scales = wanted_scales.as<uint8_t>();
      naive::quantize(plain);
      expect(g == wanted_g && !std::memcmp(codes.as<void>(), plain.codes, n * blocks * 8) &&
                 !std::memcmp(scales.as<void>(), plain.scales, n * blocks),
             tier, "quantize", n, k, block_rows, g, wanted_g);
      for (const ScaleRule rule : {ScaleRule::search, ScaleRule::four_over_six, ScaleRule::four_over_six_mae}) {
        if (block_rows == 16 || !n) break;
        const int64_t parts = n % 3 == 0 ? 3 : 1;
        const std::vector<float> weights(parts * blocks * 16, 0.25f);
        call.rule = rule, g = given;
        tier.quantize(call, pool);  // for the sanitizers alone
        call.weights = weights.data(), call.weight_rows = n / parts, g = given;
        tier.quantize(call, pool);
        call.weights = nullptr;
      }
    }
  }
}

void everything(const Tier& tier, const Pool& pool) {
  for (const int64_t m : {0, 1, 2, 3, 4, 5, 8, 15, 17, 31, 33, 70}) {
    for (const int64_t n : {1, 7, 16, 33, 66}) {
      for (const int64_t k : {1, 15, 16, 17, 40, 64, 130, 300}) {
        const DType dtype = kTypes[random_bits() % 3];
        for (const Compute compute : kComputes) linear(tier, pool, m, n, k, dtype, compute, random_bits() % 8, false);
        linear(tier, pool, m, n, k, dtype, Compute::bf16, random_bits() % 8, true);
      }
    }
  }
  for (const Shape& shape : kConvs) {
    for (const DType dtype : kTypes) {
      for (const Compute compute : kComputes) conv(tier, pool, shape, dtype, compute, random_bits() % 8, false);
      conv(tier, pool, shape, dtype, Compute::bf16, random_bits() % 8, true);
    }
  }
  for (const int64_t n : {0, 1, 3, 17, 40}) {
    for (const int64_t k : {1, 15, 16, 17, 31, 64, 100, 257}) {
      for (const DType dtype : kTypes) codec(tier, pool, n, k, dtype);
    }
  }
}

}  // namespace

int main() {
  for (const Tier* const* tier = tiers(); *tier; ++tier) {
    checks = 0;
    for (const Pool& pool : {kSerial, kThree}) everything(**tier, pool);
    std::printf("%s: %d checks\n", (*tier)->name, checks);
  }
  if (failures) std::printf("%d failures\n", failures);
  return failures != 0;
}
