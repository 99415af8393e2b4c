// The distillation loss for small class counts: one row a lane.
//
// L rows are transposed into (classes, L) blocks that live in L1. Maxima, sums, logarithms and
// coefficients are then whole vectors, nothing is reduced across lanes and no lane idles at a row's
// end, which is where a row of 10 logits spends its time otherwise. Included between kd_label.inl
// and kd_loss.inl, with block8.inl in sight.

template <class V>
inline void rows_to_lanes(const float* const* rows, int64_t columns, float* lanes) {
  for (int64_t at = 0; at < V::lanes; at += 8)
    rows_to_lanes8(rows + at, columns, lanes + at, V::lanes);
}
template <class V>
inline void lanes_to_rows(const float* lanes, int64_t columns, float* const* rows, int64_t count) {
  for (int64_t at = 0; at < V::lanes && at < count; at += 8)
    lanes_to_rows8(lanes + at, V::lanes, columns, rows + at, std::min<int64_t>(8, count - at));
}

template <class V, class Exponential>
struct Lanes {
  static constexpr int64_t L = V::lanes;
  using Block = float[kLaneClasses * L];
  using Body = Kd<V, Exponential>;

  struct Blocks {
    alignas(64) Block student, teacher, soft, student_exp, teacher_exp, label_exp;
    alignas(64) float rows[L][kLaneClasses];
  };

  static void load(const Matrix& matrix, int64_t row, int64_t count, int64_t classes,
                   Blocks& blocks, float* block) {
    const float* rows[L];
    // Lanes past the last row repeat it; nothing of theirs is stored.
    for (int64_t i = 0; i < L; ++i)
      rows[i] = read_row<float>(matrix, row + std::min(i, count - 1), 0, classes, blocks.rows[i]);
    rows_to_lanes<V>(rows, classes, block);
  }

  template <int Power, bool Teacher, bool Keep, class Setup>
  static void block(const Setup& setup, int64_t row, int64_t count, Blocks& b) {
    const KdCall& call = setup.call;
    const int64_t classes = call.classes;
    load(call.student, row, count, classes, b, b.student);
    if constexpr (Teacher) load(call.teacher, row, count, classes, b, b.teacher);
    if (setup.dense) load(call.soft, row, count, classes, b, b.soft);

    const V zero(0.0f), lowest(-INFINITY);
    V student_top = lowest, teacher_top = lowest;
    for (int64_t c = 0; c < classes; ++c) {
      student_top = maximum(student_top, V::load(b.student + c * L));
      if constexpr (Teacher) teacher_top = maximum(teacher_top, V::load(b.teacher + c * L));
    }
    KdStatistics<V> s = kd_empty(zero);
    // -inf - (-inf) is NaN, any other difference from itself 0 or (for +inf) NaN as well, and a row
    // with +inf is NaN in the end; so only -inf has to become 0.
    s.student_max = select(maximum(student_top, V(-FLT_MAX)) - student_top, zero, student_top);
    s.teacher_max = select(maximum(teacher_top, V(-FLT_MAX)) - teacher_top, zero, teacher_top);
    s.count = V(float(classes));
    const Exponential student_exp = setup.student_exp, label_exp = setup.label_exp;
    for (int64_t c = 0; c < classes; ++c) {
      const V x = V::load(b.student + c * L) - s.student_max;
      const V e = student_exp(x);
      s.student_sum = s.student_sum + e;
      if constexpr (Keep) e.store(b.student_exp + c * L);
      if constexpr (Power > 1) s.label_sum = s.label_sum + power<Power>(e);
      if constexpr (Power == kOwnExponential) {
        const V own = label_exp(x);
        s.label_sum = s.label_sum + own;
        if constexpr (Keep) own.store(b.label_exp + c * L);
      }
      if constexpr (Teacher) {
        const V y = V::load(b.teacher + c * L) - s.teacher_max;
        const V p = student_exp(y);
        s.teacher_sum = s.teacher_sum + p;
        s.gap = multiply_add(p, zero_unless(p, y - x), s.gap);
        if constexpr (Keep) p.store(b.teacher_exp + c * L);
      }
    }
    if constexpr (Power == 1) s.label_sum = s.student_sum;
    if (setup.smoothing)
      for (int64_t c = 0; c < classes; ++c)
        s.logit_sum = s.logit_sum + (V::load(b.student + c * L) - s.student_max);
    if (setup.dense)
      for (int64_t c = 0; c < classes; ++c) {
        const V y = V::load(b.soft + c * L);
        s.soft_mass = s.soft_mass + y;
        s.soft_dot =
            multiply_add(y, zero_unless(y, V::load(b.student + c * L) - s.student_max), s.soft_dot);
      }

    // What belongs to a row alone, number by number.
    alignas(64) float weight[L], first_share[L], second_share[L], mass[L], dot[L], top[L];
    alignas(64) float loss[L], hard[L];
    int64_t first[L], second[L];
    uint32_t left_out = 0, outside = 0;
    s.student_max.store(top);
    const bool kd = call.kd_loss != 0, ce = call.ce_loss != 0;
    const bool plain = call.target && !call.partner && !call.weight;
    for (int64_t i = 0; i < L; ++i) {
      const int64_t at = row + std::min(i, count - 1);
      if (plain) {
        const int64_t index = call.target[at];
        const bool inside = uint64_t(index) < uint64_t(classes) && index != call.ignore_index;
        first[i] = inside ? index : -1;
        first_share[i] = mass[i] = inside ? 1.0f : 0.0f;
        second[i] = -1;
        dot[i] = inside ? b.student[index * L + i] - top[i] : 0.0f;
        const bool bad = !inside && index != call.ignore_index;
        outside |= uint32_t(bad) << i;
        left_out |= uint32_t(bad || !(kd || (ce && inside))) << i;
        continue;
      }
      const Label label = label_of(call, at);
      first[i] = label.first;
      second[i] = label.second;
      first_share[i] = float(label.first_share);
      second_share[i] = float(label.second_share);
      weight[i] = call.weight ? call.weight[at] : 1.0f;
      mass[i] = first_share[i] + second_share[i];
      dot[i] = 0;
      if (first_share[i] != 0) dot[i] = first_share[i] * (b.student[first[i] * L + i] - top[i]);
      if (second_share[i] != 0) dot[i] += second_share[i] * (b.student[second[i] * L + i] - top[i]);
      const bool counts = weight[i] != 0 && (kd || (ce && (setup.dense || mass[i] != 0)));
      outside |= uint32_t(label.outside) << i;
      left_out |= uint32_t(label.outside || !counts) << i;
    }
    KdWeights<V> w = {
        V(float(call.kd_loss)),     V(float(call.ce_loss)), V(float(call.kd_gradient)),
        V(float(call.ce_gradient)), V::load(mass),          V::load(dot)};
    if (call.weight) {
      const V by = V::load(weight);
      w.kd_loss = w.kd_loss * by;
      w.ce_loss = w.ce_loss * by;
      w.kd_gradient = w.kd_gradient * by;
      w.ce_gradient = w.ce_gradient * by;
    }
    const KdCoefficients<V> k =
        kd_finish(s, w, V(setup.inverse_temperature), V(float(call.label_smoothing)),
                  V(setup.inverse_classes), setup.dense);
    k.loss.store(loss);
    for (int64_t i = 0; i < count; ++i) static_cast<float*>(call.losses)[row + i] = loss[i];

    if constexpr (Keep) {
      for (int64_t c = 0; c < classes; ++c) {
        const V e = V::load(b.student_exp + c * L);
        V own = e;
        if constexpr (Power > 1) own = power<Power>(e);
        if constexpr (Power == kOwnExponential) own = V::load(b.label_exp + c * L);
        V g = Power == kNoLabel ? k.student * e : multiply_add(k.label, own, k.student * e);
        g = g - (Teacher ? multiply_add(k.teacher, V::load(b.teacher_exp + c * L), k.constant)
                         : k.constant);
        if (setup.dense) g = subtract_multiply(g, k.hard, V::load(b.soft + c * L));
        g.store(b.student + c * L);
      }
      k.hard.store(hard);
      for (int64_t i = 0; i < count; ++i) {
        if (first[i] >= 0) b.student[first[i] * L + i] -= hard[i] * first_share[i];
        if (second[i] >= 0) b.student[second[i] * L + i] -= hard[i] * second_share[i];
      }
      store(call, row, count, b);
    }
    for (int64_t i = 0; left_out && i < count; ++i)
      if (left_out >> i & 1) Body::leave_out(call, row + i, outside >> i & 1);
  }

  static void store(const KdCall& call, int64_t row, int64_t count, Blocks& b) {
    float* rows[L];
    const bool direct = call.student.dtype == Dtype::float32;
    for (int64_t i = 0; i < L; ++i)
      rows[i] = direct ? static_cast<float*>(call.gradient) + (row + i) * call.classes : b.rows[i];
    lanes_to_rows<V>(b.student, call.classes, rows, count);
    if (direct) return;
    for (int64_t i = 0; i < count; ++i)
      write_as(b.rows[i], static_cast<uint16_t*>(call.gradient) + (row + i) * call.classes,
               call.student.dtype, call.classes);
  }

  static void rows(const KdCall& call, int64_t begin, int64_t end) {
    const typename Body::Setup setup(call);
    if (!setup.teacher && !setup.label) {
      for (int64_t row = begin; row < end; ++row)
        Body::leave_out(call, row, label_of(call, row).outside);
      return;
    }
    using Function = void (*)(const typename Body::Setup&, int64_t, int64_t, Blocks&);
    const auto function = Body::choose(setup, [&]<int Power, bool Teacher>() -> Function {
      if (setup.keep) return &block<Power, Teacher, true, typename Body::Setup>;
      return &block<Power, Teacher, false, typename Body::Setup>;
    });
    Blocks blocks;
    for (int64_t row = begin; row < end; row += L)
      function(setup, row, std::min(L, end - row), blocks);
  }
};
