// The arithmetic of an augmentation: rows of a plan, operations on grey levels, sampling.
//
// Both back ends include this file inside the namespace of their user; they differ only in how they
// run over pixels. Definitions are those of torchvision's functional operations on uint8 tensors
// (transforms.v2.functional), rounding for rounding: `fused` stands where torch's vector kernels
// round once, `product` and `plus` where they round twice and a compiler might not.

constexpr int kSlots = 4;
constexpr int kLevels = 256;

// The order of fastscarce/augment/table.py's OPERATIONS.
enum Operation : uint8_t {
  kIdentity,
  kAutocontrast,
  kEqualize,
  kRotate,
  kSolarize,
  kColor,
  kPosterize,
  kContrast,
  kBrightness,
  kSharpness,
  kShearX,
  kShearY,
  kTranslateX,
  kTranslateY,
  kInvert,
  kHue,
  kOperations
};
enum Mix : uint8_t { kAlone, kCutMix, kMixUp, kMixes };
enum Sampling : uint8_t { kNearest, kBilinear, kSamplings };
enum Border : uint8_t { kFill, kReflect, kBorders };

// A row of a plan: what fastscarce/augment/table.py's PLAN says, byte for byte.
struct PlanRow {
  int64_t id;
  uint32_t view;
  int32_t partner;  // a row of the same plan
  float lam;        // weight of the row's own image
  int16_t box[4];   // top, left, bottom, right of the partner's pixels; the last two not included
  float matrix[6];  // output to source, pixels from the image's centre
  float argument[kSlots];
  float rest[kSlots];  // 1 - argument, subtracted in double
  uint8_t operation[kSlots];
  int16_t erase[4];  // like box
  uint8_t fill[4];
  uint8_t erase_fill[4];
  uint8_t mix, warp_at, sampling, border;
  float amount[kSlots];   // for people
  uint8_t drawn[kSlots];  // for people
};
static_assert(sizeof(PlanRow) == 128, "a row of a plan has 128 bytes");

// Matrices within this keep every coordinate far from overflow.
constexpr float kLargestNumber = 1e6f;

FS_HD inline bool is_bounded(float number) {
  return number >= -kLargestNumber && number <= kLargestNumber;  // NaN is not
}
FS_HD inline bool is_box(const int16_t* box, int64_t height, int64_t width) {
  return box[0] >= 0 && box[1] >= 0 && box[2] <= height && box[3] <= width;
}
// Whether a row can be carried out without leaving any memory.
FS_HD inline bool is_sound(const PlanRow& row, int64_t rows, int64_t height, int64_t width) {
  for (int i = 0; i < 6; ++i)
    if (!is_bounded(row.matrix[i])) return false;
  for (int slot = 0; slot < kSlots; ++slot) {
    if (row.operation[slot] >= kOperations || !is_bounded(row.argument[slot]) ||
        !is_bounded(row.rest[slot]))
      return false;
    if (row.operation[slot] == kPosterize && !(row.argument[slot] >= 0.0f)) return false;
  }
  return row.partner >= 0 && row.partner < rows && row.lam >= 0.0f && row.lam <= 1.0f &&
         is_box(row.box, height, width) && is_box(row.erase, height, width) && row.mix < kMixes &&
         row.sampling < kSamplings && row.border < kBorders && row.warp_at <= kSlots;
}
FS_HD inline bool is_identity(const float* m) {
  return m[0] == 1.0f && m[1] == 0.0f && m[2] == 0.0f && m[3] == 0.0f && m[4] == 1.0f &&
         m[5] == 0.0f;
}

FS_HD inline float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
FS_HD inline float plus(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
FS_HD inline float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}
FS_HD inline float fused(float a, float b, float c) {  // a * b + c
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
FS_HD inline float between(float x, float low, float high) {
  return x < low ? low : x > high ? high : x;
}
// To the nearest whole number, ties to even, for |x| below 2^22: by addition alone, so that every
// machine and every vector width does the same.
FS_HD inline float whole(float x) { return plus(plus(x, 12582912.0f), -12582912.0f); }

FS_HD inline uint8_t level(float x) { return uint8_t(int(between(x, 0.0f, 255.0f))); }

// ---- operations on levels

FS_HD inline float luma(float red, float green, float blue) {
  return __builtin_floorf(fused(blue, 0.114f, fused(green, 0.587f, product(red, 0.2989f))));
}
// `ratio` of a level and the rest of `other`.
FS_HD inline float blend(float value, float other, float ratio, float rest) {
  return fused(other, rest, product(value, ratio));
}
FS_HD inline bool is_table(uint8_t operation) {
  return operation == kAutocontrast || operation == kEqualize || operation == kSolarize ||
         operation == kPosterize || operation == kContrast || operation == kBrightness ||
         operation == kInvert;
}
// Those of one table for all channels that need nothing of the image.
FS_HD inline uint8_t plain_level(uint8_t operation, float argument, int value) {
  switch (operation) {
    case kBrightness:
      return level(product(float(value), argument));
    case kSolarize:
      return uint8_t(float(value) >= argument ? 255 - value : value);
    case kPosterize: {
      const int bits = int(argument);
      return bits >= 8 ? uint8_t(value) : uint8_t(value & (((1 << bits) - 1) << (8 - bits)));
    }
    case kInvert:
      return uint8_t(255 - value);
    default:
      return uint8_t(value);
  }
}
FS_HD inline uint8_t contrast_level(int value, float mean, float ratio, float rest) {
  return level(blend(float(value), mean, ratio, rest));
}
FS_HD inline uint8_t autocontrast_level(int value, int low, int high) {
  if (low == high) return uint8_t(value);
  const float scale = product(float(high - low), float(1.0 / 255.0));
  return level(quotient(float(value - low), scale));
}
// Pillow's integer arithmetic. count: pixels of a channel; of_highest: those of its highest level;
// below: those of a lower level than `value`.
FS_HD inline uint8_t equalize_level(int value, int64_t below, int64_t count, int64_t of_highest) {
  const int64_t step = (count - of_highest) / 255;
  if (step == 0) return uint8_t(value);
  const int64_t result = value == 0 ? 0 : (below + step / 2) / step;
  return uint8_t(result > 255 ? 255 : result);
}
// sum: of the nine levels and four times the middle one. The smoothed level is sum / 13, rounded:
// a tie can't be, as 13 is odd.
FS_HD inline uint8_t sharp_level(int middle, int sum, float rest) {
  const int smooth = int((uint32_t(2 * sum + 13) * 20165u) >> 19);  // exact for these sums
  return level(fused(float(smooth - middle), rest, float(middle)));
}
struct Pixel {
  float red, green, blue;
};
FS_HD inline Pixel saturated(Pixel p, float ratio, float rest) {
  const float grey = luma(p.red, p.green, p.blue);
  return {blend(p.red, grey, ratio, rest), blend(p.green, grey, ratio, rest),
          blend(p.blue, grey, ratio, rest)};
}
// Hue turned by `turn` of a whole turn, by way of HSV in 0 to 1.
FS_HD inline Pixel hue_turned(Pixel p, float turn) {
  const float unit = float(1.0 / 255.0);
  const float r = product(p.red, unit), g = product(p.green, unit), b = product(p.blue, unit);
  const float high = r > g ? (r > b ? r : b) : (g > b ? g : b);
  const float low = r < g ? (r < b ? r : b) : (g < b ? g : b);
  const bool grey = high == low;
  const float range = plus(high, -low), divisor = grey ? 1.0f : range;
  const float s = quotient(range, grey ? 1.0f : high);
  const float rc = quotient(plus(high, -r), divisor), gc = quotient(plus(high, -g), divisor);
  const float bc = quotient(plus(high, -b), divisor);
  float h = high == r   ? plus(bc, -gc)
            : high == g ? plus(plus(rc, 2.0f), -bc)
                        : plus(plus(gc, 4.0f), -rc);
  h = plus(product(h, float(1.0 / 6.0)), 1.0f);
  h = h >= 1.0f ? plus(h, -1.0f) : h;  // h is in 5/6 to 11/6
  h = plus(h, turn);
  h = plus(h, -__builtin_floorf(h));
  const float h6 = product(h, 6.0f), i = __builtin_floorf(h6), f = plus(h6, -i);
  const float sxf = product(s, f), rest = plus(1.0f, -s);
  const float v = high;
  const float q = between(product(plus(1.0f, -sxf), v), 0.0f, 1.0f);
  const float t = between(product(plus(sxf, rest), v), 0.0f, 1.0f);
  const float w = between(product(rest, v), 0.0f, 1.0f);
  const int turned = int(i), sector = turned == 6 ? 0 : turned;
  const bool s0 = sector == 0, s1 = sector == 1, s2 = sector == 2, s3 = sector == 3;
  const bool s4 = sector == 4, s5 = sector == 5;
  const float red = s0 | s5 ? v : s1 ? q : s4 ? t : w;
  const float green = s1 | s2 ? v : s0 ? t : s3 ? q : w;
  const float blue = s3 | s4 ? v : s2 ? t : s5 ? q : w;
  const float scale = 255.999f;
  return {product(red, scale), product(green, scale), product(blue, scale)};
}

// ---- several linear operations as one matrix, for the fast mode: nothing is cut off between them

FS_HD inline bool is_linear(uint8_t operation) {
  return operation == kBrightness || operation == kContrast || operation == kColor;
}
// Those that leave levels as they are: warps are in the row's matrix.
FS_HD inline bool is_neutral(uint8_t operation) {
  return operation == kIdentity || operation == kRotate ||
         (operation >= kShearX && operation <= kTranslateY);
}
struct ColourMatrix {
  float by[3][3];
  float shift[3];
};
FS_HD inline float weighed(const ColourMatrix& m, int channel, Pixel p) {
  return fused(m.by[channel][0], p.red,
               fused(m.by[channel][1], p.green, fused(m.by[channel][2], p.blue, m.shift[channel])));
}
FS_HD inline Pixel transformed(const ColourMatrix& m, Pixel p) {
  return {weighed(m, 0, p), weighed(m, 1, p), weighed(m, 2, p)};
}
// One more operation. channels: of the image, 1 or 3; mean: of its levels before the first one.
FS_HD inline void add_operation(ColourMatrix& m, uint8_t operation, float ratio, float rest,
                                int channels, Pixel mean) {
  const float share[3] = {0.2989f, 0.587f, 0.114f};
  const Pixel now = transformed(m, mean);
  if (operation == kColor && channels == 3) {
    ColourMatrix next;
    for (int c = 0; c < 3; ++c) {
      for (int k = 0; k < 4; ++k) {
        float grey = 0.0f;
        for (int j = 0; j < 3; ++j) grey = fused(share[j], k < 3 ? m.by[j][k] : m.shift[j], grey);
        const float own = k < 3 ? m.by[c][k] : m.shift[c];
        (k < 3 ? next.by[c][k] : next.shift[c]) = fused(rest, grey, product(ratio, own));
      }
    }
    m = next;
  } else if (operation != kColor) {
    const float grey =
        channels == 1
            ? now.red
            : fused(share[2], now.blue, fused(share[1], now.green, product(share[0], now.red)));
    for (int c = 0; c < 3; ++c) {
      for (int k = 0; k < 3; ++k) m.by[c][k] = product(m.by[c][k], ratio);
      m.shift[c] = product(m.shift[c], ratio);
      if (operation == kContrast) m.shift[c] = fused(rest, grey, m.shift[c]);
    }
  }
}

// ---- sampling

// One coordinate of the source, as torchvision's grid has it: in units of half a side, and back.
struct Axis {
  float by_x, by_y, by_one, side;
};
FS_HD inline Axis axis_of(const float* matrix, int side) {
  const float half = float(0.5 * side);
  return {quotient(matrix[0], half), quotient(matrix[1], half), quotient(matrix[2], half),
          float(side)};
}
// x, y: of the output pixel, from the centre. The result counts pixels from the first one's centre.
FS_HD inline float coordinate(const Axis& axis, float x, float y) {
  const float grid = plus(plus(product(x, axis.by_x), product(y, axis.by_y)), axis.by_one);
  return product(plus(product(plus(grid, 1.0f), axis.side), -1.0f), 0.5f);
}
// Mirrored at the centres of the outermost pixels until it lies between them.
FS_HD inline float reflected(float x, float side) {
  const float span = side - 1.0f, period = 2.0f * span;
  if (span <= 0.0f) return 0.0f;
  x = x < 0.0f ? -x : x;
  x = plus(x, -product(period, __builtin_floorf(product(x, quotient(1.0f, period)))));
  return between(x > span ? plus(period, -x) : x, 0.0f, span);
}
FS_HD inline float interpolated(float a, float b, float share) {
  return fused(share, plus(b, -a), a);
}

// ---- what is stored

// scale: 1 / (255 std); shift: -mean / std.
FS_HD inline float normalised(float value, float scale, float shift) {
  return fused(value, scale, shift);
}
FS_HD inline float mixed(float own, float other, float lam) {
  return fused(lam, plus(own, -other), other);
}
