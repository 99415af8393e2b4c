// The distillation loss with TopK teachers on a GPU. Terms: csrc/math/topk_teacher.h.
//
// The student's row is read once and swept as in kl.cu; of the teacher only the k classes are read,
// and of the student, once more, those k logits. Each gradient is written by the last sweep; those
// of the k are then computed anew, whole, and written over it (in 16 bits a second rounding would
// show). `tail` marks the k in shared memory, a bit a class, so that the sum over the others is
// made without them.
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
#include "../math/topk_teacher.h"
#include "block.cuh"
#include "chunks.cuh"
#include "exponential.cuh"
#include "held_rows.cuh"
#include "kd_call.cuh"
#include "kd_kernel.cuh"
// clang-format on

// A row of one teacher: y of its classes, and what they amount to.
template <class A>
struct TeacherView {
  const int32_t* index;
  Matrix log_probs, log_tail;
  int64_t row;
  int k;
  A top = A(0), share = A(1);
  TeacherRow<A> of = {};

  __device__ void place(const KdCall& call, int which, int64_t row_) {
    const TopKTeacher& teacher = call.named[which];
    row = row_;
    k = int(teacher.k);
    index = teacher.indices + row * teacher.k;
    log_probs = teacher.log_probs;
    log_tail = teacher.log_tail;
    if (call.mix) share = which == 0 ? A(call.mix[row]) : A(1) - A(call.mix[row]);
  }
  __device__ A log_prob(int i) const { return element<A>(log_probs, row, i); }
  __device__ A tail(int64_t classes) const {
    return classes > k ? element<A>(log_tail, row, 0) : A(-INFINITY);
  }
  __device__ A shift(int i, A rate) const { return (log_prob(i) - top) * rate; }
  __device__ A delta(int i, A rate) const {
    return (exponential(shift(i, rate)) * of.inverse - of.each) * share;
  }
};

// Maxima: of the swept classes (`tail`: the others), of the student's k, of each record.
template <class A>
struct TopKMaxima {
  A swept, named, record[2];
  uint32_t outside;  // an index is outside the classes

  __device__ static TopKMaxima none() {
    return {A(-INFINITY), A(-INFINITY), {A(-INFINITY), A(-INFINITY)}, 0};
  }
  __device__ static TopKMaxima larger(const TopKMaxima& a, const TopKMaxima& b) {
    return {maximum(a.swept, b.swept),
            maximum(a.named, b.named),
            {maximum(a.record[0], b.record[0]), maximum(a.record[1], b.record[1])},
            a.outside | b.outside};
  }
};

template <class S, class A, int Policy>
struct TopKLoss {
  static constexpr bool bucket = Policy == kTailBucket, support = Policy == kTailSupport;
  static constexpr int n = kChunk<S>;
  const KdCall& call;
  LabelTerm<S, A> label;
  typename ExponentialOf<S>::type at_temperature;
  A rate;

  __device__ TopKLoss(const KdCall& call_, const KdFactors& factors)
      : call(call_),
        label(call_, factors, call_.temperature),
        at_temperature(1.0 / call_.temperature),
        rate(A(1.0 / call_.temperature)) {}

  // Bits of the chunks of this block, those of the k set.
  template <class Rows>
  __device__ uint32_t* marked(Rows& held, const TeacherView<A>& view) const {
    const int words = marked_words(
        Rows::split ? (held.chunks + held.group.blocks - 1) / held.group.blocks : Rows::capacity);
    uint32_t* const bits =
        reinterpret_cast<uint32_t*>(dynamic_shared<unsigned char>() + call.marks) +
        (Rows::split ? 0 : int(threadIdx.x) / Rows::width * words);
    held.group.barrier();  // the last row's are read
    for (int i = held.group.lane; i < words; i += Rows::width) bits[i] = 0;
    held.group.barrier();
    for (int i = held.group.lane; i < view.k; i += Rows::width) {
      const int place = view.index[i];
      if (place < 0 || place >= call.classes || !held.owns(place)) continue;
      const int bit = held.place_of(place);
      atomicOr(&bits[bit / 32], 1u << (bit % 32));
    }
    held.group.barrier();
    return bits;
  }
  __host__ __device__ static constexpr int marked_words(int chunks) {
    return (chunks * n + 31) / 32;
  }

  // What is known of the teachers before the student is looked at.
  template <class Rows>
  __device__ TeacherRow<A> teacher_of(Rows& held, TeacherView<A> (&view)[2], int teachers,
                                      const TopKMaxima<A>& top, A& mass) const {
    A chosen[] = {A(0), A(0)};
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      if (t >= teachers) continue;
      view[t].top = finite_top(maximum(view[t].tail(call.classes), top.record[t]));
      for (int i = held.group.thread(); i < view[t].k; i += held.group.threads())
        chosen[t] += exponential(view[t].shift(i, rate));
    }
    held.group.sum(chosen, teachers == 2 ? 3u : 1u);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      if (t >= teachers) continue;
      const int64_t others = call.classes - view[t].k;
      const A tail = view[t].tail(call.classes), tail_shift = (tail - view[t].top) * rate;
      const A tail_exp = tail == A(-INFINITY) ? A(0) : exponential(tail_shift);
      view[t].of = finish_teacher<A>({chosen[t], exponential((top.record[t] - view[t].top) * rate),
                                      tail_exp * A(others), tail_exp == A(0) ? A(0) : tail_shift},
                                     call.tail_policy, others);
    }
    TeacherRow<A> teacher = view[0].of;
    mass = teacher.inverse == A(0) ? A(0) : A(1);
    if (teachers == 1) return teacher;
    teacher = {A(1), A(0), A(0), A(0), A(0), A(0)};
    mass = A(0);
    for (int t = 0; t < 2; ++t) {
      teacher.each += view[t].share * view[t].of.each;
      teacher.confidence += view[t].share * view[t].of.confidence;
      if (view[t].of.inverse != A(0)) mass += view[t].share;
    }
    return teacher;
  }

  template <class Rows>
  __device__ A operator()(Rows& held, Worth<A>& worth) const {
    const int teachers = call.mix ? 2 : 1;
    TeacherView<A> view[2];
    view[0].place(call, 0, held.row);
    view[1].place(call, 1, held.row);  // of no classes, where there is none
    const auto student_at = [&](int i) { return A(number(held.first[i])); };
    // f(t, i) of the k of each teacher, shared among the threads.
    const auto over_named = [&](auto f) {
#pragma unroll
      for (int t = 0; t < 2; ++t)
        if (t < teachers)
          for (int i = held.group.thread(); i < view[t].k; i += held.group.threads()) f(t, i);
    };
    [[maybe_unused]] const uint32_t* bits = nullptr;
    if constexpr (bucket) bits = marked(held, view[0]);
    // Whether element j of a chunk is one of the k; all bits of a chunk are in one word.
    const auto marks_of = [&](int from) -> uint32_t {
      if constexpr (!bucket) return 0;
      const int bit = held.place_of(from);
      return bits[bit / 32] >> (bit % 32);
    };

    // `support` asks for the whole row on the label's account alone.
    const bool whole = !support || label.given;
    TopKMaxima<A> top = TopKMaxima<A>::none();
    const auto over_maxima = [&](int from, const A(&s)[n], const A(&)[n]) {
      const uint32_t marks = marks_of(from);
#pragma unroll
      for (int j = 0; j < n; ++j)
        top.swept = maximum(top.swept, marks >> j & 1u ? A(-INFINITY) : s[j]);
    };
    if (whole) held.first_sweep(over_maxima);
    over_named([&](int t, int i) {
      const int place = view[t].index[i];
      const bool inside = place >= 0 && place < call.classes;
      top.outside |= inside ? 0u : 1u;
      top.record[t] = maximum(top.record[t], view[t].log_prob(i));
      if ((bucket || support) && inside) top.named = maximum(top.named, student_at(place));
    });
    top = held.group.reduce(top, [](const TopKMaxima<A>& a, const TopKMaxima<A>& b) {
      return TopKMaxima<A>::larger(a, b);
    });
    if (top.outside) {
      held.clear();
      return A(NAN);
    }
    A mass;
    const TeacherRow<A> teacher = teacher_of(held, view, teachers, top, mass);
    const A whole_max = finite_top(maximum(top.swept, top.named));
    const A swept_max = finite_top(top.swept), named_max = finite_top(top.named);
    // Of the k's exponentials.
    const A reference_max = support ? named_max : whole_max;

    // Sums: of the swept at T, of the others' logits, of the excluded classes; gap, of the k at T;
    // of all at T = 1; logits, and dense labels.
    A sums[] = {A(0), A(0), A(0), A(0), A(0), A(0), A(0), A(0), A(0)};
    const bool spread = teacher.each != A(0);
    const bool own_label = label.given && (bucket || support || label.apart());
    const auto over_sums = [&](int from, const A(&s)[n], const A(&)[n]) {
      const uint32_t marks = marks_of(from);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const bool within = from + j >= 0 && from + j < label.classes;
        const A x = s[j] - whole_max;
        const A e = support ? A(0) : at_temperature(s[j] - swept_max);
        if (!support) sums[0] += marks >> j & 1u ? A(0) : e;
        if (spread && within) {
          sums[1] += s[j] == A(-INFINITY) ? A(0) : x;
          sums[2] += s[j] == A(-INFINITY) ? A(1) : A(0);
        }
        // Where nothing stands apart, both are relative to the same maximum.
        if (own_label) sums[5] += bucket || support ? label.at_one(x) : label.exponential_of(x, e);
      }
      label.add(held.row, from, s, whole_max, sums[6], sums[7], sums[8]);
    };
    if (whole) held.sweep(over_sums);
    over_named([&](int t, int i) {
      const A s = student_at(view[t].index[i]), x = (s - reference_max) * rate;
      const A delta = view[t].delta(i, rate);
      sums[3] += teachers == 2 ? weighted(delta, -x)
                               : weighted(delta + teacher.each, view[t].shift(i, rate) - x);
      if (bucket || support) sums[4] += exponential(x);
      if (teachers == 1 && spread) {
        sums[1] -= s == A(-INFINITY) ? A(0) : s - whole_max;
        sums[2] -= s == A(-INFINITY) ? A(1) : A(0);
      }
    });
    held.group.sum(sums, (support ? 0u : 1u) | (spread ? 6u : 0u) | 8u |
                             (bucket || support ? 16u : 0u) | (own_label ? 32u : 0u) |
                             (label.smoothing ? 64u : 0u) | (label.dense ? 384u : 0u));
    const A swept_sum = sums[0], gap = sums[3], named_sum = sums[4];
    KdStatistics<A> ce = kd_empty(A(0));
    ce.student_max = whole_max;
    ce.label_sum = !label.given ? A(0) : own_label ? sums[5] : swept_sum;
    ce.logit_sum = sums[6];
    ce.soft_mass = sums[7];
    ce.soft_dot = sums[8];
    ce.count = A(label.classes);

    TopKTerm<A> term;
    if constexpr (support) {
      term = finish_support(teacher, named_sum, gap);
    } else if constexpr (bucket) {
      const A rest_max = (swept_max - whole_max) * rate;
      const A whole_sum =
          named_sum + (swept_sum == A(0) ? A(0) : swept_sum * exponential(rest_max));
      term = finish_bucket(teacher, call.classes - view[0].k, whole_sum, swept_sum, rest_max, gap);
    } else {
      term = finish_spread(teacher, mass, swept_sum, gap, sums[1] * rate, sums[2] > A(0));
    }
    KdWeights<A>& w = worth.w;
    const bool taught = w.kd_loss != A(0) && !(teacher.confidence < A(call.threshold));
    if (!taught) term = no_term(A(0));
    w.label_dot = label.dot(worth.label, held, whole_max);
    const KdCoefficients<A> c = kd_finish_label(ce, w, A(call.label_smoothing),
                                                A(1.0 / double(label.classes)), label.dense);
    const A loss = c.loss + (taught ? w.kd_loss * term.loss : A(0));
    if (!held.out) return loss;

    const A by = w.kd_gradient, constant = c.constant + by * term.constant;
    const A others = support ? A(0) : by * term.others, chosen = by * term.chosen;
    const auto over_gradient = [&](int from, const A(&s)[n], const A(&)[n]) {
      A g[n];
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const A x = s[j] - whole_max;
        const A e = support ? A(0) : at_temperature(s[j] - swept_max);
        g[j] = others * e - constant;
        if (label.given)
          g[j] += c.label * (bucket || support ? label.at_one(x) : label.exponential_of(x, e));
      }
      label.subtract(held.row, from, c, worth.label, g);
      held.store(from, g);
    };
    if (whole)
      held.sweep(over_gradient);
    else
      held.clear();
    // Those of the k that are of this block, after its sweep.
    held.group.barrier();
    const bool pulls = taught && term.chosen != A(0);
#pragma unroll
    for (int t = 0; t < 2; ++t)
      for (int i = held.group.lane; t < teachers && i < view[t].k; i += Rows::width) {
        const int32_t place = view[t].index[i];
        if (!held.owns(place)) continue;
        A delta = view[t].delta(i, rate);
        if (teachers == 2) {
          // A class that both name: the same sum, in the same order, whoever writes it.
          delta = A(0);
#pragma unroll
          for (int u = 0; u < 2; ++u)
            for (int j = 0; j < view[u].k; ++j)
              if (view[u].index[j] == place) delta += view[u].delta(j, rate);
        }
        const A s = student_at(place);
        A g = -constant - (pulls ? by * delta : A(0));
        g += bucket || support ? chosen * exponential((s - reference_max) * rate)
                               : others * exponential((s - swept_max) * rate);
        if (label.given) g += c.label * exponential(s - whole_max);
        if (label.dense) {
          g -= c.hard * element<A>(call.soft, held.row, place);
        } else if (label.given) {
          if (place == worth.label.first) g -= c.hard * worth.label.first_share;
          if (place == worth.label.second) g -= c.hard * worth.label.second_share;
        }
        put(held.out + place, g);
      }
    return loss;
  }
};

template <class S, class A>
using SpreadLoss = TopKLoss<S, A, kTailUniform>;  // and renorm
template <class S, class A>
using BucketLoss = TopKLoss<S, A, kTailBucket>;
template <class S, class A>
using SupportLoss = TopKLoss<S, A, kTailSupport>;

}  // namespace

void launch_topk_teacher(const KdCall& call, const Device& device, cudaStream_t stream) {
  if (call.tail_policy == kTailBucket)
    // A bit a class, in words.
    with_one_row<Kinds::split>(call.student, call.classes, [&](auto rows) {
      launch_loss<BucketLoss>(rows, call, device, stream, decltype(rows)::type::n, 4);
    });
  else if (call.tail_policy == kTailSupport)
    with_one_row<Kinds::split>(call.student, call.classes, [&](auto rows) {
      launch_loss<SupportLoss>(rows, call, device, stream);
    });
  else
    with_one_row<Kinds::few>(call.student, call.classes, [&](auto rows) {
      launch_loss<SpreadLoss>(rows, call, device, stream);
    });
}

}  // namespace fastscarce::cuda
