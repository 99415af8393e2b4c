// The largest logits of a row and how sure they are, on a CPU: calls and the kernels that carry
// them out. A: float64 where the logits are, float32 otherwise.
#pragma once

#include <cstdint>

#include "kd_loss.h"

namespace fastscarce::cpu {

struct TopKCall {
  int64_t classes = 0, k = 0;
  Matrix logits;
  int32_t* indices = nullptr;  // (rows, k), by falling logit; equal logits by index
  void* log_probs = nullptr;   // A (rows, k)
  void* log_tail = nullptr;    // A (rows,): log of the mean probability of the other classes
};

struct ConfidenceCall {
  int64_t classes = 0, no_answer = -100;
  Matrix logits;
  double threshold = 0, temperature = 1;
  int64_t* label = nullptr;  // (rows,), like all that follow
  void* confidence = nullptr;
  void* margin = nullptr;
  void* entropy = nullptr;
  bool* mask = nullptr;
};

// Where the statistics of a distillation loss's rows go, each (rows,); csrc/math/statistics.h.
struct StatisticsCall {
  int64_t* student_label = nullptr;
  int64_t* teacher_label = nullptr;  // null, as what follows: no teacher
  void* confidence = nullptr;
  void* entropy = nullptr;
  bool* agreement = nullptr;
};

struct SelectionKernels {
  void (*topk)(const TopKCall&, int64_t begin, int64_t end);
  void (*confidence)(const ConfidenceCall&, int64_t begin, int64_t end);
  // As `confidence`, without margin and mask.
  void (*sureness)(const ConfidenceCall&, int64_t begin, int64_t end);
  // The label that `confidence` gives, alone.
  void (*argmax)(const Matrix& logits, int64_t classes, int64_t no_answer, int64_t* label,
                 int64_t begin, int64_t end);
  // Label, confidence and entropy of TopK teachers.
  void (*records)(const KdCall&, const StatisticsCall&, int64_t no_answer, int64_t begin,
                  int64_t end);
};

// Those of the instruction set in use, for logits of a dtype.
SelectionKernels selection_kernels(Dtype dtype);

namespace scalar {
SelectionKernels selection_kernels(bool float64);
}
#if defined(__x86_64__)
namespace avx2 {
SelectionKernels selection_kernels(bool float64);
}
namespace avx512 {
SelectionKernels selection_kernels(bool float64);
}
namespace emulated {
SelectionKernels selection_kernels(bool float64);
}
#endif

}  // namespace fastscarce::cpu
