// Label, confidence and entropy of rows of TopK teachers: their k classes are read, nothing else.
//
// Included after topk_teacher.h, statistics.h of csrc/math and convert.inl, in the namespace of an
// instruction set.

template <class V, class Exponential>
struct Records {
  using A = typename V::Scalar;
  static constexpr int64_t L = V::lanes;

  static RecordRow<A> record_of(const KdCall& call, const TopKTeacher& teacher, int64_t row,
                                const Exponential& exp_of, A rate, int64_t no_answer, A* memory) {
    const int64_t k = teacher.k, others = call.classes - k;
    const int32_t* const index = teacher.indices + row * k;
    const A* const x = read_row<A>(teacher.log_probs, row, 0, k, memory);
    A largest = A(-INFINITY);
    int64_t label = no_answer;
    for (int64_t i = 0; i < k; ++i) {
      if (uint64_t(index[i]) >= uint64_t(call.classes)) return no_record<A>(no_answer);
      if (x[i] > largest || (x[i] == largest && index[i] < label)) {
        largest = x[i];
        label = index[i];
      }
    }
    if (label == no_answer) return no_record<A>(no_answer);
    A tail;
    tail = others > 0 ? *read_row<A>(teacher.log_tail, row, 0, 1, &tail) : A(-INFINITY);
    const A top = maximum(tail, largest);
    const V less(top);
    double chosen = 0, dot = 0;
    for (int64_t i = 0; i < k; i += L) {
      const V v = i + L <= k ? V::load(x + i) : V::load_part(x + i, k - i, A(-INFINITY));
      const V y = v - less, e = exp_of(y);
      chosen += double(sum_of(e));
      dot += double(sum_of(e * zero_unless(e, y)));
    }
    const A tail_shift = (tail - top) * rate;
    const A tail_exp = tail == A(-INFINITY) ? A(0) : exponential(tail_shift);
    return finish_record<A>(label,
                            {A(chosen), exponential((largest - top) * rate), tail_exp * A(others),
                             tail_exp == A(0) ? A(0) : tail_shift},
                            A(dot) * rate, call.tail_policy, others, no_answer);
  }

  static void rows(const KdCall& call, const StatisticsCall& to, int64_t no_answer, int64_t begin,
                   int64_t end) {
    const Exponential exp_of(1.0 / call.temperature);
    const A rate = A(1.0 / call.temperature);
    static thread_local std::vector<A> memory;
    memory.resize(size_t(std::max(call.named[0].k, call.named[1].k)));
    for (int64_t row = begin; row < end; ++row) {
      RecordRow<A> out =
          record_of(call, call.named[0], row, exp_of, rate, no_answer, memory.data());
      if (call.mix)
        out = mix_records(
            out, record_of(call, call.named[1], row, exp_of, rate, no_answer, memory.data()),
            A(call.mix[row]), no_answer);
      to.teacher_label[row] = out.label;
      static_cast<A*>(to.confidence)[row] = out.confidence;
      static_cast<A*>(to.entropy)[row] = out.entropy;
    }
  }
};
