// exp(x * rate) for x <= 0 (or NaN), on the unit that makes powers of two. Included after kd_row.h,
// in the namespace of its user.
//
// ex2.approx is within 2 ulp of 2^y (PTX ISA, "ex2"; results below 2^-126 are 0). For logits of 16
// bits y is one product, whose rounding adds |x * rate| * 2^-23 to the relative error. Otherwise
// the product's remainder and that of the rate are added: about 3 ulp for any x. float64 has exp.
template <bool Short>
struct FloatExponential {
  float rate, remainder;

  __device__ explicit FloatExponential(double rate_) {
    const double two = rate_ * 1.4426950408889634;
    rate = float(two);
    remainder = float(two - double(rate));
  }
  __device__ float operator()(float x) const {
    const float y = x * rate;
    if constexpr (Short) return exp2_approximate(y);
    const float left = fmaf(x, remainder, fmaf(x, rate, -y));
    const float e = exp2_approximate(y);
    // Where y is -inf or e is 0, `left` may be NaN.
    return y < -149.0f ? 0.0f : fmaf(e, left * 0.69314718f, e);
  }
};

struct DoubleExponential {
  double rate;
  __device__ explicit DoubleExponential(double rate_) : rate(rate_) {}
  __device__ double operator()(double x) const { return exp(x * rate); }
};

template <class S>
struct ExponentialOf {
  using type = FloatExponential<sizeof(S) == 2>;
};
template <>
struct ExponentialOf<double> {
  using type = DoubleExponential;
};
