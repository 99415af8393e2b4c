// Distillation loss: one number at a time. Every machine has it; float64 always runs here.
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "dist.h"
#include "kd_loss.h"
#include "selection.h"

// kd_row.h: no device here, and a call in a loop over classes would empty its registers.
#define FS_HD __attribute__((always_inline))

namespace fastscarce::cpu::scalar {

// clang-format off: each needs those before it
#include "../math/kd_row.h"
#include "../math/divergence.h"
#include "../math/selection.h"
#include "../math/topk_teacher.h"
#include "../math/statistics.h"
#include "../math/dist.h"
#include "vec_scalar.inl"
#include "convert.inl"
#include "kd_label.inl"
#include "kd_scale.inl"
#include "pending.inl"
#include "kd_loss.inl"
#include "kd_parts.inl"
#include "divergence.inl"
#include "kd_topk.inl"
#include "statistics.inl"
#include "selection.inl"
#include "dist.inl"
// clang-format on

KdKernels kd_kernels(bool float64) {
  return float64 ? Kd<Lane<double>, LaneExponential<double>>::kernels()
                 : Kd<Lane<float>, LaneExponential<float>>::kernels();
}

SelectionKernels selection_kernels(bool float64) {
  return float64 ? Selection<Lane<double>, LaneExponential<double>>::kernels()
                 : Selection<Lane<float>, LaneExponential<float>>::kernels();
}

DistKernels dist_kernels(bool float64) {
  return float64 ? Dist<Lane<double>, LaneExponential<double>>::kernels()
                 : Dist<Lane<float>, LaneExponential<float>>::kernels();
}

}  // namespace fastscarce::cpu::scalar
