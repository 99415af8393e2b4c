// The distillation loss for small class counts: one row a lane.
//
// L rows are transposed into (classes, L) blocks that live in L1. Maxima, sums, logarithms and
// coefficients are then whole vectors, nothing is reduced across lanes and no lane idles at a row's
// end, which is where a row of 10 logits spends its time otherwise. Included between kd_label.inl
// and kd_loss.inl, with block8.inl in sight.

// The maxima of the rows go to `top`.
template <class V>
inline void rows_to_lanes(const float* rows, int64_t step, int64_t columns, float* lanes,
                          float* top) {
  for (int64_t at = 0; at < V::lanes; at += 8)
    rows_to_lanes8(rows + at * step, step, columns, lanes + at, V::lanes, top + at);
}
template <class V>
inline void lanes_to_rows(const float* lanes, int64_t columns, float* rows, int64_t step) {
  for (int64_t at = 0; at < V::lanes; at += 8)
    lanes_to_rows8(lanes + at, V::lanes, columns, rows + at * step, step);
}

template <class V, class Exponential>
struct Lanes {
  static constexpr int64_t L = V::lanes;
  // Padded: blocks a multiple of 4 KiB apart make loads wait for stores that they have no part in.
  using Block = float[kLaneClasses * L + 80];
  using Body = Kd<V, Exponential>;

  struct Blocks {
    alignas(64) Block student, teacher, soft, student_exp, teacher_exp, label_exp;
    alignas(64) float rows[L][kLaneClasses];
  };

  // What belongs to a row alone, of kRows rows: made before they are worked on.
  static constexpr int64_t kRows = 64;
  struct Labels {
    alignas(64) float first[kRows], second[kRows];  // classes; -1: none
    alignas(64) float first_share[kRows], second_share[kRows], weight[kRows];
    alignas(64) float first_part[kRows], second_part[kRows];  // without class weights
    uint64_t left_out, outside;                               // a bit a row

    Labels() {
      std::fill_n(second, kRows, -1.0f);
      std::fill_n(second_share, kRows, 0.0f);
      std::fill_n(second_part, kRows, 0.0f);
    }
    void read(const KdCall& call, int64_t row, int64_t count) {
      left_out = outside = 0;
      const bool kd = call.kd_loss != 0, ce = call.ce_loss != 0;
      if (call.target && !call.partner && !call.share && !call.weight && !call.class_weight) {
        const uint64_t classes = uint64_t(call.classes);
        int64_t labelled = 0;
        for (int64_t i = 0; i < count; ++i) {
          const int64_t index = call.target[row + i];
          const bool inside = uint64_t(index) < classes && index != call.ignore_index;
          first[i] = float(inside ? int32_t(index) : -1);
          first_share[i] = first_part[i] = float(inside);
          labelled += inside;
        }
        if (labelled == count) return pad(count);
        for (int64_t i = 0; i < count; ++i) {
          const bool inside = first_share[i] != 0;
          const bool bad = !inside && call.target[row + i] != call.ignore_index;
          outside |= uint64_t(bad) << i;
          left_out |= uint64_t(bad || !(kd || inside)) << i;
        }
      } else {
        for (int64_t i = 0; i < count; ++i) {
          const Label label = label_of(call, row + i);
          first[i] = float(label.first);
          second[i] = float(label.second);
          first_share[i] = float(label.first_share);
          second_share[i] = float(label.second_share);
          first_part[i] = float(label.first_part);
          second_part[i] = float(label.second_part);
          weight[i] = call.weight ? call.weight[row + i] : 1.0f;
          const bool named = call.soft.data || first_share[i] + second_share[i] != 0;
          const bool counts = weight[i] != 0 && (kd || (ce && named));
          outside |= uint64_t(label.outside) << i;
          left_out |= uint64_t(label.outside || !counts) << i;
        }
      }
      pad(count);
    }

    // Lanes past the last row: nothing of theirs is stored.
    void pad(int64_t count) {
      for (int64_t i = count; i % L; ++i) {
        first[i] = second[i] = -1.0f;
        first_share[i] = second_share[i] = weight[i] = 0.0f;
        first_part[i] = second_part[i] = 0.0f;
      }
    }
  };

  // Asks for what comes kAhead bytes later: the processor's own prefetching stops at every page.
  static constexpr int64_t kAhead = 2048;
  template <bool Write>
  static void prefetch(const float* from, int64_t numbers) {
    const char* const at = reinterpret_cast<const char*>(from) + kAhead;
    for (int64_t i = 0; i < numbers * 4; i += 64) __builtin_prefetch(at + i, Write);
  }

  static void load(const Matrix& matrix, int64_t row, int64_t count, int64_t classes,
                   Blocks& blocks, float* block, float* top) {
    if (matrix.dtype == Dtype::float32 && count == L) {
      const float* from = static_cast<const float*>(matrix.data) + row * matrix.row_stride;
      if (matrix.row_stride == classes) prefetch<false>(from, L * classes);
      return rows_to_lanes<V>(from, matrix.row_stride, classes, block, top);
    }
    // Lanes past the last row repeat it; nothing of theirs is stored.
    for (int64_t i = 0; i < L; ++i) {
      const int64_t at = (row + std::min(i, count - 1)) * matrix.row_stride;
      read_as(static_cast<const char*>(matrix.data) + at * size_of(matrix.dtype), matrix.dtype,
              blocks.rows[i], classes);
    }
    rows_to_lanes<V>(blocks.rows[0], kLaneClasses, classes, block, top);
  }

  // -inf - (-inf) is NaN, any other difference from itself 0 or (for +inf) NaN as well, and a row
  // with +inf is NaN in the end; so only -inf has to become 0.
  static V finite(V top) { return select(maximum(top, V(-FLT_MAX)) - top, V(0.0f), top); }

  // Sums over all logits that only label smoothing and dense labels want.
  template <class Setup>
  static void add_label_sums(const Setup& setup, const Blocks& b, KdStatistics<V>& s) {
    const int64_t classes = setup.call.classes;
    if (setup.smoothing)
      for (int64_t c = 0; c < classes; ++c)
        s.logit_sum = s.logit_sum + (V::load(b.student + c * L) - s.student_max);
    if (setup.dense)
      for (int64_t c = 0; c < classes; ++c) {
        const V y = V::load(b.soft + c * L);
        s.soft_mass = s.soft_mass + y;
        s.soft_dot =
            add_product_unless_zero(y, V::load(b.student + c * L) - s.student_max, s.soft_dot);
      }
  }

  // first_dot, second_dot: the labels' logits less the row's maximum.
  static KdWeights<V> weights_of(const KdCall& call, const Labels& labels, int64_t at, V first_dot,
                                 V second_dot) {
    const V first_share = V::load(labels.first_share + at);
    const V second_share = V::load(labels.second_share + at);
    KdWeights<V> w = {V(float(call.kd_loss)),
                      V(float(call.ce_loss)),
                      V(float(call.kd_gradient)),
                      V(float(call.ce_gradient)),
                      first_share + second_share,
                      first_share * zero_unless(first_share, first_dot) +
                          second_share * zero_unless(second_share, second_dot)};
    if (call.weight) {
      const V by = V::load(labels.weight + at);
      w.kd_loss = w.kd_loss * by;
      w.ce_loss = w.ce_loss * by;
      w.kd_gradient = w.kd_gradient * by;
      w.ce_gradient = w.ce_gradient * by;
    }
    return w;
  }

  static void store_losses(const KdCall& call, int64_t row, int64_t count, V loss) {
    float* const losses = static_cast<float*>(call.losses) + row;
    if (count == L)
      loss.store(losses);
    else
      loss.store_part(losses, count);
  }

  // Overwrites losses and gradients.
  static void leave_out(const KdCall& call, int64_t row, int64_t count, const Labels& labels,
                        int64_t at) {
    const uint64_t left_out = labels.left_out >> at;
    for (int64_t i = 0; left_out && i < count; ++i)
      if (left_out >> i & 1) Body::leave_out(call, row + i, labels.outside >> (at + i) & 1);
  }

  template <int Power, bool Teacher, bool Keep, class Setup>
  static void block(const Setup& setup, int64_t row, int64_t count, const Labels& labels,
                    int64_t at, Blocks& b) {
    const KdCall& call = setup.call;
    const int64_t classes = call.classes;
    alignas(64) float student_tops[L], teacher_tops[L], soft_tops[L];
    load(call.student, row, count, classes, b, b.student, student_tops);
    if constexpr (Teacher) load(call.teacher, row, count, classes, b, b.teacher, teacher_tops);
    if (setup.dense) load(call.soft, row, count, classes, b, b.soft, soft_tops);

    const V zero(0.0f), one(1.0f), lowest(-INFINITY);
    const V student_top = V::load(student_tops);
    const V teacher_top = Teacher ? V::load(teacher_tops) : lowest;
    KdStatistics<V> s = kd_empty(zero);
    s.student_max = finite(student_top);
    s.teacher_max = finite(teacher_top);
    s.count = V(float(classes));
    const Exponential student_exp = setup.student_exp, label_exp = setup.label_exp;
    // The label's own logit is picked by comparing, a vector an index: numbers that are stored one
    // by one and then loaded as a vector would wait until every store before them has retired.
    const V first = V::load(labels.first + at), second = V::load(labels.second + at);
    const V first_share = V::load(labels.first_share + at);
    const V second_share = V::load(labels.second_share + at);
    const bool two = call.partner != nullptr;
    V first_dot = zero, second_dot = zero, index = zero;
    for (int64_t c = 0; c < classes; ++c, index = index + one) {
      const V x = V::load(b.student + c * L) - s.student_max;
      const V e = student_exp(x);
      s.student_sum = s.student_sum + e;
      if constexpr (Power != kNoLabel) first_dot = first_dot + where_equal(first, index, x);
      if (two) second_dot = second_dot + where_equal(second, index, x);
      if constexpr (Keep) e.store(b.student_exp + c * L);
      if constexpr (Power > 1) s.label_sum = s.label_sum + power<Power>(e);
      if constexpr (Power == kOwnExponential) {
        const V own = label_exp(x);
        s.label_sum = s.label_sum + own;
        if constexpr (Keep) own.store(b.label_exp + c * L);
      }
    }
    // A loop of its own: with both, sums no longer fit in the registers.
    if constexpr (Teacher)
      for (int64_t c = 0; c < classes; ++c) {
        const V y = V::load(b.teacher + c * L) - s.teacher_max;
        const V p = student_exp(y);
        s.teacher_sum = s.teacher_sum + p;
        const V gap = y - (V::load(b.student + c * L) - s.student_max);
        s.gap = add_product_unless_zero(p, gap, s.gap);
        if constexpr (Keep) p.store(b.teacher_exp + c * L);
      }
    if constexpr (Power == 1) s.label_sum = s.student_sum;
    add_label_sums(setup, b, s);
    const KdWeights<V> w = weights_of(call, labels, at, first_dot, second_dot);
    const KdCoefficients<V> k =
        kd_finish(s, w, V(setup.inverse_temperature), V(float(call.label_smoothing)),
                  V(setup.inverse_classes), V(float(call.threshold)), setup.dense);
    store_losses(call, row, count, k.loss);

    if constexpr (Keep) {
      const V first_hard = k.hard * first_share, second_hard = k.hard * second_share;
      V index = zero;
      for (int64_t c = 0; c < classes; ++c, index = index + one) {
        const V e = V::load(b.student_exp + c * L);
        V own = e;
        if constexpr (Power > 1) own = power<Power>(e);
        if constexpr (Power == kOwnExponential) own = V::load(b.label_exp + c * L);
        V g = Power == kNoLabel ? k.student * e : multiply_add(k.label, own, k.student * e);
        g = g - (Teacher ? multiply_add(k.teacher, V::load(b.teacher_exp + c * L), k.constant)
                         : k.constant);
        if constexpr (Power != kNoLabel) g = g - where_equal(first, index, first_hard);
        if (two) g = g - where_equal(second, index, second_hard);
        if (setup.dense) g = subtract_multiply(g, k.hard, V::load(b.soft + c * L));
        g.store(b.student + c * L);
      }
      store(call, row, count, b);
    }
    leave_out(call, row, count, labels, at);
  }

  static void store(const KdCall& call, int64_t row, int64_t count, Blocks& b) {
    const int64_t classes = call.classes;
    if (call.student.dtype == Dtype::float32 && count == L) {
      float* to = static_cast<float*>(call.gradient) + row * classes;
      prefetch<true>(to, L * classes);
      return lanes_to_rows<V>(b.student, classes, to, classes);
    }
    lanes_to_rows<V>(b.student, classes, b.rows[0], kLaneClasses);
    char* to = static_cast<char*>(call.gradient) + row * classes * size_of(call.student.dtype);
    for (int64_t i = 0; i < count; ++i)
      write_as(b.rows[i], to + i * classes * size_of(call.student.dtype), call.student.dtype,
               classes);
  }

  // of(row, count, labels, at, blocks) for every L rows; `at` is their place in `labels`.
  template <class Of>
  static void each_block(const KdCall& call, int64_t begin, int64_t end, Of of) {
    Blocks blocks;
    Labels labels;
    for (int64_t from = begin; from < end; from += kRows) {
      const int64_t to = std::min(from + kRows, end);
      labels.read(call, from, to - from);
      for (int64_t row = from; row < to; row += L)
        of(row, std::min(L, to - row), labels, row - from, blocks);
    }
  }

  static void rows(const KdCall& call, int64_t begin, int64_t end) {
    const typename Body::Setup setup(call);
    if (!setup.teacher && !setup.label) {
      for (int64_t row = begin; row < end; ++row)
        Body::leave_out(call, row, label_of(call, row).outside);
      return;
    }
    using Function =
        void (*)(const typename Body::Setup&, int64_t, int64_t, const Labels&, int64_t, Blocks&);
    const auto function = Body::choose(setup, [&]<int Power, bool Teacher>() -> Function {
      if (setup.keep) return &block<Power, Teacher, true, typename Body::Setup>;
      return &block<Power, Teacher, false, typename Body::Setup>;
    });
    each_block(call, begin, end,
               [&](int64_t row, int64_t count, const Labels& labels, int64_t at, Blocks& b) {
                 function(setup, row, count, labels, at, b);
               });
  }
};
