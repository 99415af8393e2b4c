// Exponential and logarithm of a Vec. Included after a vec_*.inl, in the same namespace.

// e^(x * rate) for one rate, given as log2(e) * rate in two floats: 2^k * 2^f with k = x * rate
// rounded to eighths, so f is in [-1/16, 1/16]. 2^k is a table of eight and an exponent; 2^f - 1 is
// f times the degree 2 polynomial of least relative error (2.8e-8; linear programming). Two
// products in f keep the result within 1.5 units in the last place for arguments down to -87.3,
// below which it fades out and is exactly 0 from -88.1. For x * rate <= 0.
struct Exponential {
  Vec high, low, smallest;

  explicit Exponential(double rate) {
    const double scale = 1.4426950408889634 * rate;
    high = Vec(float(scale));
    low = Vec(float(scale - double(float(scale))));
    smallest = Vec(float(-127.0 / scale));
  }
  // A rate a lane.
  explicit Exponential(Vec rate) {
    const Vec log2e(1.44269502f), rest(1.92596299e-8f);
    high = rate * log2e;
    low = multiply_add(rate, rest, multiply_subtract(rate, log2e, high));
    smallest = Vec(-127.0f) / high;
  }

  Vec operator()(Vec x) const {
    Vec same = x;
    both(x, same);
    return x;
  }
  // Of two vectors, step by step: neither waits for its own last step.
  void both(Vec& a, Vec& b) const {
    // 1.5 * 2^20 rounds to eighths; 127 more and the low bits of the sum are those of the exponent.
    const Vec magic(1572864.0f + 127.0f);
    a = maximum(smallest, a), b = maximum(smallest, b);
    const Vec shifted_a = multiply_add(a, high, magic), shifted_b = multiply_add(b, high, magic);
    const Vec k_a = shifted_a - magic, k_b = shifted_b - magic;
    const Vec rest_a = multiply_subtract(a, high, k_a), rest_b = multiply_subtract(b, high, k_b);
    const Vec f_a = multiply_add(a, low, rest_a), f_b = multiply_add(b, low, rest_b);
    const Vec third(5.55274314e-2f), second(2.40258798e-1f), first(6.93147182e-1f);
    Vec y_a = multiply_add(third, f_a, second), y_b = multiply_add(third, f_b, second);
    y_a = multiply_add(y_a, f_a, first), y_b = multiply_add(y_b, f_b, first);
    y_a = y_a * f_a, y_b = y_b * f_b;
    const Vec scale_a = power_of_eighths(shifted_a), scale_b = power_of_eighths(shifted_b);
    a = multiply_add(scale_a, y_a, scale_a), b = multiply_add(scale_b, y_b, scale_b);
  }
};

// Natural logarithm, positive normal x; infinity and NaN stay. Cephes logf (S. Moshier).
inline Vec logarithm(Vec x) {
  Vec exponent;
  const Vec f = split(x, &exponent) - Vec(1.0f);
  const Vec square = f * f;
  // By pairs (Estrin): half the steps that wait for one another.
  const Vec fourth = square * square;
  const Vec low =
      multiply_add(multiply_add(Vec(-1.6668057665e-1f), f, Vec(2.0000714765e-1f)), square,
                   multiply_add(Vec(-2.4999993993e-1f), f, Vec(3.3333331174e-1f)));
  Vec y = multiply_add(multiply_add(Vec(-1.1514610310e-1f), f, Vec(1.1676998740e-1f)), square,
                       multiply_add(Vec(-1.2420140846e-1f), f, Vec(1.4249322787e-1f)));
  y = multiply_add(multiply_add(Vec(7.0376836292e-2f), fourth, y), fourth, low);
  y = y * (f * square);
  y = multiply_add(exponent, Vec(-2.12194440e-4f), y);
  y = subtract_multiply(y, Vec(0.5f), square);
  const Vec result = multiply_add(exponent, Vec(0.693359375f), f + y);
  return select(x - x, x, result);  // x - x is NaN for infinity and NaN, 0 otherwise
}

// For the arithmetic that both back ends share; x <= 0.
inline Vec exponential(Vec x) { return Exponential(1.0)(x); }
