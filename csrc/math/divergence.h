// The divergences beside KL(p || q): what a logit adds to a row's sums, and what a row is worth.
//
//   reverse KL       KL(q || p)
//   JSD(beta)        beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
//   skew KL          KL(p || m), m = lambda p + (1 - lambda) q
//   DKD              a KL of (label, rest) + b KL among the rest; Zhao et al., CVPR 2022
//   logit-standard   KL of logits divided by their standard deviation; Sun et al., CVPR 2024
//
// Every gradient is a sum over few terms with one coefficient a row each:
//   gradient = student * e + second * z + logit * x + constant
// e = exp((s - student_max) * student_rate), x = s - student_max; z is the teacher's exponential,
// or, for the first three, what `mixture` gives (q log(q / p), q log(q / m) or (1 - lambda) p q /
// m).
//
// Included inside the namespace of its user, after kd_row.h, like it; `V` is a number or a vector.

constexpr double kStandardEpsilon = 1e-7;  // added to a standard deviation

// Losses whose sums need both softmaxes, and so a second sweep.
constexpr bool needs_mixture(int divergence) {
  return divergence == kReverseKl || divergence == kJsd || divergence == kSkewKl;
}

// `a` where `condition` is not zero, else 0: for vectors an instruction less than select.
FS_HD inline float zero_unless(float condition, float a) { return condition != 0 ? a : 0.0f; }
FS_HD inline double zero_unless(double condition, double a) { return condition != 0 ? a : 0.0; }

// x, or 0 for -inf.
template <class V>
FS_HD inline V finite_or_zero(V x) {
  return select(maximum(x, V(-3.402823466e38f)) - x, V(0), x);
}

template <class V>
struct Mixture {
  V z, from_teacher, from_student;
};

// x, y: (s - student_max) / T and (t - teacher_max) / T; q, p: the probabilities; log_s, log_t: the
// logarithms of their sums of exponentials.
template <class V>
FS_HD inline Mixture<V> mixture(int divergence, V share, V x, V y, V q, V p, V log_s, V log_t) {
  const V zero = V(0), one = V(1);
  const V log_q = x - log_s, log_p = y - log_t;
  if (divergence == kReverseKl) {
    const V z = zero_unless(q, q * (log_q - log_p));
    return {z, zero, z};
  }
  // The larger of the two, and NaN where m is.
  const V m = maximum(V(1.17549435e-38f), share * p + (one - share) * q);
  const V log_m = logarithm(m);
  const V from_teacher = zero_unless(p, p * (log_p - log_m));
  const V z = divergence == kJsd ? zero_unless(q, q * (log_q - log_m)) : (one - share) * p * q / m;
  return {z, from_teacher, z};
}

// The distillation term of a row: its value, and the coefficients of its gradient.
template <class A>
struct Divergence {
  A loss, student, second, logit, constant;
};

template <class A>
FS_HD inline Divergence<A> no_divergence(A loss) {
  return {loss, A(0), A(0), A(0), A(0)};
}

// `d` where `condition` is not zero, else `loss` without a gradient.
template <class A>
FS_HD inline Divergence<A> divergence_where(A condition, const Divergence<A>& d, A loss) {
  const A zero = A(0);
  return {select(condition, d.loss, loss), select(condition, d.student, zero),
          select(condition, d.second, zero), select(condition, d.logit, zero),
          select(condition, d.constant, zero)};
}

// After the second sweep. student_sum: sum of exponentials. A row that asks for a class which the
// teacher excludes is infinite and teaches nothing.
template <class A>
FS_HD inline Divergence<A> finish_mixture(int divergence, A share, A student_sum, A from_teacher,
                                          A from_student) {
  const A zero = A(0), one = A(1);
  const A mean = from_student / student_sum;
  if (divergence == kReverseKl) {
    const Divergence<A> d = {from_student, zero - mean, one, zero, zero};
    // 0 also for NaN, which stays.
    const A largest = A(3.402823466e38f), infinite = maximum(from_student, largest) - largest;
    return divergence_where(select(infinite, zero, one), d, A(INFINITY));
  }
  if (divergence == kJsd) {
    const A rest = one - share;
    return {share * from_teacher + rest * from_student, zero - rest * mean, rest, zero, zero};
  }
  return {from_teacher, mean, zero - one, zero, zero};
}

// gap: sum of teacher exponentials times the difference of the scaled logits.
template <class A>
FS_HD inline A kl_of(A student_sum, A teacher_sum, A gap) {
  return gap / teacher_sum + logarithm(student_sum / teacher_sum);
}

// student_dot, teacher_dot: sum of exponentials times x. deviation: of the student's logits;
// centre: student_max - their mean; count: how many are finite.
template <class A>
FS_HD inline Divergence<A> finish_standard(A student_sum, A teacher_sum, A gap, A student_dot,
                                           A teacher_dot, A deviation, A centre, A count) {
  const A zero = A(0), one = A(1);
  const A loss = kl_of(student_sum, teacher_sum, gap);
  const A inverse = one / (deviation + A(kStandardEpsilon));
  const A dot = teacher_dot / teacher_sum - student_dot / student_sum;
  const A logit = dot * inverse * inverse / (deviation * (count - one));
  const Divergence<A> d = {loss, inverse / student_sum, zero - inverse / teacher_sum, logit,
                           logit * centre};
  return divergence_where(maximum(deviation, zero), d, loss);
}

// Decoupled distillation. What is left of the row without its labels: sums of exponentials relative
// to its own maxima, the maxima less those of the whole row, all logits times 1 / T; of each label
// (two at most) both logits, less the maxima of the whole row, times 1 / T. A label that is not
// there has -inf twice.
template <class A>
struct DkdRest {
  A student_max, teacher_max, student_sum, teacher_sum, gap;
};

template <class A>
struct DkdRow {
  Divergence<A> rest;
  A label_gradient[2];
  A confidence;  // the teacher's largest probability
};

// Sum of exponentials of the whole row, relative to its maximum.
template <class A>
FS_HD inline A sum_with_labels(A rest_sum, A rest_max, const A* labels, int count) {
  A sum = select(rest_sum, rest_sum * exponential(rest_max), A(0));
  for (int i = 0; i < 2; ++i)
    if (i < count) sum = sum + exponential(labels[i]);
  return sum;
}

// weight_label, weight_rest: the paper's alpha and beta.
template <class A>
FS_HD inline DkdRow<A> finish_dkd(const DkdRest<A>& rest, const A* student, const A* teacher,
                                  int count, A weight_label, A weight_rest) {
  const A zero = A(0), one = A(1), infinity = A(INFINITY);
  DkdRow<A> out = {no_divergence(zero), {zero, zero}, zero};
  const A sum_s = sum_with_labels(rest.student_sum, rest.student_max, student, count);
  const A sum_t = sum_with_labels(rest.teacher_sum, rest.teacher_max, teacher, count);
  const A log_s = logarithm(sum_s), log_t = logarithm(sum_t);
  // No finite teacher logit: nothing to learn. None of the student: infinite, without a gradient.
  const A both = select(sum_t, sum_s, zero);
  A tckd = zero;
  for (int i = 0; i < 2; ++i) {
    if (i >= count) continue;
    const A log_p = teacher[i] - log_t, log_q = student[i] - log_s;
    const A p = exponential(log_p), q = exponential(log_q);
    tckd = tckd + select(p, p * (log_p - log_q), zero);
    out.label_gradient[i] = select(both, weight_label * (q - p), zero);
  }
  out.confidence = select(sum_t, one / sum_t, zero);

  const A log_pn = logarithm(rest.teacher_sum) + (rest.teacher_max - log_t);
  const A log_qn = logarithm(rest.student_sum) + (rest.student_max - log_s);
  const A pn = select(rest.teacher_sum, exponential(log_pn), zero);
  const A qn = exponential(log_qn);
  const A shared = select(rest.teacher_sum, rest.student_sum, zero);
  const A label_loss = tckd + select(pn, pn * (log_pn - log_qn), zero);
  const A rest_loss = kl_of(rest.student_sum, rest.teacher_sum, rest.gap);
  // Where only one side has other classes: the teacher's, and the loss is infinite; or the
  // student's, which have probability 0 to come to.
  const A one_sided = select(rest.teacher_sum, infinity, weight_label * tckd);
  const A pull = weight_label * (qn - pn) + select(rest.teacher_sum, weight_rest, zero);
  const Divergence<A> d = {
      select(shared, weight_label * label_loss + weight_rest * rest_loss, one_sided),
      select(rest.student_sum, pull / rest.student_sum, zero),
      select(shared, zero - weight_rest / rest.teacher_sum, zero), zero, zero};
  out.rest = divergence_where(both, d, select(sum_t, infinity, zero));
  return out;
}
