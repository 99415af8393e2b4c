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
template <int Divergence, class V>
FS_HD inline Mixture<V> mixture(V share, V x, V y, V q, V p, V log_s, V log_t) {
  const V zero = V(0), one = V(1);
  const V log_q = x - log_s, log_p = y - log_t;
  if constexpr (Divergence == kReverseKl) {
    const V z = select(q, q * (log_q - log_p), zero);
    return {z, zero, z};
  } else {
    // The larger of the two, and NaN where m is.
    const V m = maximum(V(1.17549435e-38f), share * p + (one - share) * q);
    const V log_m = logarithm(m);
    const V from_teacher = select(p, p * (log_p - log_m), zero);
    if constexpr (Divergence == kJsd) {
      const V z = select(q, q * (log_q - log_m), zero);
      return {z, from_teacher, z};
    } else {
      const V z = (one - share) * p * q / m;
      return {z, from_teacher, z};
    }
  }
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

// After the second sweep. student_sum: sum of exponentials. A row that asks for a class which the
// teacher excludes is infinite and teaches nothing.
template <int Divergence_, class A>
FS_HD inline Divergence<A> finish_mixture(A share, A student_sum, A from_teacher, A from_student) {
  if constexpr (Divergence_ == kReverseKl) {
    if (from_student == A(INFINITY)) return no_divergence(A(INFINITY));
    return {from_student, -from_student / student_sum, A(1), A(0), A(0)};
  } else if constexpr (Divergence_ == kJsd) {
    const A rest = A(1) - share;
    return {share * from_teacher + rest * from_student, -rest * from_student / student_sum, rest,
            A(0), A(0)};
  } else {
    return {from_teacher, from_student / student_sum, A(-1), A(0), A(0)};
  }
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
  const A loss = kl_of(student_sum, teacher_sum, gap);
  if (!(deviation > A(0))) return no_divergence(loss);
  const A inverse = A(1) / (deviation + A(kStandardEpsilon));
  const A dot = student_dot / student_sum - teacher_dot / teacher_sum;
  const A logit = -dot * inverse * inverse / (deviation * (count - A(1)));
  return {loss, inverse / student_sum, -inverse / teacher_sum, logit, logit * centre};
}

// Decoupled distillation. What is left of the row without its labels: sums of exponentials relative
// to its own maxima, the maxima less those of the whole row, all logits times 1 / T; of each label
// (two at most) both logits times 1 / T.
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

// log(rest_sum e^rest_max + e^first + e^second)
template <class A>
FS_HD inline A log_of_all(A rest_sum, A rest_max, const A* labels, int count) {
  A top = rest_sum != 0 ? rest_max : A(-INFINITY);
  for (int i = 0; i < count; ++i) top = maximum(top, labels[i]);
  if (top == A(-INFINITY)) return top;
  A sum = rest_sum != 0 ? rest_sum * exponential(rest_max - top) : A(0);
  for (int i = 0; i < count; ++i) sum += exponential(labels[i] - top);
  return top + logarithm(sum);
}

// weight_label, weight_rest: the paper's alpha and beta.
template <class A>
FS_HD inline DkdRow<A> finish_dkd(const DkdRest<A>& rest, const A* student, const A* teacher,
                                  int count, A weight_label, A weight_rest) {
  DkdRow<A> out = {no_divergence(A(0)), {A(0), A(0)}, A(0)};
  const A log_s = log_of_all(rest.student_sum, rest.student_max, student, count);
  const A log_t = log_of_all(rest.teacher_sum, rest.teacher_max, teacher, count);
  if (log_t == A(-INFINITY)) return out;
  if (log_s == A(-INFINITY)) {
    out.rest.loss = A(INFINITY);
    return out;
  }
  A top = rest.teacher_sum != 0 ? rest.teacher_max : A(-INFINITY);
  A tckd = A(0);
  for (int i = 0; i < count; ++i) {
    const A p = exponential(teacher[i] - log_t), q = exponential(student[i] - log_s);
    if (p != 0) tckd += p * ((teacher[i] - log_t) - (student[i] - log_s));
    out.label_gradient[i] = weight_label * (q - p);
    top = maximum(top, teacher[i]);
  }
  out.confidence = exponential(top - log_t);
  if (rest.teacher_sum != 0 && rest.student_sum != 0) {
    const A log_pn = logarithm(rest.teacher_sum) + rest.teacher_max - log_t;
    const A log_qn = logarithm(rest.student_sum) + rest.student_max - log_s;
    const A pn = exponential(log_pn), qn = exponential(log_qn);
    if (pn != 0) tckd += pn * (log_pn - log_qn);
    out.rest.student = (weight_label * (qn - pn) + weight_rest) / rest.student_sum;
    out.rest.second = -weight_rest / rest.teacher_sum;
    tckd *= weight_label;
    out.rest.loss = tckd + weight_rest * kl_of(rest.student_sum, rest.teacher_sum, rest.gap);
  } else {
    // Only one side has other classes: the teacher's, and the loss is infinite; or the student's.
    out.rest.loss = rest.teacher_sum != 0 ? A(INFINITY) : weight_label * tckd;
    if (rest.student_sum != 0)
      out.rest.student = weight_label * exponential(rest.student_max - log_s);  // q - p with p = 0
  }
  return out;
}
