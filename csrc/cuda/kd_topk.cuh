// The distillation loss with TopK teachers on a GPU: a block a row. Included in kd_loss.cu.
//
// As csrc/cpu/kd_topk.inl: the student's row is swept, of the teacher only the k classes are read.
// Each gradient is written once by the sweep; those of the k are computed anew, whole, and written
// over it (in 16 bits a second rounding would show). `tail` marks the k in shared memory, a bit a
// class, so that the sum over the others is made without them.

// A row of one teacher: y of its classes, and what they amount to.
template <class A>
struct TeacherView {
  const int32_t* index;
  Matrix log_probs;
  int64_t row;
  int k;
  A top, share;
  TeacherRow<A> of;

  __device__ A shift(int i, A rate) const { return (element<A>(log_probs, row, i) - top) * rate; }
  __device__ A delta(int i, A rate) const {
    return (exponential(shift(i, rate)) * of.inverse - of.each) * share;
  }
};

// False, in every thread, where an index is outside the classes.
template <class A>
__device__ inline bool view_teacher(const Call& call, int which, int64_t row, A rate,
                                    TeacherView<A>& view) {
  const TopKTeacher& teacher = call.named[which];
  const int64_t others = call.classes - teacher.k;
  view.index = teacher.indices + row * teacher.k;
  view.log_probs = teacher.log_probs;
  view.row = row;
  view.k = int(teacher.k);
  view.share = A(1);
  if (call.mix) view.share = which == 0 ? A(call.mix[row]) : A(1) - A(call.mix[row]);
  bool inside = true;
  A largest = A(-INFINITY);
  for (int i = int(threadIdx.x); i < view.k; i += kThreads) {
    inside = inside && view.index[i] >= 0 && view.index[i] < call.classes;
    largest = maximum(largest, element<A>(teacher.log_probs, row, i));
  }
  if (!__syncthreads_and(inside)) return false;
  largest = maximum_over_block(largest);
  const A tail = others > 0 ? element<A>(teacher.log_tail, row, 0) : A(-INFINITY);
  view.top = maximum(tail, largest);
  if (view.top == A(-INFINITY)) view.top = A(0);
  A chosen = A(0);
  for (int i = int(threadIdx.x); i < view.k; i += kThreads)
    chosen += exponential(view.shift(i, rate));
  chosen = sum_over_block(chosen);
  const A tail_shift = (tail - view.top) * rate;
  const A tail_exp = tail == A(-INFINITY) ? A(0) : exponential(tail_shift);
  view.of = finish_teacher<A>({chosen, exponential((largest - view.top) * rate),
                               tail_exp * A(others), tail_exp == A(0) ? A(0) : tail_shift},
                              call.tail_policy, others);
  return true;
}

template <class S, class A, int Policy>
__global__ void __launch_bounds__(kThreads) topk_teacher_kernel(const Call call) {
  constexpr bool bucket = Policy == kTailBucket, support = Policy == kTailSupport;
  uint32_t* const named_bits = dynamic_shared<uint32_t>();
  const KdFactors factors = factors_of<S, A>(call);
  const bool labelled = factors.ce_loss != 0;
  const bool dense = labelled && call.soft.data;
  const bool smoothing = labelled && call.label_smoothing != 0;
  const int64_t classes = call.classes;
  const int lane = int(threadIdx.x);
  const A rate = A(1.0 / call.temperature);
  const int teachers = call.mix ? 2 : 1;
  double own_loss = 0;
  for (int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
    const Worth<A> worth = worth_of<A>(call, factors, row, dense);
    const Label& label = worth.label;
    KdWeights<A> w = worth.w;
    S* const gradient = call.gradient ? static_cast<S*>(call.gradient) + row * classes : nullptr;
    bool outside = label.outside;
    TeacherView<A> view[2];
    if (!outside && worth.counts)
      for (int t = 0; t < teachers && !outside; ++t)
        outside = !view_teacher(call, t, row, rate, view[t]);
    if (outside || !worth.counts) {
      if (lane == 0) add_loss(call, row, outside ? A(NAN) : A(0), own_loss);
      if (gradient)
        for (int64_t i = lane; i < classes; i += kThreads) put(gradient + i, A(0));
      continue;
    }
    TeacherRow<A> teacher = view[0].of;
    A mass = teacher.inverse == A(0) ? A(0) : A(1);
    if (teachers == 2) {
      teacher = {A(1), A(0), A(0), A(0), A(0), A(0)};
      mass = A(0);
      for (int t = 0; t < 2; ++t) {
        teacher.each += view[t].share * view[t].of.each;
        teacher.confidence += view[t].share * view[t].of.confidence;
        if (view[t].of.inverse != A(0)) mass += view[t].share;
      }
    }
    const S* const student =
        static_cast<const S*>(call.student.data) + row * call.student.row_stride;
    const auto student_at = [&](int64_t i) { return A(number(student[i])); };
    const auto named = [&](int64_t i) { return bucket && (named_bits[i / 32] >> (i % 32) & 1u); };
    if constexpr (bucket) {
      for (int64_t i = lane; i < (classes + 31) / 32; i += kThreads) named_bits[i] = 0;
      __syncthreads();
      for (int i = lane; i < view[0].k; i += kThreads)
        atomicOr(&named_bits[view[0].index[i] / 32], 1u << (view[0].index[i] % 32));
      __syncthreads();
    }

    // Maxima: of the swept classes (`tail`: the others), of the k, of all.
    A swept_max = A(-INFINITY), named_max = A(-INFINITY);
    for (int64_t i = lane; i < classes; i += kThreads)
      if (!named(i)) swept_max = maximum(swept_max, student_at(i));
    swept_max = maximum_over_block(swept_max);
    if (bucket || support)
      for (int i = lane; i < view[0].k; i += kThreads)
        named_max = maximum(named_max, student_at(view[0].index[i]));
    named_max = maximum_over_block(named_max);
    A whole_max = maximum(swept_max, named_max);
    if (swept_max == A(-INFINITY)) swept_max = A(0);
    if (named_max == A(-INFINITY)) named_max = A(0);
    if (whole_max == A(-INFINITY)) whole_max = A(0);

    KdStatistics<A> ce = kd_empty(A(0));
    A swept_sum = A(0), spread = A(0), excluded = A(0);
    for (int64_t i = lane; i < classes; i += kThreads) {
      const A s = student_at(i), x = s - whole_max;
      if (!support && !named(i)) swept_sum += exponential((s - swept_max) * rate);
      if (labelled) ce.label_sum += exponential(x);
      if (smoothing) ce.logit_sum += x;
      if (teacher.each != A(0)) {
        excluded += s == A(-INFINITY) ? A(1) : A(0);
        spread += s == A(-INFINITY) ? A(0) : x;
      }
      if (dense) {
        const A share = element<A>(call.soft, row, i);
        ce.soft_mass += share;
        ce.soft_dot += select(share, share * x, A(0));
      }
    }
    // Over the k.
    const A reference_max = support ? named_max : whole_max;
    A gap = A(0), named_sum = A(0);
    for (int t = 0; t < teachers; ++t)
      for (int i = lane; i < view[t].k; i += kThreads) {
        const A s = student_at(view[t].index[i]), x = (s - reference_max) * rate;
        const A delta = view[t].delta(i, rate);
        gap += teachers == 2 ? weighted(delta, -x)
                             : weighted(delta + teacher.each, view[t].shift(i, rate) - x);
        if (bucket || support) named_sum += exponential(x);
        if (teachers == 1 && teacher.each != A(0)) {
          excluded -= s == A(-INFINITY) ? A(1) : A(0);
          spread -= s == A(-INFINITY) ? A(0) : s - whole_max;
        }
      }
    swept_sum = sum_over_block(swept_sum);
    named_sum = sum_over_block(named_sum);
    gap = sum_over_block(gap);
    spread = sum_over_block(spread);
    excluded = sum_over_block(excluded);
    ce.student_max = whole_max;
    ce.label_sum = sum_over_block(ce.label_sum);
    ce.logit_sum = sum_over_block(ce.logit_sum);
    ce.soft_mass = sum_over_block(ce.soft_mass);
    ce.soft_dot = sum_over_block(ce.soft_dot);
    ce.count = A(classes);

    TopKTerm<A> term;
    if constexpr (support) {
      term = finish_support(teacher, named_sum, gap);
    } else if constexpr (bucket) {
      const A rest_max = (swept_max - whole_max) * rate;
      const A whole_sum =
          named_sum + (swept_sum == A(0) ? A(0) : swept_sum * exponential(rest_max));
      term = finish_bucket(teacher, classes - view[0].k, whole_sum, swept_sum, rest_max, gap);
    } else {
      term = finish_spread(teacher, mass, swept_sum, gap, spread * rate, excluded > A(0));
    }
    const bool taught = w.kd_loss != A(0) && !(teacher.confidence < A(call.threshold));
    if (!taught) term = no_term(A(0));
    if (label.first >= 0 && label.first_share != 0)
      w.label_dot += A(label.first_share) * (student_at(label.first) - whole_max);
    if (label.second >= 0 && label.second_share != 0)
      w.label_dot += A(label.second_share) * (student_at(label.second) - whole_max);
    KdWeights<A> label_only = w;
    label_only.kd_loss = label_only.kd_gradient = A(0);
    const KdCoefficients<A> c = kd_finish(ce, label_only, A(1), A(call.label_smoothing),
                                          A(1.0 / double(classes)), A(0), dense);
    if (lane == 0) add_loss(call, row, c.loss + (taught ? w.kd_loss * term.loss : A(0)), own_loss);
    if (gradient) {
      const A by = w.kd_gradient;
      const bool pulls = taught && term.chosen != A(0);
      const auto gradient_at = [&](int64_t i, bool chosen, A delta) {
        const A s = student_at(i);
        A g = -(c.constant + by * term.constant) - (pulls ? by * delta : A(0));
        if (bucket || support)
          g += chosen   ? by * term.chosen * exponential((s - reference_max) * rate)
               : bucket ? by * term.others * exponential((s - swept_max) * rate)
                        : A(0);
        else
          g += by * term.others * exponential((s - swept_max) * rate);
        if (labelled) g += c.label * exponential(s - whole_max);
        if (dense) {
          g -= c.hard * element<A>(call.soft, row, i);
        } else if (labelled) {
          if (i == label.first) g -= c.hard * A(label.first_share);
          if (i == label.second) g -= c.hard * A(label.second_share);
        }
        return g;
      };
      for (int64_t i = lane; i < classes; i += kThreads)
        if (!named(i)) put(gradient + i, gradient_at(i, false, A(0)));
      __syncthreads();
      for (int t = 0; t < teachers; ++t)
        for (int i = lane; i < view[t].k; i += kThreads) {
          const int32_t place = view[t].index[i];
          A delta = view[t].delta(i, rate);
          if (teachers == 2) {
            // A class that both name: the same sum, in the same order, whoever writes it.
            delta = A(0);
            for (int u = 0; u < 2; ++u)
              for (int j = 0; j < view[u].k; ++j)
                if (view[u].index[j] == place) delta += view[u].delta(j, rate);
          }
          put(gradient + place, gradient_at(place, true, delta));
        }
    }
    __syncthreads();  // the next row's marks
  }
  finish_losses<A>(call, own_loss);
}

// Shared memory for a bit a class; kMostMarked classes at most.
constexpr int64_t kMostMarked = int64_t(40) * 1024 * 8;

template <class S, class A>
void launch_topk(const Call& call, unsigned blocks, cudaStream_t stream) {
  switch (call.tail_policy) {
    case kTailRenorm:
      launch_kernel("kd_loss_topk", topk_teacher_kernel<S, A, kTailRenorm>, {blocks, kThreads},
                    stream, call);
      break;
    case kTailBucket:
      launch_kernel("kd_loss_topk", topk_teacher_kernel<S, A, kTailBucket>,
                    {blocks, kThreads, size_t((call.classes + 31) / 32) * 4}, stream, call);
      break;
    case kTailSupport:
      launch_kernel("kd_loss_topk", topk_teacher_kernel<S, A, kTailSupport>, {blocks, kThreads},
                    stream, call);
      break;
    default:
      launch_kernel("kd_loss_topk", topk_teacher_kernel<S, A, kTailUniform>, {blocks, kThreads},
                    stream, call);
  }
}
