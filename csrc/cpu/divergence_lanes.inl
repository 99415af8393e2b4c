// The divergences of math/divergence.h for small class counts: one row a lane, in the blocks of
// kd_lanes.inl. Every sweep is a loop of its own over classes, because two together want more
// registers than there are; what one leaves for the next is in L1.
//
// DKD's labels leave the row by comparing their index with the class, and come back the same way:
// a class of -inf adds nothing to any sum of the rest.
//
// Included after divergence.inl, in the namespace of an instruction set.

template <class V, class Exponential>
struct DivergenceLanes {
  static constexpr int64_t L = V::lanes;
  using Body = Kd<V, Exponential>;
  using Setup = typename Body::Setup;
  using Rows = Lanes<V, Exponential>;
  using Blocks = typename Rows::Blocks;
  using Labels = typename Rows::Labels;

  // Mean (less `top`) and standard deviation (n - 1) of the finite logits.
  struct Spread {
    V centre, deviation, count;
  };
  static Spread spread_of(const float* block, int64_t classes, V top) {
    const V zero(0.0f), one(1.0f), lowest(-FLT_MAX);
    V excluded = zero, sum = zero, square = zero;
    for (int64_t c = 0; c < classes; ++c) {
      const V x = V::load(block + c * L);
      const V beyond = maximum(x, lowest) - x;  // not 0 for -inf alone
      excluded = excluded + select(beyond, one, zero);
      sum = sum + select(beyond, zero, x - top);
    }
    const V count = V(float(classes)) - excluded;
    const V centre = sum / maximum(count, one);
    for (int64_t c = 0; c < classes; ++c) {
      const V x = V::load(block + c * L);
      const V d = select(maximum(x, lowest) - x, zero, (x - top) - centre);
      square = multiply_add(d, d, square);
    }
    const V rest = count - one;
    return {centre, select(maximum(rest, zero), root(square / maximum(rest, one)), zero), count};
  }

  // softmax(s) of the label term, where T is not 1 or the rate is the row's own: exponentials to
  // b.label_exp, and their sum. `top` is what b.student_exp is relative to.
  template <int Power>
  static V own_exponentials(const Setup& setup, V top, Blocks& b) {
    const Exponential label_exp = setup.label_exp;
    V sum(0.0f);
    for (int64_t c = 0; c < setup.call.classes; ++c) {
      V own;
      if constexpr (Power == kOwnExponential)
        own = label_exp(V::load(b.student + c * L) - top);
      else
        own = power<Power>(V::load(b.student_exp + c * L));
      own.store(b.label_exp + c * L);
      sum = sum + own;
    }
    return sum;
  }
  using OwnFunction = V (*)(const Setup&, V, Blocks&);

  // Own: the label term has exponentials of its own.
  template <int Name, bool Own>
  static void block(const Setup& setup, OwnFunction own_of, int64_t row, int64_t count,
                    const Labels& labels, int64_t at, Blocks& b) {
    const KdCall& call = setup.call;
    const int64_t classes = call.classes;
    alignas(64) float student_tops[L], teacher_tops[L], soft_tops[L];
    Rows::load(call.student, row, count, classes, b, b.student, student_tops);
    Rows::load(call.teacher, row, count, classes, b, b.teacher, teacher_tops);
    if (setup.dense) Rows::load(call.soft, row, count, classes, b, b.soft, soft_tops);

    const V zero(0.0f), one(1.0f), none(-1.0f), lowest(-INFINITY), rate(setup.inverse_temperature);
    KdStatistics<V> ce = kd_empty(zero);
    const V student_whole = Rows::finite(V::load(student_tops));
    const V teacher_whole = Rows::finite(V::load(teacher_tops));
    ce.student_max = student_whole;
    ce.count = V(float(classes));
    Rows::add_label_sums(setup, b, ce);

    // Labels, picked by comparing as in kd_lanes.inl.
    const V first = V::load(labels.first + at), second = V::load(labels.second + at);
    const V first_share = V::load(labels.first_share + at);
    const V second_share = V::load(labels.second_share + at);
    const bool two = call.partner != nullptr;
    V first_dot = zero, second_dot = zero;

    // Of a DKD row: the labels that stand apart, and what is left without them.
    V first_apart = none, second_apart = none, first_teacher = zero, second_teacher = zero;
    V student_max = student_whole, teacher_max = teacher_whole;
    if constexpr (Name == kDkd) {
      first_apart = select(V::load(labels.first_part + at), first, none);
      if (two) {
        second_apart = select(V::load(labels.second_part + at), second, none);
        second_apart = select(where_equal(first_apart, second_apart, one), none, second_apart);
      }
      V student_top = lowest, teacher_top = lowest, index = zero;
      for (int64_t c = 0; c < classes; ++c, index = index + one) {
        const V s = V::load(b.student + c * L), t = V::load(b.teacher + c * L);
        const V x = s - student_whole, y = t - teacher_whole;
        V apart = where_equal(first_apart, index, one);
        first_dot = first_dot + where_equal(first, index, x);
        first_teacher = first_teacher + where_equal(first_apart, index, y);
        if (two) {
          apart = apart + where_equal(second_apart, index, one);
          second_dot = second_dot + where_equal(second, index, x);
          second_teacher = second_teacher + where_equal(second_apart, index, y);
        }
        const V rest_s = select(apart, lowest, s), rest_t = select(apart, lowest, t);
        rest_s.store(b.student + c * L);
        rest_t.store(b.teacher + c * L);
        student_top = maximum(student_top, rest_s);
        teacher_top = maximum(teacher_top, rest_t);
      }
      student_max = Rows::finite(student_top);
      teacher_max = Rows::finite(teacher_top);
    }

    V student_rate = rate, teacher_rate = rate;
    Exponential student_exp = setup.student_exp, teacher_exp = setup.student_exp;
    Spread spread = {zero, zero, zero};
    if constexpr (Name == kLogitStandard) {
      const V epsilon{float(kStandardEpsilon)};
      spread = spread_of(b.student, classes, student_whole);
      student_rate = rate / (spread.deviation + epsilon);
      teacher_rate = rate / (spread_of(b.teacher, classes, teacher_whole).deviation + epsilon);
      student_exp = Exponential(student_rate);
      teacher_exp = Exponential(teacher_rate);
    }

    // Exponentials and their sums.
    V student_sum = zero, teacher_sum = zero, gap = zero, student_dot = zero, teacher_dot = zero;
    V index = zero;
    for (int64_t c = 0; c < classes; ++c, index = index + one) {
      const V x = V::load(b.student + c * L) - student_max;
      const V e = student_exp(x);
      e.store(b.student_exp + c * L);
      student_sum = student_sum + e;
      if constexpr (Name == kLogitStandard)
        student_dot = multiply_add(e, finite_or_zero(x), student_dot);
      if constexpr (Name != kDkd) {
        first_dot = first_dot + where_equal(first, index, x);
        if (two) second_dot = second_dot + where_equal(second, index, x);
      }
    }
    for (int64_t c = 0; c < classes; ++c) {
      const V y = V::load(b.teacher + c * L) - teacher_max;
      const V p = teacher_exp(y);
      p.store(b.teacher_exp + c * L);
      teacher_sum = teacher_sum + p;
      if constexpr (!needs_mixture(Name)) {
        const V x = V::load(b.student + c * L) - student_max;
        gap = add_product_unless_zero(p, y * teacher_rate - x * student_rate, gap);
        if constexpr (Name == kLogitStandard)
          teacher_dot = multiply_add(p, finite_or_zero(x), teacher_dot);
      }
    }
    ce.label_sum = Own ? own_of(setup, student_max, b) : student_sum;

    // The distillation term.
    Divergence<V> d = no_divergence(zero);
    V confidence = select(teacher_sum, one / teacher_sum, zero);
    V first_gradient = zero, second_gradient = zero, off = one;
    V first_exp = zero, second_exp = zero;
    if constexpr (Name == kDkd) {
      const int members = two ? 2 : 1;
      const V s[2] = {select(first_apart - none, first_dot, lowest),
                      select(second_apart - none, second_dot, lowest)};
      const V scaled[2] = {s[0] * rate, s[1] * rate};
      const V t[2] = {select(first_apart - none, first_teacher, lowest) * rate,
                      select(second_apart - none, second_teacher, lowest) * rate};
      off = student_max - student_whole;
      const DkdRow<V> dkd = finish_dkd<V>(
          {off * rate, (teacher_max - teacher_whole) * rate, student_sum, teacher_sum, gap}, scaled,
          t, members, V(float(call.first)), V(float(call.second)));
      d = dkd.rest;
      confidence = dkd.confidence;
      first_gradient = dkd.label_gradient[0];
      second_gradient = dkd.label_gradient[1];
      // The label term covers the labels too, relative to the whole row's maximum.
      off = select(student_sum, exponential(off), zero);
      first_exp = exponential(s[0]);
      if (two) second_exp = exponential(s[1]);
      ce.label_sum = ce.label_sum * off + first_exp + second_exp;
    } else {
      if constexpr (Name == kLogitStandard) {
        d = finish_standard(student_sum, teacher_sum, gap, student_dot, teacher_dot,
                            spread.deviation, zero - spread.centre, spread.count);
      } else {
        const V share{float(call.first)};
        const V inverse_s = one / student_sum, inverse_t = one / teacher_sum;
        const V log_s = logarithm(student_sum), log_t = logarithm(teacher_sum);
        V from_teacher = zero, from_student = zero;
        for (int64_t c = 0; c < classes; ++c) {
          const V x = (V::load(b.student + c * L) - student_max) * rate;
          const V y = (V::load(b.teacher + c * L) - teacher_max) * rate;
          const Mixture<V> m =
              mixture(Name, share, x, y, V::load(b.student_exp + c * L) * inverse_s,
                      V::load(b.teacher_exp + c * L) * inverse_t, log_s, log_t);
          m.z.store(b.teacher_exp + c * L);
          from_teacher = from_teacher + m.from_teacher;
          from_student = from_student + m.from_student;
        }
        d = finish_mixture(Name, share, student_sum, from_teacher, from_student);
      }
      // No finite teacher logit: nothing to learn. None of the student: infinite.
      d = divergence_where(select(teacher_sum, student_sum, zero), d,
                           select(teacher_sum, V(INFINITY), zero));
    }
    const V unsure = maximum(V(float(call.threshold)) - confidence, zero);
    const V sure = select(unsure, zero, one);
    d = divergence_where(sure, d, zero);

    const KdWeights<V> w = Rows::weights_of(call, labels, at, first_dot, second_dot);
    const KdCoefficients<V> k = kd_finish_label(ce, w, V(float(call.label_smoothing)),
                                                V(setup.inverse_classes), setup.dense);
    Rows::store_losses(call, row, count, k.loss + select(w.kd_loss, w.kd_loss * d.loss, zero));

    if (setup.keep) {
      const V by_own = Name == kDkd ? k.label * off : k.label;
      const V by_e =
          Own ? w.kd_gradient * d.student : multiply_add(w.kd_gradient, d.student, by_own);
      const V by_z = w.kd_gradient * d.second, by_x = w.kd_gradient * d.logit;
      const V from_mean = w.kd_gradient * d.constant, constant = from_mean - k.constant;
      V at_first = zero - k.hard * first_share, at_second = zero - k.hard * second_share;
      if constexpr (Name == kDkd) {
        const V by_label = select(sure, w.kd_gradient, zero);
        at_first =
            at_first + select(first_apart - none,
                              multiply_add(k.label, first_exp, by_label * first_gradient), zero);
        at_second =
            at_second + select(second_apart - none,
                               multiply_add(k.label, second_exp, by_label * second_gradient), zero);
      }
      V index = zero;
      for (int64_t c = 0; c < classes; ++c, index = index + one) {
        V g = multiply_add(by_e, V::load(b.student_exp + c * L), constant);
        // A row without gradient may have kept an infinite z, or NaN.
        const V z = V::load(b.teacher_exp + c * L);
        g = multiply_add(by_z, needs_mixture(Name) ? zero_unless(by_z, z) : z, g);
        if constexpr (Own) g = multiply_add(by_own, V::load(b.label_exp + c * L), g);
        if constexpr (Name == kLogitStandard) {
          // A class that counts in neither mean nor deviation has no gradient from them.
          const V x = V::load(b.student + c * L) - student_max;
          const V beyond = maximum(x, V(-FLT_MAX)) - x;
          g = g + select(beyond, zero - from_mean, by_x * x);
        }
        g = g + where_equal(first, index, at_first);
        if (two) g = g + where_equal(second, index, at_second);
        if (setup.dense) g = subtract_multiply(g, k.hard, V::load(b.soft + c * L));
        g.store(b.student + c * L);
      }
      Rows::store(call, row, count, b);
    }
    Rows::leave_out(call, row, count, labels, at);
  }

  template <int Name>
  static void all(const KdCall& call, int64_t begin, int64_t end) {
    const Setup setup(call);
    const int power = setup.power;
    const bool own = power != kNoLabel && (power != 1 || Name == kLogitStandard);
    const OwnFunction own_of = own_function(Name == kLogitStandard ? kOwnExponential : power);
    const auto function = own ? &block<Name, true> : &block<Name, false>;
    Rows::each_block(call, begin, end,
                     [&](int64_t row, int64_t count, const Labels& labels, int64_t at, Blocks& b) {
                       function(setup, own_of, row, count, labels, at, b);
                     });
  }

  static OwnFunction own_function(int power) {
    switch (power) {
      case 2:
        return &own_exponentials<2>;
      case 3:
        return &own_exponentials<3>;
      case 4:
        return &own_exponentials<4>;
      case 5:
        return &own_exponentials<5>;
      case 6:
        return &own_exponentials<6>;
      case 7:
        return &own_exponentials<7>;
      case 8:
        return &own_exponentials<8>;
      default:
        return &own_exponentials<kOwnExponential>;
    }
  }

  static void rows(const KdCall& call, int64_t begin, int64_t end) {
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
