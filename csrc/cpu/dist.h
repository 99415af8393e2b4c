// DIST and its gradient on a CPU: what a call is, and the kernels that carry it out. A is float, or
// double where the student is.
#pragma once

#include <cstdint>

#include "kd_loss.h"

namespace fastscarce::cpu {

constexpr int64_t kDistTile = 64;  // columns that one step of `columns` finishes

struct DistCall {
  int64_t rows = 0, classes = 0;
  int64_t piece = 0;  // rows that a column is summed over in one go
  int64_t width = 0;  // classes, rounded up to whole vectors
  Matrix student, teacher;
  double temperature = 1;
  double row_gradient = 0, column_gradient = 0;  // factors of d rho / dq
  void* kept = nullptr;                          // A (6, rows rounded up): math/dist.h, DistRow
  void* partial = nullptr;                       // A (pieces, 5, width): DistSums
  void* slopes = nullptr;                        // A (4, width): DistSlope of each column
  double* row_losses = nullptr;                  // (pieces,): sums of 1 - rho
  double* column_losses = nullptr;               // (tiles,)
  void* gradient = nullptr;                      // none wanted: null
  bool stream = false;                           // write the gradient past the caches

  int64_t pieces() const { return (rows + piece - 1) / piece; }
  int64_t tiles() const { return (classes + kDistTile - 1) / kDistTile; }
  int64_t kept_rows() const { return (rows + 15) / 16 * 16; }
};

// In this order, each on any threads: pieces of rows, tiles of columns, rows.
struct DistKernels {
  void (*sums)(const DistCall&, int64_t begin, int64_t end);
  void (*columns)(const DistCall&, int64_t begin, int64_t end);
  void (*gradients)(const DistCall&, int64_t begin, int64_t end);
};

namespace scalar {
DistKernels dist_kernels(bool float64);
}
#if defined(__x86_64__)
namespace avx2 {
DistKernels dist_kernels(bool float64);
}
namespace avx512 {
DistKernels dist_kernels(bool float64);
}
namespace emulated {
DistKernels dist_kernels(bool float64);
}
#endif

}  // namespace fastscarce::cpu
