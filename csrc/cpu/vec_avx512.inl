// Sixteen floats in one AVX-512 register. Included inside a namespace compiled for avx512f,
// avx512dq.

struct Vec {
  using Scalar = float;
  static constexpr int64_t lanes = 16;
  __m512 v;

  Vec() = default;
  Vec(__m512 value) : v(value) {}
  explicit Vec(float value) : v(_mm512_set1_ps(value)) {}

  static Vec load(const float* from) { return _mm512_loadu_ps(from); }
  // Loads and inserts: on Zen 4 in 0.6 of the time of the instruction for it.
  static Vec gather(const float* from, const int32_t* index) {
    const auto four = [&](int i) __attribute__((always_inline)) {
      __m128 x = _mm_load_ss(from + index[i]);
      x = _mm_insert_ps(x, _mm_load_ss(from + index[i + 1]), 0x10);
      x = _mm_insert_ps(x, _mm_load_ss(from + index[i + 2]), 0x20);
      return _mm_insert_ps(x, _mm_load_ss(from + index[i + 3]), 0x30);
    };
    const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(four(0)), four(4), 1);
    const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(four(8)), four(12), 1);
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
  }
  // The first n < lanes numbers, then `fill`.
  static Vec load_part(const float* from, int64_t n, float fill) {
    return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(n), from);
  }
  void store(float* to) const { _mm512_storeu_ps(to, v); }
  void store_part(float* to, int64_t n) const { _mm512_mask_storeu_ps(to, first(n), v); }
  void stream(float* to) const { _mm512_stream_ps(to, v); }  // `to` aligned to the register

  static __mmask16 first(int64_t n) { return __mmask16((1u << n) - 1u); }
};

inline Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
inline Vec multiply_subtract(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a.v, b.v, c.v); }
inline Vec subtract_multiply(Vec c, Vec a, Vec b) { return _mm512_fnmadd_ps(a.v, b.v, c.v); }
// The larger; `b` where either is NaN.
inline Vec maximum(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
inline Vec minimum(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
inline Vec select(Vec condition, Vec a, Vec b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(condition.v, _mm512_setzero_ps(), _CMP_NEQ_UQ),
                              b.v, a.v);
}
inline Vec zero_unless(Vec condition, Vec a) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(condition.v, _mm512_setzero_ps(), _CMP_NEQ_UQ),
                             a.v);
}
// c + a * b where a is not 0, else c.
inline Vec add_product_unless_zero(Vec a, Vec b, Vec c) {
  return _mm512_mask3_fmadd_ps(a.v, b.v, c.v,
                               _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NEQ_UQ));
}
inline Vec root(Vec a) { return _mm512_sqrt_ps(a.v); }
// `a` where x and y are equal, else 0.
inline Vec where_equal(Vec x, Vec y, Vec a) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_EQ_OQ), a.v);
}
// `a` where x is below y or either is NaN, else 0.
inline Vec where_below(Vec x, Vec y, Vec a) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_NGE_UQ), a.v);
}
// Bit i: lane i of x is above, or equal to, that of y; no NaN is.
inline uint32_t above(Vec x, Vec y) { return _mm512_cmp_ps_mask(x.v, y.v, _CMP_GT_OQ); }
inline uint32_t equal(Vec x, Vec y) { return _mm512_cmp_ps_mask(x.v, y.v, _CMP_EQ_OQ); }
// 2^((n - 1016) / 8) of the low eleven bits n of each number's pattern. The table holds mantissas
// less the three bits that the shift brings along.
inline Vec power_of_eighths(Vec x) {
  const __m512i mantissas = _mm512_broadcast_i64x4(
      _mm256_setr_epi32(0, -0x46a3e, -0x7c810, -0xa0129, -0xafb0c, -0xa98d6, -0x8bb03, -0x53f39));
  const __m512i bits = _mm512_castps_si512(x.v);
  return _mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_slli_epi32(bits, 20), _mm512_permutexvar_epi32(bits, mantissas)));
}
// x = mantissa * 2^exponent with the mantissa in [sqrt(1/2), sqrt(2)); x positive and normal.
inline Vec split(Vec x, Vec* exponent) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i above = _mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3));
  const __m512i power = _mm512_srai_epi32(above, 23);
  *exponent = _mm512_cvtepi32_ps(power);
  return _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(power, 23)));
}
inline float sum_of(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float maximum_of(Vec a) { return _mm512_reduce_max_ps(a.v); }
