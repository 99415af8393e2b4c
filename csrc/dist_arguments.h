// What both back ends of dist_loss do with their arguments before any kernel runs.
#pragma once

#include <algorithm>

#include "kd_arguments.h"

namespace fastscarce {

struct DistFactors {
  double row_loss, column_loss;          // of the sums over rows and columns
  double row_gradient, column_gradient;  // of d rho / dq
  double factor;                         // of the stored gradient, in the backward pass
};

// As in kd_factors.h, 16-bit gradients are stored without the 1 / rows.
inline DistFactors dist_factors(int64_t rows, int64_t classes, double temperature, double inter,
                                double intra, bool float16) {
  const double large = float16 && rows > 0 ? double(rows) : 1;
  const double row = rows > 0 ? inter / double(rows) : 0;
  const double column = rows > 0 ? intra / double(classes) : 0;
  return {row, column, -row * large / temperature, -column * large / temperature, 1 / large};
}

// Rows that a column is summed over in one go. A function of the shape alone, so that the sums are
// the same for any number of threads; partial sums (five a piece and column) stay below a sixth of
// the logits, and a sum in float32 has 256 terms at most. Whole blocks of 16 lanes.
inline int64_t dist_piece(int64_t rows) {
  return std::clamp<int64_t>((rows / 64 + 15) / 16 * 16, 32, 256);
}

inline void check_dist_arguments(const Tensor& student, const Tensor& teacher, double temperature) {
  check(student.dim() == 2 && student.size(1) > 0, "dist_loss", "(rows, classes) student logits");
  const auto is_matrix = [&](const Tensor& t) {
    return t.dim() == 2 && t.size(0) == student.size(0) && t.size(1) == student.size(1) &&
           (t.size(1) == 1 || t.stride(1) == 1) && t.is_cuda() == student.is_cuda();
  };
  check(is_matrix(student), "dist_loss", "student rows without gaps");
  check(is_matrix(teacher), "dist_loss", "teacher logits of the student's shape");
  check(temperature > 0, "dist_loss", "a positive temperature");
}

}  // namespace fastscarce
