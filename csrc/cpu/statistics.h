// Statistics of the rows of a distillation loss on a CPU, for a thread to make of a block of rows
// that its loss then finds in a cache.
#pragma once

#include <cstdint>

#include "../statistics_arguments.h"
#include "kd_loss.h"
#include "selection.h"

namespace fastscarce::cpu {

// Where the statistics of `tensors` go, with the kernels that make them: the student's by its
// dtype, the teacher's by its own.
class RowStatistics {
 public:
  RowStatistics(const KdCall& call, const StatisticsTeacher& teacher,
                const StatisticsTensors& tensors);

  void rows(int64_t begin, int64_t end) const;
  // Rows whose logits fit a part of the L2 cache; a multiple of 16, which one-row-a-lane kernels
  // take at a time, where it is more.
  int64_t rows_a_block() const;

 private:
  const KdCall& call_;
  StatisticsCall to_;
  SelectionKernels student_, teacher_;
};

}  // namespace fastscarce::cpu
