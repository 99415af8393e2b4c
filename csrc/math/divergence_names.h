// The divergences that kd_loss knows; math/divergence.h says what each is.
#pragma once

namespace fastscarce {

constexpr int kKl = 0;
constexpr int kReverseKl = 1;
constexpr int kJsd = 2;
constexpr int kSkewKl = 3;
constexpr int kDkd = 4;
constexpr int kLogitStandard = 5;

}  // namespace fastscarce
