// Augmentation: one number at a time. Every machine has it.
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "augment.h"

// math/augment.h: no device here, and a call in a loop over pixels would keep it from vectors.
#define FS_HD __attribute__((always_inline))
#define FS_VECTORS 0
#define FS_WIDE 0

namespace fastscarce::cpu::augment_scalar {

// clang-format off: each needs those before it
#include "../math/augment.h"
#include "augment_pixels.inl"
#include "augment_warp.inl"
#include "augment.inl"
// clang-format on

}  // namespace fastscarce::cpu::augment_scalar
