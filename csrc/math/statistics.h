// What a row of a TopK teacher says: its most probable class, that class's probability, and the
// entropy over all classes, all at T and by the tail policy.
//
//   uniform, tail      p = v for the k, the rest evenly over the others
//   renorm, support    p = v / sum v for the k, nothing for the others
//
// Included inside the namespace of its user, after topk_teacher.h; `A` is float or double.

template <class A>
struct RecordRow {
  int64_t label;
  A confidence, entropy;
};

template <class A>
FS_HD inline RecordRow<A> no_record(int64_t no_answer) {
  return {no_answer, A(NAN), A(NAN)};
}

// label: the class of sums.largest; dot: sum over the k of exponential times its y.
template <class A>
FS_HD inline RecordRow<A> finish_record(int64_t label, const TeacherSums<A>& sums, A dot,
                                        int tail_policy, int64_t others, int64_t no_answer) {
  const TeacherRow<A> row = finish_teacher(sums, tail_policy, others);
  // Not NaN, and some class has a probability.
  if (!(sums.chosen > A(0) && row.sum > A(0))) return no_record<A>(no_answer);
  const A entropy = logarithm(row.sum) - dot * row.inverse - row.rest * row.tail_shift;
  return {label, sums.largest * row.inverse, maximum(entropy, A(0))};
}

// Of two teachers of which the first has `share`: the label of the heavier one, the first of
// equals, and the means of the numbers. No answer where one that counts has none.
template <class A>
FS_HD inline RecordRow<A> mix_records(const RecordRow<A>& first, const RecordRow<A>& second,
                                      A share, int64_t no_answer) {
  const A rest = A(1) - share;
  const A confidence = weighted(share, first.confidence) + weighted(rest, second.confidence);
  if (!(confidence == confidence)) return no_record<A>(no_answer);
  return {share >= A(0.5) ? first.label : second.label, confidence,
          weighted(share, first.entropy) + weighted(rest, second.entropy)};
}
