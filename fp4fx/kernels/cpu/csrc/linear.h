// Linear layers: which kernel for which number of rows.
#pragma once

#include "amx.h"
#include "gemv.h"

namespace fp4fx {
namespace FP4FX_TIER {

template <class Op>
static void linear_gemm(const Linear& a, const Pool& pool) {
  const Operands<Op> x(rows_of(a), a.m, 1, 1, pool);
  const Tap tap{{0, 0, 0}, 0};
  Gather g = line_of(x.data(), x.row_bytes, a.m, round_up(a.w.k, Op::kValues), 1, tap);
  g.factors = x.factors(), g.rows_per_factor = 1;
  gemm<Op>(g, a.w, columns_of(a), pool);
}

// Rows up to which decoding anew for every four of them, in int8 for every eight, is faster than a panel; with AMX
// assumed, not measured.
constexpr int64_t kGemvRows = kAmx ? 3 : 8, kGemvRowsInt8 = kAmx ? 3 : DotInt8::kBytewise ? 16 : 8;

static void linear(const Linear& a, const Pool& pool) {
  if (a.m == 0 || a.w.n == 0) return;
  const bool few = a.m <= (a.compute == Compute::int8 ? kGemvRowsInt8 : kGemvRows);
  if (a.compute == Compute::fp32) return few ? gemv<DotF32>(a, pool) : linear_gemm<OpF32>(a, pool);
  if (a.compute == Compute::int8) return few ? gemv<DotInt8>(a, pool) : linear_gemm<OpInt8>(a, pool);
  return few ? gemv<DotBf16>(a, pool) : linear_gemm<OpBf16>(a, pool);
}

}  // namespace FP4FX_TIER
}  // namespace fp4fx
