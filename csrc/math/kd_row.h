// The arithmetic of one row of the distillation loss: statistics, loss, gradient coefficients.
//
//   loss     = kd * KL(p || q) + ce * (|Y| LSE(s) - <Y, s>)
//   gradient = kd' * (q - p)   + ce * (|Y| softmax(s) - Y)
//   p = softmax(t / T), q = softmax(s / T), Y = (1 - eps) * label + eps / classes
//
// Both back ends include this file; they differ only in how they reduce. `V` is a number (float,
// double: one row at a time) or a vector of them (one row a lane). Every sum is taken relative to
// the maximum of the part it covers, so logits of any size stay finite; a part in which every
// logit is -inf has sum zero, and a sum of zero marks it as such.
//
// Included inside the namespace of its user (each CPU instruction set, CUDA), so that every copy is
// compiled for that target alone: no include and no namespace here. The user includes <math.h>
// first and defines FS_HD ("__host__ __device__" under nvcc) and, for vectors, logarithm,
// exponential, maximum, minimum and select.

FS_HD inline float logarithm(float x) { return logf(x); }
FS_HD inline double logarithm(double x) { return log(x); }
FS_HD inline float exponential(float x) { return expf(x); }
FS_HD inline double exponential(double x) { return exp(x); }
FS_HD inline float maximum(float a, float b) { return a > b ? a : b; }
FS_HD inline double maximum(double a, double b) { return a > b ? a : b; }
FS_HD inline float minimum(float a, float b) { return a < b ? a : b; }
FS_HD inline double minimum(double a, double b) { return a < b ? a : b; }
// `a` where `condition` is not zero (NaN is not zero), else `b`.
FS_HD inline float select(float condition, float a, float b) { return condition != 0 ? a : b; }
FS_HD inline double select(double condition, double a, double b) { return condition != 0 ? a : b; }

// What one pass over a row, or over a part of it, has to know. Maxima are stored finite: 0 stands
// in for the maximum of a part with no finite logit.
template <class V>
struct KdStatistics {
  V student_max, teacher_max;
  V student_sum;  // sum exp((s - student_max) / T)
  V teacher_sum;  // sum exp((t - teacher_max) / T)
  V label_sum;    // sum exp(s - student_max)
  V gap;          // sum exp((t - teacher_max) / T) * ((t - teacher_max) - (s - student_max))
  V logit_sum;    // sum (s - student_max), wanted with label smoothing only
  V soft_mass;    // sum y, dense labels only
  V soft_dot;     // sum y * (s - student_max), dense labels only
  V count;        // number of logits covered
};

template <class V>
FS_HD inline KdStatistics<V> kd_empty(V zero) {
  return {zero, zero, zero, zero, zero, zero, zero, zero, zero, zero};
}

// One term of the gap; a teacher probability of zero contributes nothing, also against s = -inf.
template <class V>
FS_HD inline V kd_gap_term(V teacher_exp, V teacher_shifted, V student_shifted) {
  return select(teacher_exp, teacher_exp * (teacher_shifted - student_shifted), V(0));
}

// What a sum of exponentials is multiplied by for its maximum to be `shift` higher; 0 for a sum
// that is 0. One of two parts has the higher maximum, and parts made one after the other mostly the
// same.
template <class A>
FS_HD inline A kd_rescale(A sum, A shift) {
  return sum == 0 ? A(0) : shift == 0 ? A(1) : exponential(shift);
}

// Statistics of two disjoint parts of a row.
template <class A>
FS_HD inline KdStatistics<A> kd_merge(const KdStatistics<A>& a, const KdStatistics<A>& b,
                                      A inverse_temperature) {
  const A zero = A(0);
  KdStatistics<A> out;
  // The softmax at T = 1 is kept for rows without a teacher too: label_sum or student_sum is set.
  const A has_a = a.student_sum + a.label_sum, has_b = b.student_sum + b.label_sum;
  out.student_max = select(
      has_a, select(has_b, maximum(a.student_max, b.student_max), a.student_max), b.student_max);
  out.teacher_max = select(
      a.teacher_sum, select(b.teacher_sum, maximum(a.teacher_max, b.teacher_max), a.teacher_max),
      b.teacher_max);
  const A student_a = a.student_max - out.student_max, student_b = b.student_max - out.student_max;
  const A teacher_a = a.teacher_max - out.teacher_max, teacher_b = b.teacher_max - out.teacher_max;
  const A teacher_fa = kd_rescale(a.teacher_sum, teacher_a * inverse_temperature);
  const A teacher_fb = kd_rescale(b.teacher_sum, teacher_b * inverse_temperature);
  out.student_sum = a.student_sum * kd_rescale(a.student_sum, student_a * inverse_temperature) +
                    b.student_sum * kd_rescale(b.student_sum, student_b * inverse_temperature);
  out.teacher_sum = a.teacher_sum * teacher_fa + b.teacher_sum * teacher_fb;
  out.label_sum = a.label_sum * kd_rescale(a.label_sum, student_a) +
                  b.label_sum * kd_rescale(b.label_sum, student_b);
  const A gap_a = a.gap + a.teacher_sum * (teacher_a - student_a);
  const A gap_b = b.gap + b.teacher_sum * (teacher_b - student_b);
  out.gap =
      select(teacher_fa, teacher_fa * gap_a, zero) + select(teacher_fb, teacher_fb * gap_b, zero);
  out.logit_sum = a.logit_sum + a.count * student_a + b.logit_sum + b.count * student_b;
  out.soft_mass = a.soft_mass + b.soft_mass;
  out.soft_dot = a.soft_dot + a.soft_mass * student_a + b.soft_dot + b.soft_mass * student_b;
  out.count = a.count + b.count;
  return out;
}

// What a row is worth. For index labels `label_mass` is the valid share (1, 0 where ignored) and
// `label_dot` = sum over valid labels of share * (s[label] - student_max); dense labels take both
// from the statistics.
template <class V>
struct KdWeights {
  V kd_loss, ce_loss;          // factors of the two terms of the loss
  V kd_gradient, ce_gradient;  // and of the gradient
  V label_mass, label_dot;
};

// gradient = student * exp((s - student_max)/T) + label * exp(s - student_max)
//          - teacher * exp((t - teacher_max)/T) - constant - hard * share[label] - soft * y
template <class V>
struct KdCoefficients {
  V loss, student, label, teacher, constant, hard;
};

// The label term alone. |Y| = share of valid labels, or the row sum of a dense label.
template <class V>
FS_HD inline KdCoefficients<V> kd_finish_label(const KdStatistics<V>& row, const KdWeights<V>& w,
                                               V label_smoothing, V inverse_classes, bool dense) {
  const V zero = V(0), one = V(1);
  const V kept = one - label_smoothing;
  const V mass = dense ? kept * row.soft_mass + label_smoothing : w.label_mass;
  const V dot = kept * (dense ? row.soft_dot : w.label_dot);
  const V smoothing = label_smoothing * inverse_classes * (dense ? one : w.label_mass);
  const V entropy =
      mass * logarithm(row.label_sum) - dot - select(smoothing, smoothing * row.logit_sum, zero);
  const V ce = select(mass, select(row.label_sum, entropy, V(INFINITY)), zero);
  KdCoefficients<V> out;
  out.student = out.teacher = zero;
  out.label = select(row.label_sum, w.ce_gradient * mass / row.label_sum, zero);
  out.constant = w.ce_gradient * smoothing;
  out.hard = w.ce_gradient * kept;
  out.loss = select(w.ce_loss, w.ce_loss * ce, zero);
  return out;
}

template <class V>
FS_HD inline KdCoefficients<V> kd_finish(const KdStatistics<V>& row, const KdWeights<V>& w,
                                         V inverse_temperature, V label_smoothing,
                                         V inverse_classes, V threshold, bool dense) {
  const V zero = V(0), one = V(1);
  const V infinity = V(INFINITY);
  KdCoefficients<V> out = kd_finish_label(row, w, label_smoothing, inverse_classes, dense);
  // Distillation. No finite teacher logit: nothing to learn, 0. None of the student: p > 0 = q.
  const V teacher_inverse = one / row.teacher_sum, student_inverse = one / row.student_sum;
  const V divergence = row.gap * teacher_inverse * inverse_temperature +
                       logarithm(row.student_sum * teacher_inverse);
  // The teacher's largest probability is 1 / teacher_sum; below the threshold it teaches nothing.
  const V unsure = maximum(threshold * row.teacher_sum - one, zero);
  const V taught = select(unsure, zero, row.teacher_sum);
  const V kd = select(taught, select(row.student_sum, divergence, infinity), zero);
  const V kd_gradient = select(taught, w.kd_gradient, zero);
  out.student = select(row.student_sum, kd_gradient * student_inverse, zero);
  out.teacher = select(taught, w.kd_gradient * teacher_inverse, zero);
  out.loss = select(w.kd_loss, w.kd_loss * kd, zero) + out.loss;
  return out;
}

// The gradient of one logit, without the label's own share.
template <class V>
FS_HD inline V kd_gradient(const KdCoefficients<V>& c, V student_exp, V label_exp, V teacher_exp) {
  return c.student * student_exp + c.label * label_exp - (c.teacher * teacher_exp + c.constant);
}
