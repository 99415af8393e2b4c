// What the two terms of a distillation loss are multiplied by, from the sums over rows.
//
// Distillation and label term are weighted means with a denominator each: the weights of all rows,
// and those of labelled rows (times the valid share of a mixed label). A term whose denominator is
// 0 is 0. 16-bit gradients are stored `1 / factor` times too large, so that a mean over many rows
// does not round them to zero; the backward pass multiplies by `factor` and the upstream gradient
// at once.
#pragma once

#include <cstdint>

#ifndef FS_HD
#ifdef __CUDACC__
#define FS_HD __host__ __device__
#else
#define FS_HD
#endif
#endif

namespace fastscarce {

constexpr int64_t kReductionNone = 0;
constexpr int64_t kReductionSum = 1;
constexpr int64_t kReductionMean = 2;

struct KdFactors {
  double kd_loss, ce_loss, kd_gradient, ce_gradient, factor;
};

// distillation, label: the weights of the two terms.
FS_HD inline KdFactors kd_factors(bool teacher, bool target, double temperature,
                                  double distillation, double label, int64_t reduction,
                                  bool float16, double weights, double labels) {
  const bool mean = reduction == kReductionMean;
  const double kd = !teacher ? 0 : !mean ? distillation : weights != 0 ? distillation / weights : 0;
  const double ce = !target ? 0 : !mean ? label : labels != 0 ? label / labels : 0;
  double large = 1;
  if (mean && float16) large = kd != 0 ? weights : ce != 0 ? labels : 1;
  return {kd * temperature * temperature, ce, kd * temperature * large, ce * large, 1 / large};
}

}  // namespace fastscarce
