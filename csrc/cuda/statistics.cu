// Statistics of rows on a GPU: a warp a row up to 1024 classes, else a block, or a cluster where
// rows are few.
//
// Student and teacher are read once, 16 bytes at a time, and nothing of them is kept: a thread has
// the largest logit of its classes and sums relative to it, which it scales where a chunk has a
// larger one; the threads' sums are merged by a fixed tree, so the result is the same each time. Of
// TopK teachers the k classes are read.
#include <math.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "device.cuh"
#define FS_HD __host__ __device__
#include "statistics.cuh"

namespace fastscarce::cuda {
namespace {

// clang-format off: each needs those before it
#include "../math/kd_row.h"
#include "../math/selection.h"
#include "../math/topk_teacher.h"
#include "../math/statistics.h"
#include "block.cuh"
#include "chunks.cuh"
#include "held_rows.cuh"
// clang-format on

constexpr int64_t kWarpClasses = 1024;

struct Record {
  int64_t k;
  const int32_t* indices;
  Matrix log_probs, log_tail;
};

struct StatisticsCall {
  int64_t rows, classes;
  Matrix student, teacher;
  Record named[2];
  int named_count;
  const float* mix;
  int tail_policy;
  double temperature;
  int64_t *student_label, *teacher_label;
  void *confidence, *entropy;
  bool* agreement;
};

// f(from, x) of each chunk of a row, shared among the threads; its elements begin at `from`, and
// are -inf where they are outside the row.
template <class A, class Threads, class F>
__device__ inline void stream(const Matrix& matrix, int64_t row, int classes,
                              const Threads& threads, F f) {
  with_row(matrix, row, [&](const auto* data) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
    constexpr int n = kChunk<T>;
    const int shift = shift_of(data), chunks = (classes + shift + n - 1) / n;
#pragma unroll 2
    for (int c = threads.thread(); c < chunks; c += threads.threads()) {
      const Chunk<T> chunk = unpacked<T>(load_chunk(data, c * n - shift, classes, true));
      A x[n];
#pragma unroll
      for (int j = 0; j < n; ++j) x[j] = A(number(chunk.values[j]));
      f(c * n - shift, x);
    }
  });
}

// The largest logit of a part of a row, and the first class that has it. A part with NaN or +inf
// has no answer.
template <class A>
struct Largest {
  A top;
  uint32_t unsound;
  int place;

  __device__ static Largest none() { return {A(-INFINITY), 0, INT32_MAX}; }
  __device__ void add(A x, int i) {
    if (x > top || (x == top && i < place)) {
      top = x;
      place = i;
    }
    unsound |= !(x < A(INFINITY));
  }
  __device__ bool answers() const { return !unsound && top > A(-INFINITY); }
  __device__ static Largest of(const Largest& a, const Largest& b) {
    Largest out = a.top > b.top || (a.top == b.top && a.place < b.place) ? a : b;
    out.unsound = a.unsound | b.unsound;
    return out;
  }
};

// The same with the sums of a softmax, relative to the largest logit: of e = exp((x - top) / T),
// and of e times its exponent.
template <class A>
struct Softmax {
  Largest<A> largest;
  A sum, dot;

  __device__ static Softmax none() { return {Largest<A>::none(), A(0), A(0)}; }
  template <int n>
  __device__ void add(const A (&x)[n], int from, A rate) {
    const A before = largest.top;
#pragma unroll
    for (int j = 0; j < n; ++j) largest.add(x[j], from + j);
    if (largest.top > before)
      *this = {largest, rescaled(before, rate, sum), rescaled_dot(before, rate)};
    if (largest.top == A(-INFINITY)) return;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const A y = (x[j] - largest.top) * rate, e = exponential(y);
      sum += e;
      dot += weighted(e, y);
    }
  }
  // Sums relative to `before`, made relative to the largest logit now.
  __device__ A rescaled(A before, A rate, A value) const {
    return before == A(-INFINITY) ? A(0) : value * exponential((before - largest.top) * rate);
  }
  __device__ A rescaled_dot(A before, A rate) const {
    if (before == A(-INFINITY)) return A(0);
    const A y = (before - largest.top) * rate;
    return weighted(exponential(y), dot + sum * y);
  }
};

template <class A>
__device__ inline Softmax<A> merge(Softmax<A> a, Softmax<A> b, A rate) {
  const A top_a = a.largest.top, top_b = b.largest.top;
  a.largest = b.largest = Largest<A>::of(a.largest, b.largest);
  return {a.largest, a.rescaled(top_a, rate, a.sum) + b.rescaled(top_b, rate, b.sum),
          a.rescaled_dot(top_a, rate) + b.rescaled_dot(top_b, rate)};
}

template <class A, class Threads>
__device__ inline RecordRow<A> record_of(const StatisticsCall& call, const Record& teacher,
                                         int64_t row, Threads& threads, A rate) {
  const int32_t* const index = teacher.indices + row * teacher.k;
  const int64_t others = call.classes - teacher.k;
  const auto at = [&](int64_t i) { return element<A>(teacher.log_probs, row, i); };
  Largest<A> own = Largest<A>::none();
  for (int64_t i = threads.thread(); i < teacher.k; i += threads.threads()) {
    own.add(at(i), index[i]);
    own.unsound |= index[i] < 0 || index[i] >= call.classes;
  }
  const Largest<A> largest = threads.reduce(
      own, [](const Largest<A>& a, const Largest<A>& b) { return Largest<A>::of(a, b); });
  const A tail = others > 0 ? element<A>(teacher.log_tail, row, 0) : A(-INFINITY);
  const A top = largest.answers() ? maximum(tail, largest.top) : A(0);
  A sums[] = {A(0), A(0)};  // of the k: exponentials, those times their exponent
  for (int64_t i = threads.thread(); i < teacher.k; i += threads.threads()) {
    const A y = (at(i) - top) * rate, e = exponential(y);
    sums[0] += e;
    sums[1] += weighted(e, y);
  }
  threads.sum(sums);
  if (!largest.answers()) return no_record<A>(kNoAnswer);
  const A tail_shift = (tail - top) * rate;
  const A tail_exp = tail == A(-INFINITY) ? A(0) : exponential(tail_shift);
  return finish_record<A>(largest.place,
                          {sums[0], exponential((largest.top - top) * rate), tail_exp * A(others),
                           tail_exp == A(0) ? A(0) : tail_shift},
                          sums[1], call.tail_policy, others, kNoAnswer);
}

// S, A: the arithmetic of the student and of the teacher.
template <class S, class A, int Width>
__global__ void __launch_bounds__(kThreads) kd_statistics_kernel(const StatisticsCall call) {
  const A rate = A(1.0 / call.temperature);
  constexpr bool split = Width == kThreads;
  constexpr int rows_a_block = kThreads / Width;
  RowThreads<Width, split> threads;
  const int classes = int(call.classes);
  const bool dense = call.teacher.data;
  // All threads of a row have the same row, so that they meet at every reduction.
  for (int64_t row = int64_t(blockIdx.x) / threads.blocks * rows_a_block + threadIdx.x / Width;
       row < call.rows; row += int64_t(gridDim.x) / threads.blocks * rows_a_block) {
    Largest<S> student = Largest<S>::none();
    Softmax<A> teacher = Softmax<A>::none();
    stream<S>(call.student, row, classes, threads, [&](int from, const auto& x) {
#pragma unroll
      for (int j = 0; j < int(sizeof(x) / sizeof(S)); ++j) student.add(x[j], from + j);
    });
    if (dense)
      stream<A>(call.teacher, row, classes, threads,
                [&](int from, const auto& x) { teacher.add(x, from, rate); });
    student = threads.reduce(
        student, [](const Largest<S>& a, const Largest<S>& b) { return Largest<S>::of(a, b); });
    const int64_t student_label = student.answers() ? student.place : kNoAnswer;
    RecordRow<A> out = no_record<A>(kNoAnswer);
    if (dense) {
      teacher = threads.reduce(
          teacher, [rate](const Softmax<A>& a, const Softmax<A>& b) { return merge(a, b, rate); });
      if (teacher.largest.answers()) {
        const ConfidenceRow<A> sure = finish_confidence(teacher.sum, A(0), teacher.dot);
        out = {teacher.largest.place, sure.confidence, sure.entropy};
      }
    } else if (call.named_count != 0) {
      out = record_of<A>(call, call.named[0], row, threads, rate);
      if (call.mix)
        out = mix_records(out, record_of<A>(call, call.named[1], row, threads, rate),
                          A(call.mix[row]), kNoAnswer);
    }
    if (!threads.leads()) continue;
    call.student_label[row] = student_label;
    if (!call.teacher_label) continue;
    call.teacher_label[row] = out.label;
    static_cast<A*>(call.confidence)[row] = out.confidence;
    static_cast<A*>(call.entropy)[row] = out.entropy;
    call.agreement[row] = student_label == out.label;
  }
  threads.leave();
}

template <class S, class A>
void launch(const StatisticsCall& call, const Device& device, cudaStream_t stream) {
  const auto blocks = [&](int64_t rows_a_block) {
    return unsigned(std::min<int64_t>((call.rows + rows_a_block - 1) / rows_a_block, 1 << 17));
  };
  if (call.classes <= kWarpClasses)
    return launch_kernel("kd_statistics", kd_statistics_kernel<S, A, 32>,
                         {blocks(kThreads / 32), kThreads}, stream, call);
  // Rows that leave multiprocessors without work are spread over more of them.
  constexpr int64_t kBlockClasses = 4096;  // at least
  unsigned cluster = 1;
  while (device.clusters && cluster < 8 && call.rows * cluster < device.multiprocessors * 2 &&
         call.classes >= kBlockClasses * 2 * cluster)
    cluster *= 2;
  launch_kernel("kd_statistics", kd_statistics_kernel<S, A, kThreads>,
                {blocks(1) * cluster, kThreads, 2 * kToldBytes, cluster}, stream, call);
}

Record record_tensors(const Tensor& indices, const Tensor& log_probs, const Tensor& log_tail) {
  return {indices.size(1),
          static_cast<const int32_t*>(indices.const_data_ptr()),
          matrix_of(log_probs, "kd_statistics"),
          {log_tail.const_data_ptr(), 1, dtype_of(log_tail, "kd_statistics")}};
}

StatisticsResult kd_statistics(Tensor student, std::optional<Tensor> teacher,
                               std::optional<Tensor> indices, std::optional<Tensor> log_probs,
                               std::optional<Tensor> log_tail, std::optional<Tensor> second_indices,
                               std::optional<Tensor> second_log_probs,
                               std::optional<Tensor> second_log_tail, std::optional<Tensor> mix,
                               int64_t tail_policy, double temperature) {
  const RecordTensors records = {indices,          log_probs,       log_tail, second_indices,
                                 second_log_probs, second_log_tail, mix};
  check_statistics_arguments(student, teacher, records, tail_policy);
  const DeviceGuard guard(student.get_device());
  const StatisticsTensors made = empty_statistics(student, {teacher, log_probs, second_log_probs});
  launch_statistics(student, teacher, records, tail_policy, temperature, made);
  return statistics_result(student, made);
}

}  // namespace

void launch_statistics(const Tensor& student, const std::optional<Tensor>& teacher,
                       const RecordTensors& records, int64_t tail_policy, double temperature,
                       const StatisticsTensors& to) {
  StatisticsCall call{};
  call.rows = student.size(0);
  call.classes = student.size(1);
  if (call.rows == 0) return;
  call.student = matrix_of(student, "kd_statistics");
  call.tail_policy = int(tail_policy);
  call.temperature = temperature;
  call.student_label = static_cast<int64_t*>(to.student_label->mutable_data_ptr());
  if (teacher) call.teacher = matrix_of(*teacher, "kd_statistics");
  if (records.indices) {
    call.named[0] = record_tensors(*records.indices, *records.log_probs, *records.log_tail);
    call.named_count = 1;
  }
  if (records.mix) {
    call.named[1] = record_tensors(*records.second_indices, *records.second_log_probs,
                                   *records.second_log_tail);
    call.named_count = 2;
    call.mix = static_cast<const float*>(records.mix->const_data_ptr());
  }
  if (to.teacher_label) {
    call.teacher_label = static_cast<int64_t*>(to.teacher_label->mutable_data_ptr());
    call.confidence = to.confidence->mutable_data_ptr();
    call.entropy = to.entropy->mutable_data_ptr();
    call.agreement = static_cast<bool*>(to.agreement->mutable_data_ptr());
  }
  const bool wide_student = call.student.dtype == Dtype::float64;
  const bool wide_teacher = to.confidence && to.confidence->scalar_type() == ScalarType::Double;
  const cudaStream_t stream = stream_of(student);
  const Device device = device_of(student);
  if (wide_student && wide_teacher)
    launch<double, double>(call, device, stream);
  else if (wide_student)
    launch<double, float>(call, device, stream);
  else if (wide_teacher)
    launch<float, double>(call, device, stream);
  else
    launch<float, float>(call, device, stream);
}

}  // namespace fastscarce::cuda

STABLE_TORCH_LIBRARY_IMPL(fastscarce, FASTSCARCE_DEVICE, m) {
  m.impl("kd_statistics", TORCH_BOX(&fastscarce::cuda::kd_statistics));
}
