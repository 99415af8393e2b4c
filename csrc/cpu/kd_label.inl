// Index labels of the distillation loss, the sums its means divide by, and constants of its bodies.
// Included before kd_lanes.inl and kd_loss.inl, in the namespace of an instruction set.

constexpr int64_t kChunk = 1024;      // logits, at most, that are worked on at a time
constexpr int64_t kLaneClasses = 64;  // up to here a row is a lane
constexpr int kHighestPower = 8;
constexpr int kOwnExponential = -1;  // softmax(s) by an exponential of its own
constexpr int kNoLabel = 0;

template <int P, class V>
inline V power(V x) {
  if constexpr (P == 1) {
    return x;
  } else {
    const V half = power<P / 2>(x);
    if constexpr (P % 2 == 0)
      return half * half;
    else
      return half * half * x;
  }
}

struct Label {
  int64_t first = -1, second = -1;           // -1: none
  double first_share = 0, second_share = 0;  // times the weight of the class
  double first_part = 0, second_part = 0;    // without it
  bool outside = false;
};

// In place: what was stored a number at a time and is then copied as vectors waits for the stores
// before it, the streamed ones among them.
inline void read_label(const KdCall& call, int64_t row, Label& label) {
  label = {};
  if (!call.target) return;
  const double share = call.share ? double(call.share[row]) : 1.0;
  const auto take = [&](int64_t index, double part, int64_t& place, double& place_share,
                        double& place_part) {
    if (index == call.ignore_index) return;
    if (index < 0 || index >= call.classes) {
      label.outside = true;
      return;
    }
    place = index;
    place_part = part;
    place_share = call.class_weight ? part * double(call.class_weight[index]) : part;
  };
  take(call.target[row], share, label.first, label.first_share, label.first_part);
  if (call.partner)
    take(call.partner[row], 1.0 - share, label.second, label.second_share, label.second_part);
}

inline Label label_of(const KdCall& call, int64_t row) {
  Label label;
  read_label(call, row, label);
  return label;
}

inline KdTotals totals(const KdCall& call, int64_t begin, int64_t end) {
  KdTotals sum;
  if (!call.weight && !call.share && !call.class_weight && call.target) {
    int64_t labelled = 0;
    for (int64_t row = begin; row < end; ++row) labelled += call.target[row] != call.ignore_index;
    sum.weight = double(end - begin);
    sum.label = double(labelled);
    return sum;
  }
  for (int64_t row = begin; row < end; ++row) {
    const double weight = call.weight ? double(call.weight[row]) : 1.0;
    const Label label = label_of(call, row);
    sum.weight += weight;
    sum.label += call.soft.data ? weight : weight * (label.first_share + label.second_share);
  }
  return sum;
}

template <class V, class Exponential>
struct Kd;  // kd_loss.inl: one row at a time
template <class V, class Exponential>
struct KdParts;  // kd_parts.inl: parts of a row on different threads
template <class V, class Exponential>
struct Lanes;  // kd_lanes.inl: one row a lane
template <class V, class Exponential>
struct TopKRows;  // kd_topk.inl: teachers of which the largest classes are known
template <class V, class Exponential>
struct Divergences;  // divergence.inl: other divergences than KL(p || q)
template <class V, class Exponential>
struct DivergenceLanes;  // divergence_lanes.inl: those, one row a lane

// Sums over all logits that only label smoothing and dense labels want; the chunk is in L1.
template <class V>
void add_label_sums(bool smoothing, bool dense, const typename V::Scalar* s,
                    const typename V::Scalar* y, int64_t n, KdStatistics<typename V::Scalar>& out) {
  using A = typename V::Scalar;
  constexpr int64_t L = V::lanes;
  const int64_t whole = n / L * L;
  const V student_max(out.student_max), zero(A(0));
  if (smoothing) {
    // Four sums, so that an addition does not wait for the one before.
    V sums[4] = {zero, zero, zero, zero};
    int64_t at = 0;
    for (; at + 4 * L <= whole; at += 4 * L)
      for (int k = 0; k < 4; ++k) sums[k] = sums[k] + (V::load(s + at + k * L) - student_max);
    for (; at < whole; at += L) sums[0] = sums[0] + (V::load(s + at) - student_max);
    out.logit_sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (int64_t i = whole; i < n; ++i) out.logit_sum += s[i] - out.student_max;
  }
  if (dense) {
    V mass = zero, dot = zero;
    for (int64_t i = 0; i < whole; i += L) {
      const V label = V::load(y + i);
      mass = mass + label;
      dot = add_product_unless_zero(label, V::load(s + i) - student_max, dot);
    }
    out.soft_mass = sum_of(mass);
    out.soft_dot = sum_of(dot);
    for (int64_t i = whole; i < n; ++i) {
      out.soft_mass += y[i];
      out.soft_dot += select(y[i], y[i] * (s[i] - out.student_max), A(0));
    }
  }
}
