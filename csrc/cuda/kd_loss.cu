// Distillation loss and its gradient on a GPU. Shapes and terms: csrc/math/kd_row.h.
//
// A block takes a row (a warp, up to 1024 classes). Each thread finds the maxima of its own logits,
// then sums exponentials relative to them, so one reduction, of whole statistics by kd_merge in a
// fixed order, closes the row; a last sweep writes the gradient. Nothing of the row is kept in
// shared memory, so a row may be of any length: its second and third reading come from L1 or L2.
// DRAM sees student and teacher once and the gradient once while rows in flight fit in L2. The sums
// over rows that the means divide by, and the sum of the losses, are kernels of one block in a
// fixed order: no atomics, no host synchronisation, bitwise repeatable, and capturable in a graph.
#include <math.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#define FS_HD __host__ __device__
#include "../kd_arguments.h"
#include "statistics.cuh"
#include "tensors.cuh"

namespace fastscarce::cuda {

// clang-format off: each needs those before it
#include "../math/kd_row.h"
#include "../math/divergence.h"
#include "../math/topk_teacher.h"
#include "block.cuh"
// clang-format on

namespace {

// A teacher's k largest classes; csrc/math/topk_teacher.h.
struct TopKTeacher {
  int64_t k;
  const int32_t* indices;
  Matrix log_probs, log_tail;
};

struct Call {
  int64_t rows, classes;
  Matrix student, teacher, soft;
  const int64_t* target;
  const int64_t* partner;
  const float* share;
  const float* weight;
  const float* class_weight;  // multiplies index labels
  int64_t ignore_index, reduction;
  double temperature, distillation, label, label_smoothing, threshold;
  int64_t divergence;
  double first, second;
  TopKTeacher named[2];  // instead of `teacher`
  int named_count, tail_policy;
  const float* mix;
  void* gradient;
  void* losses;
  KdFactors* factors;
};

struct Label {
  int64_t first = -1, second = -1;           // -1: none
  double first_share = 0, second_share = 0;  // times the weight of the class
  double first_part = 0, second_part = 0;    // without it
  bool outside = false;
};

__device__ inline void take(const Call& call, int64_t index, double part, int64_t& place,
                            double& share, double& whole, bool& outside) {
  if (index == call.ignore_index) return;
  if (index < 0 || index >= call.classes) {
    outside = true;
    return;
  }
  place = index;
  whole = part;
  share = call.class_weight ? part * double(call.class_weight[index]) : part;
}

__device__ inline Label label_of(const Call& call, int64_t row) {
  Label label;
  if (!call.target) return label;
  const double share = call.share ? double(call.share[row]) : 1.0;
  take(call, call.target[row], share, label.first, label.first_share, label.first_part,
       label.outside);
  if (call.partner)
    take(call, call.partner[row], 1.0 - share, label.second, label.second_share, label.second_part,
         label.outside);
  return label;
}

// ---- sums over rows, by one block, in a fixed order
constexpr int kSumThreads = 1024;

__device__ inline double block_sum(double value) {
  __shared__ double part[kSumThreads];
  part[threadIdx.x] = value;
  __syncthreads();
  for (int half = kSumThreads / 2; half > 0; half /= 2) {
    if (int(threadIdx.x) < half) part[threadIdx.x] += part[threadIdx.x + half];
    __syncthreads();
  }
  const double sum = part[0];
  __syncthreads();
  return sum;
}

template <class A>
__global__ void kd_factors_kernel(Call call, bool float16, A* factor) {
  double weights = 0, labels = 0;
  if (call.reduction == kReductionMean) {
    for (int64_t row = threadIdx.x; row < call.rows; row += kSumThreads) {
      const double weight = call.weight ? double(call.weight[row]) : 1.0;
      const Label label = label_of(call, row);
      weights += weight;
      labels += call.soft.data ? weight : weight * (label.first_share + label.second_share);
    }
    weights = block_sum(weights);
    labels = block_sum(labels);
  }
  if (threadIdx.x == 0) {
    *call.factors =
        kd_factors(call.teacher.data != nullptr || call.named_count != 0,
                   call.target != nullptr || call.soft.data != nullptr, call.temperature,
                   call.distillation, call.label, call.reduction, float16, weights, labels);
    *factor = A(call.factors->factor);
  }
}

template <class A>
__global__ void kd_loss_sum_kernel(const A* losses, int64_t rows, A* loss) {
  double sum = 0;
  for (int64_t row = threadIdx.x; row < rows; row += kSumThreads) sum += double(losses[row]);
  sum = block_sum(sum);
  if (threadIdx.x == 0) *loss = A(sum);
}

// ---- one row
template <class A>
__device__ inline KdStatistics<A> statistics_down(const KdStatistics<A>& s, int by) {
  return {shuffle_down(s.student_max, by), shuffle_down(s.teacher_max, by),
          shuffle_down(s.student_sum, by), shuffle_down(s.teacher_sum, by),
          shuffle_down(s.label_sum, by),   shuffle_down(s.gap, by),
          shuffle_down(s.logit_sum, by),   shuffle_down(s.soft_mass, by),
          shuffle_down(s.soft_dot, by),    shuffle_down(s.count, by)};
}

// Statistics of the row, in every thread. Width: threads a row, 32 or the whole block.
template <class A, int Width>
__device__ inline KdStatistics<A> reduce(KdStatistics<A> own, A inverse_temperature) {
  for (int by = 16; by > 0; by /= 2)
    own = kd_merge(own, statistics_down(own, by), inverse_temperature);
  constexpr int warps = Width / 32;
  __shared__ KdStatistics<A> shared[Width == 32 ? 32 : warps];
  if constexpr (Width == 32) {
    KdStatistics<A>& mine = shared[threadIdx.x / 32];
    if (threadIdx.x % 32 == 0) mine = own;
    __syncwarp();
    own = mine;
    __syncwarp();
  } else {
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = own;
    __syncthreads();
    own = shared[0];
    for (int warp = 1; warp < warps; ++warp) own = kd_merge(own, shared[warp], inverse_temperature);
    __syncthreads();
  }
  return own;
}

// S: the student's dtype. SameTeacher: the teacher has it too and its rows are read as such.
template <class S, class A, int Width, bool SameTeacher>
__global__ void __launch_bounds__(kThreads) kd_loss_kernel(const Call call) {
  const KdFactors factors = *call.factors;
  const bool teacher = factors.kd_loss != 0, labelled = factors.ce_loss != 0;
  const bool dense = labelled && call.soft.data;
  const bool smoothing = labelled && call.label_smoothing != 0;
  const double t = teacher ? call.temperature : 1.0;
  const bool same = t == 1.0;  // softmax(s / T) is softmax(s)
  const A inverse_temperature = A(1.0 / t);
  const int64_t classes = call.classes;
  const int lane = int(threadIdx.x) % Width;
  constexpr int rows_a_block = kThreads / Width;
  // All threads of a row's group have the same row, so that they meet at every reduction.
  for (int64_t row = int64_t(blockIdx.x) * rows_a_block + threadIdx.x / Width; row < call.rows;
       row += int64_t(gridDim.x) * rows_a_block) {
    const Label label = label_of(call, row);
    const double weight = call.weight ? double(call.weight[row]) : 1.0;
    KdWeights<A> w = {A(weight * factors.kd_loss),
                      A(weight * factors.ce_loss),
                      A(weight * factors.kd_gradient),
                      A(weight * factors.ce_gradient),
                      A(label.first_share + label.second_share),
                      A(0)};
    S* const gradient = call.gradient ? static_cast<S*>(call.gradient) + row * classes : nullptr;
    A* const loss = static_cast<A*>(call.losses) + row;
    const bool counts = w.kd_loss != 0 || (w.ce_loss != 0 && (dense || w.label_mass != 0));
    if (label.outside || !counts) {
      if (lane == 0) *loss = label.outside ? A(NAN) : A(0);
      if (gradient)
        for (int64_t i = lane; i < classes; i += Width) put(gradient + i, A(0));
      continue;
    }
    const S* const student =
        static_cast<const S*>(call.student.data) + row * call.student.row_stride;
    const auto teacher_at = [&](int64_t i) {
      if constexpr (SameTeacher)
        return A(
            number((static_cast<const S*>(call.teacher.data) + row * call.teacher.row_stride)[i]));
      else
        return element<A>(call.teacher, row, i);
    };

    KdStatistics<A> own = kd_empty(A(0));
    A student_max = A(-INFINITY), teacher_max = A(-INFINITY);
    for (int64_t i = lane; i < classes; i += Width) {
      student_max = maximum(student_max, A(number(student[i])));
      if (teacher) teacher_max = maximum(teacher_max, teacher_at(i));
    }
    own.student_max = student_max == A(-INFINITY) ? A(0) : student_max;
    own.teacher_max = teacher_max == A(-INFINITY) ? A(0) : teacher_max;
    for (int64_t i = lane; i < classes; i += Width) {
      const A x = A(number(student[i])) - own.student_max;
      const A e = exponential(x * inverse_temperature);
      own.student_sum += e;
      own.label_sum += !labelled ? A(0) : same ? e : exponential(x);
      own.count += A(1);
      if (teacher) {
        const A y = teacher_at(i) - own.teacher_max;
        const A p = exponential(y * inverse_temperature);
        own.teacher_sum += p;
        own.gap += kd_gap_term(p, y, x);
      }
      if (smoothing) own.logit_sum += x;
      if (dense) {
        const A share = element<A>(call.soft, row, i);
        own.soft_mass += share;
        own.soft_dot += select(share, share * x, A(0));
      }
    }
    const KdStatistics<A> all = reduce<A, Width>(own, inverse_temperature);
    if (label.first >= 0 && label.first_share != 0)
      w.label_dot += A(label.first_share) * (A(number(student[label.first])) - all.student_max);
    if (label.second >= 0 && label.second_share != 0)
      w.label_dot += A(label.second_share) * (A(number(student[label.second])) - all.student_max);
    const KdCoefficients<A> c = kd_finish(all, w, inverse_temperature, A(call.label_smoothing),
                                          A(1.0 / double(classes)), A(call.threshold), dense);
    if (lane == 0) *loss = c.loss;
    if (!gradient) continue;
    for (int64_t i = lane; i < classes; i += Width) {
      const A x = A(number(student[i])) - all.student_max;
      const A e = exponential(x * inverse_temperature);
      const A own_exp = !labelled ? A(0) : same ? e : exponential(x);
      const A p =
          teacher ? exponential((teacher_at(i) - all.teacher_max) * inverse_temperature) : A(0);
      A g = kd_gradient(c, e, own_exp, p);
      if (dense) {
        g -= c.hard * element<A>(call.soft, row, i);
      } else if (labelled) {
        if (i == label.first) g -= c.hard * A(label.first_share);
        if (i == label.second) g -= c.hard * A(label.second_share);
      }
      put(gradient + i, g);
    }
  }
}

#include "divergence.cuh"
#include "kd_topk.cuh"

// ---- the backward pass: out = gradient * factor * upstream; returns at once where that is 1 and
// in place. The comparison is the device's.
template <class S, class A>
__global__ void kd_loss_backward_kernel(const S* gradient, S* out, const A* factor,
                                        const A* upstream, bool by_row, int64_t rows,
                                        int64_t classes) {
  if (!by_row && out == gradient && *factor * *upstream == A(1)) return;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * classes; i += step)
    put(out + i, A(number(gradient[i])) * (*factor * (by_row ? upstream[i / classes] : *upstream)));
}

// ---- launchers
template <class S, class A, int Width>
void launch(const Call& call, cudaStream_t stream) {
  constexpr int rows_a_block = kThreads / Width;
  const int64_t blocks = std::min<int64_t>((call.rows + rows_a_block - 1) / rows_a_block, 1 << 20);
  if (call.teacher.dtype == call.student.dtype)
    kd_loss_kernel<S, A, Width, true><<<unsigned(blocks), kThreads, 0, stream>>>(call);
  else
    kd_loss_kernel<S, A, Width, false><<<unsigned(blocks), kThreads, 0, stream>>>(call);
  check_launch("kd_loss");
}

template <class S, class A>
void launch_divergence(const Call& call, cudaStream_t stream) {
  const unsigned blocks = unsigned(std::min<int64_t>(call.rows, 1 << 20));
  switch (call.divergence) {
    case kReverseKl:
      divergence_kernel<S, A, kReverseKl><<<blocks, kThreads, 0, stream>>>(call);
      break;
    case kJsd:
      divergence_kernel<S, A, kJsd><<<blocks, kThreads, 0, stream>>>(call);
      break;
    case kSkewKl:
      divergence_kernel<S, A, kSkewKl><<<blocks, kThreads, 0, stream>>>(call);
      break;
    case kDkd:
      divergence_kernel<S, A, kDkd><<<blocks, kThreads, 0, stream>>>(call);
      break;
    default:
      divergence_kernel<S, A, kLogitStandard><<<blocks, kThreads, 0, stream>>>(call);
  }
  check_launch("kd_loss");
}

template <class S, class A>
void run(const Call& call, bool sum, void* factor, void* loss, cudaStream_t stream) {
  kd_factors_kernel<A>
      <<<1, kSumThreads, 0, stream>>>(call, sizeof(S) == 2, static_cast<A*>(factor));
  check_launch("kd_loss");
  if (call.rows > 0) {
    if (call.named_count != 0)
      launch_topk<S, A>(call, stream);
    else if (call.divergence != kKl && call.teacher.data)
      launch_divergence<S, A>(call, stream);
    else if (call.classes <= 1024)
      launch<S, A, 32>(call, stream);
    else
      launch<S, A, kThreads>(call, stream);
  }
  if (!sum) return;
  kd_loss_sum_kernel<A><<<1, kSumThreads, 0, stream>>>(static_cast<const A*>(call.losses),
                                                       call.rows, static_cast<A*>(loss));
  check_launch("kd_loss");
}

using Result = std::tuple<Tensor, Tensor, Tensor>;

// What every loss takes beside its teacher.
struct LabelArguments {
  const std::optional<Tensor>&target, &partner, &share, &weight, &class_weight;
  double label_smoothing;
  int64_t ignore_index;
};

Call call_of(const Tensor& student, const LabelArguments& labels, double temperature,
             double distillation, double label, double threshold, int64_t reduction) {
  Call call{};
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

Result run_call(Call& call, const Tensor& student, const Made& made) {
  const ScalarType loss_type =
      call.student.dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
  const bool fresh = made.with_gradient && !made.into;
  Tensor gradient = empty_of(student, fresh ? call.rows : 0, call.classes);
  if (made.with_gradient) call.gradient = (fresh ? gradient : *made.into).mutable_data_ptr();
  Tensor losses = empty_of(student, call.rows, -1, loss_type);
  call.losses = losses.mutable_data_ptr();
  Tensor factor = empty_of(student, -1, -1, loss_type);
  Tensor workspace = empty_of(student, sizeof(KdFactors) / sizeof(double), -1, ScalarType::Double);
  call.factors = static_cast<KdFactors*>(workspace.mutable_data_ptr());
  const bool sum = call.reduction != kReductionNone;
  Tensor loss = sum ? empty_of(student, -1, -1, loss_type) : losses;
  void* const factor_at = factor.mutable_data_ptr();
  void* const loss_at = loss.mutable_data_ptr();
  const cudaStream_t stream = stream_of(student);
  switch (call.student.dtype) {
    case Dtype::float32:
      run<float, float>(call, sum, factor_at, loss_at, stream);
      break;
    case Dtype::float64:
      run<double, double>(call, sum, factor_at, loss_at, stream);
      break;
    case Dtype::bfloat16:
      run<__nv_bfloat16, float>(call, sum, factor_at, loss_at, stream);
      break;
    default:
      run<__half, float>(call, sum, factor_at, loss_at, stream);
  }
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
  const torch::stable::accelerator::DeviceGuard guard(student.get_device());
  Call call = call_of(student, labels, temperature, distillation, label, threshold, reduction);
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
  check_topk_teacher(student, teacher.indices, teacher.log_probs, teacher.log_tail);
  check_topk_mixture(student, teacher.second_indices, teacher.second_log_probs,
                     teacher.second_log_tail, teacher.mix, tail_policy);
  check(tail_policy != kTailBucket || student.size(1) <= kMostMarked, "kd_loss_topk",
        "at most 327680 classes for the tail policy tail on a GPU");
  const torch::stable::accelerator::DeviceGuard guard(student.get_device());
  Call call = call_of(student, labels, temperature, distillation, label, threshold, reduction);
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
  const int64_t blocks = std::min<int64_t>((rows * classes + 1023) / 1024, 1 << 16);
  kd_loss_backward_kernel<S, A><<<unsigned(blocks), 256, 0, stream>>>(
      static_cast<const S*>(gradient), static_cast<S*>(out), static_cast<const A*>(factor),
      static_cast<const A*>(upstream.const_data_ptr()), upstream.dim() == 1, rows, classes);
  check_launch("kd_loss");
}

void scale(const Tensor& gradient, const Tensor& factor, const Tensor& upstream, void* out) {
  check_kd_backward_arguments(gradient, factor, upstream);
  const torch::stable::accelerator::DeviceGuard guard(gradient.get_device());
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

STABLE_TORCH_LIBRARY_IMPL(fastscarce, CUDA, m) {
  m.impl("kd_loss", TORCH_BOX(&fastscarce::cuda::kd_loss));
  m.impl("kd_loss_topk", TORCH_BOX(&fastscarce::cuda::kd_loss_topk));
  m.impl("kd_loss_out", TORCH_BOX(&fastscarce::cuda::kd_loss_out));
  m.impl("kd_loss_topk_out", TORCH_BOX(&fastscarce::cuda::kd_loss_topk_out));
  m.impl("kd_loss_backward", TORCH_BOX(&fastscarce::cuda::kd_loss_backward));
  m.impl("kd_loss_backward_", TORCH_BOX(&fastscarce::cuda::kd_loss_backward_in_place));
}
