// DIST for small class counts: one row a lane, as kd_lanes.inl has it. What is summed over rows is
// summed over lanes at the end of a piece, what is summed over classes never crosses a lane.
// Included after kd_lanes.inl and math/dist.h.

template <class V, class Exponential>
struct DistLanes {
  static constexpr int64_t L = V::lanes;
  // Padded: blocks a multiple of 4 KiB apart make loads wait for stores that they have no part in.
  using Block = float[kLaneClasses * L + 80];

  struct Blocks {
    alignas(64) Block student, teacher;
    alignas(64) Block sums[kDistSums];
    alignas(64) float rows[L][kLaneClasses];
    alignas(64) float shift[2][kLaneClasses];
  };

  // Lanes past the last row hold row `other`. Maxima of the rows are returned, 0 for -inf.
  static V read(const Matrix& matrix, int64_t row, int64_t count, int64_t other, int64_t classes,
                float rows[L][kLaneClasses], float* block) {
    alignas(64) float tops[L];
    if (matrix.dtype == Dtype::float32 && count == L) {
      const float* from = static_cast<const float*>(matrix.data) + row * matrix.row_stride;
      rows_to_lanes<V>(from, matrix.row_stride, classes, block, tops);
    } else {
      for (int64_t i = 0; i < L; ++i) {
        const int64_t at = (i < count ? row + i : other) * matrix.row_stride;
        read_as(static_cast<const char*>(matrix.data) + at * size_of(matrix.dtype), matrix.dtype,
                rows[i], classes);
      }
      rows_to_lanes<V>(rows[0], kLaneClasses, classes, block, tops);
    }
    const V top = V::load(tops);
    return select(maximum(top, V(-FLT_MAX)) - top, V(0.0f), top);
  }

  // Exponentials, then probabilities, in place; 1 / their sum.
  static V softmax(const Exponential& exponential, float* block, int64_t classes, V top) {
    const V zero(0.0f);
    V sum = zero;
    for (int64_t c = 0; c < classes; ++c) {
      const V e = exponential(V::load(block + c * L) - top);
      e.store(block + c * L);
      sum = sum + e;
    }
    const V inverse = select(sum, V(1.0f) / sum, zero);
    for (int64_t c = 0; c < classes; ++c) (V::load(block + c * L) * inverse).store(block + c * L);
    return inverse;
  }

  static void sums(const DistCall& call, int64_t begin, int64_t end) {
    const int64_t classes = call.classes;
    const Exponential exponential(1.0 / call.temperature);
    float* const kept = static_cast<float*>(call.kept);
    const int64_t step = call.kept_rows();
    const V zero(0.0f), count{float(classes)};
    Blocks b;
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece * call.piece, last = std::min(call.rows, first + call.piece);
      for (Block& sum : b.sums) std::fill_n(sum, classes * L, 0.0f);
      double loss = 0;
      for (int64_t row = first; row < last; row += L) {
        const int64_t rows = std::min(L, last - row);
        // Lanes past the end hold the piece's first row, and add nothing.
        V top = read(call.student, row, rows, first, classes, b.rows, b.student);
        const V student_inverse = softmax(exponential, b.student, classes, top);
        top.store(kept + row);
        top = read(call.teacher, row, rows, first, classes, b.rows, b.teacher);
        const V teacher_inverse = softmax(exponential, b.teacher, classes, top);
        top.store(kept + step + row);
        student_inverse.store(kept + 2 * step + row);
        teacher_inverse.store(kept + 3 * step + row);

        const V x_mean = dist_row_mean(student_inverse, count);
        const V y_mean = dist_row_mean(teacher_inverse, count);
        V student_square = zero, teacher_square = zero, product = zero;
        for (int64_t c = 0; c < classes; ++c) {
          const V x = V::load(b.student + c * L) - x_mean;
          const V y = V::load(b.teacher + c * L) - y_mean;
          student_square = multiply_add(x, x, student_square);
          teacher_square = multiply_add(y, y, teacher_square);
          product = multiply_add(x, y, product);
        }
        alignas(64) float of[3][L], slope[2][L];
        student_square.store(of[0]);
        teacher_square.store(of[1]);
        product.store(of[2]);
        for (int64_t i = 0; i < L; ++i) {
          const Pearson rho = pearson(of[0][i], of[1][i], of[2][i]);
          slope[0][i] = float(call.row_gradient * rho.student);
          slope[1][i] = float(call.row_gradient * rho.teacher);
          if (i < rows) loss += rho.loss;
        }
        V::load(slope[0]).store(kept + 4 * step + row);
        V::load(slope[1]).store(kept + 5 * step + row);

        if (row == first)
          for (int64_t c = 0; c < classes; ++c) {
            const float *const x = b.student + c * L, *const y = b.teacher + c * L;
            b.shift[0][c] = rows > 2 ? dist_typical(x[0], x[1], x[2]) : x[0];
            b.shift[1][c] = rows > 2 ? dist_typical(y[0], y[1], y[2]) : y[0];
          }
        alignas(64) float known[L];
        for (int64_t i = 0; i < L; ++i) known[i] = float(i < rows);
        const V here = V::load(known);
        for (int64_t c = 0; c < classes; ++c) {
          DistSums<V> sum = load(b, c);
          dist_add(sum, (V::load(b.student + c * L) - V(b.shift[0][c])) * here,
                   (V::load(b.teacher + c * L) - V(b.shift[1][c])) * here);
          const V all[kDistSums] = {sum.student, sum.teacher, sum.student_square,
                                    sum.teacher_square, sum.product};
          for (int64_t k = 0; k < kDistSums; ++k) all[k].store(b.sums[k] + c * L);
        }
      }
      call.row_losses[piece] = loss;
      float* const partial = static_cast<float*>(call.partial) + piece * kDistSums * call.width;
      const float inverse_count = 1.0f / float(last - first);
      for (int64_t c = 0; c < call.width; ++c) {
        DistSums<float> sum = {};
        if (c < classes) {
          const DistSums<V> all = load(b, c);
          sum = dist_centred<float>(
              {sum_of(all.student), sum_of(all.teacher), sum_of(all.student_square),
               sum_of(all.teacher_square), sum_of(all.product)},
              b.shift[0][c], b.shift[1][c], inverse_count);
        }
        const float all[kDistSums] = {sum.student, sum.teacher, sum.student_square,
                                      sum.teacher_square, sum.product};
        for (int64_t k = 0; k < kDistSums; ++k) partial[k * call.width + c] = all[k];
      }
    }
  }

  static DistSums<V> load(const Blocks& b, int64_t c) {
    return {V::load(b.sums[0] + c * L), V::load(b.sums[1] + c * L), V::load(b.sums[2] + c * L),
            V::load(b.sums[3] + c * L), V::load(b.sums[4] + c * L)};
  }

  static void gradients(const DistCall& call, int64_t begin, int64_t end) {
    const int64_t classes = call.classes, width = call.width, step = call.kept_rows();
    const Exponential exponential(1.0 / call.temperature);
    const float* const kept = static_cast<const float*>(call.kept);
    const float* const slopes = static_cast<const float*>(call.slopes);
    const V zero(0.0f), number{float(classes)};
    Blocks b;
    for (int64_t row = begin; row < end; row += L) {
      const int64_t count = std::min(L, end - row);
      read(call.student, row, count, row, classes, b.rows, b.student);
      read(call.teacher, row, count, row, classes, b.rows, b.teacher);
      const auto of = [&](int64_t k) { return V::load(kept + k * step + row); };
      const V student_max = of(0), teacher_max = of(1), student_inverse = of(2),
              teacher_inverse = of(3);
      const DistSlope<V> along = {dist_row_mean(student_inverse, number),
                                  dist_row_mean(teacher_inverse, number), of(4), of(5)};
      V dot = zero;
      for (int64_t c = 0; c < classes; ++c) {
        const V q = exponential(V::load(b.student + c * L) - student_max) * student_inverse;
        const V p = exponential(V::load(b.teacher + c * L) - teacher_max) * teacher_inverse;
        const DistSlope<V> down = {V(slopes[c]), V(slopes[width + c]), V(slopes[2 * width + c]),
                                   V(slopes[3 * width + c])};
        const V v = dist_slope(along, q, p) + dist_slope(down, q, p);
        q.store(b.student + c * L);
        v.store(b.teacher + c * L);
        dot = multiply_add(q, v, dot);
      }
      for (int64_t c = 0; c < classes; ++c)
        (V::load(b.student + c * L) * (V::load(b.teacher + c * L) - dot)).store(b.student + c * L);
      write(call, row, count, b);
    }
  }

  static void write(const DistCall& call, int64_t row, int64_t count, Blocks& b) {
    const int64_t classes = call.classes;
    const Dtype dtype = call.student.dtype;
    char* const to = static_cast<char*>(call.gradient) + row * classes * size_of(dtype);
    if (dtype == Dtype::float32 && count == L)
      return lanes_to_rows<V>(b.student, classes, reinterpret_cast<float*>(to), classes);
    lanes_to_rows<V>(b.student, classes, b.rows[0], kLaneClasses);
    for (int64_t i = 0; i < count; ++i)
      write_as(b.rows[i], to + i * classes * size_of(dtype), dtype, classes);
  }
};
