// The divergences beside KL(p || q) on a GPU. Terms: csrc/math/divergence.h.
//
// Sweeps of a row that is read once: maxima; logit-standard's mean and deviation; sums of
// exponentials; for reverse KL, JSD and skew KL the sums of `mixture`; the gradient. The labels of
// a DKD row stand apart: the sweeps find -inf in their places.
#include <math.h>

#include <algorithm>
#include <cstring>

#include "device.cuh"
#define FS_HD __host__ __device__
#include "../math/divergence_names.h"
#include "../math/kd_factors.h"
#include "kd_call.h"

namespace fastscarce::cuda {
namespace {

// clang-format off: each needs those before it
#include "../math/kd_row.h"
#include "../math/divergence.h"
#include "block.cuh"
#include "chunks.cuh"
#include "exponential.cuh"
#include "held_rows.cuh"
#include "kd_call.cuh"
#include "kd_kernel.cuh"
// clang-format on

// A number of the student's row, and the teacher's.
template <class A>
struct Both {
  A student, teacher;
};

// The labels of a DKD row.
template <class A>
struct Members {
  int index[2];
  int count;
  Both<A> logit[2] = {};

  __device__ Members(const Label<A>& label) {
    const bool one = label.first >= 0 && label.first_counts;
    const bool two =
        label.second >= 0 && label.second_counts && !(one && label.second == label.first);
    index[0] = one ? label.first : two ? label.second : -1;
    index[1] = one && two ? label.second : -1;
    count = int(one) + int(two);
  }
};

// Name: DKD, logit-standard, or any of those with a mixture: which, is asked of the call.
template <class S, class A, int Name>
struct DivergenceLoss {
  static constexpr int n = kChunk<S>;
  static constexpr bool dkd = Name == kDkd, standard = Name == kLogitStandard;
  static constexpr bool mixed = needs_mixture(Name);
  using Exponential = typename ExponentialOf<S>::type;
  const KdCall& call;
  // Of logit-standard the exponential at T, which is different in each row, has no such squares.
  LabelTerm<S, A> label;

  __device__ DivergenceLoss(const KdCall& call_, const KdFactors& factors)
      : call(call_), label(call_, factors, standard ? 0.0 : call_.temperature) {}

  // Mean and standard deviation (n - 1) of the finite logits of both rows, less `top`.
  template <class Rows>
  __device__ void deviations(Rows& held, const Both<A>& top, Both<A>& centre, Both<A>& deviation,
                             A& count) const {
    A sums[] = {A(0), A(0), A(0), A(0)};
    held.sweep([&](int, const A(&s)[n], const A(&t)[n]) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        sums[0] += s[j] == A(-INFINITY) ? A(0) : s[j] - top.student;
        sums[1] += t[j] == A(-INFINITY) ? A(0) : t[j] - top.teacher;
        sums[2] += s[j] == A(-INFINITY) ? A(0) : A(1);
        sums[3] += t[j] == A(-INFINITY) ? A(0) : A(1);
      }
    });
    held.group.sum(sums);
    centre = {sums[2] > A(0) ? sums[0] / sums[2] : A(0), sums[3] > A(0) ? sums[1] / sums[3] : A(0)};
    A squares[] = {A(0), A(0)};
    held.sweep([&](int, const A(&s)[n], const A(&t)[n]) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const A x = (s[j] - top.student) - centre.student;
        const A y = (t[j] - top.teacher) - centre.teacher;
        squares[0] += s[j] == A(-INFINITY) ? A(0) : x * x;
        squares[1] += t[j] == A(-INFINITY) ? A(0) : y * y;
      }
    });
    held.group.sum(squares);
    const auto root = [](A square, A of) {
      return of > A(1) ? A(sqrt(square / (of - A(1)))) : A(0);
    };
    deviation = {root(squares[0], sums[2]), root(squares[1], sums[3])};
    count = sums[2];
  }

  template <class Rows>
  __device__ A operator()(Rows& held, Worth<A>& worth) const {
    Members<A> members(worth.label);
    A whole_max = A(-INFINITY);
    if constexpr (dkd)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (i >= members.count) continue;
        members.logit[i] = {held.first_at(members.index[i]), held.second_at(members.index[i])};
        whole_max = maximum(whole_max, members.logit[i].student);
      }
    // f(from, s, t, s with the labels) of each chunk.
    const auto without_labels = [&](auto f) {
      return [&members, f](int from, const A(&s)[n], const A(&t)[n]) mutable {
        if constexpr (dkd) {
          A left[n], right[n];
#pragma unroll
          for (int j = 0; j < n; ++j) {
            const bool apart = from + j == members.index[0] || from + j == members.index[1];
            left[j] = apart ? A(-INFINITY) : s[j];
            right[j] = apart ? A(-INFINITY) : t[j];
          }
          f(from, left, right, s);
        } else {
          f(from, s, t, s);
        }
      };
    };

    Both<A> top = {A(-INFINITY), A(-INFINITY)};
    held.first_sweep(without_labels([&](int, const A(&s)[n], const A(&t)[n], const A(&)[n]) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        top.student = maximum(top.student, s[j]);
        top.teacher = maximum(top.teacher, t[j]);
      }
    }));
    top = held.group.reduce(top, [](const Both<A>& a, const Both<A>& b) {
      return Both<A>{maximum(a.student, b.student), maximum(a.teacher, b.teacher)};
    });
    whole_max = finite_top(maximum(whole_max, top.student));
    top = {finite_top(top.student), finite_top(top.teacher)};

    const double rate = 1.0 / call.temperature;
    double student_rate_ = rate, teacher_rate_ = rate;
    Both<A> centre = {A(0), A(0)}, deviation = {A(0), A(0)};
    A count = A(0);
    if constexpr (standard) {
      deviations(held, top, centre, deviation, count);
      student_rate_ /= double(deviation.student) + kStandardEpsilon;
      teacher_rate_ /= double(deviation.teacher) + kStandardEpsilon;
    }
    const Exponential student_exponential(student_rate_), teacher_exponential(teacher_rate_);
    const A student_rate = A(student_rate_), teacher_rate = A(teacher_rate_);

    A sums[] = {A(0), A(0), A(0), A(0), A(0), A(0), A(0), A(0), A(0)};
    held.sweep(without_labels([&](int from, const A(&s)[n], const A(&t)[n], const A(&whole)[n]) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const A x = s[j] - top.student, y = t[j] - top.teacher;
        const A e = student_exponential(x), p = teacher_exponential(y);
        sums[0] += e;
        sums[1] += p;
        if constexpr (!mixed) sums[2] += select(p, p * (y * teacher_rate - x * student_rate), A(0));
        if constexpr (standard) {
          sums[3] += e * finite_or_zero(x);
          sums[4] += p * finite_or_zero(x);
        }
        if (label.apart()) sums[5] += label.exponential_of(x, e);
      }
      label.add(held.row, from, whole, whole_max, sums[6], sums[7], sums[8]);
    }));
    held.group.sum(sums, 3u | (mixed ? 0u : 4u) | (standard ? 24u : 0u) |
                             (label.apart() ? 32u : 0u) | (label.smoothing ? 64u : 0u) |
                             (label.dense ? 384u : 0u));
    const A student_sum = sums[0], teacher_sum = sums[1], gap = sums[2];
    KdStatistics<A> ce = kd_empty(A(0));
    ce.student_max = whole_max;
    ce.label_sum = !label.given ? A(0) : label.apart() ? sums[5] : student_sum;
    ce.logit_sum = sums[6];
    ce.soft_mass = sums[7];
    ce.soft_dot = sums[8];
    ce.count = A(label.classes);

    Divergence<A> d = no_divergence(A(0));
    A label_gradient[2] = {A(0), A(0)};
    A confidence = A(1) / teacher_sum;
    const A inverse_s = A(1) / student_sum, inverse_t = A(1) / teacher_sum;
    const A log_s = logarithm(student_sum), log_t = logarithm(teacher_sum);
    const A share = A(call.first);
    const auto mixture_of = [&](A x, A y, A e) {
      return mixture(int(call.divergence), share, x * student_rate, y * teacher_rate, e * inverse_s,
                     teacher_exponential(y) * inverse_t, log_s, log_t);
    };
    if constexpr (dkd) {
      const DkdRow<A> row =
          finish(members, top, whole_max, student_rate, student_sum, teacher_sum, gap);
      d = row.rest;
      confidence = row.confidence;
      label_gradient[0] = row.label_gradient[0];
      label_gradient[1] = row.label_gradient[1];
      if (label.given) {
        ce.label_sum =
            ce.label_sum == 0 ? A(0) : ce.label_sum * exponential(top.student - whole_max);
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (i < members.count) ce.label_sum += exponential(members.logit[i].student - whole_max);
      }
    } else if constexpr (standard) {
      if (teacher_sum != 0)
        d = student_sum == 0 ? no_divergence(A(INFINITY))
                             : finish_standard(student_sum, teacher_sum, gap, sums[3], sums[4],
                                               deviation.student, -centre.student, count);
    } else {
      A from[] = {A(0), A(0)};
      held.sweep([&](int, const A(&s)[n], const A(&t)[n]) {
#pragma unroll
        for (int j = 0; j < n; ++j) {
          const A x = s[j] - top.student;
          const Mixture<A> m = mixture_of(x, t[j] - top.teacher, student_exponential(x));
          from[0] += m.from_teacher;
          from[1] += m.from_student;
        }
      });
      held.group.sum(from);
      if (teacher_sum != 0)
        d = student_sum == 0
                ? no_divergence(A(INFINITY))
                : finish_mixture(int(call.divergence), share, student_sum, from[0], from[1]);
    }
    if (!dkd && teacher_sum == 0) confidence = A(0);
    if (confidence < A(call.threshold)) {
      d = no_divergence(A(0));
      label_gradient[0] = label_gradient[1] = A(0);
    }

    KdWeights<A>& w = worth.w;
    w.label_dot = label.dot(worth.label, held, whole_max);
    const KdCoefficients<A> c = kd_finish_label(ce, w, A(call.label_smoothing),
                                                A(1.0 / double(label.classes)), label.dense);
    const A loss = c.loss + (w.kd_loss == 0 ? A(0) : w.kd_loss * d.loss);
    if (!held.out) return loss;
    // Label exponentials are made relative to the rest's maximum, where they are powers of others.
    const A label_by = student_sum == 0 ? A(0) : c.label * exponential(top.student - whole_max);
    // What the sweep leaves out of the labels' own; one that is not there has no place.
    A own[2] = {A(0), A(0)};
    if constexpr (dkd)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (i >= members.count) continue;
        own[i] = w.kd_gradient * label_gradient[i];
        if (label.given) own[i] += c.label * exponential(members.logit[i].student - whole_max);
      }
    held.sweep(without_labels([&](int from, const A(&s)[n], const A(&t)[n], const A(&)[n]) {
      A g[n];
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const A x = s[j] - top.student, y = t[j] - top.teacher;
        const A e = student_exponential(x);
        A distil = d.student * e;
        if (d.second != 0) {
          if constexpr (mixed)
            distil += d.second * mixture_of(x, y, e).z;
          else
            distil += d.second * teacher_exponential(y);
        }
        if (standard && x != A(-INFINITY)) distil += d.logit * x + d.constant;
        g[j] = w.kd_gradient * distil - c.constant;
        if (label.given) g[j] += label_by * label.exponential_of(x, e);
      }
      if constexpr (dkd) {
        label.add_at(g, members.index[0] - from, own[0]);
        label.add_at(g, members.index[1] - from, own[1]);
      }
      label.subtract(held.row, from, c, worth.label, g);
      held.store(from, g);
    }));
    return loss;
  }

  // `top`: of the classes without the labels.
  __device__ DkdRow<A> finish(const Members<A>& members, const Both<A>& top, A whole_max, A rate,
                              A student_sum, A teacher_sum, A gap) const {
    A s[2], t[2];
    // Relative to the whole row's maxima: large logits would lose digits in what follows.
    A teacher_top = top.teacher;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (i < members.count)
        teacher_top = teacher_sum == 0 && i == 0 ? members.logit[i].teacher
                                                 : maximum(teacher_top, members.logit[i].teacher);
    teacher_top = finite_top(teacher_top);
    for (int i = 0; i < 2; ++i) {
      s[i] = (members.logit[i].student - whole_max) * rate;
      t[i] = (members.logit[i].teacher - teacher_top) * rate;
    }
    const DkdRest<A> rest = {(top.student - whole_max) * rate, (top.teacher - teacher_top) * rate,
                             student_sum, teacher_sum, gap};
    return finish_dkd<A>(rest, s, t, members.count, A(call.first), A(call.second));
  }
};

template <class S, class A>
using MixtureLoss = DivergenceLoss<S, A, kJsd>;  // also reverse KL and skew KL
template <class S, class A>
using DkdLoss = DivergenceLoss<S, A, kDkd>;
template <class S, class A>
using StandardLoss = DivergenceLoss<S, A, kLogitStandard>;

}  // namespace

void launch_divergence(const KdCall& call, const Device& device, cudaStream_t stream) {
  with_two_rows<Kinds::few>(call.student, call.teacher, call.classes, [&](auto rows) {
    if (call.divergence == kDkd)
      launch_loss<DkdLoss>(rows, call, device, stream);
    else if (call.divergence == kLogitStandard)
      launch_loss<StandardLoss>(rows, call, device, stream);
    else
      launch_loss<MixtureLoss>(rows, call, device, stream);
  });
}

}  // namespace fastscarce::cuda
