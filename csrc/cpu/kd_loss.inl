// Body of the distillation loss on a CPU: student and teacher read once, one write of the gradient.
//
// A row is cut into chunks of at most 1024 logits. A chunk comes from memory once and stays in L1
// for its two sweeps: maxima, then exponentials and their sums relative to the maxima so far.
// The exponentials stay in scratch (L1 to L2 sized; 8 bytes a logit) and the gradient is made of
// them by multiply-adds, so a logit costs two exponentials: for T = 1 ... 8 softmax(s) comes from
// e^s = (e^(s/T))^T, any other T takes a third. DRAM traffic is the least there is: student and
// teacher read once, the gradient written once (past the caches where the call asks).
//
// Included in the namespace of an instruction set, after kd_label.inl, kd_scale.inl, pending.inl.

template <class V, class Exponential>
struct Kd {
  using A = typename V::Scalar;
  using Statistics = KdStatistics<A>;
  using Coefficients = KdCoefficients<A>;
  static constexpr int64_t L = V::lanes;
  // A single sum of 1024 numbers loses digits that 16 sums of 64 keep.
  static constexpr int64_t kPart = L == 1 ? 128 : kChunk;

  // Where the exponentials of a row stay, chunk after chunk.
  struct Kept {
    A *student, *teacher, *label;
    Statistics* statistics;
  };
  struct Buffers {
    alignas(64) A student[kChunk], teacher[kChunk], out[kChunk];
    Pending<V> pending;
  };

  struct Setup {
    const KdCall& call;
    bool distils, teacher, label, dense, smoothing, keep;
    int power;
    int64_t chunks, chunk;
    A inverse_temperature, inverse_classes;
    Exponential student_exp, label_exp;

    explicit Setup(const KdCall& c)
        : call(c),
          distils(c.kd_loss != 0),
          teacher(distils && c.teacher.data),
          label(c.ce_loss != 0),
          dense(label && c.soft.data),
          smoothing(label && c.label_smoothing != 0),
          keep(c.gradient != nullptr),
          student_exp(distils ? 1.0 / c.temperature : 1.0),
          label_exp(1.0) {
      const double t = distils ? c.temperature : 1.0;
      const bool whole = t == double(int64_t(t)) && t <= kHighestPower;
      power = !label ? kNoLabel : whole ? int(t) : kOwnExponential;
      chunks = c.classes > kPart ? (c.classes + kPart - 1) / kPart : 1;
      chunk = ((c.classes + chunks - 1) / chunks + 15) / 16 * 16;
      chunks = (c.classes + chunk - 1) / chunk;
      inverse_temperature = A(1.0 / t);
      inverse_classes = A(1.0 / double(c.classes));
    }
    int64_t kept_size() const { return chunks * chunk; }
  };

  // What a chunk's exponentials are at least relative to: the maxima of the chunks of its row
  // before it. Most chunks then share theirs with the row, and nothing has to be rescaled.
  struct Reference {
    A student = A(-INFINITY), teacher = A(-INFINITY);
    void take(const Statistics& part) {
      if (part.student_sum != 0) student = part.student_max;
      if (part.teacher_sum != 0) teacher = part.teacher_max;
    }
    // The same from a chunk's own maxima.
    void take(const Reference& top) {
      if (top.student != A(-INFINITY)) student = maximum(student, top.student);
      if (top.teacher != A(-INFINITY)) teacher = maximum(teacher, top.teacher);
    }
  };

  static A finite(A largest) { return largest == A(-INFINITY) ? A(0) : largest; }

  // Asks for the logits that come next, the next chunk's or the next row's, while this chunk is
  // worked on: the processor's own prefetching stops at every page. A line a vector of 64 bytes.
  template <bool Teacher>
  static void ask_ahead(const A* s, const A* t, int64_t i, int64_t n) {
    if constexpr (L >= 16) {
      __builtin_prefetch(s + i + n);
      if constexpr (Teacher) __builtin_prefetch(t + i + n);
    } else if constexpr (L == 8) {
      __builtin_prefetch((Teacher && (i & L) ? t : s) + (i & ~L) + n);
    }
  }

  // The largest of a chunk.
  template <bool Teacher>
  static Reference chunk_maxima(const A* s, const A* t, int64_t n) {
    const A lowest = A(-INFINITY);
    const int64_t whole = n / L * L;
    V student_top(lowest), teacher_top(lowest), other_top(lowest);
    int64_t first = 0;
    // Without a teacher two maxima of the student, so that one does not wait for the other.
    if constexpr (!Teacher)
      for (; first + 2 * L <= whole; first += 2 * L) {
        student_top = maximum(student_top, V::load(s + first));
        other_top = maximum(other_top, V::load(s + first + L));
      }
    student_top = maximum(student_top, other_top);
    for (int64_t i = first; i < whole; i += L) {
      student_top = maximum(student_top, V::load(s + i));
      if constexpr (Teacher) teacher_top = maximum(teacher_top, V::load(t + i));
    }
    if (whole < n) {
      student_top = maximum(student_top, V::load_part(s + whole, n - whole, lowest));
      if constexpr (Teacher)
        teacher_top = maximum(teacher_top, V::load_part(t + whole, n - whole, lowest));
    }
    Reference top;
    top.student = maximum_of(student_top);
    if constexpr (Teacher) top.teacher = maximum_of(teacher_top);
    return top;
  }

  // ---- statistics of one chunk. Sum: logit_sum too, on the way.
  template <int Power, bool Teacher, bool Keep, bool Sum = false>
  static void chunk_statistics(const Setup& setup, const A* s, const A* t, int64_t n,
                               const Reference& reference, A* student_kept, A* teacher_kept,
                               A* label_kept, Pending<V>& pending, Statistics& out) {
    const int64_t whole = n / L * L;
    const A lowest = A(-INFINITY);
    const Reference top = chunk_maxima<Teacher>(s, t, n);
    out = kd_empty(A(0));
    // NaN stays: `maximum` gives the second where either is.
    out.student_max = finite(maximum(reference.student, top.student));
    if constexpr (Teacher) out.teacher_max = finite(maximum(reference.teacher, top.teacher));
    out.count = A(n);

    const V student_max(out.student_max), teacher_max(out.teacher_max), zero(A(0));
    const Exponential student_exp = setup.student_exp, label_exp = setup.label_exp;
    V student_sum = zero, teacher_sum = zero, label_sum = zero, gap = zero, logit_sum = zero;
    const auto add = [&](V x, V e, V teacher, int64_t i) {
      student_sum = student_sum + e;
      if constexpr (Keep) e.store(student_kept + i);
      if constexpr (Power > 1) label_sum = label_sum + power<Power>(e);
      if constexpr (Power == kOwnExponential) {
        const V own = label_exp(x);
        label_sum = label_sum + own;
        if constexpr (Keep) own.store(label_kept + i);
      }
      if constexpr (Teacher) {
        const V y = teacher - teacher_max;
        const V p = student_exp(y);
        teacher_sum = teacher_sum + p;
        gap = add_product_unless_zero(p, y - x, gap);
        if constexpr (Keep) p.store(teacher_kept + i);
      }
    };
    const auto step = [&](V student, V teacher, int64_t i) {
      const V x = student - student_max;
      add(x, student_exp(x), teacher, i);
      return x;
    };
    const A* const leaving = pending.from;
    A* const to = pending.to;
    const int64_t end = pending.end;
    int64_t at = pending.at;
    const auto leave = [&]() {
      if (at >= end) return;
      V::load(leaving + at).stream(to + at);
      at += L;
    };
    int64_t i = 0;
    if constexpr (!Teacher && L >= 16)
      for (; i + 2 * L <= whole; i += 2 * L) {
        ask_ahead<Teacher>(s, t, i, n);
        ask_ahead<Teacher>(s, t, i + L, n);
        leave();
        const V x = V::load(s + i) - student_max, y = V::load(s + i + L) - student_max;
        V e = x, f = y;
        student_exp.both(e, f);
        add(x, e, zero, i);
        leave();
        add(y, f, zero, i + L);
        if constexpr (Sum) logit_sum = logit_sum + x + y;
      }
    for (; i < whole; i += L) {
      ask_ahead<Teacher>(s, t, i, n);
      leave();
      const V x = step(V::load(s + i), Teacher ? V::load(t + i) : zero, i);
      if constexpr (Sum) logit_sum = logit_sum + x;
    }
    if constexpr (Sum)
      if (whole < n)
        logit_sum = logit_sum + (V::load_part(s + whole, n - whole, out.student_max) - student_max);
    if (whole < n)
      step(V::load_part(s + whole, n - whole, lowest),
           Teacher ? V::load_part(t + whole, n - whole, lowest) : zero, whole);
    pending.at = at;
    out.student_sum = sum_of(student_sum);
    out.teacher_sum = sum_of(teacher_sum);
    out.label_sum = Power == 1 ? out.student_sum : sum_of(label_sum);
    out.gap = sum_of(gap);
    out.logit_sum = sum_of(logit_sum);
  }

  // ---- gradient of one chunk
  template <int Power, bool Teacher>
  static void chunk_gradient(const Coefficients& c, const A* student_kept, const A* teacher_kept,
                             const A* label_kept, int64_t n, A* out, bool stream) {
    const V student(Power == 1 ? c.student + c.label : c.student);
    const V label(c.label), teacher(c.teacher), constant(c.constant), zero(A(0));
    const auto value = [&](int64_t i) {
      const V e = V::load(student_kept + i);
      V g = Teacher ? multiply_add(teacher, V::load(teacher_kept + i), constant) : constant;
      if constexpr (Power > 1) g = subtract_multiply(g, label, power<Power>(e));
      if constexpr (Power == kOwnExponential)
        g = subtract_multiply(g, label, V::load(label_kept + i));
      return multiply_subtract(student, e, g);
    };
    int64_t i = 0;
    if (stream && n >= L) {
      // Up to where whole lines begin, and no further: a line that was stored to in the cache and
      // is then streamed to goes to memory twice.
      constexpr int64_t bytes = L * int64_t(sizeof(A));
      const int64_t past = int64_t(reinterpret_cast<uintptr_t>(out) % bytes);
      i = past ? (bytes - past) / int64_t(sizeof(A)) : 0;
      if (i) value(0).store_part(out, i);
      for (; i + L <= n; i += L) value(i).stream(out + i);
    } else {
      for (; i + L <= n; i += L) value(i).store(out + i);
    }
    if (i < n) value(i).store_part(out + i, n - i);
  }

  // The results of these and of what follows are written where they stay: copied as vectors soon
  // after they were stored one by one, they would wait for all stores before them.
  using StatisticsFunction = void (*)(const Setup&, const A*, const A*, int64_t, const Reference&,
                                      A*, A*, A*, Pending<V>&, Statistics&);
  using GradientFunction = void (*)(const Coefficients&, const A*, const A*, const A*, int64_t, A*,
                                    bool);

  // f<Power, Teacher>() for the call's power; without a teacher the softmax at T = 1 is the only
  // one.
  template <class F>
  static auto choose(const Setup& setup, F f) {
    if (!setup.teacher) return f.template operator()<1, false>();
    switch (setup.power) {
      case kNoLabel:
        return f.template operator()<kNoLabel, true>();
      case 1:
        return f.template operator()<1, true>();
      case 2:
        return f.template operator()<2, true>();
      case 3:
        return f.template operator()<3, true>();
      case 4:
        return f.template operator()<4, true>();
      case 5:
        return f.template operator()<5, true>();
      case 6:
        return f.template operator()<6, true>();
      case 7:
        return f.template operator()<7, true>();
      case 8:
        return f.template operator()<8, true>();
      default:
        return f.template operator()<kOwnExponential, true>();
    }
  }
  static StatisticsFunction statistics_function(const Setup& setup) {
    return choose(setup, [&]<int Power, bool Teacher>() -> StatisticsFunction {
      if (setup.keep) return &chunk_statistics<Power, Teacher, true>;
      return &chunk_statistics<Power, Teacher, false>;
    });
  }
  static GradientFunction gradient_function(const Setup& setup) {
    return choose(setup, []<int Power, bool Teacher>() -> GradientFunction {
      return &chunk_gradient<Power, Teacher>;
    });
  }

  // Whether a row's gradient leaves while the next row is worked on: chunk by chunk, the next row's
  // exponentials take the place of those that a chunk of the gradient was made of. Not with AVX2,
  // whose sixteen registers are too few for both, nor where the exponentials outgrow the second
  // cache.
  static bool leaves_late(const Setup& setup) {
    return L >= 16 && setup.keep && setup.call.stream &&
           setup.call.student.dtype == dtype_of<A>() &&
           exponentials_size(setup) * int64_t(sizeof(A)) <= kLateBytes;
  }
  static constexpr int64_t kLateBytes = int64_t(640) << 10;

  // ---- one row
  static KdWeights<A> weights_of(const KdCall& call, const Label& label, int64_t row) {
    const double weight = call.weight ? double(call.weight[row]) : 1.0;
    return {A(weight * call.kd_loss),
            A(weight * call.ce_loss),
            A(weight * call.kd_gradient),
            A(weight * call.ce_gradient),
            A(label.first_share + label.second_share),
            A(0)};
  }
  static bool counts(const Setup& setup, const KdWeights<A>& w) {
    return w.kd_loss != 0 || (w.ce_loss != 0 && (setup.dense || w.label_mass != 0));
  }

  static void statistics(const Setup& setup, StatisticsFunction function, int64_t row,
                         int64_t first, int64_t last, Reference& reference, const Kept& kept,
                         Buffers& buffers) {
    const KdCall& call = setup.call;
    for (int64_t k = first; k < last; ++k) {
      const int64_t from = k * setup.chunk;
      const int64_t n = std::min(setup.chunk, call.classes - from);
      const A* s = read_row<A>(call.student, row, from, n, buffers.student);
      const A* t =
          setup.teacher ? read_row<A>(call.teacher, row, from, n, buffers.teacher) : nullptr;
      function(setup, s, t, n, reference, kept.student + from, kept.teacher + from,
               kept.label + from, buffers.pending, kept.statistics[k]);
      reference.take(kept.statistics[k]);
      if (setup.smoothing || setup.dense) {
        const A* y = setup.dense ? read_row<A>(call.soft, row, from, n, buffers.out) : nullptr;
        add_label_sums<V>(setup.smoothing, setup.dense, s, y, n, kept.statistics[k]);
      }
    }
  }

  // Statistics of the row: those of its one chunk, or `whole`, made of them.
  static const Statistics& merged(const Setup& setup, const Kept& kept, Statistics& whole) {
    if (setup.chunks == 1) return kept.statistics[0];
    whole = kept.statistics[0];
    for (int64_t k = 1; k < setup.chunks; ++k)
      whole = kd_merge(whole, kept.statistics[k], setup.inverse_temperature);
    return whole;
  }

  static void coefficients(const Setup& setup, int64_t row, const Label& label, KdWeights<A>& w,
                           const Statistics& whole, Coefficients& out) {
    const KdCall& call = setup.call;
    const auto dot = [&](int64_t index, double share) {
      if (index < 0 || share == 0) return A(0);
      A element;
      return A(share) * (*read_row<A>(call.student, row, index, 1, &element) - whole.student_max);
    };
    w.label_dot = dot(label.first, label.first_share) + dot(label.second, label.second_share);
    if (setup.teacher)
      out = kd_finish(whole, w, setup.inverse_temperature, A(call.label_smoothing),
                      setup.inverse_classes, A(call.threshold), setup.dense);
    else
      out = kd_finish_label(whole, w, A(call.label_smoothing), setup.inverse_classes, setup.dense);
  }

  // Coefficients for exponentials that are relative to the maxima up to a chunk.
  static Coefficients for_chunk(const Setup& setup, const Coefficients& c, const Statistics& row,
                                const Statistics& part) {
    Coefficients out = c;
    const A student = part.student_max - row.student_max;
    const A teacher = part.teacher_max - row.teacher_max;
    out.student *= kd_rescale(part.student_sum, student * setup.inverse_temperature);
    out.label *= kd_rescale(part.label_sum, student);
    out.teacher *= kd_rescale(part.teacher_sum, teacher * setup.inverse_temperature);
    return out;
  }

  static void gradients(const Setup& setup, GradientFunction function, int64_t row, int64_t first,
                        int64_t last, const Label& label, const Coefficients& whole,
                        const Statistics& statistics, const Kept& kept, Buffers& buffers,
                        bool late = false) {
    const KdCall& call = setup.call;
    const Dtype dtype = call.student.dtype;
    char* const gradient = static_cast<char*>(call.gradient) + row * call.classes * size_of(dtype);
    const bool direct = dtype == dtype_of<A>();
    for (int64_t k = first; k < last; ++k) {
      const int64_t from = k * setup.chunk;
      const int64_t n = std::min(setup.chunk, call.classes - from);
      Coefficients part;
      if (setup.chunks > 1) part = for_chunk(setup, whole, statistics, kept.statistics[k]);
      const Coefficients& c = setup.chunks > 1 ? part : whole;
      const A* student_kept = kept.student + from;
      const A* teacher_kept = kept.teacher + from;
      const A* label_kept = kept.label + from;
      A* const place = reinterpret_cast<A*>(gradient) + from;
      if (late) buffers.pending.rest();
      A* out = late ? buffers.pending.place(place, student_kept) : direct ? place : buffers.out;
      function(c, student_kept, teacher_kept, label_kept, n, out,
               !late && direct && call.stream && !setup.dense);
      if (setup.dense) {
        const A* y = read_row<A>(call.soft, row, from, n, buffers.teacher);
        for (int64_t i = 0; i < n; ++i) out[i] -= c.hard * y[i];
      } else if (setup.label) {
        // The label's own logit, computed again: a store, not a read of what may have been
        // streamed.
        const auto fix = [&](int64_t index) {
          const int64_t i = index - from;
          if (index < 0 || i < 0 || i >= n) return;
          const A share = (label.first == index ? A(label.first_share) : A(0)) +
                          (label.second == index ? A(label.second_share) : A(0));
          const A e = student_kept[i];
          A own = e;
          if (setup.power == kOwnExponential) own = label_kept[i];
          for (int p = 1; p < setup.power; ++p) own *= e;
          out[i] = kd_gradient(c, e, own, setup.teacher ? teacher_kept[i] : A(0)) - c.hard * share;
        };
        fix(label.first);
        fix(label.second);
      }
      if (late)
        buffers.pending.give(out, place, n);
      else if (!direct)
        write_as(out, gradient + from * size_of(dtype), dtype, n);
    }
  }

  // A row that carries no weight or whose label is outside the classes: no gradient; 0 or NaN.
  static void leave_out(const KdCall& call, int64_t row, bool outside) {
    static_cast<A*>(call.losses)[row] = outside ? A(NAN) : A(0);
    if (!call.gradient) return;
    const int64_t bytes = call.classes * size_of(call.student.dtype);
    std::memset(static_cast<char*>(call.gradient) + row * bytes, 0, size_t(bytes));
  }

  // Scratch of a thread, kept between calls: three rows at most.
  static A* scratch(int64_t size) {
    static thread_local LineMemory<A> memory;
    return memory.of(size);
  }
  // Multiples of 16, so that every part begins with a line.
  static int64_t statistics_size(const Setup& setup) {
    return (setup.chunks * int64_t(sizeof(Statistics) / sizeof(A)) + 15) / 16 * 16;
  }
  static int64_t exponentials_size(const Setup& setup) {
    const int64_t rows = 1 + setup.teacher + (setup.power == kOwnExponential);
    return setup.keep ? rows * setup.kept_size() : 0;
  }
  static Kept place(const Setup& setup, A* statistics, A* exponentials) {
    const int64_t size = setup.kept_size();
    Kept kept;
    kept.statistics = reinterpret_cast<Statistics*>(statistics);
    kept.student = exponentials;
    kept.teacher = kept.student + size;
    kept.label = kept.teacher + (setup.teacher ? size : 0);
    return kept;
  }

  static void rows(const KdCall& call, int64_t begin, int64_t end) {
    if constexpr (L >= 8) {
      if (call.classes <= kLaneClasses) return Lanes<V, Exponential>::rows(call, begin, end);
    }
    const Setup setup(call);
    const auto statistics_of = statistics_function(setup);
    const auto gradient_of = gradient_function(setup);
    const bool late = leaves_late(setup);
    const int64_t exponentials = exponentials_size(setup), size = statistics_size(setup);
    A* const memory = scratch(exponentials + (1 + late) * size);
    struct Row {
      int64_t row = -1;
      Label label;
      Coefficients c;
      Statistics whole;
      Kept kept;
    } two[2];
    for (int i = 0; i < 2; ++i)
      two[i].kept = place(setup, memory + exponentials + i * late * size, memory);
    Row *current = &two[0], *previous = &two[1];
    Buffers buffers;
    const auto gradient = [&](const Row& of, int64_t first, int64_t last) {
      gradients(setup, gradient_of, of.row, first, last, of.label, of.c, of.whole, of.kept, buffers,
                late);
    };
    for (int64_t row = begin; row < end; ++row) {
      Row& now = *current;
      const Row& before = *previous;
      read_label(call, row, now.label);
      KdWeights<A> w = weights_of(call, now.label, row);
      if (now.label.outside || !counts(setup, w)) {
        leave_out(call, row, now.label.outside);
        continue;
      }
      now.row = row;
      Reference reference;
      for (int64_t k = 0; k < setup.chunks; ++k) {
        if (before.row >= 0) gradient(before, k, k + 1);
        statistics(setup, statistics_of, row, k, k + 1, reference, now.kept, buffers);
      }
      coefficients(setup, row, now.label, w, merged(setup, now.kept, now.whole), now.c);
      static_cast<A*>(call.losses)[row] = now.c.loss;
      if (late)
        std::swap(current, previous);
      else if (setup.keep)
        gradient(now, 0, setup.chunks);
    }
    if (previous->row >= 0) gradient(*previous, 0, setup.chunks);
  }

  static KdKernels kernels() {
    return {&totals,
            &rows,
            &KdParts<V, Exponential>::workspace_bytes,
            &KdParts<V, Exponential>::maxima,
            &KdParts<V, Exponential>::statistics,
            &KdParts<V, Exponential>::gradients,
            &scale_gradient<A>,
            &Divergences<V, Exponential>::rows,
            &TopKRows<V, Exponential>::rows};
  }
};
