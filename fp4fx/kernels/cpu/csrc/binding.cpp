// The ops fp4fx_cpu::*: checks, memory formats and threads. The only file that knows torch; what computes is behind
// api.h.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <omp.h>
#include <pthread.h>
#include <torch/library.h>

#include <array>
#include <functional>
#include <numeric>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "api.h"

namespace {

using at::IntArrayRef;
using c10::SymInt;
using c10::SymIntArrayRef;
using at::ScalarType;
using at::Tensor;
using Maybe = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// --- threads ---------------------------------------------------------------------------------------------------------

void run_in_parallel(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

fp4fx::Pool pool() { return {at::in_parallel_region() ? 1 : at::get_num_threads(), run_in_parallel}; }

// GNU's OpenMP would wait in a forked child for threads that only its parent has: release those of the forking thread
// first. They come back with the next parallel loop.
const int at_fork = pthread_atfork([] { omp_pause_resource_all(omp_pause_soft); }, nullptr, nullptr);

// --- arguments -------------------------------------------------------------------------------------------------------

const fp4fx::Tier& tier_of(std::string_view name) {
  const fp4fx::Tier* const* all = fp4fx::tiers();
  if (name.empty()) return **all;
  std::string names;
  for (; *all; ++all) {
    if (name == (*all)->name) return **all;
    names += std::string(names.empty() ? "" : ", ") + (*all)->name;
  }
  C10_THROW_ERROR(ValueError, c10::str("fp4fx_cpu: no tier '", name, "' here; use '' for the best, or one of ", names));
}

template <typename Value, size_t count>
Value named(std::string_view name, const char* what, const std::array<const char*, count>& names) {
  std::string all;
  for (size_t i = 0; i < count; ++i) {
    if (name == names[i]) return static_cast<Value>(i);
    all += std::string(i ? ", " : "") + names[i];
  }
  C10_THROW_ERROR(ValueError, c10::str("fp4fx_cpu: unknown ", what, " '", name, "'; use one of ", all));
}

// What a caller may store in bf16 between two calls is nothing to the call itself.
fp4fx::Compute compute_of(std::string_view name) {
  if (name == "bf16_operands") return fp4fx::Compute::bf16;
  return named<fp4fx::Compute, 3>(name, "compute", {"bf16", "fp32", "int8"});
}

fp4fx::ScaleRule scale_rule_of(std::string_view name) {
  return named<fp4fx::ScaleRule, 4>(name, "scale rule", {"max", "search", "four_over_six", "four_over_six_mae"});
}

fp4fx::Activation activation_of(std::string_view name) {
  return named<fp4fx::Activation, 9>(
      name, "activation",
      {"none", "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish", "hardsigmoid", "sigmoid"});
}

fp4fx::DType dtype_of(ScalarType dtype) {
  if (dtype == at::kFloat) return fp4fx::DType::f32;
  if (dtype == at::kBFloat16) return fp4fx::DType::bf16;
  TORCH_CHECK(dtype == at::kHalf, "fp4fx_cpu: expected float32, bfloat16 or float16, found ", dtype);
  return fp4fx::DType::f16;
}

int64_t blocks_of(int64_t k) { return (k + 15) / 16; }

// A C++ wrapper of Inductor calls with lists of SymInt, which kernels that take int64_t refuse.
IntArrayRef ints(SymIntArrayRef sizes) { return C10_AS_INTARRAYREF_SLOW(sizes); }

int64_t product(IntArrayRef sizes) { return c10::multiply_integers(sizes); }

Sizes concat(IntArrayRef head, IntArrayRef tail) {
  Sizes all(head.begin(), head.end());
  all.insert(all.end(), tail.begin(), tail.end());
  return all;
}

float scalar_of(const Tensor& t, const char* name) {
  TORCH_CHECK(t.is_cpu() && t.scalar_type() == at::kFloat && t.numel() == 1, "fp4fx_cpu: ", name,
              " must be one float32 value on the CPU, found ", t.scalar_type(), " ", t.sizes(), " on ", t.device());
  return *t.const_data_ptr<float>();
}

// Rows of K codes and their scales, made contiguous; the tensors live as long as the pointers are used.
struct Rows {
  Rows(const Tensor& packed, const Tensor& scale, const Tensor& global_scale, int64_t k, const char* name) {
    TORCH_CHECK(k >= 1, "fp4fx_cpu: rows of ", k, " values");
    TORCH_CHECK(
        packed.is_cpu() && scale.is_cpu() && packed.scalar_type() == at::kByte && scale.scalar_type() == at::kByte,
        "fp4fx_cpu: ", name, " must have codes and scales of uint8 on the CPU, found ", packed.scalar_type(), " on ",
        packed.device(), " and ", scale.scalar_type(), " on ", scale.device());
    const int64_t blocks = blocks_of(k);
    const bool fits = packed.dim() >= 1 && packed.dim() == scale.dim() && packed.size(-1) == 8 * blocks &&
                      scale.size(-1) == blocks &&
                      packed.sizes().slice(0, packed.dim() - 1) == scale.sizes().slice(0, scale.dim() - 1);
    TORCH_CHECK(fits, "fp4fx_cpu: ", name, ": K=", k, " needs ", 8 * blocks, " code bytes and ", blocks,
                " scales a row, found packed ", packed.sizes(), " and scale ", scale.sizes());
    codes = packed.contiguous();
    scales = scale.contiguous();
    view = {codes.const_data_ptr<uint8_t>(), scales.const_data_ptr<uint8_t>(),
            scalar_of(global_scale, "a global scale"), scales.numel() / blocks, k};
  }

  Tensor codes, scales;
  fp4fx::Packed view;
};

Rows weight_of(const Tensor& packed, const Tensor& scale, const Tensor& global_scale, int64_t k) {
  TORCH_CHECK(packed.dim() == 2, "fp4fx_cpu: the weight must be a matrix of codes, found ", packed.sizes());
  return Rows(packed, scale, global_scale, k, "the weight");
}

// What is read of an activation: values, or codes with their scales. `dtype` is the result's, x's own if not given.
struct Input {
  Input(const Tensor& given, const Maybe& x_scale, const Maybe& x_global_scale, std::optional<ScalarType> dtype,
        int64_t k)
      : x(given) {
    TORCH_CHECK(x.is_cpu(), "fp4fx_cpu: x must be on the CPU, is on ", x.device());
    if (x_scale) {
      TORCH_CHECK(x_global_scale && dtype,
                  "fp4fx_cpu: a quantized x needs its global scale and the dtype of the result");
      rows.emplace(x, *x_scale, *x_global_scale, k, "x");
      x = rows->codes;
    }
    result = dtype.value_or(given.scalar_type());
    y_dtype = dtype_of(result);
    x_dtype = x_scale ? y_dtype : dtype_of(x.scalar_type());
  }

  const uint8_t* scales() const { return rows ? rows->view.scales : nullptr; }
  float global_scale() const { return rows ? rows->view.global_scale : 1.0f; }

  Tensor x;
  std::optional<Rows> rows;
  ScalarType result;
  fp4fx::DType x_dtype, y_dtype;
};

// The epilogue's tensors in the form that the kernels read.
struct Epilogue {
  Epilogue(const Maybe& channel_scale, const Maybe& bias, Maybe residual, std::string_view activation, int64_t n,
           const Tensor& y, at::MemoryFormat format = at::MemoryFormat::Contiguous)
      : channel_scale(vector_of(channel_scale, n, "channel_scale")),
        bias(vector_of(bias, n, "bias")),
        residual(std::move(residual)) {
    const Maybe& r = this->residual;
    if (r) {
      TORCH_CHECK(r->is_cpu() && r->scalar_type() == y.scalar_type() && r->sizes() == y.sizes(),
                  "fp4fx_cpu: residual must be ", y.scalar_type(), " ", y.sizes(),
                  " on the CPU like the result, found ", r->scalar_type(), " ", r->sizes(), " on ", r->device());
      this->residual = r->contiguous(format);
    }
    view = {data(this->channel_scale), data(this->bias), r ? r->const_data_ptr() : nullptr, activation_of(activation)};
  }

  static Maybe vector_of(const Maybe& v, int64_t n, const char* name) {
    if (!v) return std::nullopt;
    TORCH_CHECK(v->is_cpu() && at::isFloatingType(v->scalar_type()) && v->dim() == 1 && v->size(0) == n,
                "fp4fx_cpu: ", name, " must have ", n, " floating-point values on the CPU, found ", v->scalar_type(),
                " ", v->sizes(), " on ", v->device());
    return v->to(at::kFloat).contiguous();
  }

  static const float* data(const Maybe& v) { return v ? v->const_data_ptr<float>() : nullptr; }

  Maybe channel_scale, bias, residual;
  fp4fx::Epilogue view;
};

// --- linear ----------------------------------------------------------------------------------------------------------

// Elements between two rows [..., K] of x, if one number says it and the rows themselves are contiguous.
std::optional<int64_t> row_stride(const Tensor& x) {
  if (x.size(-1) > 1 && x.stride(-1) != 1) return std::nullopt;
  int64_t stride = x.size(-1), reach = -1;  // reach: what the next axis outwards must step by
  for (int64_t d = x.dim() - 2; d >= 0; --d) {
    if (x.size(d) == 1) continue;
    if (reach < 0) {
      stride = x.stride(d);
    } else if (x.stride(d) != reach) {
      return std::nullopt;
    }
    reach = x.stride(d) * x.size(d);
  }
  return stride;
}

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& global_scale, const Maybe& bias,
              int64_t in_features, const Maybe& x_scale, const Maybe& x_global_scale, std::optional<ScalarType> dtype,
              const Maybe& channel_scale, const Maybe& residual, std::string_view activation, std::string_view compute,
              std::string_view quantize_x, std::string_view tier) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Rows weight = weight_of(packed, scale, global_scale, in_features);
  TORCH_CHECK(quantize_x.empty() || !x_scale, "fp4fx_cpu: quantize_x is for an x of values, found codes");
  const fp4fx::ScaleRule x_rule = quantize_x.empty() ? fp4fx::ScaleRule::max : scale_rule_of(quantize_x);
  Input input(x, x_scale, x_global_scale, dtype, in_features);
  TORCH_CHECK(x.dim() >= 1, "fp4fx_cpu: x has no axis");
  TORCH_CHECK(x_scale || x.size(-1) == in_features, "fp4fx_cpu: x has ", x.size(-1),
              " values along axis -1, the weight expects ", in_features);
  const IntArrayRef lead = x.sizes().slice(0, x.dim() - 1);
  const Tensor y = at::empty(concat(lead, weight.view.n), x.options().dtype(input.result));
  const Epilogue epilogue(channel_scale, bias, residual, activation, weight.view.n, y);
  const fp4fx::Compute precision = compute_of(compute);
  const fp4fx::Tier& chosen = tier_of(tier);
  if (y.numel() == 0) return y;
  std::optional<int64_t> stride = x_scale ? 0 : row_stride(input.x);
  if (!stride) {
    input.x = input.x.contiguous();
    stride = in_features;
  }
  fp4fx::Packed w = weight.view;
  float g = 0;  // which asks for a scale to be found
  if (!quantize_x.empty()) {
    if (x_global_scale) g = scalar_of(*x_global_scale, "x_global_scale");
    TORCH_CHECK_VALUE(!x_global_scale || g != 0, "fp4fx_cpu: x_global_scale must be positive, is 0");
    if (g == 0) {
      chosen.quantize({input.x.const_data_ptr(), input.x_dtype, product(lead), in_features, *stride, x_rule, 1, &g,
                       nullptr, nullptr, nullptr, 1},
                      pool());
    }
    w.global_scale *= g;
  }
  chosen.linear({input.x.const_data_ptr(), input.scales(), input.global_scale(), input.x_dtype, input.y_dtype,
                 product(lead), *stride, w, epilogue.view, precision, y.mutable_data_ptr(), g,
                 x_rule},
                pool());
  return y;
}

// --- convolutions ----------------------------------------------------------------------------------------------------

bool answers_channels_last(const Tensor& x) {
  if (x.is_contiguous()) return false;
  return (x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast)) ||
         (x.dim() == 5 && x.is_contiguous(at::MemoryFormat::ChannelsLast3d));
}

struct Geometry {
  IntArrayRef kernel, stride, padding, output_padding, dilation;  // output_padding empty: not transposed
  int64_t groups;
};

// The size of one spatial axis of the result.
int64_t out_size(int64_t in, const Geometry& g, size_t i) {
  const int64_t kernel = g.dilation[i] * (g.kernel[i] - 1) + 1;
  TORCH_CHECK(g.kernel[i] >= 1 && g.stride[i] >= 1 && g.dilation[i] >= 1,
              "fp4fx_cpu: kernel, stride and dilation must be positive");
  TORCH_CHECK(g.padding[i] >= 0, "fp4fx_cpu: negative padding is not supported, found ", g.padding);
  if (g.output_padding.empty()) {
    TORCH_CHECK(in + 2 * g.padding[i] >= kernel, "fp4fx_cpu: a kernel of ", kernel, " does not fit an input of ", in,
                " padded by ", g.padding[i]);
    return (in + 2 * g.padding[i] - kernel) / g.stride[i] + 1;
  }
  const int64_t extra = g.output_padding[i];
  TORCH_CHECK(extra >= 0 && (extra < g.stride[i] || extra < g.dilation[i]),
              "fp4fx_cpu: output_padding must be smaller than stride or dilation, found ", g.output_padding);
  const int64_t out = (in - 1) * g.stride[i] - 2 * g.padding[i] + kernel + extra;
  TORCH_CHECK(in >= 1 && out >= 1, "fp4fx_cpu: the result of a transposed convolution would be empty");
  return out;
}

Tensor convolution(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& global_scale,
                   const Maybe& bias, int64_t channels, const Geometry& g, const Maybe& x_scale,
                   const Maybe& x_global_scale, std::optional<ScalarType> dtype, const Maybe& channel_scale,
                   const Maybe& residual, std::string_view activation, std::string_view compute,
                   std::string_view tier) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const size_t rank = g.kernel.size();
  const bool transposed = !g.output_padding.empty();
  TORCH_CHECK(
      rank >= 1 && rank <= 3 && g.stride.size() == rank && g.padding.size() == rank && g.dilation.size() == rank &&
          (!transposed || g.output_padding.size() == rank),
      "fp4fx_cpu: a convolution has one to three spatial axes, each with a kernel size, stride, padding and dilation");
  TORCH_CHECK(g.groups >= 1 && channels >= 1 && channels % g.groups == 0, "fp4fx_cpu: ", channels,
              " channels do not form ", g.groups, " groups");
  const Rows weight = weight_of(packed, scale, global_scale, channels / g.groups * product(g.kernel));
  TORCH_CHECK(weight.view.n % g.groups == 0, "fp4fx_cpu: ", weight.view.n, " results do not form ", g.groups,
              " groups");
  Input input(x, x_scale, x_global_scale, dtype, channels);
  TORCH_CHECK(x.dim() == static_cast<int64_t>(rank) + 2 && (x_scale || x.size(1) == channels),
              "fp4fx_cpu: x must have a batch, ", channels, " channels and ", rank, " spatial axes, found ", x.sizes());
  // Packed x has its channels last; other x is copied if it has not.
  const bool keep_last = x_scale ? rank > 1 : answers_channels_last(x);
  if (!x_scale && !keep_last) input.x = x.movedim(1, -1).contiguous();
  const size_t first = x_scale || !keep_last ? 1 : 2;  // spatial axis of input.x

  fp4fx::Conv conv = {};
  conv.batch = x.size(0);
  Sizes sizes = {conv.batch, weight.view.n};
  for (size_t i = 0; i < 3; ++i) {
    const bool there = i + rank >= 3;
    const size_t axis = i + rank - 3;
    conv.in[i] = there ? input.x.size(axis + first) : 1;
    conv.out[i] = there ? out_size(conv.in[i], g, axis) : 1;
    conv.kernel[i] = there ? g.kernel[axis] : 1;
    conv.stride[i] = there ? g.stride[axis] : 1;
    conv.padding[i] = there ? g.padding[axis] : 0;
    conv.dilation[i] = there ? g.dilation[axis] : 1;
    if (there) sizes.push_back(conv.out[i]);
  }
  const at::TensorOptions options = x.options().dtype(input.result);
  const at::MemoryFormat last = rank == 3 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
  if (rank == 1) sizes.insert(sizes.begin() + 2, 1);  // there is no such format of rank 3
  const Tensor y = at::empty(sizes, options, last);
  const Maybe wide = residual && rank == 1 ? Maybe(residual->unsqueeze(2)) : residual;
  const Epilogue epilogue(channel_scale, bias, wide, activation, weight.view.n, y, last);
  conv.x = input.x.const_data_ptr();
  conv.x_scales = input.scales();
  conv.x_global_scale = input.global_scale();
  conv.x_dtype = input.x_dtype;
  conv.y_dtype = input.y_dtype;
  conv.transposed = transposed;
  conv.cin = channels;
  conv.groups = g.groups;
  conv.w = weight.view;
  conv.epilogue = epilogue.view;
  conv.compute = compute_of(compute);
  conv.y = y.mutable_data_ptr();
  const fp4fx::Tier& chosen = tier_of(tier);
  if (y.numel()) chosen.conv(conv, pool());
  if (rank == 1) return y.squeeze(2).contiguous();
  return keep_last ? y : y.contiguous();
}

Tensor conv(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& global_scale, const Maybe& bias,
            SymInt in_channels, IntArrayRef kernel_size, SymIntArrayRef stride, SymIntArrayRef padding,
            SymIntArrayRef dilation, SymInt groups, const Maybe& x_scale, const Maybe& x_global_scale,
            std::optional<ScalarType> dtype, const Maybe& channel_scale, const Maybe& residual,
            std::string_view activation, std::string_view compute, std::string_view tier) {
  return convolution(x, packed, scale, global_scale, bias, in_channels.expect_int(),
                     {kernel_size, ints(stride), ints(padding), {}, ints(dilation), groups.expect_int()}, x_scale,
                     x_global_scale, dtype, channel_scale, residual, activation, compute, tier);
}

Tensor conv_transpose(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& global_scale,
                      const Maybe& bias, SymInt in_channels, IntArrayRef kernel_size, SymIntArrayRef stride,
                      SymIntArrayRef padding, SymIntArrayRef output_padding, SymIntArrayRef dilation,
                      SymInt groups, const Maybe& x_scale, const Maybe& x_global_scale, std::optional<ScalarType> dtype,
                      const Maybe& channel_scale, const Maybe& residual, std::string_view activation,
                      std::string_view compute, std::string_view tier) {
  TORCH_CHECK(!output_padding.empty(), "fp4fx_cpu: output_padding has no axis");
  return convolution(
      x, packed, scale, global_scale, bias, in_channels.expect_int(),
      {kernel_size, ints(stride), ints(padding), ints(output_padding), ints(dilation), groups.expect_int()}, x_scale,
      x_global_scale, dtype, channel_scale, residual, activation, compute, tier);
}

// --- embedding -------------------------------------------------------------------------------------------------------

Tensor embedding(const Tensor& indices, const Tensor& packed, const Tensor& scale, const Tensor& global_scale,
                 int64_t embedding_dim, ScalarType dtype, std::string_view tier) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Rows table = weight_of(packed, scale, global_scale, embedding_dim);
  TORCH_CHECK(indices.is_cpu() && (indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt),
              "fp4fx_cpu: indices must be int64 or int32 on the CPU, are ", indices.scalar_type(), " on ",
              indices.device());
  const Tensor wide = indices.to(at::kLong).contiguous();
  const int64_t* data = wide.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < wide.numel(); ++i) {
    TORCH_CHECK_INDEX(data[i] >= 0 && data[i] < table.view.n, "fp4fx_cpu: index ", data[i],
                      " is out of range, the table has ", table.view.n, " rows");
  }
  const Tensor y = at::empty(concat(indices.sizes(), embedding_dim), packed.options().dtype(dtype));
  const fp4fx::DType type = dtype_of(dtype);
  const fp4fx::Tier& chosen = tier_of(tier);
  if (y.numel()) chosen.embedding({table.view, data, wide.numel(), type, y.mutable_data_ptr()}, pool());
  return y;
}

// --- the codec -------------------------------------------------------------------------------------------------------

enum class Order { rows, channels, conv, conv_transpose, columns };

Order order_of(std::string_view name) {
  return named<Order, 5>(name, "order", {"rows", "channels", "conv", "conv_transpose", "columns"});
}

// K, the length of the rows that a tensor of this shape becomes; refuses what has none.
int64_t row_length(IntArrayRef shape, Order order, int64_t groups) {
  const size_t rank = order == Order::rows ? 1 : 2;
  TORCH_CHECK(shape.size() >= rank, "fp4fx_cpu: this order needs ", rank, " dimensions or more, found ", shape);
  const bool plain = order == Order::rows || order == Order::columns;
  const int64_t grouped = plain ? 1 : order == Order::channels ? shape[1] : shape[0];
  TORCH_CHECK(groups >= 1 && grouped % groups == 0, "fp4fx_cpu: groups=", groups, " does not fit shape ", shape);
  int64_t k = shape.back();
  if (order == Order::columns) k = shape[shape.size() - 2];
  if (order == Order::channels) k = shape[1] / groups;
  if (order == Order::conv) k = product(shape.slice(1));
  if (order == Order::conv_transpose) k = shape[0] / groups * product(shape.slice(2));
  TORCH_CHECK(k >= 1, "fp4fx_cpu: shape ", shape, " has no values along its reduction axis");
  return k;
}

// Any tensor as rows [..., K]; a view where possible.
Tensor to_rows(const Tensor& x, Order order, int64_t groups, int64_t k) {
  if (order == Order::rows) return x;
  if (order == Order::columns) return x.transpose(-1, -2);
  if (order == Order::channels) return groups == 1 ? x.movedim(1, -1) : x.movedim(1, -1).unflatten(-1, {groups, k});
  if (order == Order::conv) return x.movedim(1, -1).reshape({x.size(0), k});
  return x.unflatten(0, {groups, x.size(0) / groups}).movedim(1, -1).reshape({groups * x.size(1), k});
}

// Contiguous rows as a contiguous tensor of the shape: the inverse.
Tensor from_rows(const Tensor& rows, IntArrayRef shape, Order order, int64_t groups) {
  if (order == Order::rows) return rows.view(shape);
  if (order == Order::columns) {
    Sizes turned(shape.begin(), shape.end());
    std::swap(turned.back(), turned[turned.size() - 2]);
    return rows.view(turned).transpose(-1, -2).contiguous();
  }
  const IntArrayRef spatial = shape.slice(2);
  if (order == Order::conv_transpose) {
    const Sizes grouped = concat(concat({groups, shape[1]}, spatial), shape[0] / groups);
    return rows.view(grouped).movedim(-1, 1).reshape(shape).contiguous();
  }
  return rows.view(concat(concat(shape[0], spatial), shape[1])).movedim(-1, 1).contiguous();
}

Tensor dequantize(const Tensor& packed, const Tensor& scale, const Tensor& global_scale, SymIntArrayRef sizes,
                  ScalarType dtype, std::string_view order, SymInt in_groups, std::string_view /*compute*/,
                  std::string_view tier) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const IntArrayRef shape = ints(sizes);
  const int64_t groups = in_groups.expect_int();
  const Order layout = order_of(order);
  const int64_t k = row_length(shape, layout, groups);
  const Rows rows(packed, scale, global_scale, k, "what is decoded");
  TORCH_CHECK(rows.view.n * k == product(shape), "fp4fx_cpu: ", rows.view.n, " rows of ", k,
              " values do not fill the shape ", shape);
  const Tensor y = at::empty({rows.view.n, k}, packed.options().dtype(dtype));
  const fp4fx::DType type = dtype_of(dtype);
  const fp4fx::Tier& chosen = tier_of(tier);
  if (y.numel()) chosen.dequantize({rows.view, type, y.mutable_data_ptr()}, pool());
  return from_rows(y, shape, layout, groups);
}

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& x, const Maybe& global_scale, std::string_view order,
                                            int64_t groups, std::string_view scale_rule, int64_t block_rows,
                                            const Maybe& weights, std::string_view tier) {
  at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK(x.is_cpu(), "fp4fx_cpu: x must be on the CPU, is on ", x.device());
  TORCH_CHECK_VALUE(block_rows == 1 || block_rows == 16, "fp4fx_cpu: a block has 1 row or 16, found ", block_rows);
  const fp4fx::ScaleRule rule = scale_rule_of(scale_rule);
  TORCH_CHECK_VALUE(rule == fp4fx::ScaleRule::max || block_rows == 1, "fp4fx_cpu: scale_rule='", scale_rule,
                    "' chooses a scale per 16 values; a 16x16 block needs 'max'");
  const Order layout = order_of(order);
  const int64_t k = row_length(x.sizes(), layout, groups), blocks = blocks_of(k);
  Tensor rows = to_rows(x, layout, groups, k);
  const IntArrayRef lead = rows.sizes().slice(0, rows.dim() - 1);
  const Tensor codes = at::empty(concat(lead, 8 * blocks), x.options().dtype(at::kByte));
  const Tensor scales = at::empty(concat(lead, blocks), x.options().dtype(at::kByte));
  // What is returned is memory of its own, and 0 asks for a scale to be found.
  const Tensor used =
      at::scalar_tensor(global_scale ? scalar_of(*global_scale, "global_scale") : 0.0f, x.options().dtype(at::kFloat));
  float* g = used.mutable_data_ptr<float>();
  TORCH_CHECK_VALUE(!global_scale || *g != 0, "fp4fx_cpu: global_scale must be positive, is 0");

  std::optional<int64_t> stride = row_stride(rows);
  if (!stride) {
    rows = rows.contiguous();
    stride = k;
  }
  fp4fx::Quantize whole = {rows.const_data_ptr(),
                           dtype_of(x.scalar_type()),
                           product(lead),
                           k,
                           *stride,
                           rule,
                           static_cast<int>(block_rows),
                           g,
                           codes.mutable_data_ptr<uint8_t>(),
                           scales.mutable_data_ptr<uint8_t>(),
                           nullptr,
                           1};
  Tensor factors;
  if (weights) {
    factors = weights->contiguous();
    const int64_t parts = factors.numel() / (16 * blocks);
    TORCH_CHECK_VALUE(factors.is_cpu() && factors.scalar_type() == at::kFloat && parts > 0 &&
                          factors.numel() == parts * 16 * blocks && whole.n % parts == 0,
                      "fp4fx_cpu: weights must be fp32 blocks [", blocks, ", 16] on the CPU, for all rows or for equal "
                      "parts of ", whole.n, "; found ", weights->scalar_type(), ' ', weights->sizes());
    whole.weights = factors.const_data_ptr<float>();
    whole.weight_rows = std::max<int64_t>(whole.n / parts, 1);
  }
  const fp4fx::Tier& chosen = tier_of(tier);
  const int64_t height = lead.empty() ? 1 : lead.back();
  if (block_rows == 1 || height % 16 == 0 || whole.n <= height) {
    chosen.quantize(whole, pool());
    return {codes, scales, used};
  }
  // Tiles end with their matrix. The scale of all matrices together comes from a first round without tiles.
  if (*g == 0) {
    whole.block_rows = 1;
    chosen.quantize(whole, pool());
  }
  for (int64_t first = 0; first < product(lead); first += height) {
    fp4fx::Quantize matrix = whole;
    matrix.x = static_cast<const char*>(whole.x) + first * *stride * fp4fx::size_of(whole.dtype);
    matrix.n = height;
    matrix.block_rows = 16;
    matrix.codes += first * 8 * blocks;
    matrix.scales += first * blocks;
    chosen.quantize(matrix, pool());
  }
  return {codes, scales, used};
}

Tensor balance(const Tensor& rows, const Tensor& packed, const Tensor& scale, const Tensor& global_scale, int64_t taps,
               std::string_view tier) {
  at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK(rows.is_cpu() && rows.scalar_type() == at::kFloat && rows.dim() == 2 && rows.is_contiguous() &&
                  taps > 0 && rows.size(1) % taps == 0,
              "fp4fx_cpu: expected contiguous fp32 rows [N, taps * C] on the CPU, found ", rows.scalar_type(), " ",
              rows.sizes(), " and taps=", taps);
  const Rows from(packed, scale, global_scale, rows.size(1), "what is balanced");
  TORCH_CHECK(from.view.n == rows.size(0), "fp4fx_cpu: ", from.view.n, " packed rows of ", rows.size(0));
  const Tensor codes = at::empty(packed.sizes(), packed.options());
  const fp4fx::Tier& chosen = tier_of(tier);
  chosen.balance({rows.const_data_ptr<float>(), from.view, taps, codes.mutable_data_ptr<uint8_t>()}, pool());
  return codes;
}

std::vector<std::string> tier_names() {
  std::vector<std::string> names;
  for (const fp4fx::Tier* const* tier = fp4fx::tiers(); *tier; ++tier) names.emplace_back((*tier)->name);
  return names;
}

}  // namespace

// The arguments of fp4fx::<op>, then the tier: '' is the best that this machine can run. With quantize_x, a scale rule,
// linear reads x as what fp4fx::quantize makes of it, by x_global_scale if that is given. The weights of quantize are
// those of nvfp4.quantize_rows.
TORCH_LIBRARY(fp4fx_cpu, m) {
  m.def(
      "linear(Tensor x, Tensor packed, Tensor scale, Tensor global_scale, Tensor? bias, SymInt in_features,"
      " Tensor? x_scale=None, Tensor? x_global_scale=None, ScalarType? dtype=None, Tensor? channel_scale=None,"
      " Tensor? residual=None, str activation='none', str compute='bf16', str quantize_x='',"
      " str tier='') -> Tensor");
  m.def(
      "conv(Tensor x, Tensor packed, Tensor scale, Tensor global_scale, Tensor? bias, SymInt in_channels,"
      " int[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, Tensor? x_scale=None,"
      " Tensor? x_global_scale=None, ScalarType? dtype=None, Tensor? channel_scale=None, Tensor? residual=None,"
      " str activation='none', str compute='bf16', str tier='') -> Tensor");
  m.def(
      "conv_transpose(Tensor x, Tensor packed, Tensor scale, Tensor global_scale, Tensor? bias, SymInt in_channels,"
      " int[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] output_padding, SymInt[] dilation,"
      " SymInt groups, Tensor? x_scale=None, Tensor? x_global_scale=None, ScalarType? dtype=None,"
      " Tensor? channel_scale=None, Tensor? residual=None, str activation='none', str compute='bf16', str tier='') -> Tensor");
  m.def(
      "embedding(Tensor indices, Tensor packed, Tensor scale, Tensor global_scale, SymInt embedding_dim,"
      " ScalarType dtype, str tier='') -> Tensor");
  m.def(
      "dequantize(Tensor packed, Tensor scale, Tensor global_scale, SymInt[] shape, ScalarType dtype, str order='rows',"
      " SymInt groups=1, str compute='bf16', str tier='') -> Tensor");
  m.def(
      "quantize(Tensor x, Tensor? global_scale=None, str order='rows', SymInt groups=1, str scale_rule='max',"
      " int block_rows=1, Tensor? weights=None, str tier='') -> (Tensor packed, Tensor scale, Tensor global_scale)");
  m.def(
      "balance(Tensor rows, Tensor packed, Tensor scale, Tensor global_scale, int taps, str tier='') -> Tensor");
  m.def("tiers() -> str[]", &tier_names);
}

TORCH_LIBRARY_IMPL(fp4fx_cpu, CPU, m) {
  m.impl("linear", &linear);
  m.impl("conv", &conv);
  m.impl("conv_transpose", &conv_transpose);
  m.impl("embedding", &embedding);
  m.impl("dequantize", &dequantize);
  m.impl("quantize", &quantize);
  m.impl("balance", &balance);
}
