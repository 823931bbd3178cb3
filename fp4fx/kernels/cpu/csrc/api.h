// What the kernels take and give: plain pointers and sizes, no torch header anywhere but in binding.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fp4fx {

enum class DType : int32_t { f32, bf16, f16 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Precision of the operands; sums are fp32 throughout.
enum class Compute : int32_t { bf16, fp32, int8 };

// How the scale of a block is chosen, as fp4fx/scales.py says.
enum class ScaleRule : int32_t { max, search, four_over_six, four_over_six_mae };

enum class Activation : int32_t { none, relu, relu6, silu, gelu, gelu_tanh, hardswish, hardsigmoid, sigmoid };

// What a caller's thread pool does: body(context, begin, end) over [0, count) in pieces, in any order, all done on return.
struct Pool {
  int threads;
  void (*run)(int64_t count, void (*body)(void* context, int64_t begin, int64_t end), void* context);
};

// N rows of K values in NVFP4: ceil(K/16)*8 code bytes and ceil(K/16) scale bytes a row, both contiguous.
// A value is code * scale * global_scale; the codes of a row's tail are zero.
struct Packed {
  const uint8_t* codes;
  const uint8_t* scales;
  float global_scale;
  int64_t n, k;

  int64_t blocks() const { return (k + 15) / 16; }
};

// y = activation(channel_scale * product + bias + residual) in fp32, rounded once to y's dtype.
struct Epilogue {
  const float* channel_scale;  // [N] or null
  const float* bias;           // [N] or null
  const void* residual;        // laid out like y, of y's dtype, or null
  Activation activation;
};

// y [M, N] = x [M, K] * W^T, rows of x `x_stride` elements apart, y contiguous. If `x_scales` is not null, x is packed
// codes, [M, ceil(K/16)*8] bytes contiguous, with x_scales [M, ceil(K/16)] and x_global_scale; x_dtype is then not read.
struct Linear {
  const void* x;
  const uint8_t* x_scales;
  float x_global_scale;
  DType x_dtype, y_dtype;
  int64_t m, x_stride;
  Packed w;
  Epilogue epilogue;
  Compute compute;
  void* y;
  float quantize_x;  // not 0: x is read as codes and scales that this global scale, a factor of w's, would give
  ScaleRule x_rule;  // by this rule
};

// Convolution over up to three spatial axes, missing ones of size 1 in front. x and y are channels-last and contiguous:
// x [batch, *in, cin], y [batch, *out, N]. W has N rows over (*kernel, cin/groups). A transposed one scatters by stride.
// A packed x has its codes in blocks along all channels of a pixel, as in Linear.
struct Conv {
  const void* x;
  const uint8_t* x_scales;
  float x_global_scale;
  DType x_dtype, y_dtype;
  bool transposed;
  int64_t batch, cin, groups;
  int64_t in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
  Packed w;
  Epilogue epilogue;
  Compute compute;
  void* y;
};

// y [count, K] = rows of a table by index; the caller has checked the indices.
struct Embedding {
  Packed table;
  const int64_t* indices;
  int64_t count;
  DType dtype;
  void* y;
};

// y [N, K], contiguous, in dtype: code * (scale * global_scale) in fp32, then rounded.
struct Dequantize {
  Packed x;
  DType dtype;
  void* y;
};


// Rows x [n, k], `x_stride` elements apart, to codes and scales. global_scale is given (0: to be found first and
// written); block_rows is 1 or 16, and 16 for `max` alone. Without codes, only the global scale is found. Weights, if not
// null, are factors of the errors that a rule compares: a row of whole blocks, contiguous, for every `weight_rows` of x.
struct Quantize {
  const void* x;
  DType dtype;
  int64_t n, k, x_stride;
  ScaleRule rule;
  int block_rows;
  float* global_scale;
  uint8_t* codes;
  uint8_t* scales;
  const float* weights;
  int64_t weight_rows;
};

// Codes of rows x fp32 [n, k], contiguous, with k = taps * channels, moved from those of `packed` so that errors cancel.
struct Balance {
  const float* rows;
  Packed packed;
  int64_t taps;
  uint8_t* codes;
};

// One implementation for one instruction set. Everything is safe to call from several threads at once.
struct Tier {
  const char* name;
  bool (*supported)();  // this processor, and the operating system, can run it
  void (*linear)(const Linear&, const Pool&);
  void (*conv)(const Conv&, const Pool&);
  void (*embedding)(const Embedding&, const Pool&);
  void (*dequantize)(const Dequantize&, const Pool&);
  void (*quantize)(const Quantize&, const Pool&);
  void (*balance)(const Balance&, const Pool&);
};

// Defined in tier.cpp, compiled once per instruction set.
extern const Tier tier_portable, tier_avx2, tier_avx512, tier_avx512_bf16, tier_amx;

// Best first, those of them that were built and that this machine can run; null behind the last. dispatch.cpp.
const Tier* const* tiers();

}  // namespace fp4fx
