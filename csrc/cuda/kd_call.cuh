// What every distillation kernel does around its rows: labels, the denominators of the means, the
// sum of the losses. Included after kd_row.h and block.cuh, in the namespace of its user.
//
// Two kernels make a loss. kd_prepare_kernel sums weights and labels over pieces of the rows and
// resets a counter. Every block of the second adds the pieces up for itself, works on its rows, and
// leaves the sum of their losses; the block that finishes last adds those. Which block that is
// changes nothing: pieces, rows of a block and order of the sums are fixed by the shapes (and by
// the number of multiprocessors). No float atomics, nothing to wait for on the host.

struct Label {
  int64_t first = -1, second = -1;           // -1: none
  double first_share = 0, second_share = 0;  // times the weight of the class
  double first_part = 0, second_part = 0;    // without it
  bool outside = false;
};

__device__ inline void take(const KdCall& call, int64_t index, double part, int64_t& place,
                            double& share, double& whole, bool& outside) {
  if (index == call.ignore_index) return;
  if (index < 0 || index >= call.classes) {
    outside = true;
    return;
  }
  place = index;
  whole = part;
  share = call.class_weight ? part * double(call.class_weight[index]) : part;
}

__device__ inline Label label_of(const KdCall& call, int64_t row) {
  Label label;
  if (!call.target) return label;
  const double share = call.share ? double(call.share[row]) : 1.0;
  take(call, call.target[row], share, label.first, label.first_share, label.first_part,
       label.outside);
  if (call.partner)
    take(call, call.partner[row], 1.0 - share, label.second, label.second_share, label.second_part,
         label.outside);
  return label;
}

// What a row is worth; `counts`: whether it has any loss at all.
template <class A>
struct Worth {
  Label label;
  KdWeights<A> w;
  bool counts;
};

template <class A>
__device__ inline Worth<A> worth_of(const KdCall& call, const KdFactors& factors, int64_t row,
                                    bool dense) {
  Worth<A> out;
  out.label = label_of(call, row);
  const double weight = call.weight ? double(call.weight[row]) : 1.0;
  out.w = {A(weight * factors.kd_loss),
           A(weight * factors.ce_loss),
           A(weight * factors.kd_gradient),
           A(weight * factors.ce_gradient),
           A(out.label.first_share + out.label.second_share),
           A(0)};
  out.counts = out.w.kd_loss != 0 || (out.w.ce_loss != 0 && (dense || out.w.label_mass != 0));
  return out;
}

// By every thread of every block. S: the student's dtype.
template <class S, class A>
__device__ inline KdFactors factors_of(const KdCall& call) {
  double weights = double(call.rows), labels = weights;
  if (call.pieces == 1) {
    weights = call.workspace->weights[0];
    labels = call.workspace->labels[0];
  } else if (call.pieces > 1) {
    const bool mine = int(threadIdx.x) < call.pieces;
    weights = sum_over_block(mine ? call.workspace->weights[threadIdx.x] : 0.0);
    labels = sum_over_block(mine ? call.workspace->labels[threadIdx.x] : 0.0);
  }
  const KdFactors factors =
      kd_factors(call.teacher.data != nullptr || call.named_count != 0,
                 call.target != nullptr || call.soft.data != nullptr, call.temperature,
                 call.distillation, call.label, call.reduction, sizeof(S) == 2, weights, labels);
  if (blockIdx.x == 0 && threadIdx.x == 0) *static_cast<A*>(call.factor) = A(factors.factor);
  return factors;
}

// The loss of a row, from one thread; `own` is its sum so far.
template <class A>
__device__ inline void add_loss(const KdCall& call, int64_t row, A loss, double& own) {
  if (call.reduction == kReductionNone)
    static_cast<A*>(call.losses)[row] = loss;
  else
    own += double(loss);
}

// After the rows, by every thread: the losses' sum.
template <class A>
__device__ inline void finish_losses(const KdCall& call, double own) {
  if (call.reduction == kReductionNone) return;
  __shared__ bool last;
  own = sum_over_block(own);
  if (threadIdx.x == 0) {
    call.workspace->losses[blockIdx.x] = own;
    __threadfence();
    last = atomicAdd(&call.workspace->finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  double sum = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads)
    sum += __ldcg(&call.workspace->losses[i]);
  sum = sum_over_block(sum);
  if (threadIdx.x == 0) *static_cast<A*>(call.losses) = A(sum);
}
