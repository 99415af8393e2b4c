// DIST: 1 - Pearson over every row and over every column of two softmaxes, and its gradient.
//
//   q = softmax(s / T), p = softmax(t / T), both (rows, classes)
//   rho(a, b) = <a0, b0> / (|a0| |b0| + 1e-8), a0 and b0 less their means
//   loss = inter * mean over rows of (1 - rho) + intra * mean over columns of (1 - rho)
//   d rho / da = b0 / d - <a0, b0> |b0| / (d^2 |a0|) a0, d = |a0| |b0| + 1e-8
//
// Both back ends include this file; they differ only in how they sum. Included inside the namespace
// of its user, as kd_row.h is; `V` is a number or a vector.

constexpr double kPearsonEpsilon = 1e-8;  // of the definition

struct Pearson {
  double loss;              // 1 - rho
  double student, teacher;  // d rho / da = student * a0 + teacher * b0
};

// From the sums of squares and products of a0 and b0. A side without deviation has rho 0.
FS_HD inline Pearson pearson(double student_square, double teacher_square, double product) {
  // Rounding may leave a sum of squares below zero; NaN stays.
  const double a = sqrt(student_square < 0 ? 0 : student_square);
  const double b = sqrt(teacher_square < 0 ? 0 : teacher_square);
  const double d = a * b + kPearsonEpsilon;
  // Where b is 0 so is b0; its factor of 1e8 would show the rounding of a mean.
  return {1 - product / d, a == 0 ? 0 : -product * b / (d * d * a), b == 0 ? 0 : 1 / d};
}

// Sums over some rows of a column, of probabilities less a typical one: no digit is lost to a
// common part, and of a column that does not change every sum is exactly 0. Typical is the middle
// one of the first three (of fewer rows, the first): a single row that stands out may be among
// them.
template <class V>
struct DistSums {
  V student, teacher, student_square, teacher_square, product;
};
constexpr int64_t kDistSums = 5;

template <class V>
FS_HD inline V dist_typical(V a, V b, V c) {
  return maximum(minimum(a, b), minimum(maximum(a, b), c));
}

template <class V>
FS_HD inline void dist_add(DistSums<V>& sums, V x, V y) {
  sums.student = sums.student + x;
  sums.teacher = sums.teacher + y;
  sums.student_square = sums.student_square + x * x;
  sums.teacher_square = sums.teacher_square + y * y;
  sums.product = sums.product + x * y;
}

// The same over 1 / `inverse_count` rows: means, and sums of squares and products about them.
template <class V>
FS_HD inline DistSums<V> dist_centred(const DistSums<V>& sums, V student_shift, V teacher_shift,
                                      V inverse_count) {
  const V x = sums.student * inverse_count, y = sums.teacher * inverse_count;
  return {student_shift + x, teacher_shift + y, sums.student_square - x * sums.student,
          sums.teacher_square - y * sums.teacher, sums.product - x * sums.teacher};
}

// A column over all pieces of rows, in double: sums of what `dist_centred` gives, with means less
// those of the first piece.
struct DistColumn {
  double student, teacher, student_square, teacher_square, product;
};

FS_HD inline void dist_merge(DistColumn& column, double count, double x, double y,
                             double student_square, double teacher_square, double product) {
  column.student += count * x;
  column.teacher += count * y;
  column.student_square += student_square + count * x * x;
  column.teacher_square += teacher_square + count * y * y;
  column.product += product + count * x * y;
}

FS_HD inline Pearson pearson_of(const DistColumn& column, double rows) {
  const double x = column.student / rows, y = column.teacher / rows;
  return pearson(column.student_square - x * column.student,
                 column.teacher_square - y * column.teacher, column.product - x * column.teacher);
}

// What a row or a column adds to d loss / dq: student * (q - student_mean) + teacher * (p -
// teacher_mean). The means of a row are one number.
template <class V>
struct DistSlope {
  V student_mean, teacher_mean, student, teacher;
};
constexpr int64_t kDistSlope = 4;

template <class V>
FS_HD inline V dist_slope(const DistSlope<V>& along, V q, V p) {
  return along.student * (q - along.student_mean) + along.teacher * (p - along.teacher_mean);
}

// What is kept of a row between the passes: maxima of the logits, 1 / (sum of exponentials), and
// the factors of its slope.
template <class V>
struct DistRow {
  V student_max, teacher_max, student_inverse, teacher_inverse, student, teacher;
};
constexpr int64_t kDistRow = 6;

// The mean of a row of probabilities: they sum to 1, or are 0 where no logit is finite. Of a row of
// equal logits it is each of them exactly.
template <class V>
FS_HD inline V dist_row_mean(V inverse_sum, V classes) {
  return select(inverse_sum, V(1) / classes, V(0));
}
