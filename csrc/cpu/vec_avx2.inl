// Eight floats in one AVX2 register. Included inside a namespace compiled for avx2, fma, f16c.

struct Vec {
  using Scalar = float;
  static constexpr int64_t lanes = 8;
  __m256 v;

  Vec() = default;
  Vec(__m256 value) : v(value) {}
  explicit Vec(float value) : v(_mm256_set1_ps(value)) {}

  static Vec load(const float* from) { return _mm256_loadu_ps(from); }
  static Vec gather(const float* from, const int32_t* index) {
    return _mm256_i32gather_ps(from, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)),
                               4);
  }
  // The first n < lanes numbers, then `fill`.
  static Vec load_part(const float* from, int64_t n, float fill) {
    const __m256i mask = first(n);
    return _mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(from, mask),
                            _mm256_castsi256_ps(mask));
  }
  void store(float* to) const { _mm256_storeu_ps(to, v); }
  void store_part(float* to, int64_t n) const { _mm256_maskstore_ps(to, first(n), v); }
  void stream(float* to) const { _mm256_stream_ps(to, v); }  // `to` aligned to the register

  static __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

inline Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline Vec multiply_subtract(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a.v, b.v, c.v); }
inline Vec subtract_multiply(Vec c, Vec a, Vec b) { return _mm256_fnmadd_ps(a.v, b.v, c.v); }
// The larger; `b` where either is NaN.
inline Vec maximum(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
inline Vec minimum(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
inline Vec select(Vec condition, Vec a, Vec b) {
  const __m256 mask = _mm256_cmp_ps(condition.v, _mm256_setzero_ps(), _CMP_NEQ_UQ);
  return _mm256_blendv_ps(b.v, a.v, mask);
}
inline Vec zero_unless(Vec condition, Vec a) {
  return _mm256_and_ps(_mm256_cmp_ps(condition.v, _mm256_setzero_ps(), _CMP_NEQ_UQ), a.v);
}
// c + a * b where a is not 0, else c.
inline Vec add_product_unless_zero(Vec a, Vec b, Vec c) {
  return multiply_add(a, zero_unless(a, b), c);
}
inline Vec root(Vec a) { return _mm256_sqrt_ps(a.v); }
// `a` where x and y are equal, else 0.
inline Vec where_equal(Vec x, Vec y, Vec a) {
  return _mm256_and_ps(_mm256_cmp_ps(x.v, y.v, _CMP_EQ_OQ), a.v);
}
// `a` where x is below y or either is NaN, else 0.
inline Vec where_below(Vec x, Vec y, Vec a) {
  return _mm256_and_ps(_mm256_cmp_ps(x.v, y.v, _CMP_NGE_UQ), a.v);
}
// Bit i: lane i of x is above, or equal to, that of y; no NaN is.
inline uint32_t above(Vec x, Vec y) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.v, y.v, _CMP_GT_OQ)));
}
inline uint32_t equal(Vec x, Vec y) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.v, y.v, _CMP_EQ_OQ)));
}
// 2^((n - 1016) / 8) of the low eleven bits n of each number's pattern. The table holds mantissas
// less the three bits that the shift brings along.
inline Vec power_of_eighths(Vec x) {
  const __m256i mantissas =
      _mm256_setr_epi32(0, -0x46a3e, -0x7c810, -0xa0129, -0xafb0c, -0xa98d6, -0x8bb03, -0x53f39);
  const __m256i bits = _mm256_castps_si256(x.v);
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_slli_epi32(bits, 20), _mm256_permutevar8x32_epi32(mantissas, bits)));
}
// x = mantissa * 2^exponent with the mantissa in [sqrt(1/2), sqrt(2)); x positive and normal.
inline Vec split(Vec x, Vec* exponent) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i above = _mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3));
  const __m256i power = _mm256_srai_epi32(above, 23);
  *exponent = _mm256_cvtepi32_ps(power);
  return _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(power, 23)));
}
inline float sum_of(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline float maximum_of(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
