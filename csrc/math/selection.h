// What the writers of a teacher's table and of pseudo-labels make of a row's sums.
//
// Both back ends include this file; they differ only in how they select and sum. Included inside
// the namespace of its user, after kd_row.h, like it; `A` is float or double.

// The largest k logits of a row. top: the largest; chosen: sum of exp(x - top) over the k; rest:
// over the others. A row whose logits are all -inf has sums of 0, and every probability is 0.
template <class A>
struct TopKRow {
  A top, log_sum, log_tail;
};

template <class A>
FS_HD inline TopKRow<A> finish_topk(A top, A chosen, A rest, int64_t others) {
  const A sum = chosen + rest;
  const A log_sum = sum == A(0) ? A(INFINITY) : logarithm(sum);
  // A sum of NaN has to stay NaN, also where nothing is left over.
  const A mean = others == 0 ? A(0) : rest / A(others);
  if (mean == A(0)) return {top, log_sum, sum == sum ? A(-INFINITY) : sum};
  return {top, log_sum, logarithm(mean) - log_sum};
}

template <class A>
FS_HD inline A topk_log_prob(const TopKRow<A>& row, A logit) {
  return logit == A(-INFINITY) && row.log_sum == row.log_sum ? logit
                                                             : logit - row.top - row.log_sum;
}

// second_exp: exp((second largest - largest) / T), 0 for one class; sum: of exp((x - largest) / T);
// dot: sum of exp(...) times its exponent.
template <class A>
struct ConfidenceRow {
  A confidence, margin, entropy;
};

template <class A>
FS_HD inline ConfidenceRow<A> finish_confidence(A sum, A second_exp, A dot) {
  const A inverse = A(1) / sum;
  return {inverse, (A(1) - second_exp) * inverse, maximum(logarithm(sum) - dot * inverse, A(0))};
}
