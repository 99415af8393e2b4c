// KL(p || q) and the label term on a GPU. Included after kd_call.cuh, chunks.cuh and
// exponential.cuh, in the namespace of its user.
//
// A row is read from DRAM once: its logits stay where they are (16 bytes a chunk) from the maxima
// over the sums to the gradient; exponentials are made twice, which costs less than room for them.
// kd_rows_kernel keeps them in registers, a row a group of 4 to 256 threads. kd_split_kernel takes
// longer rows: in shared memory, spread over the blocks of a cluster where the GPU has clusters;
// where they do not fit it reads them again, from L2. Sums go through a fixed tree.

// What a chunk's arithmetic needs to know of the call and of the row.
template <class S, class A>
struct RowMath {
  using Exponential = typename ExponentialOf<S>::type;
  static constexpr int n = kChunk<S>;

  bool teacher, labelled, dense, smoothing;
  int classes, power;  // power: of the exponential at T that the one at 1 is; 0: made on its own
  Exponential at_temperature, at_one;
  Matrix soft;
  int64_t row;

  __device__ RowMath(const Call& call, const KdFactors& factors)
      : teacher(factors.kd_loss != 0),
        labelled(factors.ce_loss != 0),
        dense(labelled && call.soft.data),
        smoothing(labelled && call.label_smoothing != 0),
        classes(int(call.classes)),
        power(0),
        at_temperature(1.0 / (factors.kd_loss != 0 ? call.temperature : 1.0)),
        at_one(1.0),
        soft(call.soft),
        row(0) {
    const double t = teacher ? call.temperature : 1.0;
    if (t >= 1 && t <= kHighestPower && t == double(int(t))) power = int(t);
  }

  __device__ A label_exponential(A x, A e) const {
    return power == 1 ? e : power != 0 ? integer_power(e, power) : at_one(x);
  }

  // teacher_at(k): the teacher's logit k of the chunk. Logits outside the row are -inf.
  template <class At>
  __device__ void add(int from, const Chunk<S>& student, At teacher_at,
                      KdStatistics<A>& own) const {
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const A x = A(number(student.values[k])) - own.student_max;
      const A e = at_temperature(x);
      own.student_sum += e;
      if (labelled && power != 1) own.label_sum += label_exponential(x, e);
      if (teacher) {
        const A y = teacher_at(k) - own.teacher_max;
        const A p = at_temperature(y);
        own.teacher_sum += p;
        own.gap += kd_gap_term(p, y, x);
      }
      if ((smoothing || dense) && from + k >= 0 && from + k < classes) {
        own.logit_sum += x;
        if (dense) {
          const A share = element<A>(soft, row, from + k);
          own.soft_mass += share;
          own.soft_dot += select(share, share * x, A(0));
        }
      }
    }
  }

  template <class At>
  __device__ void gradient(int from, const Chunk<S>& student, At teacher_at,
                           const KdStatistics<A>& all, const KdCoefficients<A>& c,
                           const Label& label, A (&g)[n]) const {
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const A x = A(number(student.values[k])) - all.student_max;
      const A e = at_temperature(x);
      const A own = labelled ? label_exponential(x, e) : A(0);
      const A p = teacher ? at_temperature(teacher_at(k) - all.teacher_max) : A(0);
      g[k] = kd_gradient(c, e, own, p);
    }
    if (dense) {
#pragma unroll
      for (int k = 0; k < n; ++k)
        if (from + k >= 0 && from + k < classes) g[k] -= c.hard * element<A>(soft, row, from + k);
    } else if (labelled) {
      subtract(g, label.first - from, c.hard * A(label.first_share));
      subtract(g, label.second - from, c.hard * A(label.second_share));
    }
  }

  // Few chunks have a label; an index known at compile time keeps `g` in registers.
  __device__ static void subtract(A (&g)[n], int64_t place, A share) {
    if (place < 0 || place >= n) return;
#pragma unroll
    for (int k = 0; k < n; ++k)
      if (place == k) g[k] -= share;
  }

  __device__ KdCoefficients<A> finish(const Call& call, const KdStatistics<A>& all,
                                      const S* student, Worth<A>& worth) const {
    const Label& label = worth.label;
    KdWeights<A>& w = worth.w;
    if (label.first >= 0 && label.first_share != 0)
      w.label_dot += A(label.first_share) * (A(number(student[label.first])) - all.student_max);
    if (label.second >= 0 && label.second_share != 0)
      w.label_dot += A(label.second_share) * (A(number(student[label.second])) - all.student_max);
    return kd_finish(all, w, A(1.0 / (teacher ? call.temperature : 1.0)), A(call.label_smoothing),
                     A(1.0 / double(classes)), A(call.threshold), dense);
  }
};

// Of a group of Width threads, in each of them. `mask`: the group's lanes of its warp.
template <int Width, class A, class Op>
__device__ inline A over_group(A value, unsigned mask, Op op) {
  for (int by = (Width < 32 ? Width : 32) / 2; by > 0; by /= 2)
    value = op(value, __shfl_xor_sync(mask, value, by));
  return value;
}

template <class A>
struct Maxima {
  A student, teacher;
};

// Maxima and sums over a block, each through memory of its own: a barrier a reduction.
template <int Width, class A>
__device__ inline Maxima<A> maxima_of_group(A student, A teacher, unsigned mask) {
  const auto larger = [](A a, A b) { return maximum(a, b); };
  Maxima<A> out = {over_group<Width>(student, mask, larger),
                   over_group<Width>(teacher, mask, larger)};
  if constexpr (Width > 32) {
    __shared__ Maxima<A> part[Width / 32];
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = out;
    __syncthreads();
    for (int warp = 0; warp < Width / 32; ++warp) {
      out.student = maximum(out.student, part[warp].student);
      out.teacher = maximum(out.teacher, part[warp].teacher);
    }
  }
  return out;
}

template <class A>
struct Sums {
  A student, teacher, label, gap, logit, soft_mass, soft_dot;
};

template <class A>
__device__ inline void add_sums(Sums<A>& to, const Sums<A>& from) {
  to.student += from.student;
  to.teacher += from.teacher;
  to.label += from.label;
  to.gap += from.gap;
  to.logit += from.logit;
  to.soft_mass += from.soft_mass;
  to.soft_dot += from.soft_dot;
}

template <int Width, class S, class A>
__device__ inline Sums<A> sums_of_group(const RowMath<S, A>& math, const KdStatistics<A>& own,
                                        unsigned mask) {
  const auto sum = [&](bool wanted, A value) {
    return wanted ? over_group<Width>(value, mask, [](A a, A b) { return a + b; }) : A(0);
  };
  Sums<A> out = {sum(true, own.student_sum),
                 sum(math.teacher, own.teacher_sum),
                 sum(math.labelled && math.power != 1, own.label_sum),
                 sum(math.teacher, own.gap),
                 sum(math.smoothing, own.logit_sum),
                 sum(math.dense, own.soft_mass),
                 sum(math.dense, own.soft_dot)};
  if constexpr (Width > 32) {
    __shared__ Sums<A> part[Width / 32];
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = out;
    __syncthreads();
    out = part[0];
    for (int warp = 1; warp < Width / 32; ++warp) add_sums(out, part[warp]);
  }
  return out;
}

template <class A>
__device__ inline void set_maxima(KdStatistics<A>& to, const Maxima<A>& top) {
  to.student_max = top.student == A(-INFINITY) ? A(0) : top.student;
  to.teacher_max = top.teacher == A(-INFINITY) ? A(0) : top.teacher;
}

template <class S, class A>
__device__ inline void set_sums(const RowMath<S, A>& math, KdStatistics<A>& to,
                                const Sums<A>& sums) {
  to.student_sum = sums.student;
  to.teacher_sum = sums.teacher;
  to.label_sum = !math.labelled ? A(0) : math.power == 1 ? sums.student : sums.label;
  to.gap = sums.gap;
  to.logit_sum = sums.logit;
  to.soft_mass = sums.soft_mass;
  to.soft_dot = sums.soft_dot;
  to.count = A(math.classes);
}

template <class S>
__device__ inline const S* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<const S*>(matrix.data) + row * matrix.row_stride;
}

// A row of no loss, or (NaN) of a label outside the classes: no gradient.
template <class S, class A>
__device__ inline void clear_gradient(const Call& call, int64_t row, int lane, int width) {
  if (!call.gradient) return;
  S* const gradient = static_cast<S*>(call.gradient) + row * call.classes;
  for (int i = lane; i < int(call.classes); i += width) put(gradient + i, A(0));
}

// Width threads a row, each with Chunks chunks of it. SameTeacher: the teacher has the student's
// dtype; of another it is read where it lies, each time. Two blocks a multiprocessor: without that
// bound the compiler keeps 16-bit logits as floats, and registers for one.
template <class S, class A, int Width, int Chunks, bool SameTeacher>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 4 && SameTeacher && Chunks <= 4 ? 2 : 1)
    kd_rows_kernel(const Call call) {
  constexpr int n = kChunk<S>;
  const KdFactors factors = factors_of<S, A>(call);
  RowMath<S, A> math(call, factors);
  const int classes = math.classes, lane = int(threadIdx.x) % Width;
  const unsigned mask = Width >= 32 ? 0xffffffffu
                                    : ((1u << (Width % 32)) - 1u)
                                          << (int(threadIdx.x) % 32 / Width * Width);
  constexpr int rows_a_block = kThreads / Width;
  double own_loss = 0;
  // All threads of a row's group have the same row, so that they meet at every reduction.
  for (int64_t row = int64_t(blockIdx.x) * rows_a_block + threadIdx.x / Width; row < call.rows;
       row += int64_t(gridDim.x) * rows_a_block) {
    Worth<A> worth = worth_of<A>(call, factors, row, math.dense);
    if (worth.label.outside || !worth.counts) {
      if (lane == 0) add_loss(call, row, worth.label.outside ? A(NAN) : A(0), own_loss);
      clear_gradient<S, A>(call, row, lane, Width);
      continue;
    }
    math.row = row;
    const S* const student = row_of<S>(call.student, row);
    const S* const teacher = SameTeacher && math.teacher ? row_of<S>(call.teacher, row) : student;
    const int shift = shift_of(student);
    const bool teacher_aligned = shift_of(teacher) == shift;
    const auto from_of = [&](int k) { return (lane + k * Width) * n - shift; };
    uint4 student_bits[Chunks], teacher_bits[Chunks];
#pragma unroll
    for (int k = 0; k < Chunks; ++k) {
      student_bits[k] = load_chunk(student, from_of(k), classes, true);
      if (SameTeacher && math.teacher)
        teacher_bits[k] = load_chunk(teacher, from_of(k), classes, teacher_aligned);
    }
    const auto teacher_of = [&](int k, int j) {
      if constexpr (SameTeacher) {
        return A(number(unpacked<S>(teacher_bits[k]).values[j]));
      } else {
        const int i = from_of(k) + j;
        return i >= 0 && i < classes ? element<A>(call.teacher, row, i) : A(-INFINITY);
      }
    };

    A student_max = A(-INFINITY), teacher_max = A(-INFINITY);
#pragma unroll
    for (int k = 0; k < Chunks; ++k) {
      const Chunk<S> chunk = unpacked<S>(student_bits[k]);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        student_max = maximum(student_max, A(number(chunk.values[j])));
        if (math.teacher) teacher_max = maximum(teacher_max, teacher_of(k, j));
      }
    }
    KdStatistics<A> all = kd_empty(A(0));
    set_maxima(all, maxima_of_group<Width>(student_max, teacher_max, mask));
#pragma unroll
    for (int k = 0; k < Chunks; ++k)
      math.add(
          from_of(k), unpacked<S>(student_bits[k]), [&](int j) { return teacher_of(k, j); }, all);
    set_sums(math, all, sums_of_group<Width>(math, all, mask));
    const KdCoefficients<A> c = math.finish(call, all, student, worth);
    if (lane == 0) add_loss(call, row, c.loss, own_loss);
    if (!call.gradient) continue;
    S* const gradient = static_cast<S*>(call.gradient) + row * call.classes;
    const bool gradient_aligned = shift_of(gradient) == shift;
#pragma unroll
    for (int k = 0; k < Chunks; ++k) {
      A g[n];
      math.gradient(
          from_of(k), unpacked<S>(student_bits[k]), [&](int j) { return teacher_of(k, j); }, all, c,
          worth.label, g);
      store_chunk(gradient, from_of(k), classes, gradient_aligned, g);
    }
  }
  finish_losses<A>(call, own_loss);
}

// A cluster a row (a block, where there are none): each block has a run of the row's chunks, of
// which it keeps call.row_chunks in shared memory, or none. What the blocks tell each other lies
// before those.
template <class A>
struct Exchange {
  Maxima<A> top;
  Sums<A> sums;
};

constexpr size_t kExchangeBytes = 128;
static_assert(sizeof(Exchange<double>) <= kExchangeBytes);

template <class S, class A, bool SameTeacher>
__global__ void __launch_bounds__(kThreads) kd_split_kernel(const Call call) {
  constexpr int n = kChunk<S>;
  const KdFactors factors = factors_of<S, A>(call);
  RowMath<S, A> math(call, factors);
  const int classes = math.classes, lane = int(threadIdx.x);
  const int rank = int(cluster_rank()), blocks = int(cluster_size());
  Exchange<A>* const told = dynamic_shared<Exchange<A>>();
  uint4* const kept_student =
      reinterpret_cast<uint4*>(dynamic_shared<unsigned char>() + kExchangeBytes);
  uint4* const kept_teacher = kept_student + call.row_chunks;
  const bool kept = call.row_chunks != 0;
  double own_loss = 0;
  for (int64_t row = blockIdx.x / blocks; row < call.rows; row += gridDim.x / blocks) {
    Worth<A> worth = worth_of<A>(call, factors, row, math.dense);
    if (worth.label.outside || !worth.counts) {
      if (rank == 0 && lane == 0)
        add_loss(call, row, worth.label.outside ? A(NAN) : A(0), own_loss);
      clear_gradient<S, A>(call, row, rank * kThreads + lane, blocks * kThreads);
      continue;
    }
    math.row = row;
    const S* const student = row_of<S>(call.student, row);
    const S* const teacher = SameTeacher && math.teacher ? row_of<S>(call.teacher, row) : student;
    const int shift = shift_of(student);
    const bool teacher_aligned = shift_of(teacher) == shift;
    const int chunks = (classes + shift + n - 1) / n, part = (chunks + blocks - 1) / blocks;
    const int first = rank * part, last = first + part < chunks ? first + part : chunks;
    // f(from, student, teacher_at) of each chunk of this thread; it alone reads what it kept.
    const auto over_chunks = [&](bool fresh, auto f) {
#pragma unroll(sizeof(A) == 8 ? 1 : 4)
      for (int c = first + lane; c < last; c += kThreads) {
        const int from = c * n - shift;
        uint4 bits, teacher_bits = {};
        if (fresh || !kept) {
          bits = load_chunk(student, from, classes, true);
          if (SameTeacher && math.teacher)
            teacher_bits = load_chunk(teacher, from, classes, teacher_aligned);
          if (kept) {
            kept_student[c - first] = bits;
            if (SameTeacher) kept_teacher[c - first] = teacher_bits;
          }
        } else {
          bits = kept_student[c - first];
          if (SameTeacher) teacher_bits = kept_teacher[c - first];
        }
        const Chunk<S> chunk = unpacked<S>(teacher_bits);
        f(from, unpacked<S>(bits), [&](int j) {
          if constexpr (SameTeacher) {
            return A(number(chunk.values[j]));
          } else {
            const int i = from + j;
            return i >= 0 && i < classes ? element<A>(call.teacher, row, i) : A(-INFINITY);
          }
        });
      }
    };

    A student_max = A(-INFINITY), teacher_max = A(-INFINITY);
    over_chunks(true, [&](int, const Chunk<S>& chunk, auto teacher_at) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        student_max = maximum(student_max, A(number(chunk.values[j])));
        if (math.teacher) teacher_max = maximum(teacher_max, teacher_at(j));
      }
    });
    Maxima<A> top = maxima_of_group<kThreads>(student_max, teacher_max, 0xffffffffu);
    // Every block has read what was told of the last row before it came to the barrier between
    // maxima and sums; so the other of the two may be written.
    if (blocks > 1) {
      if (lane == 0) told->top = top;
      cluster_barrier();
      for (int k = 0; k < blocks; ++k) {
        const Maxima<A> other = cluster_shared(told, unsigned(k))->top;
        top.student = maximum(top.student, other.student);
        top.teacher = maximum(top.teacher, other.teacher);
      }
    }
    KdStatistics<A> all = kd_empty(A(0));
    set_maxima(all, top);
    over_chunks(false, [&](int from, const Chunk<S>& chunk, auto teacher_at) {
      math.add(from, chunk, teacher_at, all);
    });
    Sums<A> sums = sums_of_group<kThreads>(math, all, 0xffffffffu);
    if (blocks > 1) {
      if (lane == 0) told->sums = sums;
      cluster_barrier();
      sums = cluster_shared(told, 0)->sums;
      for (int k = 1; k < blocks; ++k) add_sums(sums, cluster_shared(told, unsigned(k))->sums);
    }
    set_sums(math, all, sums);
    const KdCoefficients<A> c = math.finish(call, all, student, worth);
    if (rank == 0 && lane == 0) add_loss(call, row, c.loss, own_loss);
    if (!call.gradient) continue;
    S* const gradient = static_cast<S*>(call.gradient) + row * call.classes;
    const bool gradient_aligned = shift_of(gradient) == shift;
    over_chunks(false, [&](int from, const Chunk<S>& chunk, auto teacher_at) {
      A g[n];
      math.gradient(from, chunk, teacher_at, all, c, worth.label, g);
      store_chunk(gradient, from, classes, gradient_aligned, g);
    });
  }
  if (blocks > 1) cluster_barrier();  // nobody leaves while its memory is read
  finish_losses<A>(call, own_loss);
}
