// The operator dist_loss on a CPU: sums over pieces of rows, columns, gradients of rows.
#include "dist.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../dist_arguments.h"
#include "isa.h"
#include "tensors.h"

namespace fastscarce::cpu {
namespace {

DistKernels kernels(bool float64) {
#if defined(__x86_64__)
  if (!float64) switch (isa()) {
      case Isa::avx512:
        return avx512::dist_kernels(false);
      case Isa::avx2:
        return avx2::dist_kernels(false);
      case Isa::emulated:
        return emulated::dist_kernels(false);
      default:
        break;
    }
#endif
  return scalar::dist_kernels(float64);
}

// Scratch of a call, from torch's allocator and not set to zero.
Tensor scratch(const Tensor& student, int64_t rows, int64_t columns, ScalarType dtype) {
  Tensor out = empty_of(student, rows, columns, dtype);
  ask_for_huge_pages(out.mutable_data_ptr(), rows * columns * int64_t(out.element_size()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> dist_loss(Tensor student, Tensor teacher, double temperature,
                                             double inter, double intra, bool with_gradient) {
  check_dist_arguments(student, teacher, temperature);
  DistCall call;
  call.rows = student.size(0);
  call.classes = student.size(1);
  call.piece = dist_piece(call.rows);
  call.width = (call.classes + 15) / 16 * 16;
  call.student = matrix_of(student, "dist_loss");
  call.teacher = matrix_of(teacher, "dist_loss");
  call.temperature = temperature;
  const bool float64 = call.student.dtype == Dtype::float64;
  const bool float16 = call.student.dtype != Dtype::float32 && !float64;
  const DistFactors factors =
      dist_factors(call.rows, call.classes, temperature, inter, intra, float16);
  call.row_gradient = factors.row_gradient;
  call.column_gradient = factors.column_gradient;

  const ScalarType dtype = float64 ? ScalarType::Double : ScalarType::Float;
  Tensor gradient = empty_of(student, with_gradient ? call.rows : 0, call.classes);
  Tensor kept = scratch(student, 6, call.kept_rows(), dtype);
  Tensor partial = scratch(student, 5 * call.pieces(), call.width, dtype);
  Tensor slopes = scratch(student, 4, call.width, dtype);
  std::vector<double> row_losses(size_t(call.pieces())), column_losses(size_t(call.tiles()));
  call.kept = kept.mutable_data_ptr();
  call.partial = partial.mutable_data_ptr();
  call.slopes = slopes.mutable_data_ptr();
  call.row_losses = row_losses.data();
  call.column_losses = column_losses.data();

  double sum = 0;
  if (call.rows > 0) {
    const DistKernels run = kernels(float64);
    const int64_t piece = call.piece * call.classes;
    torch::stable::parallel_for(0, call.pieces(), std::max<int64_t>(1, kLogitsPerThread / piece),
                                [&](int64_t begin, int64_t end) { run.sums(call, begin, end); });
    const int64_t tile = kDistTile * call.pieces();
    torch::stable::parallel_for(0, call.tiles(), std::max<int64_t>(1, kLogitsPerThread / tile),
                                [&](int64_t begin, int64_t end) { run.columns(call, begin, end); });
    if (with_gradient) {
      call.gradient = gradient.mutable_data_ptr();
      const int64_t bytes = call.rows * call.classes * int64_t(gradient.element_size());
      call.stream = bytes >= kStreamBytes;
      ask_for_huge_pages(call.gradient, bytes);
      // Blocks of 16 rows keep the lanes of every thread but the last full.
      constexpr int64_t block = 16;
      const int64_t grain = std::max<int64_t>(1, kLogitsPerThread / (block * call.classes));
      torch::stable::parallel_for(
          0, (call.rows + block - 1) / block, grain, [&](int64_t begin, int64_t end) {
            run.gradients(call, begin * block, std::min(call.rows, end * block));
          });
    }
    double rows = 0, columns = 0;
    for (const double loss : row_losses) rows += loss;
    for (const double loss : column_losses) columns += loss;
    // A term of weight 0 is left out: 0 times NaN would be NaN.
    sum = (inter != 0 ? factors.row_loss * rows : 0) +
          (intra != 0 ? factors.column_loss * columns : 0);
  }
  Tensor loss = empty_of(student, -1, -1, dtype), factor = empty_of(student, -1, -1, dtype);
  write_scalar(loss, float64, sum);
  write_scalar(factor, float64, factors.factor);
  return {loss, gradient, factor};
}

}  // namespace
}  // namespace fastscarce::cpu

STABLE_TORCH_LIBRARY_IMPL(fastscarce, CPU, m) {
  m.impl("dist_loss", TORCH_BOX(&fastscarce::cpu::dist_loss));
}
