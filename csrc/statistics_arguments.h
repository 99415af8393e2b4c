// The statistics of rows that kd_loss gives on request: where they go, as both back ends take it.
//
// student_label, teacher_label: int64; confidence, entropy: float64 where the teacher is, float32
// otherwise; agreement: bool; each (rows,). Without a teacher there is student_label alone.
#pragma once

#include <optional>
#include <tuple>

#include "selection_arguments.h"

namespace fastscarce {

struct StatisticsTensors {
  std::optional<Tensor> student_label, teacher_label, confidence, entropy, agreement;

  bool asked() const { return student_label.has_value(); }
};

// What the statistics of a teacher are made of: its logits, or the records of one or two.
struct StatisticsTeacher {
  const std::optional<Tensor>&logits, &log_probs, &second_log_probs;

  bool given() const { return logits.has_value() || log_probs.has_value(); }
  ScalarType dtype() const {
    for (const std::optional<Tensor>* part : {&logits, &log_probs, &second_log_probs})
      if (*part && (*part)->scalar_type() == ScalarType::Double) return ScalarType::Double;
    return ScalarType::Float;
  }
};

inline void check_statistics(const Tensor& student, const StatisticsTeacher& teacher,
                             const StatisticsTensors& to) {
  const auto is_column = [&](const std::optional<Tensor>& t, ScalarType dtype, bool wanted) {
    if (!wanted || !t) return wanted == t.has_value();
    return t->dim() == 1 && t->size(0) == student.size(0) && t->is_contiguous() &&
           t->scalar_type() == dtype && t->is_cuda() == student.is_cuda();
  };
  const bool all = to.asked() && teacher.given();
  check(is_column(to.student_label, ScalarType::Long, to.asked()) &&
            is_column(to.teacher_label, ScalarType::Long, all) &&
            is_column(to.confidence, teacher.dtype(), all) &&
            is_column(to.entropy, teacher.dtype(), all) &&
            is_column(to.agreement, ScalarType::Bool, all),
        "kd_loss", "all of a row's statistics (rows,), or none");
}

// The records of one teacher, or of two that `mix` weighs.
struct RecordTensors {
  const std::optional<Tensor>&indices, &log_probs, &log_tail;
  const std::optional<Tensor>&second_indices, &second_log_probs, &second_log_tail, &mix;
};

inline void check_statistics_arguments(const Tensor& student, const std::optional<Tensor>& teacher,
                                       const RecordTensors& records, int64_t tail_policy) {
  check_kd_arguments(student, teacher, {}, {}, {}, {}, {}, kKl);
  const bool named = records.indices.has_value();
  check(records.log_probs.has_value() == named && records.log_tail.has_value() == named &&
            (named || !records.mix) && !(named && teacher),
        "kd_statistics", "logits of a teacher, all of its records, or neither");
  if (named) check_topk_teacher(student, *records.indices, *records.log_probs, *records.log_tail);
  check_topk_mixture(student, records.second_indices, records.second_log_probs,
                     records.second_log_tail, records.mix, tail_policy);
}

inline StatisticsTensors empty_statistics(const Tensor& student, const StatisticsTeacher& teacher) {
  const int64_t rows = student.size(0);
  StatisticsTensors to;
  to.student_label = empty_of(student, rows, -1, ScalarType::Long);
  if (!teacher.given()) return to;
  to.teacher_label = empty_of(student, rows, -1, ScalarType::Long);
  to.confidence = empty_of(student, rows, -1, teacher.dtype());
  to.entropy = empty_of(student, rows, -1, teacher.dtype());
  to.agreement = empty_of(student, rows, -1, ScalarType::Bool);
  return to;
}

using StatisticsResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// What a functional operator returns: empty columns for what there is not.
inline StatisticsResult statistics_result(const Tensor& student, const StatisticsTensors& to) {
  const auto column = [&](const std::optional<Tensor>& t, ScalarType dtype) {
    return t ? *t : empty_of(student, 0, -1, dtype);
  };
  return {*to.student_label, column(to.teacher_label, ScalarType::Long),
          column(to.confidence, ScalarType::Float), column(to.entropy, ScalarType::Float),
          column(to.agreement, ScalarType::Bool)};
}

}  // namespace fastscarce
