// The distillation losses and their gradients on a GPU: operators, and the kernels before and after
// the rows'. Terms: csrc/math/kd_row.h; the rows: kl.cu, divergence.cu, kd_topk.cu.
#include <math.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "device.cuh"
#define FS_HD __host__ __device__
#include "../kd_arguments.h"
#include "kd_call.h"
#include "statistics.cuh"
#include "tensors.cuh"

namespace fastscarce::cuda {
namespace {

// clang-format off: each needs those before it
#include "../math/kd_row.h"
#include "block.cuh"
#include "chunks.cuh"
#include "kd_call.cuh"
// clang-format on

// ---- before the rows: sums of weights and labels
// A grid of call.pieces blocks, or one.
__global__ void __launch_bounds__(kThreads) kd_prepare_kernel(const KdCall call) {
  if (blockIdx.x == 0 && threadIdx.x == 0) call.workspace->finished = 0;
  if (call.pieces == 0) return;
  const int64_t piece = (call.rows + call.pieces - 1) / call.pieces;
  const int64_t first = blockIdx.x * piece;
  const int64_t last = first + piece < call.rows ? first + piece : call.rows;
  double weights = 0, labels = 0;
  for (int64_t row = first + threadIdx.x; row < last; row += kThreads) {
    const double weight = call.weight ? double(call.weight[row]) : 1.0;
    const Label label = label_of(call, row);
    weights += weight;
    labels += call.soft.data ? weight : weight * (label.first_share + label.second_share);
  }
  weights = sum_over_block(weights);
  labels = sum_over_block(labels);
  if (threadIdx.x != 0) return;
  call.workspace->weights[blockIdx.x] = weights;
  call.workspace->labels[blockIdx.x] = labels;
}

// ---- the backward pass: out = gradient * factor * upstream; returns at once where that is 1 and
// in place. The comparison is the device's. With one upstream for all, the matrix is one row.
template <class S, class A>
__global__ void __launch_bounds__(kThreads)
    kd_loss_backward_kernel(const S* gradient, S* out, const A* factor, const A* upstream,
                            int64_t rows, int64_t classes) {
  constexpr int n = kChunk<S>;
  const bool one = rows == 1;
  if (one && out == gradient && *factor * *upstream == A(1)) return;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const A by = *factor * upstream[row];
    const S* const from = gradient + row * classes;
    S* const to = out + row * classes;
    const int shift = shift_of(from);
    const bool aligned = shift_of(to) == shift;
    const int64_t chunks = (classes + shift + n - 1) / n;
    for (int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x; c < chunks;
         c += int64_t(gridDim.x) * kThreads) {
      const int64_t i = c * n - shift;
      const Chunk<S> chunk = unpacked<S>(load_chunk(from, i, classes, true));
      A g[n];
#pragma unroll
      for (int k = 0; k < n; ++k) g[k] = A(number(chunk.values[k])) * by;
      store_chunk(to, i, classes, aligned, g);
    }
  }
}

// ---- operators
void run(const KdCall& call, const Device& device, cudaStream_t stream) {
  if (call.pieces != 0 || call.reduction != kReductionNone)
    launch_kernel("kd_loss", kd_prepare_kernel, {unsigned(std::max(call.pieces, 1)), kThreads},
                  stream, call);
  if (call.named_count != 0)
    launch_topk_teacher(call, device, stream);
  else if (call.divergence != kKl && call.teacher.data)
    launch_divergence(call, device, stream);
  else
    launch_kl(call, device, stream);
}

constexpr int64_t kMostClasses = INT32_MAX - 64;

using Result = std::tuple<Tensor, Tensor, Tensor>;

// What every loss takes beside its teacher.
struct LabelArguments {
  const std::optional<Tensor>&target, &partner, &share, &weight, &class_weight;
  double label_smoothing;
  int64_t ignore_index;
};

KdCall call_of(const Tensor& student, const LabelArguments& labels, double temperature,
             double distillation, double label, double threshold, int64_t reduction) {
  KdCall call{};
  call.rows = student.size(0);
  call.classes = student.size(1);
  call.student = matrix_of(student, "kd_loss");
  call.temperature = temperature;
  call.distillation = distillation;
  call.label = label;
  call.threshold = threshold;
  call.reduction = reduction;
  call.label_smoothing = labels.label_smoothing;
  call.ignore_index = labels.ignore_index;
  if (labels.target && labels.target->scalar_type() == ScalarType::Long)
    call.target = static_cast<const int64_t*>(labels.target->const_data_ptr());
  else if (labels.target)
    call.soft = matrix_of(*labels.target, "kd_loss");
  if (labels.partner) call.partner = static_cast<const int64_t*>(labels.partner->const_data_ptr());
  if (labels.share) call.share = static_cast<const float*>(labels.share->const_data_ptr());
  if (labels.class_weight)
    call.class_weight = static_cast<const float*>(labels.class_weight->const_data_ptr());
  if (labels.weight) call.weight = static_cast<const float*>(labels.weight->const_data_ptr());
  return call;
}

// What is made beside the loss.
struct Made {
  bool with_gradient;
  std::optional<Tensor> into;  // memory for the gradient; without it there is fresh memory
  StatisticsTensors statistics;
};

void check_made(const Tensor& student, const StatisticsTeacher& teacher, const Made& made) {
  if (made.into) check_kd_gradient(student, *made.into);
  check_statistics(student, teacher, made.statistics);
}

Result run_call(KdCall& call, const Tensor& student, const Made& made) {
  const ScalarType loss_type =
      call.student.dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
  const bool fresh = made.with_gradient && !made.into;
  Tensor gradient = empty_of(student, fresh ? call.rows : 0, call.classes);
  if (made.with_gradient) call.gradient = (fresh ? gradient : *made.into).mutable_data_ptr();
  const bool sum = call.reduction != kReductionNone;
  Tensor loss = empty_of(student, sum ? -1 : call.rows, -1, loss_type);
  Tensor factor = empty_of(student, -1, -1, loss_type);
  call.losses = loss.mutable_data_ptr();
  call.factor = factor.mutable_data_ptr();
  // The weights of all rows, and of those with a label, are known where there is neither.
  if (call.reduction == kReductionMean && (call.weight || call.target) && call.rows > 0)
    call.pieces = int(std::min<int64_t>((call.rows + kRowsAPiece - 1) / kRowsAPiece, kMostPieces));
  const Tensor workspace =
      empty_of(student, sizeof(Workspace) / sizeof(double), -1, ScalarType::Double);
  call.workspace = static_cast<Workspace*>(workspace.mutable_data_ptr());
  run(call, device_of(student), stream_of(student));
  return {loss, gradient, factor};
}

const std::optional<Tensor> kNone;

Result dense_loss(const Tensor& student, const std::optional<Tensor>& teacher,
                  const LabelArguments& labels, int64_t divergence, double first, double second,
                  double temperature, double distillation, double label, double threshold,
                  int64_t reduction, const Made& made) {
  check_made(student, {teacher, kNone, kNone}, made);
  check_kd_arguments(student, teacher, labels.target, labels.partner, labels.share, labels.weight,
                     labels.class_weight, divergence);
  check(student.size(1) <= kMostClasses, "kd_loss", "fewer than 2**31 - 64 classes on a GPU");
  const DeviceGuard guard(student.get_device());
  KdCall call = call_of(student, labels, temperature, distillation, label, threshold, reduction);
  call.divergence = divergence;
  call.first = first;
  call.second = second;
  if (teacher) call.teacher = matrix_of(*teacher, "kd_loss");
  if (made.statistics.asked())
    launch_statistics(student, teacher, {kNone, kNone, kNone, kNone, kNone, kNone, kNone},
                      kTailUniform, temperature, made.statistics);
  return run_call(call, student, made);
}

Result kd_loss(Tensor student, std::optional<Tensor> teacher, std::optional<Tensor> target,
               std::optional<Tensor> partner, std::optional<Tensor> share,
               std::optional<Tensor> weight, std::optional<Tensor> class_weight, int64_t divergence,
               double first, double second, double temperature, double distillation, double label,
               double label_smoothing, double threshold, int64_t ignore_index, int64_t reduction,
               bool with_gradient) {
  return dense_loss(student, teacher,
                    {target, partner, share, weight, class_weight, label_smoothing, ignore_index},
                    divergence, first, second, temperature, distillation, label, threshold,
                    reduction, {with_gradient, {}, {}});
}

Result kd_loss_out(Tensor student, std::optional<Tensor> teacher, std::optional<Tensor> target,
                   std::optional<Tensor> partner, std::optional<Tensor> share,
                   std::optional<Tensor> weight, std::optional<Tensor> class_weight,
                   int64_t divergence, double first, double second, double temperature,
                   double distillation, double label, double label_smoothing, double threshold,
                   int64_t ignore_index, int64_t reduction, bool with_gradient,
                   std::optional<Tensor> out, std::optional<Tensor> student_label,
                   std::optional<Tensor> teacher_label, std::optional<Tensor> confidence,
                   std::optional<Tensor> entropy, std::optional<Tensor> agreement) {
  return dense_loss(
      student, teacher,
      {target, partner, share, weight, class_weight, label_smoothing, ignore_index}, divergence,
      first, second, temperature, distillation, label, threshold, reduction,
      {with_gradient, out, {student_label, teacher_label, confidence, entropy, agreement}});
}

TopKTeacher topk_of(const Tensor& indices, const Tensor& log_probs, const Tensor& log_tail) {
  return {indices.size(1),
          static_cast<const int32_t*>(indices.const_data_ptr()),
          matrix_of(log_probs, "kd_loss_topk"),
          {log_tail.const_data_ptr(), 1, dtype_of(log_tail, "kd_loss_topk")}};
}

struct TopKArguments {
  const Tensor &indices, &log_probs, &log_tail;
  const std::optional<Tensor>&second_indices, &second_log_probs, &second_log_tail, &mix;
};

Result topk_loss(const Tensor& student, const TopKArguments& teacher, const LabelArguments& labels,
                 int64_t tail_policy, double temperature, double distillation, double label,
                 double threshold, int64_t reduction, const Made& made) {
  const std::optional<Tensor> indices = teacher.indices, log_probs = teacher.log_probs,
                              log_tail = teacher.log_tail;
  check_made(student, {kNone, log_probs, teacher.second_log_probs}, made);
  check_kd_arguments(student, {}, labels.target, labels.partner, labels.share, labels.weight,
                     labels.class_weight, kKl);
  check(student.size(1) <= kMostClasses, "kd_loss_topk", "fewer than 2**31 - 64 classes on a GPU");
  check_topk_teacher(student, teacher.indices, teacher.log_probs, teacher.log_tail);
  check_topk_mixture(student, teacher.second_indices, teacher.second_log_probs,
                     teacher.second_log_tail, teacher.mix, tail_policy);
  check(tail_policy != kTailBucket || student.size(1) <= kMostMarked, "kd_loss_topk",
        "at most 327680 classes for the tail policy tail on a GPU");
  const DeviceGuard guard(student.get_device());
  KdCall call = call_of(student, labels, temperature, distillation, label, threshold, reduction);
  call.tail_policy = int(tail_policy);
  call.named[0] = topk_of(teacher.indices, teacher.log_probs, teacher.log_tail);
  call.named_count = 1;
  if (teacher.mix) {
    call.named[1] =
        topk_of(*teacher.second_indices, *teacher.second_log_probs, *teacher.second_log_tail);
    call.named_count = 2;
    call.mix = static_cast<const float*>(teacher.mix->const_data_ptr());
  }
  if (made.statistics.asked())
    launch_statistics(student, kNone,
                      {indices, log_probs, log_tail, teacher.second_indices,
                       teacher.second_log_probs, teacher.second_log_tail, teacher.mix},
                      tail_policy, temperature, made.statistics);
  return run_call(call, student, made);
}

Result kd_loss_topk(Tensor student, Tensor indices, Tensor log_probs, Tensor log_tail,
                    std::optional<Tensor> second_indices, std::optional<Tensor> second_log_probs,
                    std::optional<Tensor> second_log_tail, std::optional<Tensor> mix,
                    std::optional<Tensor> target, std::optional<Tensor> partner,
                    std::optional<Tensor> share, std::optional<Tensor> weight,
                    std::optional<Tensor> class_weight, int64_t tail_policy, double temperature,
                    double distillation, double label, double label_smoothing, double threshold,
                    int64_t ignore_index, int64_t reduction, bool with_gradient) {
  return topk_loss(
      student,
      {indices, log_probs, log_tail, second_indices, second_log_probs, second_log_tail, mix},
      {target, partner, share, weight, class_weight, label_smoothing, ignore_index}, tail_policy,
      temperature, distillation, label, threshold, reduction, {with_gradient, {}, {}});
}

Result kd_loss_topk_out(Tensor student, Tensor indices, Tensor log_probs, Tensor log_tail,
                        std::optional<Tensor> second_indices,
                        std::optional<Tensor> second_log_probs,
                        std::optional<Tensor> second_log_tail, std::optional<Tensor> mix,
                        std::optional<Tensor> target, std::optional<Tensor> partner,
                        std::optional<Tensor> share, std::optional<Tensor> weight,
                        std::optional<Tensor> class_weight, int64_t tail_policy, double temperature,
                        double distillation, double label, double label_smoothing, double threshold,
                        int64_t ignore_index, int64_t reduction, bool with_gradient,
                        std::optional<Tensor> out, std::optional<Tensor> student_label,
                        std::optional<Tensor> teacher_label, std::optional<Tensor> confidence,
                        std::optional<Tensor> entropy, std::optional<Tensor> agreement) {
  return topk_loss(
      student,
      {indices, log_probs, log_tail, second_indices, second_log_probs, second_log_tail, mix},
      {target, partner, share, weight, class_weight, label_smoothing, ignore_index}, tail_policy,
      temperature, distillation, label, threshold, reduction,
      {with_gradient, out, {student_label, teacher_label, confidence, entropy, agreement}});
}

template <class S, class A>
void scale(const void* gradient, void* out, const void* factor, const Tensor& upstream,
           int64_t rows, int64_t classes, cudaStream_t stream) {
  constexpr int64_t kMostAcross = 1 << 16, kMostDown = 65535;
  if (upstream.dim() == 0) {
    classes *= rows;
    rows = 1;
  }
  const int64_t across = (classes / kChunk<S> + kThreads) / kThreads;
  launch_kernel("kd_loss", kd_loss_backward_kernel<S, A>,
                {dim3(unsigned(std::min(across, kMostAcross)), unsigned(std::min(rows, kMostDown))),
                 kThreads},
                stream, static_cast<const S*>(gradient), static_cast<S*>(out),
                static_cast<const A*>(factor), static_cast<const A*>(upstream.const_data_ptr()),
                rows, classes);
}

void scale(const Tensor& gradient, const Tensor& factor, const Tensor& upstream, void* out) {
  check_kd_backward_arguments(gradient, factor, upstream);
  const DeviceGuard guard(gradient.get_device());
  const int64_t rows = gradient.size(0), classes = gradient.size(1);
  if (rows * classes == 0) return;
  const void* in = gradient.const_data_ptr();
  const void* by = factor.const_data_ptr();
  const cudaStream_t stream = stream_of(gradient);
  switch (dtype_of(gradient, "kd_loss_backward")) {
    case Dtype::float32:
      return scale<float, float>(in, out, by, upstream, rows, classes, stream);
    case Dtype::float64:
      return scale<double, double>(in, out, by, upstream, rows, classes, stream);
    case Dtype::bfloat16:
      return scale<__nv_bfloat16, float>(in, out, by, upstream, rows, classes, stream);
    default:
      return scale<__half, float>(in, out, by, upstream, rows, classes, stream);
  }
}

Tensor kd_loss_backward(Tensor gradient, Tensor factor, Tensor upstream) {
  Tensor out = empty_of(gradient, gradient.size(0), gradient.size(1));
  scale(gradient, factor, upstream, out.mutable_data_ptr());
  return out;
}

void kd_loss_backward_in_place(Tensor gradient, Tensor factor, Tensor upstream) {
  scale(gradient, factor, upstream, gradient.mutable_data_ptr());
}

}  // namespace
}  // namespace fastscarce::cuda

STABLE_TORCH_LIBRARY_IMPL(fastscarce, FASTSCARCE_DEVICE, m) {
  m.impl("kd_loss", TORCH_BOX(&fastscarce::cuda::kd_loss));
  m.impl("kd_loss_topk", TORCH_BOX(&fastscarce::cuda::kd_loss_topk));
  m.impl("kd_loss_out", TORCH_BOX(&fastscarce::cuda::kd_loss_out));
  m.impl("kd_loss_topk_out", TORCH_BOX(&fastscarce::cuda::kd_loss_topk_out));
  m.impl("kd_loss_backward", TORCH_BOX(&fastscarce::cuda::kd_loss_backward));
  m.impl("kd_loss_backward_", TORCH_BOX(&fastscarce::cuda::kd_loss_backward_in_place));
}
