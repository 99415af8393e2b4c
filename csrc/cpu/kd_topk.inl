// The distillation loss with TopK teachers on a CPU: one row at a time.
//
// The student's row goes through the chunks of kd_loss.inl; of the teacher only the k classes are
// read, and only there the gradient differs from a multiple of the softmax. DRAM sees the student
// once, k classes of the teacher, and the gradient once.
//
// `tail` asks for the student's sum over the other classes. It is made without the k (-inf in a
// copy of the chunk), not as a difference; the k then are a chunk of their own.
//
// Included after kd_loss.inl, in the namespace of an instruction set.

template <class V, class Exponential>
struct TopKRows {
  using A = typename V::Scalar;
  using Body = Kd<V, Exponential>;
  using Setup = typename Body::Setup;
  using Statistics = typename Body::Statistics;
  using Coefficients = typename Body::Coefficients;
  static constexpr int64_t L = V::lanes;

  // What the loop over rows needs of each of the k classes, teacher after teacher. delta: v - u,
  // times the teacher's share; shift: y; logit: the student's.
  struct Named {
    const int32_t* index;  // of a teacher's own, or, of two, `both`
    int32_t* both;
    // Places of the k grouped by the chunk their class lies in: chunk c's are order[begin[c]] up to
    // order[begin[c + 1]]. A row of one chunk has no groups.
    int32_t *order, *begin;

    // of(place) for those of chunk c, of `chunks`.
    template <class Of>
    void each(int64_t c, int64_t chunks, Of of) const {
      if (chunks == 1)
#pragma GCC unroll 4
        for (int64_t i = 0; i < count; ++i) of(i);
      else
        for (int64_t j = begin[c]; j < begin[c + 1]; ++j) of(order[j]);
    }
    A *delta, *shift, *logit;
    int64_t count;
    A *kept, *kept_label, *gradient;  // tail and support: the k as a chunk of their own
  };

  // Classes and probabilities of one teacher; false where an index is outside the classes.
  static bool read_teacher(const KdCall& call, const TopKTeacher& teacher, int64_t row,
                           const Exponential& exp_of, A inverse_temperature, A* shift, A* v,
                           TeacherRow<A>& out) {
    const int64_t k = teacher.k, whole = k / L * L, padded = (k + L - 1) / L * L;
    const int64_t others = call.classes - k;
    const int32_t* const index = teacher.indices + row * k;
    uint32_t largest_index = 0;
    for (int64_t i = 0; i < k; ++i) largest_index = std::max(largest_index, uint32_t(index[i]));
    if (largest_index >= uint64_t(call.classes)) return false;
    const A* const l = read_row<A>(teacher.log_probs, row, 0, k, shift);
    // Of the row after the next: past the last one nothing is read, and asking is no access.
    __builtin_prefetch(index + 2 * k);
    if (l != shift) __builtin_prefetch(l + 2 * teacher.log_probs.row_stride);
    A tail;
    tail = others > 0 ? *read_row<A>(teacher.log_tail, row, 0, 1, &tail) : A(-INFINITY);
    const A lowest = A(-INFINITY);
    const auto log_probs = [&](int64_t i) {
      return i < whole ? V::load(l + i) : V::load_part(l + i, k - i, lowest);
    };
    V largest(lowest);
    for (int64_t i = 0; i < padded; i += L) largest = maximum(largest, log_probs(i));
    const A largest_of_k = maximum_of(largest), top = Body::finite(maximum(tail, largest_of_k));
    const V less(top), rate(inverse_temperature);
    V sum(A(0));
    for (int64_t i = 0; i < padded; i += L) {
      const V x = log_probs(i) - less, e = exp_of(x);
      sum = sum + e;
      e.store(v + i);
      (x * rate).store(shift + i);
    }
    const A tail_shift = (tail - top) * inverse_temperature;
    const A tail_exp = tail == A(-INFINITY) ? A(0) : exponential(tail_shift);
    const TeacherSums<A> sums = {sum_of(sum),
                                 kd_rescale(A(1), (largest_of_k - top) * inverse_temperature),
                                 tail_exp * A(others), tail_exp == A(0) ? A(0) : tail_shift};
    out = finish_teacher(sums, call.tail_policy, others);
    const V by(out.inverse), each(out.each);
    for (int64_t i = 0; i < padded; i += L) (V::load(v + i) * by - each).store(v + i);
    return true;
  }

  // One teacher, or the mixture of two as one that has no logarithms: its loss is a cross entropy.
  static bool read_teachers(const KdCall& call, int64_t row, const Exponential& exp_of,
                            A inverse_temperature, Named& named, TeacherRow<A>& out, A& mass) {
    named.count = 0;
    mass = A(0);
    TeacherRow<A> mixed = {A(1), A(0), A(0), A(0), A(0), A(0)};
    for (int64_t i = 0; i < call.named_count; ++i) {
      const TopKTeacher& teacher = call.named[i];
      A* const delta = named.delta + named.count;
      if (!read_teacher(call, teacher, row, exp_of, inverse_temperature, named.shift + named.count,
                        delta, out))
        return false;
      named.index = teacher.indices + row * teacher.k;
      if (call.mix) {
        std::copy_n(named.index, teacher.k, named.both + named.count);
        named.index = named.both;
      }
      named.count += teacher.k;
      const A share = !call.mix ? A(1) : i == 0 ? A(call.mix[row]) : A(1) - A(call.mix[row]);
      mass += out.inverse == A(0) ? A(0) : share;
      if (!call.mix) return true;
      for (int64_t j = 0; j < teacher.k; ++j) delta[j] *= share;
      mixed.each += share * out.each;
      mixed.confidence += share * out.confidence;
    }
    out = mixed;
    return true;
  }

  static void group(const Setup& setup, Named& named) {
    if (setup.chunks == 1) return;
    std::fill_n(named.begin, setup.chunks + 1, 0);
    const uint32_t chunk = uint32_t(setup.chunk);
    for (int64_t i = 0; i < named.count; ++i) ++named.begin[uint32_t(named.index[i]) / chunk];
    for (int64_t c = 1; c <= setup.chunks; ++c) named.begin[c] += named.begin[c - 1];
    for (int64_t i = 0; i < named.count; ++i)
      named.order[--named.begin[uint32_t(named.index[i]) / chunk]] = int32_t(i);
  }

  using StatisticsFunction = typename Body::StatisticsFunction;
  using GradientFunction = typename Body::GradientFunction;
  template <class F>
  static auto choose(const Setup& setup, F f) {
    switch (setup.power) {
      case kNoLabel:
        return f.template operator()<kNoLabel>();
      case 1:
        return f.template operator()<1>();
      case 2:
        return f.template operator()<2>();
      case 3:
        return f.template operator()<3>();
      case 4:
        return f.template operator()<4>();
      default:
        return f.template operator()<kOwnExponential>();
    }
  }
  // Sum: with that of the logits, which a uniform tail wants.
  template <bool Sum>
  static StatisticsFunction statistics_function(const Setup& setup) {
    return choose(setup, [&]<int Power>() -> StatisticsFunction {
      if (setup.keep) return &Body::template chunk_statistics<Power, false, true, Sum>;
      return &Body::template chunk_statistics<Power, false, false, Sum>;
    });
  }
  static GradientFunction gradient_function(const Setup& setup) {
    return choose(setup, []<int Power>() -> GradientFunction {
      return &Body::template chunk_gradient<Power, false>;
    });
  }

  // The student's logits of the k, once the row is in a cache. The last vector is filled up with
  // classes that have no share.
  static void gather(const KdCall& call, int64_t row, const Named& named, A no_share) {
    if (call.student.dtype == dtype_of<A>()) {
      const A* const s = static_cast<const A*>(call.student.data) + row * call.student.row_stride;
      // A vector at a time: numbers that are stored one by one and then loaded as a vector would
      // wait until every store before them, the streamed lines among them, has retired.
      int64_t i = 0;
      for (; i + L <= named.count; i += L) V::gather(s, named.index + i).store(named.logit + i);
      for (; i < named.count; ++i) named.logit[i] = s[named.index[i]];
    } else {
      for (int64_t i = 0; i < named.count; ++i)
        read_row<A>(call.student, row, named.index[i], 1, named.logit + i);
    }
    for (int64_t i = named.count; i % L; ++i) {
      named.logit[i] = named.shift[i] = A(0);
      named.delta[i] = no_share;
    }
  }

  // Sum over the k of v (y - x); of a mixture, of delta (-x).
  static A gap_of(const Named& named, bool mixture, A each, A student_max, A inverse_temperature) {
    const V top(student_max), rate(inverse_temperature), zero(A(0)), add(mixture ? A(0) : each);
    V gap = zero;
    for (int64_t i = 0; i < named.count; i += L) {
      const V x = (V::load(named.logit + i) - top) * rate;
      const V v = V::load(named.delta + i) + add;
      const V y = mixture ? zero : V::load(named.shift + i);
      gap = add_product_unless_zero(v, y - x, gap);
    }
    return sum_of(gap);
  }

  // Sum of s - student_max over the classes that have u: all of them in a mixture, else those
  // outside the k. hidden: the student excludes one of them.
  static A spread_sum(const KdCall& call, int64_t row, const Named& named, bool mixture,
                      A student_max, A all, bool& hidden) {
    if (all == A(-INFINITY))
      return finite_spread_sum(call, row, named, mixture, student_max, hidden);
    hidden = false;
    if (mixture) return all;
    const V top(student_max);
    V sum(A(0));
    for (int64_t i = 0; i < named.count; i += L) sum = sum + (V::load(named.logit + i) - top);
    // What fills up the last vector has the logit 0.
    const int64_t padded = (named.count + L - 1) / L * L;
    return all - (sum_of(sum) + A(padded - named.count) * student_max);
  }
  static A finite_spread_sum(const KdCall& call, int64_t row, const Named& named, bool mixture,
                             A student_max, bool& hidden) {
    double sum = 0;
    int64_t excluded = 0;
    const auto add = [&](A s, int sign) {
      excluded += s == A(-INFINITY) ? sign : 0;
      sum += s == A(-INFINITY) ? 0 : sign * double(s - student_max);
    };
    for (int64_t i = 0; i < call.classes; ++i) {
      A one;
      add(*read_row<A>(call.student, row, i, 1, &one), 1);
    }
    for (int64_t i = 0; i < named.count && !mixture; ++i) add(named.logit[i], -1);
    hidden = excluded > 0;
    return A(sum);
  }

  // ---- `tail`: statistics of the row without the k, then of the k
  template <class Between>
  static void bucket_statistics(const Setup& setup, StatisticsFunction function, int64_t row,
                                const Named& named, const typename Body::Kept& kept,
                                typename Body::Buffers& buffers, Statistics& of_k,
                                Between between) {
    const KdCall& call = setup.call;
    typename Body::Reference reference;
    for (int64_t c = 0; c < setup.chunks; ++c) {
      between(c);
      const int64_t from = c * setup.chunk, n = std::min(setup.chunk, call.classes - from);
      const A* const s = read_row<A>(call.student, row, from, n, buffers.student);
      std::copy_n(s, n, buffers.teacher);
      named.each(c, setup.chunks,
                 [&](int64_t i) { buffers.teacher[named.index[i] - from] = A(-INFINITY); });
      function(setup, buffers.teacher, nullptr, n, reference, kept.student + from, nullptr,
               kept.label + from, buffers.pending, kept.statistics[c]);
      reference.take(kept.statistics[c]);
      if (setup.smoothing || setup.dense) {
        const A* const y =
            setup.dense ? read_row<A>(call.soft, row, from, n, buffers.out) : nullptr;
        add_label_sums<V>(setup.smoothing, setup.dense, s, y, n, kept.statistics[c]);
      }
    }
    gather(call, row, named, A(0));
    function(setup, named.logit, nullptr, named.count, {}, named.kept, nullptr, named.kept_label,
             buffers.pending, of_k);
    of_k.count = A(0);  // the sums over logits have them already
  }

  // What the gradient of a row is made of.
  struct Row {
    int64_t row = -1;
    Label label;
    Coefficients c;
    Statistics whole, rest;
    typename Body::Kept kept;
    Named named;
  };

  // The gradient of chunks: a multiple of the softmax, then what differs at the k, then the label.
  template <int Policy>
  static void gradients(const Setup& setup, GradientFunction gradient_of, const Row& of,
                        int64_t first, int64_t last, typename Body::Buffers& buffers, bool late) {
    constexpr bool bucket = Policy == kTailBucket, support = Policy == kTailSupport;
    const KdCall& call = setup.call;
    const Named& named = of.named;
    const Dtype dtype = call.student.dtype;
    char* const gradient =
        static_cast<char*>(call.gradient) + of.row * call.classes * size_of(dtype);
    const bool direct = dtype == dtype_of<A>() && !call.stream, sweep = !support || setup.label;
    const bool shifted = sweep && (bucket || setup.chunks > 1);
    for (int64_t part = first; part < last; ++part) {
      const int64_t from = part * setup.chunk, n = std::min(setup.chunk, call.classes - from);
      A* const place = reinterpret_cast<A*>(gradient) + from;
      if (late) buffers.pending.rest();
      A* const out = late     ? buffers.pending.place(place, of.kept.student + from)
                     : direct ? place
                              : buffers.out;
      if (sweep) {
        Coefficients c;
        if (shifted)
          c = Body::for_chunk(setup, of.c, bucket ? of.rest : of.whole, of.kept.statistics[part]);
        gradient_of(shifted ? c : of.c, of.kept.student + from, nullptr, of.kept.label + from, n,
                    out, false);
      } else {
        std::fill_n(out, n, A(0));
      }
      named.each(part, setup.chunks, [&](int64_t i) {
        A& at = out[named.index[i] - from];
        if constexpr (bucket)
          at = named.gradient[i] - named.delta[i];
        else if constexpr (support)
          at += named.gradient[i] - named.delta[i];
        else
          at -= named.delta[i];
      });
      if (setup.dense) {
        const A* const y = read_row<A>(call.soft, of.row, from, n, buffers.teacher);
        for (int64_t i = 0; i < n; ++i) out[i] -= of.c.hard * y[i];
      } else if (setup.label) {
        const int64_t one = of.label.first - from, other = of.label.second - from;
        if (of.label.first >= 0 && one >= 0 && one < n)
          out[one] -= of.c.hard * A(of.label.first_share);
        if (of.label.second >= 0 && other >= 0 && other < n)
          out[other] -= of.c.hard * A(of.label.second_share);
      }
      if (late)
        buffers.pending.give(out, place, n);
      else if (!direct)
        put<V>(out, gradient + from * size_of(dtype), dtype, n, call.stream);
    }
  }

  // Loss of a row, and what its gradient is made of; false where the row is left out.
  // between(k): before the statistics of each chunk.
  template <int Policy, class Between>
  static bool loss(const Setup& setup, const Setup& distilling, StatisticsFunction statistics_of,
                   GradientFunction gradient_of, int64_t row, Row& now,
                   typename Body::Buffers& buffers, Between between) {
    const KdCall& call = setup.call;
    const KdCall& whole_call = distilling.call;
    constexpr bool bucket = Policy == kTailBucket, support = Policy == kTailSupport;
    const typename Body::Kept& kept = now.kept;
    Named& named = now.named;
    now.row = row;
    const Label& label = now.label;
    read_label(call, row, now.label);
    KdWeights<A> w = Body::weights_of(whole_call, label, row);
    if (label.outside || !Body::counts(distilling, w)) {
      Body::leave_out(call, row, label.outside);
      return false;
    }
    const A rate = distilling.inverse_temperature;
    const bool mixture = call.mix != nullptr;
    TeacherRow<A> teacher;
    A mass;
    if (!read_teachers(whole_call, row, distilling.student_exp, rate, named, teacher, mass)) {
      Body::leave_out(call, row, true);
      return false;
    }

    group(setup, named);

    // The student, and the label term.
    Statistics &rest = now.rest, of_k;
    Coefficients& c = now.c;
    const Statistics* statistics = &now.whole;
    const bool sweep = !support || setup.label;
    if constexpr (bucket) {
      bucket_statistics(setup, statistics_of, row, named, kept, buffers, of_k, between);
      rest = kept.statistics[0];
      for (int64_t i = 1; i < setup.chunks; ++i) rest = kd_merge(rest, kept.statistics[i], rate);
      now.whole = kd_merge(rest, of_k, rate);
    } else if (sweep) {
      typename Body::Reference reference;
      for (int64_t k = 0; k < setup.chunks; ++k) {
        between(k);
        Body::statistics(setup, statistics_of, row, k, k + 1, reference, kept, buffers);
      }
      statistics = &Body::merged(setup, kept, now.whole);
    } else {
      for (int64_t k = 0; k < setup.chunks; ++k) between(k);
    }
    const Statistics& whole = *statistics;
    if (sweep)
      Body::coefficients(setup, row, label, w, whole, c);
    else
      c = {};
    if constexpr (!bucket) gather(call, row, named, mixture ? A(0) : -teacher.each);

    // The distillation term.
    TopKTerm<A> term;
    if constexpr (support) {
      const A top = Body::finite(*std::max_element(named.logit, named.logit + named.count));
      double sum = 0;
      for (int64_t i = 0; i < named.count; ++i) {
        named.kept[i] = exponential((named.logit[i] - top) * rate);
        sum += double(named.kept[i]);
      }
      term = finish_support(teacher, A(sum), gap_of(named, false, A(0), top, rate));
    } else {
      const A gap = gap_of(named, mixture, teacher.each, whole.student_max, rate);
      if constexpr (bucket) {
        term = finish_bucket(teacher, call.classes - named.count, whole.student_sum,
                             rest.student_sum, (rest.student_max - whole.student_max) * rate, gap);
      } else {
        bool hidden = false;
        A sum = A(0);
        if (teacher.each != A(0))
          sum = spread_sum(call, row, named, mixture, whole.student_max, whole.logit_sum, hidden);
        term = finish_spread(teacher, mass, whole.student_sum, gap, sum * rate, hidden);
      }
    }
    const bool taught = !(teacher.confidence < A(call.threshold));
    if (!taught) term = no_term(A(0));
    static_cast<A*>(call.losses)[row] = c.loss + (w.kd_loss == A(0) ? A(0) : w.kd_loss * term.loss);
    if (!setup.keep) return true;

    const A by = w.kd_gradient;
    const bool pulls = taught && term.chosen != A(0);
    c.student = by * term.others;
    c.constant += by * term.constant;
    if constexpr (bucket) {
      Coefficients of = c;
      of.student = by * term.chosen;
      of = Body::for_chunk(setup, of, whole, of_k);
      // The others' coefficient is relative to their own maximum.
      if (rest.student_sum != A(0)) c.label *= exponential(rest.student_max - whole.student_max);
      gradient_of(of, named.kept, nullptr, named.kept_label, named.count, named.gradient, false);
    } else if constexpr (support) {
      for (int64_t i = 0; i < named.count; ++i)
        named.gradient[i] = by * term.chosen * named.kept[i];
    }
    // In place of the shares: what the gradient loses.
    const V scale(pulls ? by : A(0));
    for (int64_t i = 0; i < named.count; i += L)
      (V::load(named.delta + i) * scale).store(named.delta + i);
    return true;
  }

  template <int Policy>
  static void all(const KdCall& call, int64_t begin, int64_t end) {
    // `support` leaves the whole row to the label term alone.
    KdCall sweep_call = call;
    if (Policy == kTailSupport) sweep_call.kd_loss = 0;
    const Setup distilling(call);
    Setup setup(sweep_call);
    if (setup.power > 4) setup.power = kOwnExponential;
    const int64_t most = (call.named[0].k + L - 1) / L * L + (call.named[1].k + L - 1) / L * L;
    const bool late = Body::leaves_late(setup);
    const int64_t statistics = Body::statistics_size(setup), step = (most + 15) / 16 * 16 + 16;
    const int64_t exponentials = Body::exponentials_size(setup);
    // The groups' begins are integers no larger than an A.
    const int64_t size = statistics + 8 * step + (setup.chunks + 1 + 15) / 16 * 16;
    A* const memory = Body::scratch(exponentials + (1 + late) * size);
    Row two[2], *current = &two[0], *previous = &two[1];
    const auto lay = [&](Row& row, A* from) {
      row.kept = Body::place(setup, from, memory);
      A* const at = from + statistics;
      Named& named = row.named;
      named.delta = at;
      named.logit = at + step;
      named.kept = at + 2 * step;
      named.kept_label = at + 3 * step;
      named.gradient = at + 4 * step;
      named.shift = at + 5 * step;
      named.both = reinterpret_cast<int32_t*>(at + 6 * step);
      named.order = reinterpret_cast<int32_t*>(at + 7 * step);
      named.begin = reinterpret_cast<int32_t*>(at + 8 * step);
    };
    for (int i = 0; i < 2; ++i) lay(two[i], memory + exponentials + i * late * size);
    const auto statistics_of = statistics_function<Policy == kTailUniform>(setup);
    const auto gradient_of = gradient_function(setup);
    typename Body::Buffers buffers;
    const auto gradient = [&](const Row& of, int64_t first, int64_t last) {
      gradients<Policy>(setup, gradient_of, of, first, last, buffers, late);
    };
    for (int64_t row = begin; row < end; ++row) {
      const bool counts = loss<Policy>(setup, distilling, statistics_of, gradient_of, row, *current,
                                       buffers, [&](int64_t k) {
                                         if (previous->row >= 0) gradient(*previous, k, k + 1);
                                       });
      if (!counts) continue;
      if (late)
        std::swap(current, previous);
      else if (setup.keep)
        gradient(*current, 0, setup.chunks);
    }
    if (previous->row >= 0) gradient(*previous, 0, setup.chunks);
  }

  static void rows(const KdCall& call, int64_t begin, int64_t end) {
    switch (call.tail_policy) {
      case kTailRenorm:
        return all<kTailRenorm>(call, begin, end);
      case kTailBucket:
        return all<kTailBucket>(call, begin, end);
      case kTailSupport:
        return all<kTailSupport>(call, begin, end);
      default:
        return all<kTailUniform>(call, begin, end);
    }
  }
};
