// DIST and its gradient on a GPU. Shapes and terms: csrc/math/dist.h.
//
// Five kernels, because the slope of a column wants every row of it: statistics and 1 - rho of the
// rows; sums over pieces of the columns (a block a piece of 32 columns, whose threads share the
// rows); the columns, from their pieces in order; the gradient of the rows; the loss. Each of the
// three that see the logits reads them once (rows: held_rows.cuh). Exponentials are made again
// where they are wanted, so that nothing of the size of the logits is written but the gradient.
// Every sum has a fixed order: no atomics, no host synchronisation, bitwise repeatable, and
// capturable in a graph.
#include <math.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
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
#include "chunks.cuh"
#include "exponential.cuh"
#include "held_rows.cuh"
// clang-format on

constexpr int kColumns = 32;                    // of a block that sums columns
constexpr int kTogether = kThreads / kColumns;  // rows that it sums at a time
constexpr int64_t kMostRowBlocks = int64_t(1) << 20;
constexpr int64_t kMostPieces = 65535;  // blocks in the second dimension of a grid

template <class A>
struct Call {
  int64_t rows, classes, piece, pieces;
  Matrix student, teacher;
  double rate;  // 1 / T
  int room;     // of HeldRows
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

// One for all kernels, whatever the dtype of the logits: the same number wherever it is made.
template <class A>
using Exponential = typename ExponentialOf<A>::type;

// Sums of exponentials of a row, as what a probability is multiplied by.
template <class A>
__device__ inline A inverse_of(A sum) {
  return sum == A(0) ? A(0) : A(1) / sum;
}

template <class A>
__device__ inline A finite_top(A top) {
  return top == A(-INFINITY) ? A(0) : top;
}

// A number of the student's row, and the teacher's.
template <class A>
struct Both {
  A student, teacher;
};

template <class Rows>
__global__ void __launch_bounds__(kThreads, Rows::blocks)
    dist_rows_kernel(const Call<typename Rows::A> call) {
  using A = typename Rows::A;
  constexpr int n = Rows::n;
  const Exponential<A> at_temperature(call.rate);
  Rows held(call.student, call.teacher, nullptr, call.classes, call.room);
  for (int64_t row = held.from_row(); row < call.rows; row += held.row_step()) {
    held.place(row);
    Both<A> top = {A(-INFINITY), A(-INFINITY)};
    held.first_sweep([&](int, const A(&s)[n], const A(&t)[n]) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        top.student = maximum(top.student, s[j]);
        top.teacher = maximum(top.teacher, t[j]);
      }
    });
    top = held.group.reduce(top, [](const Both<A>& a, const Both<A>& b) {
      return Both<A>{maximum(a.student, b.student), maximum(a.teacher, b.teacher)};
    });
    top = {finite_top(top.student), finite_top(top.teacher)};
    A sums[] = {A(0), A(0)};
    held.sweep([&](int, const A(&s)[n], const A(&t)[n]) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        sums[0] += at_temperature(s[j] - top.student);
        sums[1] += at_temperature(t[j] - top.teacher);
      }
    });
    held.group.sum(sums);
    const A student_inverse = inverse_of(sums[0]), teacher_inverse = inverse_of(sums[1]);
    const A student_mean = dist_row_mean(student_inverse, A(call.classes));
    const A teacher_mean = dist_row_mean(teacher_inverse, A(call.classes));
    A squares[] = {A(0), A(0), A(0)};  // the third: products
    held.sweep([&](int from, const A(&s)[n], const A(&t)[n]) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if (from + j < 0 || from + j >= held.classes) continue;
        const A x = probability(at_temperature(s[j] - top.student), student_inverse) - student_mean;
        const A y = probability(at_temperature(t[j] - top.teacher), teacher_inverse) - teacher_mean;
        squares[0] += x * x;
        squares[1] += y * y;
        squares[2] += x * y;
      }
    });
    held.group.sum(squares);
    if (!held.group.leads()) continue;
    const Pearson rho = pearson(squares[0], squares[1], squares[2]);
    call.row_losses[row] = rho.loss;
    call.kept[row] = {top.student,
                      top.teacher,
                      student_inverse,
                      teacher_inverse,
                      A(call.factors.row_gradient * rho.student),
                      A(call.factors.row_gradient * rho.teacher)};
  }
  held.group.leave();
}

template <class A>
__global__ void __launch_bounds__(kThreads) dist_sums_kernel(const Call<A> call) {
  __shared__ DistSums<A> shared[kTogether][kColumns];
  const int column = int(threadIdx.x) % kColumns, lane = int(threadIdx.x) / kColumns;
  const int64_t i = int64_t(blockIdx.x) * kColumns + column;
  const Exponential<A> at_temperature(call.rate);
  for (int64_t piece = blockIdx.y; piece < call.pieces; piece += gridDim.y) {
    const int64_t first = piece * call.piece;
    const int64_t last = first + call.piece < call.rows ? first + call.piece : call.rows;
    DistSums<A> sums = {};
    A student_shift = A(0), teacher_shift = A(0);
    if (i < call.classes) {
      const auto student_at = [&](int64_t row) {
        const DistRow<A>& kept = call.kept[row];
        return probability(at_temperature(element<A>(call.student, row, i) - kept.student_max),
                           kept.student_inverse);
      };
      const auto teacher_at = [&](int64_t row) {
        const DistRow<A>& kept = call.kept[row];
        return probability(at_temperature(element<A>(call.teacher, row, i) - kept.teacher_max),
                           kept.teacher_inverse);
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

template <class Rows>
__global__ void __launch_bounds__(kThreads, Rows::blocks)
    dist_gradient_kernel(const Call<typename Rows::A> call) {
  using A = typename Rows::A;
  constexpr int n = Rows::n;
  const Exponential<A> at_temperature(call.rate);
  Rows held(call.student, call.teacher, call.gradient, call.classes, call.room);
  for (int64_t row = held.from_row(); row < call.rows; row += held.row_step()) {
    held.place(row);
    const DistRow<A> kept = call.kept[row];
    const DistSlope<A> along = {dist_row_mean(kept.student_inverse, A(call.classes)),
                                dist_row_mean(kept.teacher_inverse, A(call.classes)), kept.student,
                                kept.teacher};
    // Probabilities and slopes of a chunk; 0 outside the row.
    const auto slopes_of = [&](int from, const A(&s)[n], const A(&t)[n], A(&q)[n], A(&slope)[n]) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        q[j] = slope[j] = A(0);
        if (from + j < 0 || from + j >= held.classes) continue;
        q[j] = probability(at_temperature(s[j] - kept.student_max), kept.student_inverse);
        const A p = probability(at_temperature(t[j] - kept.teacher_max), kept.teacher_inverse);
        slope[j] = dist_slope(along, q[j], p) + dist_slope(call.slopes[from + j], q[j], p);
      }
    };
    A dot[] = {A(0)};
    held.first_sweep([&](int from, const A(&s)[n], const A(&t)[n]) {
      A q[n], slope[n];
      slopes_of(from, s, t, q, slope);
#pragma unroll
      for (int j = 0; j < n; ++j) dot[0] += q[j] * slope[j];
    });
    held.group.sum(dot);
    held.sweep([&](int from, const A(&s)[n], const A(&t)[n]) {
      A q[n], slope[n];
      slopes_of(from, s, t, q, slope);
#pragma unroll
      for (int j = 0; j < n; ++j) slope[j] = q[j] * (slope[j] - dot[0]);
      held.store(from, slope);
    });
  }
  held.group.leave();
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

// The statistics of the rows, or their gradients. Of Rows that compute in A: others never come.
template <class Rows, class A>
void launch_over_rows(Type<Rows>, Call<A> call, const Device& device, cudaStream_t stream,
                      bool gradients) {
  if constexpr (std::is_same_v<typename Rows::A, A>) {
    const RowsLaunch launch = launch_of<Rows>(call.rows, call.classes, device, kMostRowBlocks);
    call.room = launch.room;
    if (gradients)
      launch_kernel("dist_loss", dist_gradient_kernel<Rows>, launch.grid, stream, call);
    else
      launch_kernel("dist_loss", dist_rows_kernel<Rows>, launch.grid, stream, call);
  }
}

template <class A>
void run(const Tensor& student, const Tensor& teacher, double temperature, double inter,
         double intra, const Tensor& gradient, bool with_gradient, const Tensor& loss,
         const Tensor& factor) {
  const cudaStream_t stream = stream_of(student);
  const Device device = device_of(student);
  Call<A> call{};
  call.rows = student.size(0);
  call.classes = student.size(1);
  call.piece = dist_piece(call.rows);
  call.pieces = (call.rows + call.piece - 1) / call.piece;
  call.student = matrix_of(student, "dist_loss");
  call.teacher = matrix_of(teacher, "dist_loss");
  call.rate = 1.0 / temperature;
  const bool short_gradient =
      call.student.dtype == Dtype::bfloat16 || call.student.dtype == Dtype::float16;
  call.factors = dist_factors(call.rows, call.classes, temperature, inter, intra, short_gradient);
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
  const auto over_rows = [&](bool gradients) {
    with_two_rows<Kinds::few>(call.student, call.teacher, call.classes, [&](auto rows) {
      launch_over_rows(rows, call, device, stream, gradients);
    });
  };
  if (call.rows > 0) {
    over_rows(false);
    const dim3 pieces(unsigned((call.classes + kColumns - 1) / kColumns),
                      unsigned(std::min(call.pieces, kMostPieces)));
    launch_kernel("dist_loss", dist_sums_kernel<A>, {pieces, kThreads}, stream, call);
    const unsigned columns = unsigned((call.classes + kThreads - 1) / kThreads);
    launch_kernel("dist_loss", dist_columns_kernel<A>, {columns, kThreads}, stream, call);
    if (with_gradient) over_rows(true);
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
  if (dtype == Dtype::float64)
    run<double>(student, teacher, temperature, inter, intra, gradient, with_gradient, loss, factor);
  else
    run<float>(student, teacher, temperature, inter, intra, gradient, with_gradient, loss, factor);
  return {loss, gradient, factor};
}

}  // namespace
}  // namespace fastscarce::cuda

STABLE_TORCH_LIBRARY_IMPL(fastscarce, FASTSCARCE_DEVICE, m) {
  m.impl("dist_loss", TORCH_BOX(&fastscarce::cuda::dist_loss));
}
