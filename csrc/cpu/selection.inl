// The largest logits of a row, and how sure they are, one row at a time.
//
// topk takes the maxima of a few times k parts of the row; the k-th largest of them is no larger
// than the k-th largest logit, and little more than k logits reach it. Those are collected, a
// compare a vector, and sorted. The largest logit is then known, so one sweep of exponentials
// follows, over the classes that were not chosen: their sum is made on its own, not as a
// difference, and keeps its digits however small it is.
//
// Included after convert.inl, in the namespace of an instruction set.

template <class V, class Exponential>
struct StatisticsLanes;  // statistics_lanes.inl: one row a lane

template <class V, class Exponential>
struct Selection {
  using A = typename V::Scalar;
  static constexpr int64_t L = V::lanes;
  static constexpr int64_t kPiece = 64 * L;  // longer sums are made of sums of this many, in double

  struct Candidate {
    A value;
    int32_t index;
    bool operator<(const Candidate& other) const {
      return value > other.value || (value == other.value && index < other.index);
    }
  };

  // The row in the arithmetic's own dtype.
  static const A* whole_row(const Matrix& matrix, int64_t row, int64_t classes) {
    static thread_local LineMemory<A> memory;
    A* const to = matrix.dtype == dtype_of<A>() ? nullptr : memory.of(classes);
    return read_row<A>(matrix, row, 0, classes, to);
  }

  // of(vector, place) of every vector of the row; the last one filled up with -inf.
  template <class Of>
  static void sweep(const A* x, int64_t from, int64_t to, Of of) {
    int64_t i = from;
    for (; i + L <= to; i += L) of(V::load(x + i), i);
    if (i < to) of(V::load_part(x + i, to - i, A(-INFINITY)), i);
  }

  // A number below the k-th largest logit, close to it in a wide row.
  static A lower_bound(const A* x, int64_t classes, int64_t k) {
    const int64_t parts = (4 * k + L - 1) / L, size = classes / (parts * L) * L;
    if (size < 2 * L) return A(-INFINITY);
    static thread_local std::vector<A> tops;
    tops.resize(size_t(parts * L));
    for (int64_t part = 0; part < parts; ++part) {
      V top(A(-INFINITY));
      const A* const at = x + part * size;
      for (int64_t i = 0; i < size; i += L) top = maximum(top, V::load(at + i));
      top.store(tops.data() + part * L);
    }
    // NaN has no order: the sum of exponentials finds it later.
    for (A& top : tops)
      if (top != top) top = A(-INFINITY);
    std::nth_element(tops.begin(), tops.begin() + (k - 1), tops.end(), std::greater<A>());
    return std::nextafter(tops[size_t(k - 1)], A(-INFINITY));
  }

  // The k largest, in order. `found` holds more than k while the row is read.
  static void choose(const A* x, int64_t classes, int64_t k, std::vector<Candidate>& found) {
    const size_t keep = size_t(k), full = size_t(4 * k + 4 * L);
    found.clear();
    // Classes of -inf are not looked for: they fill up what is missing in the end.
    A bound = lower_bound(x, classes, k);
    sweep(x, 0, classes, [&](V v, int64_t i) {
      for (uint32_t bits = above(v, V(bound)); bits; bits &= bits - 1) {
        const int64_t at = i + __builtin_ctz(bits);
        found.push_back({x[at], int32_t(at)});
      }
      if (found.size() >= full) {
        std::nth_element(found.begin(), found.begin() + (k - 1), found.end());
        found.resize(keep);
        bound = found.back().value;
      }
    });
    if (found.size() > keep) {
      std::nth_element(found.begin(), found.begin() + (k - 1), found.end());
      found.resize(keep);
    }
    std::sort(found.begin(), found.end());
    if (found.size() == keep) return;
    std::vector<bool> taken(size_t(classes), false);
    for (const Candidate& one : found) taken[size_t(one.index)] = true;
    for (int64_t i = 0; found.size() < keep; ++i)
      if (!taken[size_t(i)]) found.push_back({x[i], int32_t(i)});  // -inf or NaN
  }

  static void topk(const TopKCall& call, int64_t begin, int64_t end) {
    const Exponential exp_of(1.0);
    static thread_local std::vector<Candidate> found;
    for (int64_t row = begin; row < end; ++row) {
      const A* const x = whole_row(call.logits, row, call.classes);
      choose(x, call.classes, call.k, found);
      const A last = found.back().value;
      const A top = found.front().value == A(-INFINITY) ? A(0) : found.front().value;
      const V shift(top), bound(last), one(A(1)), zero(A(0));
      double rest = 0, equals = 0;
      for (int64_t from = 0; from < call.classes && call.k < call.classes; from += kPiece) {
        V sum = zero, same = zero;
        sweep(x, from, std::min(from + kPiece, call.classes), [&](V v, int64_t) {
          sum = sum + where_below(v, bound, exp_of(v - shift));
          same = same + where_equal(v, bound, one);
        });
        rest += double(sum_of(sum));
        equals += double(sum_of(same));
      }
      double chosen = 0;
      for (int64_t from = 0; from < call.k; from += L) {
        A part[L];
        for (int64_t i = 0; i < L; ++i) {
          part[i] = from + i < call.k ? found[size_t(from + i)].value : A(-INFINITY);
          equals -= from + i < call.k && part[i] == last;
        }
        chosen += double(sum_of(exp_of(V::load(part) - shift)));
      }
      if (last != A(-INFINITY) && call.k < call.classes)
        rest += equals * double(exponential(last - top));
      const TopKRow<A> whole = finish_topk(top, A(chosen), A(rest), call.classes - call.k);
      for (int64_t i = 0; i < call.k; ++i) {
        call.indices[row * call.k + i] = found[size_t(i)].index;
        static_cast<A*>(call.log_probs)[row * call.k + i] =
            topk_log_prob(whole, found[size_t(i)].value);
      }
      static_cast<A*>(call.log_tail)[row] = whole.log_tail;
    }
  }

  // The largest logit; of(vector) of every vector. Four maxima, so that a comparison does not wait
  // for the one before. NaN has no order and may be passed over.
  template <class Of>
  static A largest(const A* x, int64_t classes, Of of) {
    V tops[4] = {V(A(-INFINITY)), V(A(-INFINITY)), V(A(-INFINITY)), V(A(-INFINITY))};
    const auto take = [&](V v, V& top) {
      top = maximum(top, v);
      of(v);
    };
    int64_t i = 0;
    for (; i + 4 * L <= classes; i += 4 * L)
      for (int k = 0; k < 4; ++k) take(V::load(x + i + k * L), tops[k]);
    sweep(x, i, classes, [&](V v, int64_t) { take(v, tops[0]); });
    return maximum_of(maximum(maximum(tops[0], tops[1]), maximum(tops[2], tops[3])));
  }

  static void largest_two(const A* x, int64_t classes, A& top, A& next) {
    V first(A(-INFINITY)), second = first;
    sweep(x, 0, classes, [&](V v, int64_t) {
      second = maximum(second, minimum(first, v));
      first = maximum(first, v);
    });
    A firsts[L], seconds[L];
    first.store(firsts);
    second.store(seconds);
    for (int64_t i = 0; i < L; ++i) {
      next = maximum(next, maximum(seconds[i], firsts[i] < top ? firsts[i] : top));
      top = maximum(top, firsts[i]);
    }
  }

  // Margin: with the second largest, which the margin is made of, and the mask.
  template <bool Margin>
  static void confidence(const ConfidenceCall& call, int64_t begin, int64_t end) {
    const double rate = 1.0 / call.temperature;
    const Exponential exp_of(rate);
    const V zero(A(0));
    for (int64_t row = begin; row < end; ++row) {
      const A* const x = whole_row(call.logits, row, call.classes);
      A top = A(-INFINITY), next = A(-INFINITY);
      if constexpr (Margin)
        largest_two(x, call.classes, top, next);
      else
        top = largest(x, call.classes, [](V) {});
      const V shift(top == A(-INFINITY) ? A(0) : top);
      double sum = 0, dot = 0;
      for (int64_t from = 0; from < call.classes; from += kPiece) {
        V part = zero, part_dot = zero;
        sweep(x, from, std::min(from + kPiece, call.classes), [&](V v, int64_t) {
          const V e = exp_of(v - shift);
          part = part + e;
          part_dot = add_product_unless_zero(e, v - shift, part_dot);
        });
        sum += double(sum_of(part));
        dot += double(sum_of(part_dot));
      }
      int64_t label = call.no_answer;
      ConfidenceRow<A> out = {A(NAN), A(NAN), A(NAN)};
      if (sum > 0) {  // not NaN, and some class is finite
        label = place_of(x, call.classes, top);
        const A second = Margin ? exponential((next - top) * A(rate)) : A(0);
        out = finish_confidence(A(sum), second, A(dot * rate));
      }
      call.label[row] = label;
      static_cast<A*>(call.confidence)[row] = out.confidence;
      static_cast<A*>(call.entropy)[row] = out.entropy;
      if constexpr (Margin) {
        static_cast<A*>(call.margin)[row] = out.margin;
        call.mask[row] = out.confidence >= A(call.threshold);
      }
    }
  }

  // The first class whose logit is `wanted`, which one has.
  static int64_t place_of(const A* x, int64_t classes, A wanted) {
    const V all(wanted);
    int64_t i = 0;
    for (; i + L <= classes; i += L)
      if (const uint32_t bits = equal(V::load(x + i), all)) return i + __builtin_ctz(bits);
    return i + __builtin_ctz(equal(V::load_part(x + i, classes - i, A(-INFINITY)), all));
  }

  static void argmax(const Matrix& logits, int64_t classes, int64_t no_answer, int64_t* label,
                     int64_t begin, int64_t end) {
    constexpr uint32_t every = uint32_t((uint64_t(1) << L) - 1);
    for (int64_t row = begin; row < end; ++row) {
      const A* const x = whole_row(logits, row, classes);
      uint32_t sound = every;
      const A top = largest(x, classes, [&](V v) { sound &= equal(v, v); });
      const bool answer = sound == every && top > A(-INFINITY) && top < A(INFINITY);
      label[row] = answer ? place_of(x, classes, top) : no_answer;
    }
  }

  // Statistics of rows: of few classes by lanes.
  static void sureness(const ConfidenceCall& call, int64_t begin, int64_t end) {
    if constexpr (L > 1)
      if (call.classes <= kLaneClasses)
        return StatisticsLanes<V, Exponential>::confidence(call, begin, end);
    confidence<false>(call, begin, end);
  }
  static void label(const Matrix& logits, int64_t classes, int64_t no_answer, int64_t* label,
                    int64_t begin, int64_t end) {
    if constexpr (L > 1)
      if (classes <= kLaneClasses)
        return StatisticsLanes<V, Exponential>::argmax(logits, classes, no_answer, label, begin,
                                                       end);
    argmax(logits, classes, no_answer, label, begin, end);
  }

  static SelectionKernels kernels() {
    return {&topk, &confidence<true>, &sureness, &label, &Records<V, Exponential>::rows};
  }
};
