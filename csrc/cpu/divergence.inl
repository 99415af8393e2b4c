// The divergences of math/divergence.h on a CPU, one row at a time.
//
// A row of student and teacher is copied once into scratch, padded with -inf to whole vectors (a
// class of probability 0 adds nothing), and stays in L1 or L2 for the sweeps: maxima; exponentials
// and their sums; for reverse KL, JSD and skew KL a sweep with both probabilities; the gradient,
// a few multiply-adds of what was kept. DRAM sees student and teacher once and the gradient once.
//
// DKD takes the labels out of the row (-inf) before the sweeps, so that the sums over the other
// classes are made without cancellation, and puts them back as numbers of their own.
//
// Included after kd_loss.inl, in the namespace of an instruction set.

template <class V, class Exponential>
struct Divergences {
  using A = typename V::Scalar;
  using Body = Kd<V, Exponential>;
  static constexpr int64_t L = V::lanes;
  static constexpr int64_t kPiece = 64 * L;  // longer sums are made of sums of this many, in double

  struct Row {
    A *student, *teacher, *e, *z, *own, *soft;
    int64_t classes, padded;
  };
  struct Members {  // the labels of a DKD row
    int64_t index[2];
    A student[2], teacher[2];  // logits
    int count = 0;
  };

  static A maximum_over(const A* x, int64_t padded) {
    V top(A(-INFINITY));
    for (int64_t i = 0; i < padded; i += L) top = maximum(top, V::load(x + i));
    return maximum_of(top);
  }
  static A finite(A top) { return top == A(-INFINITY) ? A(0) : top; }

  // Asks for the line of the next row that stands where entry i of this one does: it comes while
  // this row is worked on. Past the last row nothing is read, and asking is no access.
  static void ask_ahead(const Matrix& matrix, int64_t row, int64_t i) {
    if constexpr (L > 1) {
      const int64_t at = (row + 1) * matrix.row_stride + i;
      __builtin_prefetch(static_cast<const char*>(matrix.data) + at * size_of(matrix.dtype));
    }
  }

  static void copy(const Matrix& matrix, int64_t row, A* to, int64_t classes, int64_t padded) {
    const char* from =
        static_cast<const char*>(matrix.data) + row * matrix.row_stride * size_of(matrix.dtype);
    read_as(from, matrix.dtype, to, classes);
    for (int64_t i = classes; i < padded; ++i) to[i] = A(-INFINITY);
  }

  // Sum of of(x) over the padded row: vectors in pieces, pieces in double.
  template <class Of>
  static double sum_over(const A* x, int64_t padded, Of of) {
    double sum = 0;
    for (int64_t from = 0; from < padded; from += kPiece) {
      V part(A(0));
      for (int64_t i = from; i < std::min(from + kPiece, padded); i += L)
        part = part + of(V::load(x + i));
      sum += double(sum_of(part));
    }
    return sum;
  }

  // Mean and standard deviation (n - 1) of the finite logits.
  static void deviation(const A* x, int64_t padded, A top, A& mean, A& deviation, A& count) {
    const V zero(A(0)), one(A(1)), max(top), lowest(A(-3.402823466e38f));
    const auto finite_only = [&](V v, V value) {
      return select(maximum(v, lowest) - v, zero, value);
    };
    const double n = sum_over(x, padded, [&](V v) { return finite_only(v, one); });
    const double sum = sum_over(x, padded, [&](V v) { return finite_only(v, v - max); });
    const double centre = n > 0 ? sum / n : 0;
    const V middle{A(centre)};
    const double square = sum_over(x, padded, [&](V v) {
      const V c = finite_only(v, v - max - middle);
      return c * c;
    });
    mean = A(centre) + top;
    deviation = n > 1 ? A(std::sqrt(square / (n - 1))) : A(0);
    count = A(n);
  }

  static Members take_labels(const Label& label, const Row& r) {
    Members members;
    const auto take = [&](int64_t index, double share) {
      if (index < 0 || share == 0) return;
      if (members.count && members.index[0] == index) return;
      members.index[members.count] = index;
      members.student[members.count] = r.student[index];
      members.teacher[members.count++] = r.teacher[index];
    };
    take(label.first, label.first_part);
    take(label.second, label.second_part);
    for (int i = 0; i < members.count; ++i)
      r.student[members.index[i]] = r.teacher[members.index[i]] = A(-INFINITY);
    return members;
  }

  // The sums of both sweeps, and the row's divergence.
  template <int Name>
  static void one(const typename Body::Setup& setup, int64_t row, const Row& r) {
    const KdCall& call = setup.call;
    const Label label = label_of(call, row);
    KdWeights<A> w = Body::weights_of(call, label, row);
    if (label.outside || !Body::counts(setup, w)) {
      Body::leave_out(call, row, label.outside);
      return;
    }
    copy(call.student, row, r.student, r.classes, r.padded);
    copy(call.teacher, row, r.teacher, r.classes, r.padded);

    // Label term: relative to the maximum of the whole row.
    KdStatistics<A> ce = kd_empty(A(0));
    ce.student_max = finite(maximum_over(r.student, r.padded));
    ce.count = A(r.classes);
    if (setup.smoothing || setup.dense) {
      const A* y = setup.dense ? read_row<A>(call.soft, row, 0, r.classes, r.soft) : nullptr;
      add_label_sums<V>(setup.smoothing, setup.dense, r.student, y, r.classes, ce);
    }
    const auto dot = [&](int64_t index, double share) {
      return index < 0 || share == 0 ? A(0) : A(share) * (r.student[index] - ce.student_max);
    };
    w.label_dot = dot(label.first, label.first_share) + dot(label.second, label.second_share);

    Members members;
    A student_max = ce.student_max;
    if constexpr (Name == kDkd) {
      members = take_labels(label, r);
      student_max = finite(maximum_over(r.student, r.padded));
    }
    const A teacher_max = finite(maximum_over(r.teacher, r.padded));
    const double rate = 1.0 / call.temperature;
    double student_rate = rate, teacher_rate = rate;
    A student_mean = 0, student_deviation = 0, student_count = 0;
    if constexpr (Name == kLogitStandard) {
      A mean, teacher_deviation, count;
      deviation(r.teacher, r.padded, teacher_max, mean, teacher_deviation, count);
      deviation(r.student, r.padded, student_max, student_mean, student_deviation, student_count);
      student_rate /= double(student_deviation) + kStandardEpsilon;
      teacher_rate /= double(teacher_deviation) + kStandardEpsilon;
    }

    // Exponentials and their sums.
    const Exponential student_exp(student_rate), teacher_exp(teacher_rate), own_exp(1.0);
    const V top_s(student_max), top_t(teacher_max), rate_s{A(student_rate)},
        rate_t{A(teacher_rate)};
    const V zero(A(0));
    const bool own = setup.label && student_rate != 1.0;
    double sums[6] = {};
    for (int64_t from = 0; from < r.padded; from += kPiece) {
      V sum_s = zero, sum_t = zero, sum_own = zero, gaps = zero, dot_s = zero, dot_t = zero;
      for (int64_t i = from; i < std::min(from + kPiece, r.padded); i += L) {
        ask_ahead(call.student, row, i);
        ask_ahead(call.teacher, row, i);
        const V x = V::load(r.student + i) - top_s, y = V::load(r.teacher + i) - top_t;
        const V e = student_exp(x), p = teacher_exp(y);
        e.store(r.e + i);
        p.store(r.z + i);
        sum_s = sum_s + e;
        sum_t = sum_t + p;
        if (own) {
          const V o = own_exp(x);
          o.store(r.own + i);
          sum_own = sum_own + o;
        }
        if constexpr (!needs_mixture(Name))
          gaps = add_product_unless_zero(p, y * rate_t - x * rate_s, gaps);
        if constexpr (Name == kLogitStandard) {
          const V known = finite_or_zero(x);
          dot_s = multiply_add(e, known, dot_s);
          dot_t = multiply_add(p, known, dot_t);
        }
      }
      const V of[6] = {sum_s, sum_t, sum_own, gaps, dot_s, dot_t};
      for (int k = 0; k < 6; ++k) sums[k] += double(sum_of(of[k]));
    }
    const A student_sum = A(sums[0]), teacher_sum = A(sums[1]), gap = A(sums[3]);
    ce.label_sum = own ? A(sums[2]) : student_sum;

    // The distillation term.
    Divergence<A> d = no_divergence(A(0));
    A label_gradient[2] = {A(0), A(0)};
    A confidence = A(1) / teacher_sum;
    if constexpr (Name == kDkd) {
      // Relative to the whole row's maxima: large logits would lose digits in what follows.
      A s[2], t[2], teacher_top = teacher_max;
      for (int i = 0; i < members.count; ++i)
        teacher_top = teacher_sum == 0 && i == 0 ? members.teacher[i]
                                                 : maximum(teacher_top, members.teacher[i]);
      teacher_top = finite(teacher_top);
      for (int i = 0; i < members.count; ++i) {
        s[i] = (members.student[i] - ce.student_max) * A(rate);
        t[i] = (members.teacher[i] - teacher_top) * A(rate);
      }
      const DkdRow<A> dkd =
          finish_dkd<A>({(student_max - ce.student_max) * A(rate),
                         (teacher_max - teacher_top) * A(rate), student_sum, teacher_sum, gap},
                        s, t, members.count, A(call.first), A(call.second));
      d = dkd.rest;
      confidence = dkd.confidence;
      std::copy_n(dkd.label_gradient, 2, label_gradient);
      // The sum of the label term covers the labels too.
      const A off = student_max - ce.student_max;
      ce.label_sum = ce.label_sum == 0 ? A(0) : ce.label_sum * exponential(off);
      for (int i = 0; i < members.count; ++i)
        ce.label_sum += exponential(members.student[i] - ce.student_max);
    } else if (teacher_sum == 0) {
      confidence = A(0);
    } else if (student_sum == 0) {
      d = no_divergence(A(INFINITY));
    } else if constexpr (Name == kLogitStandard) {
      d = finish_standard(student_sum, teacher_sum, gap, A(sums[4]), A(sums[5]), student_deviation,
                          student_max - student_mean, student_count);
    } else {
      const V share(A(call.first)), inverse_s(A(1) / student_sum), inverse_t(A(1) / teacher_sum);
      const V log_s(logarithm(student_sum)), log_t(logarithm(teacher_sum));
      double from_teacher = 0, from_student = 0;
      for (int64_t from = 0; from < r.padded; from += kPiece) {
        V teacher_part = zero, student_part = zero;
        for (int64_t i = from; i < std::min(from + kPiece, r.padded); i += L) {
          const V x = (V::load(r.student + i) - top_s) * rate_s;
          const V y = (V::load(r.teacher + i) - top_t) * rate_t;
          const Mixture<V> m = mixture(Name, share, x, y, V::load(r.e + i) * inverse_s,
                                       V::load(r.z + i) * inverse_t, log_s, log_t);
          m.z.store(r.z + i);
          teacher_part = teacher_part + m.from_teacher;
          student_part = student_part + m.from_student;
        }
        from_teacher += double(sum_of(teacher_part));
        from_student += double(sum_of(student_part));
      }
      d = finish_mixture(Name, A(call.first), student_sum, A(from_teacher), A(from_student));
    }
    if (confidence < A(call.threshold)) {
      d = no_divergence(A(0));
      label_gradient[0] = label_gradient[1] = A(0);
    }

    const KdCoefficients<A> c =
        kd_finish_label(ce, w, A(call.label_smoothing), setup.inverse_classes, setup.dense);
    static_cast<A*>(call.losses)[row] = c.loss + (w.kd_loss == 0 ? A(0) : w.kd_loss * d.loss);
    if (!setup.keep) return;

    // Gradient, in place of the student's logits.
    const A off =
        Name == kDkd && student_sum != 0 ? exponential(student_max - ce.student_max) : A(1);
    const A label_own = student_sum == 0 && Name == kDkd ? A(0) : c.label * off;
    const V by_e(w.kd_gradient * d.student + (own ? A(0) : label_own)), by_own(label_own);
    const V by_z(w.kd_gradient * d.second), by_x(w.kd_gradient * d.logit);
    const V constant(w.kd_gradient * d.constant - c.constant);
    const V from_mean(w.kd_gradient * d.constant);
    const bool second = d.second != 0;
    for (int64_t i = 0; i < r.padded; i += L) {
      V g = multiply_add(by_e, V::load(r.e + i), constant);
      if (second) g = multiply_add(by_z, V::load(r.z + i), g);
      if (own) g = multiply_add(by_own, V::load(r.own + i), g);
      if constexpr (Name == kLogitStandard) {
        const V x = V::load(r.student + i) - top_s;
        // A class that counts in neither mean nor deviation has no gradient from them.
        g = g + select(maximum(x, V(A(-3.402823466e38f))) - x, zero - from_mean,
                       by_x * finite_or_zero(x));
      }
      g.store(r.student + i);
    }
    for (int i = 0; i < members.count; ++i)
      r.student[members.index[i]] = w.kd_gradient * label_gradient[i] - c.constant +
                                    c.label * exponential(members.student[i] - ce.student_max);
    if (setup.dense) {
      const A* y = read_row<A>(call.soft, row, 0, r.classes, r.soft);
      for (int64_t i = 0; i < r.classes; ++i) r.student[i] -= c.hard * y[i];
    } else if (setup.label) {
      if (label.first >= 0) r.student[label.first] -= c.hard * A(label.first_share);
      if (label.second >= 0) r.student[label.second] -= c.hard * A(label.second_share);
    }
    const Dtype dtype = call.student.dtype;
    char* const gradient = static_cast<char*>(call.gradient) + row * r.classes * size_of(dtype);
    put<V>(r.student, gradient, dtype, r.classes, call.stream);
  }

  template <int Name>
  static void all(const KdCall& call, int64_t begin, int64_t end) {
    const typename Body::Setup setup(call);
    const int64_t padded = (call.classes + L - 1) / L * L, size = (call.classes + 15) / 16 * 16;
    static thread_local LineMemory<A> memory;
    A* const at = memory.of(6 * size);
    const Row r = {
        at,           at + size, at + 2 * size, at + 3 * size, at + 4 * size, at + 5 * size,
        call.classes, padded};
    for (int64_t row = begin; row < end; ++row) one<Name>(setup, row, r);
  }

  static void rows(const KdCall& call, int64_t begin, int64_t end) {
    if constexpr (L >= 8) {
      if (call.classes <= kLaneClasses)
        return DivergenceLanes<V, Exponential>::rows(call, begin, end);
    }
    switch (call.divergence) {
      case kReverseKl:
        return all<kReverseKl>(call, begin, end);
      case kJsd:
        return all<kJsd>(call, begin, end);
      case kSkewKl:
        return all<kSkewKl>(call, begin, end);
      case kDkd:
        return all<kDkd>(call, begin, end);
      default:
        return all<kLogitStandard>(call, begin, end);
    }
  }
};
