// Statistics of the rows of a distillation loss on a GPU: kernel and launcher are in statistics.cu.
#pragma once

#include <optional>

#include "../statistics_arguments.h"
#include "tensors.cuh"

namespace fastscarce::cuda {

// Launched on the student's stream. Before a loss that may write over the teacher's logits.
void launch_statistics(const Tensor& student, const std::optional<Tensor>& teacher,
                       const RecordTensors& records, int64_t tail_policy, double temperature,
                       const StatisticsTensors& to);

}  // namespace fastscarce::cuda
