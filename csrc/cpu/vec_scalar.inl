// One number at a time, with the interface of the vectors: the body for machines without AVX2 and
// for float64.

template <class A>
struct Lane {
  using Scalar = A;
  static constexpr int64_t lanes = 1;
  A v;

  Lane() = default;
  explicit Lane(A value) : v(value) {}

  static Lane load(const A* from) { return Lane(*from); }
  static Lane gather(const A* from, const int32_t* index) { return Lane(from[*index]); }
  static Lane load_part(const A*, int64_t, A fill) { return Lane(fill); }
  void store(A* to) const { *to = v; }
  void store_part(A*, int64_t) const {}
  void stream(A* to) const { *to = v; }
};

template <class A>
Lane<A> operator+(Lane<A> a, Lane<A> b) {
  return Lane<A>(a.v + b.v);
}
template <class A>
Lane<A> operator-(Lane<A> a, Lane<A> b) {
  return Lane<A>(a.v - b.v);
}
template <class A>
Lane<A> operator*(Lane<A> a, Lane<A> b) {
  return Lane<A>(a.v * b.v);
}
template <class A>
Lane<A> multiply_add(Lane<A> a, Lane<A> b, Lane<A> c) {
  return Lane<A>(a.v * b.v + c.v);
}
template <class A>
Lane<A> multiply_subtract(Lane<A> a, Lane<A> b, Lane<A> c) {
  return Lane<A>(a.v * b.v - c.v);
}
template <class A>
Lane<A> subtract_multiply(Lane<A> c, Lane<A> a, Lane<A> b) {
  return Lane<A>(c.v - a.v * b.v);
}
template <class A>
Lane<A> maximum(Lane<A> a, Lane<A> b) {
  return Lane<A>(a.v > b.v ? a.v : b.v);
}
template <class A>
Lane<A> minimum(Lane<A> a, Lane<A> b) {
  return Lane<A>(a.v < b.v ? a.v : b.v);
}
template <class A>
Lane<A> where_equal(Lane<A> x, Lane<A> y, Lane<A> a) {
  return Lane<A>(x.v == y.v ? a.v : A(0));
}
template <class A>
Lane<A> where_below(Lane<A> x, Lane<A> y, Lane<A> a) {
  return Lane<A>(!(x.v >= y.v) ? a.v : A(0));
}
template <class A>
uint32_t above(Lane<A> x, Lane<A> y) {
  return x.v > y.v;
}
template <class A>
uint32_t equal(Lane<A> x, Lane<A> y) {
  return x.v == y.v;
}
template <class A>
Lane<A> zero_unless(Lane<A> condition, Lane<A> a) {
  return Lane<A>(condition.v != 0 ? a.v : A(0));
}
template <class A>
Lane<A> add_product_unless_zero(Lane<A> a, Lane<A> b, Lane<A> c) {
  return a.v != 0 ? multiply_add(a, b, c) : c;
}
template <class A>
Lane<A> operator/(Lane<A> a, Lane<A> b) {
  return Lane<A>(a.v / b.v);
}
template <class A>
Lane<A> select(Lane<A> condition, Lane<A> a, Lane<A> b) {
  return condition.v != 0 ? a : b;
}
template <class A>
Lane<A> logarithm(Lane<A> a) {
  return Lane<A>(logarithm(a.v));
}
template <class A>
A sum_of(Lane<A> a) {
  return a.v;
}
template <class A>
A maximum_of(Lane<A> a) {
  return a.v;
}

template <class A>
struct LaneExponential {
  A rate;
  explicit LaneExponential(double rate_) : rate(A(rate_)) {}
  Lane<A> operator()(Lane<A> x) const { return Lane<A>(exponential(x.v * rate)); }
};

inline void half_to_float(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = c10::detail::fp16_ieee_to_fp32_value(from[i]);
}
inline void float_to_half(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = c10::detail::fp16_ieee_from_fp32_value(from[i]);
}
