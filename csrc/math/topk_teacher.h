// A teacher of which a row's k largest classes are known, and the mean of all the others.
//
//   v = probabilities of the k at T, r what is left, u = r / (classes - k); q = softmax(s / T)
//   uniform   KL with u for each of the others
//   renorm    KL with v / sum v, nothing for the others
//   tail      KL with the others as one class: r against the sum of their q
//   support   KL of v / sum v and the student's softmax over the k alone
//
// Gradients, of a logit outside the k and of one among them:
//   others * e - constant,   chosen * e - constant - delta
// e = exp((s - student_max) / T); delta is v - u (uniform, renorm) or v (tail, support).
//
// Included inside the namespace of its user, after kd_row.h, like it; `A` is float or double.

// What a row's teacher is worth before the student is looked at. Exponentials are those of y = l /
// T
// - top with l the log-probabilities, and top the largest of them all.
template <class A>
struct TeacherSums {
  A chosen;      // sum of the exponentials of the k
  A largest;     // the largest of them
  A tail;        // exponential of the tail, times the number of others
  A tail_shift;  // its y; 0 where `tail` is
};

template <class A>
struct TeacherRow {
  A sum, inverse;  // v = exponential * inverse; 0 for a teacher that gives no class anything
  A rest, each;    // r and u
  A tail_shift;    // y of the tail
  A confidence;    // the largest probability, among all classes
};

template <class A>
FS_HD inline TeacherRow<A> finish_teacher(const TeacherSums<A>& sums, int tail_policy,
                                          int64_t others) {
  const A all = sums.chosen + sums.tail;
  const bool kept = tail_policy == kTailUniform || tail_policy == kTailBucket;
  const A sum = kept ? all : sums.chosen;
  if (sum == A(0)) return {A(1), A(0), A(0), A(0), A(0), A(0)};
  TeacherRow<A> out = {sum, A(1) / sum, A(0), A(0), A(0), sums.largest / all};
  if (!kept || sums.tail == A(0)) return out;
  out.rest = sums.tail * out.inverse;
  out.each = tail_policy == kTailUniform ? out.rest / A(others) : A(0);
  out.tail_shift = sums.tail_shift;
  return out;
}

// A row's distillation term, without T^2, and the coefficients of its gradient, without T.
template <class A>
struct TopKTerm {
  A loss, others, chosen, constant;
};

template <class A>
FS_HD inline TopKTerm<A> no_term(A loss) {
  return {loss, A(0), A(0), A(0)};
}

// x = (s - student_max) / T in all that follows; gap: sum over the k of v (y - x). Differences of
// logarithms are taken before they are added up: a student close to its teacher keeps its digits.

// uniform and renorm. mass: of all probabilities (1, less where a mixed teacher gives none);
// student_sum: of e; logit_sum: sum of x over the other classes, asked for where u is not 0;
// hidden: u falls on a class of -inf.
template <class A>
FS_HD inline TopKTerm<A> finish_spread(const TeacherRow<A>& teacher, A mass, A student_sum, A gap,
                                       A logit_sum, bool hidden) {
  if (mass == A(0)) return no_term(A(0));
  if (student_sum == A(0)) return no_term(A(INFINITY));
  A loss = gap + mass * logarithm(student_sum / teacher.sum);
  if (teacher.each != A(0))
    loss = hidden ? A(INFINITY)
                  : loss + (teacher.rest * teacher.tail_shift - teacher.each * logit_sum);
  const A by = mass / student_sum;
  return {loss, by, by, teacher.each};
}

// tail. student_sum: of e over all classes; rest_sum: over the others, relative to their own
// maximum, whose x is rest_max. `others` is for exponentials relative to that maximum too: far
// below the k they would all be 0.
template <class A>
FS_HD inline TopKTerm<A> finish_bucket(const TeacherRow<A>& teacher, int64_t others, A student_sum,
                                       A rest_sum, A rest_max, A gap) {
  if (teacher.inverse == A(0)) return no_term(A(0));
  if (student_sum == A(0)) return no_term(A(INFINITY));
  const A inverse = A(1) / student_sum;
  TopKTerm<A> out = {gap + logarithm(student_sum / teacher.sum), A(0), inverse, A(0)};
  if (rest_sum != A(0)) out.others = exponential(rest_max) * inverse;
  if (teacher.rest == A(0)) return out;
  if (rest_sum == A(0)) return {A(INFINITY), A(0), inverse, A(0)};
  const A log_rest = logarithm(rest_sum / A(others)) + rest_max;
  out.loss += teacher.rest * (teacher.tail_shift - log_rest);
  out.others -= teacher.rest / rest_sum;
  return out;
}

// support. student_sum: of e over the k.
template <class A>
FS_HD inline TopKTerm<A> finish_support(const TeacherRow<A>& teacher, A student_sum, A gap) {
  if (teacher.inverse == A(0)) return no_term(A(0));
  if (student_sum == A(0)) return no_term(A(INFINITY));
  return {gap + logarithm(student_sum / teacher.sum), A(0), A(1) / student_sum, A(0)};
}

// weight * x, 0 for a weight of 0 also against an infinite x.
template <class A>
FS_HD inline A weighted(A weight, A x) {
  return weight == A(0) ? A(0) : weight * x;
}
