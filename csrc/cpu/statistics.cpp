// Statistics of rows on a CPU, and the operator kd_statistics, which makes them alone.
#include "statistics.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "tensors.h"

namespace fastscarce::cpu {

RowStatistics::RowStatistics(const KdCall& call, const StatisticsTeacher& teacher,
                             const StatisticsTensors& tensors)
    : call_(call) {
  const bool wide = teacher.dtype() == ScalarType::Double;
  student_ = selection_kernels(call.student.dtype);
  teacher_ = selection_kernels(wide ? Dtype::float64 : Dtype::float32);
  to_.student_label = static_cast<int64_t*>(tensors.student_label->mutable_data_ptr());
  if (!teacher.given()) return;
  to_.teacher_label = static_cast<int64_t*>(tensors.teacher_label->mutable_data_ptr());
  to_.confidence = tensors.confidence->mutable_data_ptr();
  to_.entropy = tensors.entropy->mutable_data_ptr();
  to_.agreement = static_cast<bool*>(tensors.agreement->mutable_data_ptr());
}

void RowStatistics::rows(int64_t begin, int64_t end) const {
  student_.argmax(call_.student, call_.classes, kNoAnswer, to_.student_label, begin, end);
  if (!to_.teacher_label) return;
  if (call_.named_count != 0) {
    teacher_.records(call_, to_, kNoAnswer, begin, end);
  } else {
    ConfidenceCall confidence;
    confidence.classes = call_.classes;
    confidence.no_answer = kNoAnswer;
    confidence.logits = call_.teacher;
    confidence.temperature = call_.temperature;
    confidence.label = to_.teacher_label;
    confidence.confidence = to_.confidence;
    confidence.entropy = to_.entropy;
    teacher_.sureness(confidence, begin, end);
  }
  for (int64_t row = begin; row < end; ++row)
    to_.agreement[row] = to_.student_label[row] == to_.teacher_label[row];
}

int64_t RowStatistics::rows_a_block() const {
  constexpr int64_t bytes = int64_t(256) << 10;
  const auto size = [](Dtype dtype) {
    return dtype == Dtype::none ? 0 : dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
  };
  const int64_t row = call_.classes * (size(call_.student.dtype) + size(call_.teacher.dtype));
  const int64_t fit = bytes / row;
  return fit >= 16 ? fit / 16 * 16 : std::max<int64_t>(fit, 1);
}

namespace {

StatisticsResult kd_statistics(Tensor student, std::optional<Tensor> teacher,
                               std::optional<Tensor> indices, std::optional<Tensor> log_probs,
                               std::optional<Tensor> log_tail, std::optional<Tensor> second_indices,
                               std::optional<Tensor> second_log_probs,
                               std::optional<Tensor> second_log_tail, std::optional<Tensor> mix,
                               int64_t tail_policy, double temperature) {
  check_statistics_arguments(
      student, teacher,
      {indices, log_probs, log_tail, second_indices, second_log_probs, second_log_tail, mix},
      tail_policy);
  KdCall call;
  call.rows = student.size(0);
  call.classes = student.size(1);
  call.student = matrix_of(student, "kd_statistics");
  call.temperature = temperature;
  call.tail_policy = int(tail_policy);
  if (teacher) call.teacher = matrix_of(*teacher, "kd_statistics");
  if (indices) {
    call.named[0] = topk_of(*indices, *log_probs, *log_tail);
    call.named_count = 1;
  }
  if (mix) {
    call.named[1] = topk_of(*second_indices, *second_log_probs, *second_log_tail);
    call.named_count = 2;
    call.mix = static_cast<const float*>(mix->const_data_ptr());
  }
  const StatisticsTeacher of = {teacher, log_probs, second_log_probs};
  const StatisticsTensors made = empty_statistics(student, of);
  const RowStatistics statistics(call, of, made);
  const int64_t grain = std::max<int64_t>(1, kLogitsPerThread / call.classes);
  if (call.rows > 0)
    torch::stable::parallel_for(0, call.rows, grain,
                                [&](int64_t begin, int64_t end) { statistics.rows(begin, end); });
  return statistics_result(student, made);
}

}  // namespace
}  // namespace fastscarce::cpu

STABLE_TORCH_LIBRARY_IMPL(fastscarce, CPU, m) {
  m.impl("kd_statistics", TORCH_BOX(&fastscarce::cpu::kd_statistics));
}
