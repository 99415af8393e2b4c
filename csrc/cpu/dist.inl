// Body of DIST on a CPU. Three passes, because the slope of a column wants every row of it:
//
//   sums       a piece of rows: softmaxes of kTogether rows at a time, kept in L2; what the rows
//              are worth; sums over the columns, which stay in registers for those rows
//   columns    pieces of each column are merged in double, in their order
//   gradients  softmaxes again, slopes, <q, slope>, gradient; a row stays in L2
//
// DRAM sees student and teacher twice and the gradient once. Sums over a column are made of pieces
// that depend on the shape alone, so that a result repeats for any number of threads.
//
// Included after math/dist.h and kd_loss.inl, in the namespace of an instruction set.

template <class V, class Exponential>
struct DistLanes;  // dist_lanes.inl; not where a vector is one number

template <class V, class Exponential>
struct Dist {
  using A = typename V::Scalar;
  static constexpr int64_t L = V::lanes;
  static constexpr int64_t kPart = 64 * L;  // longer sums are made of sums of this many, in double
  static constexpr int64_t kTogether = 4;   // rows; their columns are summed in one go

  // Of a thread: probabilities of kTogether rows, typical ones of the piece, sums over columns.
  struct Scratch {
    A *student[kTogether], *teacher[kTogether];
    A *student_shift, *teacher_shift, *sums;
  };
  static Scratch scratch(int64_t width) {
    // Rows a multiple of 4 KiB apart make loads wait for stores that they have no part in.
    const int64_t row = width + 80;
    static thread_local LineMemory<A> memory;
    A* const at = memory.of((2 * kTogether + 2 + kDistSums) * row);
    Scratch out;
    for (int64_t i = 0; i < kTogether; ++i) {
      out.student[i] = at + 2 * i * row;
      out.teacher[i] = at + (2 * i + 1) * row;
    }
    out.student_shift = at + 2 * kTogether * row;
    out.teacher_shift = out.student_shift + row;
    out.sums = out.teacher_shift + row;
    return out;
  }

  static A finite(A top) { return top == A(-INFINITY) ? A(0) : top; }
  static A* kept(const DistCall& call, int64_t number) {
    return static_cast<A*>(call.kept) + number * call.kept_rows();
  }

  // f(i, n): whole vectors with n = L, then what is left of the row.
  template <class F>
  static void over(int64_t from, int64_t to, F f) {
    int64_t i = from;
    for (; i + L <= to; i += L) f(i, L);
    if (i < to) f(i, to - i);
  }
  static V load(const A* x, int64_t i, int64_t n, A fill) {
    return n == L ? V::load(x + i) : V::load_part(x + i, n, fill);
  }
  // The sum over a row of what f(i, n) adds to its Count sums.
  template <int Count, class F>
  static void sums_over(int64_t classes, double* sums, F f) {
    for (int64_t from = 0; from < classes; from += kPart) {
      V part[Count];
      for (V& sum : part) sum = V(A(0));
      over(from, std::min(from + kPart, classes), [&](int64_t i, int64_t n) { f(i, n, part); });
      for (int k = 0; k < Count; ++k) sums[k] += double(sum_of(part[k]));
    }
  }

  // Exponentials of a row in `out`, 0 past its end; its maximum, and 1 / their sum.
  static void exponentials(const Exponential& exponential, const Matrix& matrix, int64_t row,
                           int64_t classes, A* out, A& top, A& inverse) {
    const A* const x = read_row<A>(matrix, row, 0, classes, out);
    V largest(A(-INFINITY));
    over(0, classes,
         [&](int64_t i, int64_t n) { largest = maximum(largest, load(x, i, n, A(-INFINITY))); });
    top = finite(maximum_of(largest));
    const V shift(top);
    double sum = 0;
    sums_over<1>(classes, &sum, [&](int64_t i, int64_t n, V* part) {
      const V e = exponential(load(x, i, n, A(-INFINITY)) - shift);
      e.store(out + i);
      part[0] = part[0] + e;
    });
    inverse = sum == 0 ? A(0) : A(1) / A(sum);
  }

  // Exponentials become probabilities. Returns 1 - rho of the row and keeps what its gradient
  // needs.
  static double row(const DistCall& call, int64_t row, A* student, A* teacher, const A* top,
                    const A* inverse) {
    const A count = A(call.classes);
    const A student_mean = dist_row_mean(inverse[0], count);
    const A teacher_mean = dist_row_mean(inverse[1], count);
    const V student_inverse(inverse[0]), teacher_inverse(inverse[1]);
    const V x_mean(student_mean), y_mean(teacher_mean);
    double sums[3] = {};
    sums_over<3>(call.classes, sums, [&](int64_t i, int64_t n, V* part) {
      const V q = V::load(student + i) * student_inverse;
      const V p = V::load(teacher + i) * teacher_inverse;
      q.store(student + i);
      p.store(teacher + i);
      V x = q - x_mean, y = p - y_mean;
      if (n < L) {  // nothing of what is past the end
        alignas(64) A known[L];
        for (int64_t k = 0; k < L; ++k) known[k] = A(k < n);
        x = x * V::load(known);
        y = y * V::load(known);
      }
      part[0] = multiply_add(x, x, part[0]);
      part[1] = multiply_add(y, y, part[1]);
      part[2] = multiply_add(x, y, part[2]);
    });
    const Pearson rho = pearson(sums[0], sums[1], sums[2]);
    const A keep[kDistRow] = {top[0],
                              top[1],
                              inverse[0],
                              inverse[1],
                              A(call.row_gradient * rho.student),
                              A(call.row_gradient * rho.teacher)};
    for (int64_t k = 0; k < kDistRow; ++k) kept(call, k)[row] = keep[k];
    return rho.loss;
  }

  static DistSums<V> load_sums(const A* from, int64_t step, int64_t i) {
    return {V::load(from + i), V::load(from + step + i), V::load(from + 2 * step + i),
            V::load(from + 3 * step + i), V::load(from + 4 * step + i)};
  }
  static void store_sums(const DistSums<V>& sums, A* to, int64_t step, int64_t i) {
    sums.student.store(to + i);
    sums.teacher.store(to + step + i);
    sums.student_square.store(to + 2 * step + i);
    sums.teacher_square.store(to + 3 * step + i);
    sums.product.store(to + 4 * step + i);
  }

  template <int Rows>
  static void add_columns(const Scratch& at, int64_t width) {
    for (int64_t i = 0; i < width; i += L) {
      const V x = V::load(at.student_shift + i), y = V::load(at.teacher_shift + i);
      DistSums<V> sums = load_sums(at.sums, width, i);
      for (int r = 0; r < Rows; ++r)
        dist_add(sums, V::load(at.student[r] + i) - x, V::load(at.teacher[r] + i) - y);
      store_sums(sums, at.sums, width, i);
    }
  }

  static void sums(const DistCall& call, int64_t begin, int64_t end) {
    if constexpr (L >= 8) {
      if (call.classes <= kLaneClasses) return DistLanes<V, Exponential>::sums(call, begin, end);
    }
    const int64_t width = call.width;
    const Exponential exponential(1.0 / call.temperature);
    const Scratch at = scratch(width);
    for (int64_t i = 0; i < kTogether; ++i) {
      std::fill(at.student[i] + call.classes, at.student[i] + width, A(0));
      std::fill(at.teacher[i] + call.classes, at.teacher[i] + width, A(0));
    }
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece * call.piece, last = std::min(call.rows, first + call.piece);
      double loss = 0;
      for (int64_t from = first; from < last; from += kTogether) {
        const int64_t rows = std::min(kTogether, last - from);
        for (int64_t r = 0; r < rows; ++r) {
          A top[2], inverse[2];
          exponentials(exponential, call.student, from + r, call.classes, at.student[r], top[0],
                       inverse[0]);
          exponentials(exponential, call.teacher, from + r, call.classes, at.teacher[r], top[1],
                       inverse[1]);
          loss += row(call, from + r, at.student[r], at.teacher[r], top, inverse);
        }
        if (from == first) {
          const int64_t second = rows > 2 ? 1 : 0, third = rows > 2 ? 2 : 0;
          for (int64_t i = 0; i < width; i += L) {
            const auto of = [&](A* const* x) {
              return dist_typical(V::load(x[0] + i), V::load(x[second] + i), V::load(x[third] + i));
            };
            of(at.student).store(at.student_shift + i);
            of(at.teacher).store(at.teacher_shift + i);
          }
          std::fill_n(at.sums, kDistSums * width, A(0));
        }
        switch (rows) {
          case 1:
            add_columns<1>(at, width);
            break;
          case 2:
            add_columns<2>(at, width);
            break;
          case 3:
            add_columns<3>(at, width);
            break;
          default:
            add_columns<kTogether>(at, width);
        }
      }
      call.row_losses[piece] = loss;
      A* const partial = static_cast<A*>(call.partial) + piece * kDistSums * width;
      const V inverse_count{A(1) / A(last - first)};
      for (int64_t i = 0; i < width; i += L)
        store_sums(dist_centred(load_sums(at.sums, width, i), V::load(at.student_shift + i),
                                V::load(at.teacher_shift + i), inverse_count),
                   partial, width, i);
    }
  }

  static void columns(const DistCall& call, int64_t begin, int64_t end) {
    const int64_t width = call.width;
    A* const slopes = static_cast<A*>(call.slopes);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t from = tile * kDistTile, n = std::min(kDistTile, width - from);
      const A* const partial = static_cast<const A*>(call.partial) + from;
      DistColumn sums[kDistTile] = {};
      for (int64_t piece = 0; piece < call.pieces(); ++piece) {
        const double count = double(std::min(call.piece, call.rows - piece * call.piece));
        const A* const at = partial + piece * kDistSums * width;
        for (int64_t c = 0; c < n; ++c)
          dist_merge(sums[c], count, double(at[c]) - double(partial[c]),
                     double(at[width + c]) - double(partial[width + c]), double(at[2 * width + c]),
                     double(at[3 * width + c]), double(at[4 * width + c]));
      }
      double loss = 0;
      for (int64_t c = 0; c < n; ++c) {
        const Pearson rho = pearson_of(sums[c], double(call.rows));
        const A slope[kDistSlope] = {
            A(double(partial[c]) + sums[c].student / double(call.rows)),
            A(double(partial[width + c]) + sums[c].teacher / double(call.rows)),
            A(call.column_gradient * rho.student), A(call.column_gradient * rho.teacher)};
        for (int64_t k = 0; k < kDistSlope; ++k) slopes[k * width + from + c] = slope[k];
        if (from + c < call.classes) loss += rho.loss;
      }
      call.column_losses[tile] = loss;
    }
  }

  // Writes the gradient of a row: q * (slope - dot).
  static void write(const DistCall& call, int64_t row, const A* student, A* slope, A dot) {
    const Dtype dtype = call.student.dtype;
    const int64_t classes = call.classes;
    char* const to = static_cast<char*>(call.gradient) + row * classes * size_of(dtype);
    const bool direct = dtype == dtype_of<A>();
    A* const out = direct ? reinterpret_cast<A*>(to) : slope;
    const V middle(dot);
    const auto value = [&](int64_t i) {
      return V::load(student + i) * (V::load(slope + i) - middle);
    };
    int64_t i = 0;
    if (direct && call.stream && classes >= L) {
      // An unaligned head that overlaps the first aligned vector, then whole vectors.
      value(0).store(out);
      constexpr int64_t bytes = L * int64_t(sizeof(A));
      const int64_t past = int64_t(reinterpret_cast<uintptr_t>(out) % bytes);
      i = past ? (bytes - past) / int64_t(sizeof(A)) : 0;
      for (; i + L <= classes; i += L) value(i).stream(out + i);
    } else {
      for (; i + L <= classes; i += L) value(i).store(out + i);
    }
    if (i < classes) value(i).store_part(out + i, classes - i);
    if (!direct) write_as(out, to, dtype, classes);
  }

  static void gradients(const DistCall& call, int64_t begin, int64_t end) {
    if constexpr (L >= 8) {
      if (call.classes <= kLaneClasses)
        return DistLanes<V, Exponential>::gradients(call, begin, end);
    }
    const int64_t classes = call.classes, width = call.width;
    const Exponential exponential(1.0 / call.temperature);
    const A* const slopes = static_cast<const A*>(call.slopes);
    const Scratch at = scratch(width);
    A *const student = at.student[0], *const slope = at.teacher[0];
    for (int64_t row = begin; row < end; ++row) {
      const A* const s = read_row<A>(call.student, row, 0, classes, student);
      const A* const t = read_row<A>(call.teacher, row, 0, classes, slope);
      const A student_inverse = kept(call, 2)[row], teacher_inverse = kept(call, 3)[row];
      const DistRow<V> of = {V(kept(call, 0)[row]), V(kept(call, 1)[row]), V(student_inverse),
                             V(teacher_inverse),    V(kept(call, 4)[row]), V(kept(call, 5)[row])};
      const DistSlope<V> along = {V(dist_row_mean(student_inverse, A(classes))),
                                  V(dist_row_mean(teacher_inverse, A(classes))), of.student,
                                  of.teacher};
      double dot = 0;
      sums_over<1>(classes, &dot, [&](int64_t i, int64_t n, V* part) {
        const V x = load(s, i, n, A(-INFINITY)) - of.student_max;
        const V y = load(t, i, n, A(-INFINITY)) - of.teacher_max;
        const V q = exponential(x) * of.student_inverse;
        const V p = exponential(y) * of.teacher_inverse;
        const DistSlope<V> down = {V::load(slopes + i), V::load(slopes + width + i),
                                   V::load(slopes + 2 * width + i),
                                   V::load(slopes + 3 * width + i)};
        const V v = dist_slope(along, q, p) + dist_slope(down, q, p);
        q.store(student + i);
        v.store(slope + i);
        part[0] = multiply_add(q, v, part[0]);
      });
      write(call, row, student, slope, A(dot));
    }
  }

  static DistKernels kernels() { return {&sums, &columns, &gradients}; }
};
