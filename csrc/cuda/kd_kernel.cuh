// The kernel of every distillation loss, and the label term that all have. Included after
// kd_call.cuh, exponential.cuh and held_rows.cuh, in the namespace of its user.
//
// A loss is a functor: made once a thread from the call, it takes a row that is placed, returns the
// row's loss and writes the row's gradient.

template <class Rows, class Loss>
__global__ void __launch_bounds__(kThreads, Rows::blocks) kd_kernel(const KdCall call) {
  using A = typename Rows::A;
  const KdFactors factors = factors_of<typename Rows::S, A>(call);
  const Loss loss(call, factors);
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

template <class Rows, class Loss>
void launch_held(KdCall call, const Device& device, cudaStream_t stream, int64_t chunk_bits = 0,
                 int64_t more = 0) {
  const RowsLaunch launch = launch_of<Rows>(call.rows, call.classes, device, kMostBlocks,
                                            chunk_bits, more);
  call.room = launch.room;
  call.marks = launch.memory;
  launch_kernel("kd_loss", kd_kernel<Rows, Loss>, launch.grid, stream, call);
}

// Of the label term what a sweep adds up, relative to the maximum of the whole row, and what it
// takes from a gradient. Exponentials at T = 1 are powers of those at T where T is 1 to 8.
template <class S, class A>
struct LabelTerm {
  using Exponential = typename ExponentialOf<S>::type;
  static constexpr int n = kChunk<S>;

  bool given, dense, smoothing;
  int classes, power;
  Exponential at_one;
  Matrix soft;

  __device__ LabelTerm(const KdCall& call, const KdFactors& factors, double temperature)
      : given(factors.ce_loss != 0),
        dense(given && call.soft.data),
        smoothing(given && call.label_smoothing != 0),
        classes(int(call.classes)),
        power(0),
        at_one(1.0),
        soft(call.soft) {
    const double t = temperature;
    if (t >= 1 && t <= kHighestPower && t == double(int(t))) power = int(t);
  }

  // e: exp(x / T).
  __device__ A exponential_of(A x, A e) const {
    return power == 1 ? e : power != 0 ? integer_power(e, power) : at_one(x);
  }

  // Element j of the chunk at `from`; x: less the row's maximum.
  __device__ void add(int64_t row, int from, int j, A x, A& logit_sum, A& soft_mass,
                      A& soft_dot) const {
    if (!(smoothing || dense) || from + j < 0 || from + j >= classes) return;
    logit_sum += x;
    if (!dense) return;
    const A share = element<A>(soft, row, from + j);
    soft_mass += share;
    soft_dot += select(share, share * x, A(0));
  }

  __device__ void subtract(int64_t row, int from, const KdCoefficients<A>& c, const Label& label,
                           A (&g)[n]) const {
    if (dense) {
#pragma unroll
      for (int j = 0; j < n; ++j)
        if (from + j >= 0 && from + j < classes) g[j] -= c.hard * element<A>(soft, row, from + j);
    } else if (given) {
      add_at(g, label.first - from, -(c.hard * A(label.first_share)));
      add_at(g, label.second - from, -(c.hard * A(label.second_share)));
    }
  }

  // Few chunks have a label; an index known at compile time keeps `g` in registers.
  __device__ static void add_at(A (&g)[n], int64_t place, A value) {
    if (place < 0 || place >= n) return;
#pragma unroll
    for (int j = 0; j < n; ++j)
      if (place == j) g[j] += value;
  }

  // <Y, s> of index labels, before smoothing.
  __device__ static A dot(const Label& label, const S* student, A top) {
    A sum = A(0);
    if (label.first >= 0 && label.first_share != 0)
      sum += A(label.first_share) * (A(number(student[label.first])) - top);
    if (label.second >= 0 && label.second_share != 0)
      sum += A(label.second_share) * (A(number(student[label.second])) - top);
    return sum;
  }
};

template <class A>
__device__ inline A finite_top(A top) {
  return top == A(-INFINITY) ? A(0) : top;
}
