// What both back ends of topk and confidence do with their arguments before any kernel runs.
#pragma once

#include "kd_arguments.h"

namespace fastscarce {

// The label of a row without an answer: NaN logits, or none finite. The losses ignore it.
constexpr int64_t kNoAnswer = -100;

inline void check_logits(const Tensor& logits, const char* operation) {
  check(logits.dim() == 2 && logits.size(1) > 0, operation, "(rows, classes) logits");
  check(logits.size(1) == 1 || logits.stride(1) == 1, operation, "logits whose rows have no gaps");
  check(logits.size(1) <= INT32_MAX, operation, "fewer than 2**31 classes");
}

inline void check_topk_arguments(const Tensor& logits, int64_t k) {
  check_logits(logits, "topk");
  check(k >= 1 && k <= logits.size(1), "topk", "k in 1 to classes");
}

inline void check_pack_arguments(const Tensor& logits, int64_t k,
                                 const std::optional<Tensor>& tags) {
  check_logits(logits, "pack_topk");
  check(k >= 1 && k <= logits.size(1), "pack_topk", "k in 1 to classes");
  check(!tags || (tags->dim() == 1 && tags->size(0) == logits.size(0) && tags->is_contiguous() &&
                  tags->scalar_type() == ScalarType::Long && tags->is_cuda() == logits.is_cuda()),
        "pack_topk", "contiguous int64 tags (rows,) on the logits' device");
}

inline void check_unpack_arguments(const Tensor& records, int64_t classes, int64_t k,
                                   int64_t stride) {
  check(k >= 1 && k <= classes && classes <= INT32_MAX, "unpack_topk", "k in 1 to classes");
  check(records.dim() == 2 && records.scalar_type() == ScalarType::Byte &&
            records.is_contiguous() && records.size(1) == stride,
        "unpack_topk", "contiguous uint8 records (rows, stride) of this layout");
}

inline void check_confidence_arguments(const Tensor& logits, double temperature) {
  check_logits(logits, "confidence");
  check(temperature > 0, "confidence", "a positive temperature");
}

}  // namespace fastscarce
