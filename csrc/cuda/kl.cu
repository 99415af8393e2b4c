// KL(p || q) and the label term on a GPU. Terms: csrc/math/kd_row.h.
//
// Three sweeps of a row that is read once: maxima, sums, gradient. Exponentials are made twice,
// which costs less than room for them.
#include <math.h>

#include <algorithm>
#include <cstring>

#include "device.cuh"
#define FS_HD __host__ __device__
#include "../math/kd_factors.h"
#include "kd_call.h"

namespace fastscarce::cuda {
namespace {

// clang-format off: each needs those before it
#include "../math/kd_row.h"
#include "block.cuh"
#include "chunks.cuh"
#include "exponential.cuh"
#include "held_rows.cuh"
#include "kd_call.cuh"
#include "kd_kernel.cuh"
// clang-format on

template <class S, class A>
struct KlLoss {
  static constexpr int n = kChunk<S>;
  const KdCall& call;
  bool teacher;
  double temperature;
  LabelTerm<S, A> label;
  typename ExponentialOf<S>::type at_temperature;

  __device__ KlLoss(const KdCall& call_, const KdFactors& factors)
      : call(call_),
        teacher(factors.kd_loss != 0),
        temperature(teacher ? call_.temperature : 1.0),
        label(call_, factors, temperature),
        at_temperature(1.0 / temperature) {}

  template <class Rows>
  __device__ A operator()(Rows& held, Worth<A>& worth) const {
    struct Maxima {
      A student, teacher;
    } top = {A(-INFINITY), A(-INFINITY)};
    held.first_sweep([&](int, const A(&s)[n], const A(&t)[n]) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        top.student = maximum(top.student, s[j]);
        if (teacher) top.teacher = maximum(top.teacher, t[j]);
      }
    });
    top = held.group.reduce(top, [](const Maxima& a, const Maxima& b) {
      return Maxima{maximum(a.student, b.student), maximum(a.teacher, b.teacher)};
    });
    KdStatistics<A> all = kd_empty(A(0));
    all.student_max = finite_top(top.student);
    all.teacher_max = finite_top(top.teacher);

    held.sweep([&](int from, const A(&s)[n], const A(&t)[n]) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const A x = s[j] - all.student_max;
        const A e = at_temperature(x);
        all.student_sum += e;
        if (label.given && label.power != 1) all.label_sum += label.exponential_of(x, e);
        if (teacher) {
          const A y = t[j] - all.teacher_max;
          const A p = at_temperature(y);
          all.teacher_sum += p;
          all.gap += kd_gap_term(p, y, x);
        }
        label.add(held.row, from, j, x, all.logit_sum, all.soft_mass, all.soft_dot);
      }
    });
    A sums[] = {all.student_sum, all.teacher_sum, all.gap,     all.label_sum,
                all.logit_sum,   all.soft_mass,   all.soft_dot};
    const bool own_label = label.given && label.power != 1;
    held.group.sum(sums, 1u | (teacher ? 6u : 0u) | (own_label ? 8u : 0u) |
                             (label.smoothing ? 16u : 0u) | (label.dense ? 96u : 0u));
    all.student_sum = sums[0];
    all.teacher_sum = sums[1];
    all.gap = sums[2];
    all.label_sum = !label.given ? A(0) : label.power == 1 ? sums[0] : sums[3];
    all.logit_sum = sums[4];
    all.soft_mass = sums[5];
    all.soft_dot = sums[6];
    all.count = A(label.classes);

    worth.w.label_dot = label.dot(worth.label, held.first, all.student_max);
    const KdCoefficients<A> c =
        kd_finish(all, worth.w, A(1.0 / temperature), A(call.label_smoothing),
                  A(1.0 / double(label.classes)), A(call.threshold), label.dense);
    if (!held.out) return c.loss;
    held.sweep([&](int from, const A(&s)[n], const A(&t)[n]) {
      A g[n];
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const A x = s[j] - all.student_max;
        const A e = at_temperature(x);
        const A own = label.given ? label.exponential_of(x, e) : A(0);
        g[j] = kd_gradient(c, e, own, teacher ? at_temperature(t[j] - all.teacher_max) : A(0));
      }
      label.subtract(held.row, from, c, worth.label, g);
      held.store(from, g);
    });
    return c.loss;
  }
};

}  // namespace

void launch_kl(const KdCall& call, const Device& device, cudaStream_t stream) {
  with_dtype(call.student.dtype, [&](auto s, auto a) {
    using S = typename decltype(s)::type;
    using A = typename decltype(a)::type;
    const auto launch = [&](auto rows) {
      launch_held<typename decltype(rows)::type, KlLoss<S, A>>(call, device, stream);
    };
    if (!call.teacher.data || call.teacher.dtype == call.student.dtype)
      with_rows<S, A, Beside::same, true>(call.classes, launch);
    else
      with_rows<S, A, Beside::other, true>(call.classes, launch);
  });
}

}  // namespace fastscarce::cuda
