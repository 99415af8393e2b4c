// The operators kd_loss and kd_loss_backward on a CPU: tensors in, threads over rows, one sum.
#include "kd_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../kd_arguments.h"
#include "isa.h"
#include "statistics.h"
#include "tensors.h"

namespace fastscarce::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A row this wide is worth cutting into parts where there are fewer rows than threads.
constexpr int64_t kWideRow = 8192;

KdKernels kernels(Dtype dtype) {
  const bool float64 = dtype == Dtype::float64;
#if defined(__x86_64__)
  if (!float64) switch (isa()) {
      case Isa::avx512:
        return avx512::kd_kernels(false);
      case Isa::avx2:
        return avx2::kd_kernels(false);
      case Isa::emulated:
        return emulated::kd_kernels(false);
      default:
        break;
    }
#endif
  return scalar::kd_kernels(float64);
}

// `of(begin, end)` of fixed pieces of the rows, added in order: the same for any number of threads.
template <class Sum, class Of>
Sum sum_of_pieces(int64_t rows, Of of) {
  constexpr int64_t piece = 8192;
  const int64_t pieces = (rows + piece - 1) / piece;
  std::vector<Sum> parts(static_cast<size_t>(pieces));
  torch::stable::parallel_for(0, pieces, 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      parts[size_t(i)] = of(i * piece, std::min(rows, (i + 1) * piece));
  });
  Sum sum{};
  for (const Sum& part : parts) sum = sum + part;
  return sum;
}

template <class A>
double sum_of_losses(const A* losses, int64_t rows) {
  return sum_of_pieces<double>(rows, [&](int64_t begin, int64_t end) {
    double part[8] = {};  // eight sums, so that an addition does not wait for the one before
    int64_t i = begin;
    for (; i + 8 <= end; i += 8)
      for (int k = 0; k < 8; ++k) part[k] += double(losses[i + k]);
    for (; i < end; ++i) part[i % 8] += double(losses[i]);
    return ((part[0] + part[1]) + (part[2] + part[3])) +
           ((part[4] + part[5]) + (part[6] + part[7]));
  });
}

// of(begin, end), after the statistics of the same rows where some are asked for: block by block,
// so that the loss finds in a cache what the statistics read from memory. They come first: the
// gradient may be written over the teacher.
template <class Of>
void with_statistics(const RowStatistics* statistics, int64_t begin, int64_t end, Of of) {
  if (!statistics) return of(begin, end);
  const int64_t block = statistics->rows_a_block();
  for (int64_t row = begin; row < end; row += block) {
    const int64_t last = std::min(row + block, end);
    statistics->rows(row, last);
    of(row, last);
  }
}

void run_rows(const KdCall& call, const KdKernels& run, const RowStatistics* statistics) {
  const int64_t threads = torch::stable::get_num_threads();
  if (call.named_count != 0 && call.kd_loss != 0) {
    const int64_t grain = std::max<int64_t>(1, kLogitsPerThread / (4 * call.classes));
    torch::stable::parallel_for(0, call.rows, grain, [&](int64_t begin, int64_t end) {
      with_statistics(statistics, begin, end,
                      [&](int64_t first, int64_t last) { run.topk(call, first, last); });
    });
    return;
  }
  const bool kl = call.divergence == kKl || call.kd_loss == 0;
  if (kl && call.rows < threads && call.classes >= kWideRow) {
    // A row is more than one thread's here: the caches that threads share keep it in between.
    if (statistics)
      torch::stable::parallel_for(
          0, call.rows, 1, [&](int64_t begin, int64_t end) { statistics->rows(begin, end); });
    const int64_t parts = threads;
    constexpr size_t line = 64 / sizeof(double);
    std::vector<double> memory(size_t(run.workspace_bytes(call)) / sizeof(double) + line);
    // From a line's beginning.
    double* const workspace =
        memory.data() + (line - reinterpret_cast<uintptr_t>(memory.data()) / sizeof(double) % line);
    const int64_t items = call.rows * parts;
    for (const auto of : {run.part_maxima, run.part_statistics, run.part_gradients})
      torch::stable::parallel_for(
          0, items, 1, [&](int64_t begin, int64_t end) { of(call, parts, workspace, begin, end); });
    return;
  }
  // Blocks of 16 rows keep the lanes of every thread but the last full.
  constexpr int64_t block = 16;
  const bool lanes = call.classes <= 64;
  const int64_t unit = lanes ? block : 1;
  const int64_t units = (call.rows + unit - 1) / unit;
  const int64_t logits = kl ? kLogitsPerThread : kLogitsPerThread / (lanes ? 2 : 4);
  const int64_t grain = std::max<int64_t>(1, logits / (unit * call.classes));
  const auto of = kl ? run.rows : run.divergences;
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    with_statistics(statistics, begin * unit, std::min(call.rows, end * unit),
                    [&](int64_t first, int64_t last) { of(call, first, last); });
  });
}

using Result = std::tuple<Tensor, Tensor, Tensor>;

// What every loss takes beside its teacher.
struct LabelArguments {
  const std::optional<Tensor>&target, &partner, &share, &weight, &class_weight;
  double label_smoothing;
  int64_t ignore_index;
};

KdCall call_of(const Tensor& student, const LabelArguments& label, double temperature,
               double threshold) {
  KdCall call;
  call.rows = student.size(0);
  call.classes = student.size(1);
  call.student = matrix_of(student, "kd_loss");
  call.temperature = temperature;
  call.threshold = threshold;
  call.label_smoothing = label.label_smoothing;
  call.ignore_index = label.ignore_index;
  if (label.target && label.target->scalar_type() == ScalarType::Long)
    call.target = static_cast<const int64_t*>(label.target->const_data_ptr());
  else if (label.target)
    call.soft = matrix_of(*label.target, "kd_loss");
  if (label.partner) call.partner = static_cast<const int64_t*>(label.partner->const_data_ptr());
  if (label.share) call.share = static_cast<const float*>(label.share->const_data_ptr());
  if (label.class_weight)
    call.class_weight = static_cast<const float*>(label.class_weight->const_data_ptr());
  if (label.weight) call.weight = static_cast<const float*>(label.weight->const_data_ptr());
  return call;
}

// What is made beside the loss.
struct Made {
  bool with_gradient;
  std::optional<Tensor> into;  // memory for the gradient; without it there is fresh memory
  StatisticsTensors statistics;
};

Result run_call(KdCall& call, const Tensor& student, const StatisticsTeacher& teacher,
                double distillation, double label, int64_t reduction, const Made& made) {
  const bool float64 = call.student.dtype == Dtype::float64;
  const bool float16 = call.student.dtype != Dtype::float32 && !float64;
  const KdKernels run = kernels(call.student.dtype);
  const KdTotals totals =
      reduction == kReductionMean
          ? sum_of_pieces<KdTotals>(
                call.rows, [&](int64_t begin, int64_t end) { return run.totals(call, begin, end); })
          : KdTotals{};
  const KdFactors factors = kd_factors(
      call.teacher.data || call.named_count, call.target || call.soft.data, call.temperature,
      distillation, label, reduction, float16, totals.weight, totals.label);
  call.kd_loss = factors.kd_loss;
  call.ce_loss = factors.ce_loss;
  call.kd_gradient = factors.kd_gradient;
  call.ce_gradient = factors.ce_gradient;

  const ScalarType loss_type = float64 ? ScalarType::Double : ScalarType::Float;
  const bool fresh = made.with_gradient && !made.into;
  Tensor gradient = empty_of(student, fresh ? call.rows : 0, call.classes);
  const int64_t bytes = call.rows * call.classes * int64_t(gradient.element_size());
  if (made.with_gradient && bytes > 0) {
    call.gradient = (fresh ? gradient : *made.into).mutable_data_ptr();
    call.stream = bytes >= kStreamBytes;
    if (fresh) ask_for_huge_pages(call.gradient, bytes);
  }
  Tensor losses = empty_of(student, call.rows, -1, loss_type);
  call.losses = losses.mutable_data_ptr();
  std::optional<RowStatistics> statistics;
  if (made.statistics.asked()) statistics.emplace(call, teacher, made.statistics);
  if (call.rows > 0) run_rows(call, run, statistics ? &*statistics : nullptr);

  Tensor factor = empty_of(student, -1, -1, loss_type);
  write_scalar(factor, float64, factors.factor);
  if (reduction == kReductionNone) return {losses, gradient, factor};
  Tensor loss = empty_of(student, -1, -1, loss_type);
  const double sum = float64 ? sum_of_losses(static_cast<const double*>(call.losses), call.rows)
                             : sum_of_losses(static_cast<const float*>(call.losses), call.rows);
  write_scalar(loss, float64, sum);
  return {loss, gradient, factor};
}

const std::optional<Tensor> kNone;

void check_made(const Tensor& student, const StatisticsTeacher& teacher, const Made& made) {
  if (made.into) check_kd_gradient(student, *made.into);
  check_statistics(student, teacher, made.statistics);
}

Result dense_loss(const Tensor& student, const std::optional<Tensor>& teacher,
                  const LabelArguments& labels, int64_t divergence, double first, double second,
                  double temperature, double distillation, double label, double threshold,
                  int64_t reduction, const Made& made) {
  const StatisticsTeacher of = {teacher, kNone, kNone};
  check_made(student, of, made);
  check_kd_arguments(student, teacher, labels.target, labels.partner, labels.share, labels.weight,
                     labels.class_weight, divergence);
  KdCall call = call_of(student, labels, temperature, threshold);
  call.divergence = divergence;
  call.first = first;
  call.second = second;
  if (teacher) call.teacher = matrix_of(*teacher, "kd_loss");
  return run_call(call, student, of, distillation, label, reduction, made);
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

struct TopKArguments {
  const Tensor &indices, &log_probs, &log_tail;
  const std::optional<Tensor>&second_indices, &second_log_probs, &second_log_tail, &mix;
};

Result topk_loss(const Tensor& student, const TopKArguments& teacher, const LabelArguments& labels,
                 int64_t tail_policy, double temperature, double distillation, double label,
                 double threshold, int64_t reduction, const Made& made) {
  const std::optional<Tensor> log_probs = teacher.log_probs;
  const StatisticsTeacher of = {kNone, log_probs, teacher.second_log_probs};
  check_made(student, of, made);
  check_kd_arguments(student, {}, labels.target, labels.partner, labels.share, labels.weight,
                     labels.class_weight, kKl);
  check_topk_teacher(student, teacher.indices, teacher.log_probs, teacher.log_tail);
  check_topk_mixture(student, teacher.second_indices, teacher.second_log_probs,
                     teacher.second_log_tail, teacher.mix, tail_policy);
  KdCall call = call_of(student, labels, temperature, threshold);
  call.tail_policy = int(tail_policy);
  call.named[0] = topk_of(teacher.indices, teacher.log_probs, teacher.log_tail);
  call.named_count = 1;
  if (teacher.mix) {
    call.named[1] =
        topk_of(*teacher.second_indices, *teacher.second_log_probs, *teacher.second_log_tail);
    call.named_count = 2;
    call.mix = static_cast<const float*>(teacher.mix->const_data_ptr());
  }
  return run_call(call, student, of, distillation, label, reduction, made);
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

double read_scalar(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double
             ? *static_cast<const double*>(tensor.const_data_ptr())
             : double(*static_cast<const float*>(tensor.const_data_ptr()));
}

void scale(const Tensor& gradient, const Tensor& factor, const Tensor& upstream, void* out) {
  check_kd_backward_arguments(gradient, factor, upstream);
  const Dtype dtype = dtype_of(gradient, "kd_loss_backward");
  const int64_t rows = gradient.size(0), classes = gradient.size(1);
  if (rows * classes == 0) return;
  const void* in = gradient.const_data_ptr();
  double by = read_scalar(factor);
  const void* row_factor = nullptr;
  if (upstream.dim() == 1)
    row_factor = upstream.const_data_ptr();
  else
    by *= read_scalar(upstream);
  if (!row_factor && by == 1 && out == in) return;
  if (out != in) ask_for_huge_pages(out, rows * classes * int64_t(gradient.element_size()));
  const KdKernels run = kernels(dtype);
  const int64_t grain = std::max<int64_t>(1, kLogitsPerThread / classes);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    run.scale(dtype, in, out, classes, by, row_factor, begin, end);
  });
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
}  // namespace fastscarce::cpu

STABLE_TORCH_LIBRARY_IMPL(fastscarce, CPU, m) {
  m.impl("kd_loss", TORCH_BOX(&fastscarce::cpu::kd_loss));
  m.impl("kd_loss_topk", TORCH_BOX(&fastscarce::cpu::kd_loss_topk));
  m.impl("kd_loss_out", TORCH_BOX(&fastscarce::cpu::kd_loss_out));
  m.impl("kd_loss_topk_out", TORCH_BOX(&fastscarce::cpu::kd_loss_topk_out));
  m.impl("kd_loss_backward", TORCH_BOX(&fastscarce::cpu::kd_loss_backward));
  m.impl("kd_loss_backward_", TORCH_BOX(&fastscarce::cpu::kd_loss_backward_in_place));
}
