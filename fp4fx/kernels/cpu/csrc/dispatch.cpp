// Which tiers were built, and which of them this machine can run.
#include "api.h"

// FP4FX_TIERS(X) is X(name) for every tier that was built, best first.
namespace fp4fx {

#define FP4FX_DECLARE(name) extern const Tier tier_##name;
FP4FX_TIERS(FP4FX_DECLARE)

namespace {

#define FP4FX_COUNT(name) +1
constexpr int kBuilt = 0 FP4FX_TIERS(FP4FX_COUNT);

struct Runnable {
  const Tier* list[kBuilt + 1] = {};

  Runnable() {
#define FP4FX_ADDRESS(name) &tier_##name,
    const Tier* const built[] = {FP4FX_TIERS(FP4FX_ADDRESS)};
    int count = 0;
    for (const Tier* tier : built) {
      if (tier->supported()) list[count++] = tier;
    }
  }
};

}  // namespace

const Tier* const* tiers() {
  static const Runnable runnable;  // supported() may ask the kernel for a permission: once
  return runnable.list;
}

}  // namespace fp4fx
