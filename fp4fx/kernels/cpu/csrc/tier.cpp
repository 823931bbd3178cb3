// One instruction set: compiled once for each, with its flags and -DFP4FX_TIER=<name>.
#if defined(__AMX_BF16__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "balance.h"
#include "conv.h"
#include "dequantize.h"
#include "linear.h"
#include "quantize.h"

namespace fp4fx {
namespace FP4FX_TIER {

#if defined(__AMX_BF16__)
// The processor has the tiles, the operating system saves them, and lets this process use them.
static bool amx_permitted() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & 1u << 22) || !(d & 1u << 24)) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & 1u << 27)) return false;  // xgetbv
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & 0x60000) != 0x60000) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

static bool supported() {
#if defined(__AMX_BF16__)
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") && amx_permitted();
#elif defined(__AVX512BF16__)
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512vbmi");
#elif defined(__AVX512BW__)
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return true;
#endif
}

}  // namespace FP4FX_TIER

#define FP4FX_JOIN_(a, b) a##b
#define FP4FX_JOIN(a, b) FP4FX_JOIN_(a, b)
#define FP4FX_TEXT_(a) #a
#define FP4FX_TEXT(a) FP4FX_TEXT_(a)

extern const Tier FP4FX_JOIN(tier_, FP4FX_TIER);
const Tier FP4FX_JOIN(tier_, FP4FX_TIER) = {
    FP4FX_TEXT(FP4FX_TIER),
    FP4FX_TIER::supported,
    FP4FX_TIER::linear,
    FP4FX_TIER::conv,
    FP4FX_TIER::embedding,
    FP4FX_TIER::dequantize,
    FP4FX_TIER::quantize,
    FP4FX_TIER::balance,
};

}  // namespace fp4fx
