// The divergences beside KL(p || q) on a GPU: a block a row. Included in kd_loss.cu.
//
// Each sweep reads the row again (from L1 or L2) instead of keeping it: maxima, sums of
// exponentials, for reverse KL, JSD and skew KL the sums of `mixture`, then the gradient. Sums are
// reduced in a fixed order.

// Mean and standard deviation (n - 1) of the finite logits of a row.
template <class A, class At>
__device__ inline void deviation_over_block(At at, int64_t classes, A top, A& mean, A& deviation,
                                            A& count) {
  A sum = A(0), square = A(0);
  count = A(0);
  for (int64_t i = threadIdx.x; i < classes; i += kThreads) {
    const A x = at(i);
    if (x == A(-INFINITY)) continue;
    sum += x - top;
    count += A(1);
  }
  sum = sum_over_block(sum);
  count = sum_over_block(count);
  const A centre = count > A(0) ? sum / count : A(0);
  for (int64_t i = threadIdx.x; i < classes; i += kThreads) {
    const A x = at(i);
    if (x == A(-INFINITY)) continue;
    const A c = (x - top) - centre;
    square += c * c;
  }
  square = sum_over_block(square);
  mean = centre + top;
  deviation = count > A(1) ? A(sqrt(square / (count - A(1)))) : A(0);
}

template <class S, class A, int Name>
__global__ void __launch_bounds__(kThreads) divergence_kernel(const Call call) {
  const KdFactors factors = factors_of<S, A>(call);
  const bool labelled = factors.ce_loss != 0;
  const bool dense = labelled && call.soft.data;
  const bool smoothing = labelled && call.label_smoothing != 0;
  const int64_t classes = call.classes;
  const int lane = int(threadIdx.x);
  double own_loss = 0;
  for (int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
    const Worth<A> worth = worth_of<A>(call, factors, row, dense);
    const Label& label = worth.label;
    KdWeights<A> w = worth.w;
    S* const gradient = call.gradient ? static_cast<S*>(call.gradient) + row * classes : nullptr;
    if (label.outside || !worth.counts) {
      if (lane == 0) add_loss(call, row, label.outside ? A(NAN) : A(0), own_loss);
      if (gradient)
        for (int64_t i = lane; i < classes; i += kThreads) put(gradient + i, A(0));
      continue;
    }
    const S* const student =
        static_cast<const S*>(call.student.data) + row * call.student.row_stride;
    const auto student_at = [&](int64_t i) { return A(number(student[i])); };
    const auto teacher_at = [&](int64_t i) { return element<A>(call.teacher, row, i); };

    // The labels of a DKD row stand apart.
    int64_t members[2] = {-1, -1};
    int count = 0;
    if constexpr (Name == kDkd) {
      if (label.first >= 0 && label.first_part != 0) members[count++] = label.first;
      if (label.second >= 0 && label.second_part != 0 && label.second != members[0])
        members[count++] = label.second;
    }
    const auto apart = [&](int64_t i) {
      return Name == kDkd && (i == members[0] || i == members[1]);
    };
    A member_student[2] = {A(0), A(0)}, member_teacher[2] = {A(0), A(0)};
    A whole_max = A(-INFINITY);
    for (int i = 0; i < count; ++i) {
      member_student[i] = student_at(members[i]);
      member_teacher[i] = teacher_at(members[i]);
      whole_max = maximum(whole_max, member_student[i]);
    }
    const A first_logit = label.first >= 0 ? student_at(label.first) : A(0);
    const A second_logit = label.second >= 0 ? student_at(label.second) : A(0);

    A student_max = A(-INFINITY), teacher_max = A(-INFINITY);
    for (int64_t i = lane; i < classes; i += kThreads) {
      if (apart(i)) continue;
      student_max = maximum(student_max, student_at(i));
      teacher_max = maximum(teacher_max, teacher_at(i));
    }
    student_max = maximum_over_block(student_max);
    teacher_max = maximum_over_block(teacher_max);
    whole_max = maximum(whole_max, student_max);
    if (student_max == A(-INFINITY)) student_max = A(0);
    if (teacher_max == A(-INFINITY)) teacher_max = A(0);
    if (whole_max == A(-INFINITY)) whole_max = A(0);

    const double rate = 1.0 / call.temperature;
    double student_rate_ = rate, teacher_rate_ = rate;
    A student_mean = A(0), student_deviation = A(0), student_count = A(0);
    if constexpr (Name == kLogitStandard) {
      A mean, teacher_deviation, teacher_count;
      deviation_over_block<A>(teacher_at, classes, teacher_max, mean, teacher_deviation,
                              teacher_count);
      deviation_over_block<A>(student_at, classes, student_max, student_mean, student_deviation,
                              student_count);
      student_rate_ /= double(student_deviation) + kStandardEpsilon;
      teacher_rate_ /= double(teacher_deviation) + kStandardEpsilon;
    }
    const A student_rate = A(student_rate_), teacher_rate = A(teacher_rate_);

    KdStatistics<A> ce = kd_empty(A(0));
    A student_sum = A(0), teacher_sum = A(0), gap = A(0), student_dot = A(0), teacher_dot = A(0);
    for (int64_t i = lane; i < classes; i += kThreads) {
      const A s = student_at(i);
      if (smoothing) ce.logit_sum += s - whole_max;
      if (dense) {
        const A share = element<A>(call.soft, row, i);
        ce.soft_mass += share;
        ce.soft_dot += select(share, share * (s - whole_max), A(0));
      }
      if (apart(i)) continue;
      const A x = s - student_max, y = teacher_at(i) - teacher_max;
      const A e = exponential(x * student_rate), p = exponential(y * teacher_rate);
      student_sum += e;
      teacher_sum += p;
      if (labelled) ce.label_sum += student_rate_ == 1.0 ? e : exponential(x);
      if constexpr (!needs_mixture(Name))
        gap += select(p, p * (y * teacher_rate - x * student_rate), A(0));
      if constexpr (Name == kLogitStandard) {
        student_dot += e * finite_or_zero(x);
        teacher_dot += p * finite_or_zero(x);
      }
    }
    student_sum = sum_over_block(student_sum);
    teacher_sum = sum_over_block(teacher_sum);
    gap = sum_over_block(gap);
    ce.student_max = whole_max;
    ce.count = A(classes);
    if (labelled) ce.label_sum = sum_over_block(ce.label_sum);
    if (smoothing) ce.logit_sum = sum_over_block(ce.logit_sum);
    if (dense) {
      ce.soft_mass = sum_over_block(ce.soft_mass);
      ce.soft_dot = sum_over_block(ce.soft_dot);
    }

    Divergence<A> d = no_divergence(A(0));
    A label_gradient[2] = {A(0), A(0)};
    A confidence = A(1) / teacher_sum;
    const A inverse_s = A(1) / student_sum, inverse_t = A(1) / teacher_sum;
    const A log_s = logarithm(student_sum), log_t = logarithm(teacher_sum);
    const A share = A(call.first);
    const auto mixture_at = [&](int64_t i) {
      const A x = (student_at(i) - student_max) * student_rate;
      const A y = (teacher_at(i) - teacher_max) * teacher_rate;
      return mixture<needs_mixture(Name) ? Name : kJsd, A>(
          share, x, y, exponential(x) * inverse_s, exponential(y) * inverse_t, log_s, log_t);
    };
    if constexpr (Name == kDkd) {
      A s[2], t[2];
      // Relative to the whole row's maxima: large logits would lose digits in what follows.
      A teacher_top = teacher_max;
      for (int i = 0; i < count; ++i)
        teacher_top = teacher_sum == 0 && i == 0 ? member_teacher[i]
                                                 : maximum(teacher_top, member_teacher[i]);
      if (teacher_top == A(-INFINITY)) teacher_top = A(0);
      for (int i = 0; i < 2; ++i) {
        s[i] = (member_student[i] - whole_max) * student_rate;
        t[i] = (member_teacher[i] - teacher_top) * teacher_rate;
      }
      const DkdRest<A> rest = {(student_max - whole_max) * student_rate,
                               (teacher_max - teacher_top) * teacher_rate, student_sum, teacher_sum,
                               gap};
      const DkdRow<A> dkd = finish_dkd<A>(rest, s, t, count, A(call.first), A(call.second));
      d = dkd.rest;
      confidence = dkd.confidence;
      label_gradient[0] = dkd.label_gradient[0];
      label_gradient[1] = dkd.label_gradient[1];
      if (labelled) {
        ce.label_sum =
            ce.label_sum == 0 ? A(0) : ce.label_sum * exponential(student_max - whole_max);
        for (int i = 0; i < count; ++i) ce.label_sum += exponential(member_student[i] - whole_max);
      }
    } else if (teacher_sum == 0) {
      confidence = A(0);
    } else if (student_sum == 0) {
      d = no_divergence(A(INFINITY));
    } else if constexpr (Name == kLogitStandard) {
      d = finish_standard(student_sum, teacher_sum, gap, sum_over_block(student_dot),
                          sum_over_block(teacher_dot), student_deviation,
                          student_max - student_mean, student_count);
    } else {
      A from_teacher = A(0), from_student = A(0);
      for (int64_t i = lane; i < classes; i += kThreads) {
        const Mixture<A> m = mixture_at(i);
        from_teacher += m.from_teacher;
        from_student += m.from_student;
      }
      d = finish_mixture<Name, A>(share, student_sum, sum_over_block(from_teacher),
                                  sum_over_block(from_student));
    }
    if (confidence < A(call.threshold)) {
      d = no_divergence(A(0));
      label_gradient[0] = label_gradient[1] = A(0);
    }

    if (label.first >= 0 && label.first_share != 0)
      w.label_dot += A(label.first_share) * (first_logit - whole_max);
    if (label.second >= 0 && label.second_share != 0)
      w.label_dot += A(label.second_share) * (second_logit - whole_max);
    const KdCoefficients<A> c =
        kd_finish(ce, w, A(1), A(call.label_smoothing), A(1.0 / double(classes)), A(0), dense);
    if (lane == 0)
      add_loss(call, row, c.loss + (w.kd_loss == 0 ? A(0) : w.kd_loss * d.loss), own_loss);
    if (!gradient) continue;
    for (int64_t i = lane; i < classes; i += kThreads) {
      const A s = student_at(i);
      A g = (labelled ? c.label * exponential(s - whole_max) : A(0)) - c.constant;
      if (apart(i)) {
        g += w.kd_gradient * label_gradient[i == members[0] ? 0 : 1];
      } else {
        const A x = s - student_max;
        A distil = d.student * exponential(x * student_rate);
        if (d.second != 0) {
          if constexpr (needs_mixture(Name))
            distil += d.second * mixture_at(i).z;
          else
            distil += d.second * exponential((teacher_at(i) - teacher_max) * teacher_rate);
        }
        if (Name == kLogitStandard && x != A(-INFINITY)) distil += d.logit * x + d.constant;
        g += w.kd_gradient * distil;
      }
      if (dense) {
        g -= c.hard * element<A>(call.soft, row, i);
      } else if (labelled) {
        if (i == label.first) g -= c.hard * A(label.first_share);
        if (i == label.second) g -= c.hard * A(label.second_share);
      }
      put(gradient + i, g);
    }
  }
  finish_losses<A>(call, own_loss);
}
