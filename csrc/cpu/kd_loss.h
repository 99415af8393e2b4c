// Distillation loss and its gradient on a CPU: what a call is, and the kernels that carry it out.
//
// student, teacher, soft: (rows, classes), each of its own dtype and row stride; gradient: (rows,
// classes), contiguous, of the student's dtype. Index labels: target, partner int64 (rows,), share
// float32 (rows,): the weight of target; partner has the rest.
#pragma once

#include <cstdint>

#include "../math/divergence_names.h"

namespace fastscarce::cpu {

enum class Dtype : int32_t { none, float32, float64, bfloat16, float16 };

struct Matrix {
  const void* data = nullptr;
  int64_t row_stride = 0;  // in elements
  Dtype dtype = Dtype::none;
};

// A teacher's k largest classes; csrc/math/topk_teacher.h.
struct TopKTeacher {
  int64_t k = 0;
  const int32_t* indices = nullptr;  // (rows, k)
  Matrix log_probs;                  // (rows, k)
  Matrix log_tail;                   // (rows, 1)
};

struct KdCall {
  int64_t rows = 0, classes = 0;
  Matrix student, teacher, soft;
  TopKTeacher named[2];  // instead of `teacher`
  int64_t named_count = 0;
  const float* mix = nullptr;  // (rows,): weight of the first of two; the second has the rest
  int tail_policy = kTailUniform;
  const int64_t* target = nullptr;
  const int64_t* partner = nullptr;
  const float* share = nullptr;
  const float* weight = nullptr;
  const float* class_weight = nullptr;  // (classes,): multiplies index labels
  int64_t ignore_index = -100;
  double temperature = 1, label_smoothing = 0;
  double threshold = 0;  // rows whose teacher is less confident have no distillation term
  int64_t divergence = kKl;
  double first = 0, second = 0;  // beta of JSD, lambda of skew KL; alpha and beta of DKD
  // Factors of each row's terms, before the row's weight; 0 leaves a term out.
  double kd_loss = 0, ce_loss = 0, kd_gradient = 0, ce_gradient = 0;
  void* gradient = nullptr;  // none wanted: null
  void* losses = nullptr;    // (rows,): float64 where the student is, float32 otherwise
  bool stream = false;       // write the gradient past the caches
};

// Sums over rows that the means divide by.
struct KdTotals {
  double weight = 0;  // of all rows
  double label = 0;   // of labelled rows, times the valid share of each

  KdTotals operator+(const KdTotals& other) const {
    return {weight + other.weight, label + other.label};
  }
};

struct KdKernels {
  KdTotals (*totals)(const KdCall&, int64_t begin, int64_t end);
  void (*rows)(const KdCall&, int64_t begin, int64_t end);
  // A few wide rows: `parts` equal parts of each, parts of a row on different threads. `workspace`
  // holds workspace_bytes. First maxima of (row, part) items, then statistics, then gradients of
  // the same items.
  int64_t (*workspace_bytes)(const KdCall&);
  void (*part_maxima)(const KdCall&, int64_t parts, void* workspace, int64_t begin, int64_t end);
  void (*part_statistics)(const KdCall&, int64_t parts, void* workspace, int64_t begin,
                          int64_t end);
  void (*part_gradients)(const KdCall&, int64_t parts, void* workspace, int64_t begin, int64_t end);
  // out = gradient * factor, elementwise (row_factor: one per row), of the gradient's dtype.
  void (*scale)(Dtype dtype, const void* gradient, void* out, int64_t classes, double factor,
                const void* row_factor, int64_t begin, int64_t end);
  // As `rows`, for every divergence but KL(p || q).
  void (*divergences)(const KdCall&, int64_t begin, int64_t end);
  // As `rows`, for TopK teachers.
  void (*topk)(const KdCall&, int64_t begin, int64_t end);
};

// Kernels of an instruction set for a student dtype.
namespace scalar {
KdKernels kd_kernels(bool float64);
}
#if defined(__x86_64__)
namespace avx2 {
KdKernels kd_kernels(bool float64);
}
namespace avx512 {
KdKernels kd_kernels(bool float64);
}
namespace emulated {
KdKernels kd_kernels(bool float64);
}
#endif

}  // namespace fastscarce::cpu
