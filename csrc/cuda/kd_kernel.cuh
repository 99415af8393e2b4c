// The kernel of every distillation loss, and the label term that all have. Included after
// kd_call.cuh, exponential.cuh and held_rows.cuh, in the namespace of its user.
//
// A loss is a functor: made once a thread from the call, it takes a row that is placed, returns the
// row's loss and writes the row's gradient.

template <template <class, class> class Loss, class Rows>
__global__ void __launch_bounds__(kThreads, Rows::blocks) kd_kernel(const KdCall call) {
  using A = typename Rows::A;
  const KdFactors factors = factors_of<A>(call);
  const Loss<typename Rows::S, A> loss(call, factors);
  Rows held(call.student, call.teacher, call.gradient, call.classes, call.room);
  double own_loss = 0;
  // All threads of a row have the same row, so that they meet at every reduction.
  for (int64_t row = held.from_row(); row < call.rows; row += held.row_step()) {
    Worth<A> worth = worth_of<A>(call, factors, row, loss.label.dense);
    held.place(row);
    A value = worth.label.outside ? A(NAN) : A(0);
    if (worth.label.outside || !worth.counts)
      held.clear();
    else
      value = loss(held, worth);
    if (held.group.leads()) add_loss(call, row, value, own_loss);
  }
  held.group.leave();
  finish_losses<A>(call, own_loss);
}

template <template <class, class> class Loss, class Rows>
void launch_loss(Type<Rows>, KdCall call, const Device& device, cudaStream_t stream,
                 int64_t chunk_bits = 0, int64_t more = 0) {
  const RowsLaunch launch =
      launch_of<Rows>(call.rows, call.classes, device, kMostBlocks, chunk_bits, more);
  call.room = launch.room;
  call.marks = launch.memory;
  launch_kernel("kd_loss", kd_kernel<Loss, Rows>, launch.grid, stream, call);
}

// Of the label term what a sweep adds up, relative to the maximum of the whole row, and what it
// takes from a gradient. Exponentials at T = 1 are squares of those at T where T is 2, 4 or 8.
template <class S, class A>
struct LabelTerm {
  using Exponential = typename ExponentialOf<S>::type;
  static constexpr int n = kChunk<S>;

  bool given, dense, smoothing;
  int classes, squares;  // squares: of exponentials at T until they are at 1; -1: made on their own
  Exponential at_one;
  Matrix soft;

  __device__ LabelTerm(const KdCall& call, const KdFactors& factors, double temperature)
      : given(factors.ce_loss != 0),
        dense(given && call.soft.data),
        smoothing(given && call.label_smoothing != 0),
        classes(int(call.classes)),
        squares(temperature == 1   ? 0
                : temperature == 2 ? 1
                : temperature == 4 ? 2
                : temperature == 8 ? 3
                                   : -1),
        at_one(1.0),
        soft(call.soft) {}

  // Whether sums of exponentials at T are not those at 1.
  __device__ bool apart() const { return given && squares != 0; }

  // e: exp(x / T).
  __device__ A exponential_of(A x, A e) const {
    if (squares < 0) return at_one(x);
    if (squares > 0) e *= e;
    if (squares > 1) e *= e;
    if (squares > 2) e *= e;
    return e;
  }

  // Of the chunk at `from`: sums of logits, of labels, and of their products.
  __device__ void add(int64_t row, int from, const A (&s)[n], A top, A& logit_sum, A& soft_mass,
                      A& soft_dot) const {
    if (smoothing) {
#pragma unroll
      for (int j = 0; j < n; ++j)
        if (from + j >= 0 && from + j < classes) logit_sum += s[j] - top;
    }
    if (!dense) return;
    A share[n];
    elements(soft, row, from, classes, A(0), share);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      soft_mass += share[j];
      soft_dot += select(share[j], share[j] * (s[j] - top), A(0));
    }
  }

  __device__ void subtract(int64_t row, int from, const KdCoefficients<A>& c, const Label<A>& label,
                           A (&g)[n]) const {
    if (dense) {
      A share[n];
      elements(soft, row, from, classes, A(0), share);
#pragma unroll
      for (int j = 0; j < n; ++j) g[j] -= c.hard * share[j];
    } else if (given) {
      add_at(g, label.first - from, -(c.hard * label.first_share));
      add_at(g, label.second - from, -(c.hard * label.second_share));
    }
  }

  // Few chunks have a label; an index known at compile time keeps `g` in registers.
  __device__ static void add_at(A (&g)[n], int place, A value) {
    if (place < 0 || place >= n) return;
#pragma unroll
    for (int j = 0; j < n; ++j)
      if (place == j) g[j] += value;
  }

  // <Y, s> of index labels, before smoothing.
  template <class Rows>
  __device__ static A dot(const Label<A>& label, const Rows& held, A top) {
    A sum = A(0);
    if (label.first >= 0 && label.first_share != 0)
      sum += label.first_share * (held.first_at(label.first) - top);
    if (label.second >= 0 && label.second_share != 0)
      sum += label.second_share * (held.first_at(label.second) - top);
    return sum;
  }
};

template <class A>
__device__ inline A finite_top(A top) {
  return top == A(-INFINITY) ? A(0) : top;
}
