// What every distillation kernel does around its rows: labels, the denominators of the means, the
// sum of the losses. Included after kd_row.h, divergence.h and block.cuh, in the namespace of its
// user.
//
// Two kernels make a loss. kd_prepare_kernel sums weights and labels over pieces of the rows and
// resets a counter. Every block of the second adds the pieces up for itself, works on its rows, and
// leaves the sum of their losses; the block that finishes last adds those. Which block that is
// changes nothing: pieces, rows of a block and order of the sums are fixed by the shapes (and by
// the number of multiprocessors). No float atomics, nothing to wait for on the host.

// A teacher's k largest classes; csrc/math/topk_teacher.h.
struct TopKTeacher {
  int64_t k;
  const int32_t* indices;
  Matrix log_probs, log_tail;
};

// Between the kernels of one call.
constexpr int kMostPieces = 256;
constexpr int kRowsAPiece = 1024;  // at least
constexpr int kMostBlocks = 2048;
struct Workspace {
  unsigned finished;
  double weights[kMostPieces], labels[kMostPieces];
  double losses[kMostBlocks];
};

struct Call {
  int64_t rows, classes;
  Matrix student, teacher, soft;
  const int64_t* target;
  const int64_t* partner;
  const float* share;
  const float* weight;
  const float* class_weight;  // multiplies index labels
  int64_t ignore_index, reduction;
  double temperature, distillation, label, label_smoothing, threshold;
  int64_t divergence;
  double first, second;
  TopKTeacher named[2];  // instead of `teacher`
  int named_count, tail_policy;
  const float* mix;
  void* gradient;
  void* losses;  // of each row, without a reduction; otherwise the one loss
  void* factor;
  Workspace* workspace;
  int pieces;      // of rows whose sums are in the workspace; 0: the sums are known
  int row_chunks;  // of a row that is split: chunks a block keeps in shared memory
};

struct Label {
  int64_t first = -1, second = -1;           // -1: none
  double first_share = 0, second_share = 0;  // times the weight of the class
  double first_part = 0, second_part = 0;    // without it
  bool outside = false;
};

__device__ inline void take(const Call& call, int64_t index, double part, int64_t& place,
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

__device__ inline Label label_of(const Call& call, int64_t row) {
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
__device__ inline Worth<A> worth_of(const Call& call, const KdFactors& factors, int64_t row,
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

// A grid of call.pieces blocks, or one.
__global__ void __launch_bounds__(kThreads) kd_prepare_kernel(const Call call) {
  if (blockIdx.x == 0 && threadIdx.x == 0) call.workspace->finished = 0;
  if (call.pieces == 0) return;
  const int64_t piece = (call.rows + call.pieces - 1) / call.pieces;
  const int64_t first = blockIdx.x * piece;
  const int64_t last = first + piece < call.rows ? first + piece : call.rows;
  double weights = 0, labels = 0;
  for (int64_t row = first + threadIdx.x; row < last; row += kThreads) {
    const double weight = call.weight ? double(call.weight[row]) : 1.0;
    const Label label = label_of(call, row);
    weights += weight;
    labels += call.soft.data ? weight : weight * (label.first_share + label.second_share);
  }
  weights = sum_over_block(weights);
  labels = sum_over_block(labels);
  if (threadIdx.x != 0) return;
  call.workspace->weights[blockIdx.x] = weights;
  call.workspace->labels[blockIdx.x] = labels;
}

// By every thread of every block. S: the student's dtype.
template <class S, class A>
__device__ inline KdFactors factors_of(const Call& call) {
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
__device__ inline void add_loss(const Call& call, int64_t row, A loss, double& own) {
  if (call.reduction == kReductionNone)
    static_cast<A*>(call.losses)[row] = loss;
  else
    own += double(loss);
}

// After the rows, by every thread: the losses' sum.
template <class A>
__device__ inline void finish_losses(const Call& call, double own) {
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
