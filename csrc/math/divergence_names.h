// The divergences that kd_loss knows (math/divergence.h says what each is), and what a TopK teacher
// says of the classes it does not name (math/topk_teacher.h).
#pragma once

namespace fastscarce {

constexpr int kKl = 0;
constexpr int kReverseKl = 1;
constexpr int kJsd = 2;
constexpr int kSkewKl = 3;
constexpr int kDkd = 4;
constexpr int kLogitStandard = 5;

constexpr int kTailUniform = 0;
constexpr int kTailRenorm = 1;
constexpr int kTailBucket = 2;
constexpr int kTailSupport = 3;

}  // namespace fastscarce
