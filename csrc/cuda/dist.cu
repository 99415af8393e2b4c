// DIST and its gradient on a GPU. Shapes and terms: csrc/math/dist.h.
//
// Five kernels, because the slope of a column wants every row of it: statistics and 1 - rho of the
// rows (a block a row); sums over pieces of the columns (a block a piece of 32 columns, whose
// threads share the rows); the columns, from their pieces in order; the gradient (a block a row);
// the loss. Exponentials are made again where they are wanted, so that nothing of the size of the
// logits is written but the gradient. Every sum has a fixed order: no atomics, no host
// synchronisation, bitwise repeatable, and capturable in a graph.
#include <math.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "device.cuh"
#define FS_HD __host__ __device__
#include "../dist_arguments.h"
#include "tensors.cuh"

namespace fastscarce::cuda {
namespace {

// clang-format off: each needs those before it
#include "../math/kd_row.h"
#include "../math/dist.h"
#include "block.cuh"
// clang-format on

constexpr int kColumns = 32;                    // of a block that sums columns
constexpr int kTogether = kThreads / kColumns;  // rows that it sums at a time
constexpr int64_t kMostRowBlocks = int64_t(1) << 20;
constexpr int64_t kMostPieces = 65535;  // blocks in the second dimension of a grid

template <class A>
struct Call {
  int64_t rows, classes, piece, pieces;
  Matrix student, teacher;
  A rate;  // 1 / T
  DistFactors factors;
  bool inter, intra;
  DistRow<A>* kept;       // (rows,)
  DistSums<A>* partial;   // (pieces, classes)
  DistSlope<A>* slopes;   // (classes,)
  double* row_losses;     // (rows,): 1 - rho
  double* column_losses;  // (classes,)
  void* gradient;
};

// Rounded here, not joined with a subtraction that follows: the same number wherever it is made.
__device__ inline float probability(float e, float inverse) { return __fmul_rn(e, inverse); }
__device__ inline double probability(double e, double inverse) { return __dmul_rn(e, inverse); }

template <class A>
__device__ inline A probability_at(const Matrix& matrix, int64_t row, int64_t i, A top, A inverse,
                                   A rate) {
  return probability(exponential((element<A>(matrix, row, i) - top) * rate), inverse);
}

template <class A>
__global__ void __launch_bounds__(kThreads) dist_rows_kernel(const Call<A> call) {
  for (int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
    A student_max = A(-INFINITY), teacher_max = A(-INFINITY);
    for (int64_t i = threadIdx.x; i < call.classes; i += kThreads) {
      student_max = maximum(student_max, element<A>(call.student, row, i));
      teacher_max = maximum(teacher_max, element<A>(call.teacher, row, i));
    }
    student_max = maximum_over_block(student_max);
    teacher_max = maximum_over_block(teacher_max);
    if (student_max == A(-INFINITY)) student_max = A(0);
    if (teacher_max == A(-INFINITY)) teacher_max = A(0);
    A student_sum = A(0), teacher_sum = A(0);
    for (int64_t i = threadIdx.x; i < call.classes; i += kThreads) {
      student_sum += exponential((element<A>(call.student, row, i) - student_max) * call.rate);
      teacher_sum += exponential((element<A>(call.teacher, row, i) - teacher_max) * call.rate);
    }
    student_sum = sum_over_block(student_sum);
    teacher_sum = sum_over_block(teacher_sum);
    const A student_inverse = student_sum == A(0) ? A(0) : A(1) / student_sum;
    const A teacher_inverse = teacher_sum == A(0) ? A(0) : A(1) / teacher_sum;
    const A student_mean = dist_row_mean(student_inverse, A(call.classes));
    const A teacher_mean = dist_row_mean(teacher_inverse, A(call.classes));
    A student_square = A(0), teacher_square = A(0), product = A(0);
    for (int64_t i = threadIdx.x; i < call.classes; i += kThreads) {
      const A x = probability_at(call.student, row, i, student_max, student_inverse, call.rate) -
                  student_mean;
      const A y = probability_at(call.teacher, row, i, teacher_max, teacher_inverse, call.rate) -
                  teacher_mean;
      student_square += x * x;
      teacher_square += y * y;
      product += x * y;
    }
    student_square = sum_over_block(student_square);
    teacher_square = sum_over_block(teacher_square);
    product = sum_over_block(product);
    if (threadIdx.x != 0) continue;
    const Pearson rho = pearson(student_square, teacher_square, product);
    call.row_losses[row] = rho.loss;
    call.kept[row] = {student_max,
                      teacher_max,
                      student_inverse,
                      teacher_inverse,
                      A(call.factors.row_gradient * rho.student),
                      A(call.factors.row_gradient * rho.teacher)};
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads) dist_sums_kernel(const Call<A> call) {
  __shared__ DistSums<A> shared[kTogether][kColumns];
  const int column = int(threadIdx.x) % kColumns, lane = int(threadIdx.x) / kColumns;
  const int64_t i = int64_t(blockIdx.x) * kColumns + column;
  for (int64_t piece = blockIdx.y; piece < call.pieces; piece += gridDim.y) {
    const int64_t first = piece * call.piece;
    const int64_t last = first + call.piece < call.rows ? first + call.piece : call.rows;
    DistSums<A> sums = {};
    A student_shift = A(0), teacher_shift = A(0);
    if (i < call.classes) {
      const auto student_at = [&](int64_t row) {
        const DistRow<A>& kept = call.kept[row];
        return probability_at(call.student, row, i, kept.student_max, kept.student_inverse,
                              call.rate);
      };
      const auto teacher_at = [&](int64_t row) {
        const DistRow<A>& kept = call.kept[row];
        return probability_at(call.teacher, row, i, kept.teacher_max, kept.teacher_inverse,
                              call.rate);
      };
      const int64_t second = last - first > 2 ? first + 1 : first;
      const int64_t third = last - first > 2 ? first + 2 : first;
      student_shift = dist_typical(student_at(first), student_at(second), student_at(third));
      teacher_shift = dist_typical(teacher_at(first), teacher_at(second), teacher_at(third));
      for (int64_t row = first + lane; row < last; row += kTogether)
        dist_add(sums, student_at(row) - student_shift, teacher_at(row) - teacher_shift);
    }
    shared[lane][column] = sums;
    __syncthreads();
    if (lane == 0 && i < call.classes) {
      for (int k = 1; k < kTogether; ++k) {
        const DistSums<A>& other = shared[k][column];
        sums.student += other.student;
        sums.teacher += other.teacher;
        sums.student_square += other.student_square;
        sums.teacher_square += other.teacher_square;
        sums.product += other.product;
      }
      call.partial[piece * call.classes + i] =
          dist_centred(sums, student_shift, teacher_shift, A(1) / A(last - first));
    }
    __syncthreads();
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads) dist_columns_kernel(const Call<A> call) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= call.classes) return;
  const double x = call.partial[i].student, y = call.partial[i].teacher;
  DistColumn column = {};
  for (int64_t piece = 0; piece < call.pieces; ++piece) {
    const DistSums<A> part = call.partial[piece * call.classes + i];
    const int64_t left = call.rows - piece * call.piece;
    dist_merge(column, double(left < call.piece ? left : call.piece), double(part.student) - x,
               double(part.teacher) - y, part.student_square, part.teacher_square, part.product);
  }
  const double rows = double(call.rows);
  const Pearson rho = pearson_of(column, rows);
  call.column_losses[i] = rho.loss;
  call.slopes[i] = {A(x + column.student / rows), A(y + column.teacher / rows),
                    A(call.factors.column_gradient * rho.student),
                    A(call.factors.column_gradient * rho.teacher)};
}

template <class S, class A>
__global__ void __launch_bounds__(kThreads) dist_gradient_kernel(const Call<A> call) {
  for (int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
    const DistRow<A> kept = call.kept[row];
    const DistSlope<A> along = {dist_row_mean(kept.student_inverse, A(call.classes)),
                                dist_row_mean(kept.teacher_inverse, A(call.classes)), kept.student,
                                kept.teacher};
    A q;
    const auto slope_at = [&](int64_t i) {
      q = probability_at(call.student, row, i, kept.student_max, kept.student_inverse, call.rate);
      const A p =
          probability_at(call.teacher, row, i, kept.teacher_max, kept.teacher_inverse, call.rate);
      return dist_slope(along, q, p) + dist_slope(call.slopes[i], q, p);
    };
    A dot = A(0);
    for (int64_t i = threadIdx.x; i < call.classes; i += kThreads) {
      const A slope = slope_at(i);
      dot += q * slope;
    }
    dot = sum_over_block(dot);
    S* const gradient = static_cast<S*>(call.gradient) + row * call.classes;
    for (int64_t i = threadIdx.x; i < call.classes; i += kThreads) {
      const A slope = slope_at(i);
      put(gradient + i, q * (slope - dot));
    }
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    dist_loss_kernel(const Call<A> call, A* loss, A* factor) {
  double rows = 0, columns = 0;
  for (int64_t i = threadIdx.x; i < call.rows; i += kThreads) rows += call.row_losses[i];
  if (call.rows > 0)
    for (int64_t i = threadIdx.x; i < call.classes; i += kThreads) columns += call.column_losses[i];
  rows = sum_over_block(rows);
  columns = sum_over_block(columns);
  if (threadIdx.x != 0) return;
  // A term of weight 0 is left out: 0 times NaN would be NaN.
  *loss = A((call.inter ? call.factors.row_loss * rows : 0) +
            (call.intra ? call.factors.column_loss * columns : 0));
  *factor = A(call.factors.factor);
}

template <class S, class A>
void run(const Tensor& student, const Tensor& teacher, double temperature, double inter,
         double intra, const Tensor& gradient, bool with_gradient, const Tensor& loss,
         const Tensor& factor) {
  const cudaStream_t stream = stream_of(student);
  Call<A> call{};
  call.rows = student.size(0);
  call.classes = student.size(1);
  call.piece = dist_piece(call.rows);
  call.pieces = (call.rows + call.piece - 1) / call.piece;
  call.student = matrix_of(student, "dist_loss");
  call.teacher = matrix_of(teacher, "dist_loss");
  call.rate = A(1.0 / temperature);
  call.factors = dist_factors(call.rows, call.classes, temperature, inter, intra, sizeof(S) == 2);
  call.inter = inter != 0;
  call.intra = intra != 0;
  const ScalarType dtype = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
  const Tensor kept = empty_of(student, call.rows, kDistRow, dtype);
  const Tensor partial = empty_of(student, call.pieces * kDistSums, call.classes, dtype);
  const Tensor slopes = empty_of(student, kDistSlope, call.classes, dtype);
  const Tensor losses = empty_of(student, call.rows + call.classes, -1, ScalarType::Double);
  call.kept = static_cast<DistRow<A>*>(kept.mutable_data_ptr());
  call.partial = static_cast<DistSums<A>*>(partial.mutable_data_ptr());
  call.slopes = static_cast<DistSlope<A>*>(slopes.mutable_data_ptr());
  call.row_losses = static_cast<double*>(losses.mutable_data_ptr());
  call.column_losses = call.row_losses + call.rows;
  call.gradient = with_gradient ? gradient.mutable_data_ptr() : nullptr;
  if (call.rows > 0) {
    const unsigned row_blocks = unsigned(std::min(call.rows, kMostRowBlocks));
    launch_kernel("dist_loss", dist_rows_kernel<A>, {row_blocks, kThreads}, stream, call);
    const dim3 pieces(unsigned((call.classes + kColumns - 1) / kColumns),
                      unsigned(std::min(call.pieces, kMostPieces)));
    launch_kernel("dist_loss", dist_sums_kernel<A>, {pieces, kThreads}, stream, call);
    const unsigned columns = unsigned((call.classes + kThreads - 1) / kThreads);
    launch_kernel("dist_loss", dist_columns_kernel<A>, {columns, kThreads}, stream, call);
    if (with_gradient) {
      launch_kernel("dist_loss", dist_gradient_kernel<S, A>, {row_blocks, kThreads}, stream, call);
    }
  }
  launch_kernel("dist_loss", dist_loss_kernel<A>, {1, kThreads}, stream, call,
                static_cast<A*>(loss.mutable_data_ptr()),
                static_cast<A*>(factor.mutable_data_ptr()));
}

std::tuple<Tensor, Tensor, Tensor> dist_loss(Tensor student, Tensor teacher, double temperature,
                                             double inter, double intra, bool with_gradient) {
  check_dist_arguments(student, teacher, temperature);
  const DeviceGuard guard(student.get_device());
  const Dtype dtype = dtype_of(student, "dist_loss");
  const ScalarType loss_type = dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
  Tensor gradient = empty_of(student, with_gradient ? student.size(0) : 0, student.size(1));
  Tensor loss = empty_of(student, -1, -1, loss_type), factor = empty_of(student, -1, -1, loss_type);
  const auto with = [&](auto run) {
    run(student, teacher, temperature, inter, intra, gradient, with_gradient, loss, factor);
  };
  switch (dtype) {
    case Dtype::float32:
      with(run<float, float>);
      break;
    case Dtype::float64:
      with(run<double, double>);
      break;
    case Dtype::bfloat16:
      with(run<__nv_bfloat16, float>);
      break;
    default:
      with(run<__half, float>);
  }
  return {loss, gradient, factor};
}

}  // namespace
}  // namespace fastscarce::cuda

STABLE_TORCH_LIBRARY_IMPL(fastscarce, FASTSCARCE_DEVICE, m) {
  m.impl("dist_loss", TORCH_BOX(&fastscarce::cuda::dist_loss));
}
