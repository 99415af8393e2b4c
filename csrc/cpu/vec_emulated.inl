// Sixteen floats in two AVX2 registers: the 16-lane body on a machine without AVX-512, for tests.
// Included inside a namespace compiled for avx2 that holds vec_avx2.inl in `half`.

struct Vec {
  using Scalar = float;
  using Half = half::Vec;
  static constexpr int64_t lanes = 16;
  Half low, high;

  Vec() = default;
  Vec(Half l, Half h) : low(l), high(h) {}
  explicit Vec(float value) : low(value), high(value) {}

  static Vec load(const float* from) { return {Half::load(from), Half::load(from + 8)}; }
  static Vec gather(const float* from, const int32_t* index) {
    return {Half::gather(from, index), Half::gather(from, index + 8)};
  }
  static Vec load_part(const float* from, int64_t n, float fill) {
    if (n < 8) return {Half::load_part(from, n, fill), Half(fill)};
    return {Half::load(from), Half::load_part(from + 8, n - 8, fill)};
  }
  void store(float* to) const {
    low.store(to);
    high.store(to + 8);
  }
  void store_part(float* to, int64_t n) const {
    if (n < 8) return low.store_part(to, n);
    low.store(to);
    high.store_part(to + 8, n - 8);
  }
  void stream(float* to) const {
    low.stream(to);
    high.stream(to + 8);
  }
};

inline Vec operator+(Vec a, Vec b) { return {a.low + b.low, a.high + b.high}; }
inline Vec operator-(Vec a, Vec b) { return {a.low - b.low, a.high - b.high}; }
inline Vec operator*(Vec a, Vec b) { return {a.low * b.low, a.high * b.high}; }
inline Vec operator/(Vec a, Vec b) { return {a.low / b.low, a.high / b.high}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return {multiply_add(a.low, b.low, c.low), multiply_add(a.high, b.high, c.high)};
}
inline Vec multiply_subtract(Vec a, Vec b, Vec c) {
  return {multiply_subtract(a.low, b.low, c.low), multiply_subtract(a.high, b.high, c.high)};
}
inline Vec subtract_multiply(Vec c, Vec a, Vec b) {
  return {subtract_multiply(c.low, a.low, b.low), subtract_multiply(c.high, a.high, b.high)};
}
inline Vec maximum(Vec a, Vec b) { return {maximum(a.low, b.low), maximum(a.high, b.high)}; }
inline Vec minimum(Vec a, Vec b) { return {minimum(a.low, b.low), minimum(a.high, b.high)}; }
inline Vec select(Vec condition, Vec a, Vec b) {
  return {select(condition.low, a.low, b.low), select(condition.high, a.high, b.high)};
}
inline Vec zero_unless(Vec condition, Vec a) {
  return {zero_unless(condition.low, a.low), zero_unless(condition.high, a.high)};
}
inline Vec add_product_unless_zero(Vec a, Vec b, Vec c) {
  return multiply_add(a, zero_unless(a, b), c);
}
inline Vec root(Vec a) { return {root(a.low), root(a.high)}; }
inline Vec where_equal(Vec x, Vec y, Vec a) {
  return {where_equal(x.low, y.low, a.low), where_equal(x.high, y.high, a.high)};
}
inline Vec where_below(Vec x, Vec y, Vec a) {
  return {where_below(x.low, y.low, a.low), where_below(x.high, y.high, a.high)};
}
inline uint32_t above(Vec x, Vec y) { return above(x.low, y.low) | above(x.high, y.high) << 8; }
inline uint32_t equal(Vec x, Vec y) { return equal(x.low, y.low) | equal(x.high, y.high) << 8; }
inline Vec power_of_eighths(Vec x) { return {power_of_eighths(x.low), power_of_eighths(x.high)}; }
inline Vec split(Vec x, Vec* exponent) {
  return {split(x.low, &exponent->low), split(x.high, &exponent->high)};
}
inline float sum_of(Vec a) { return sum_of(a.low + a.high); }
inline float maximum_of(Vec a) { return maximum_of(maximum(a.low, a.high)); }
