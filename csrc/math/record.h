// A row of the teacher's table, byte by byte; fastscarce/cache/record.py says what the bytes mean,
// and is what these functions are tested against, bit for bit.
//
// Numbers are little-endian. Bytes are written one at a time: rows have any length, so that nothing
// in them is aligned. Included inside the namespace of its user; FS_HD as for kd_row.h.

struct RecordLayout {
  int32_t k, stride, index_bytes;  // index_bytes: 0 in a dense row
  bool codes;                      // u8 codes and a scale for float16 values
  int32_t scale, tail, tag;        // first bytes; -1: not there
  FS_HD int32_t values() const { return index_bytes * k; }
};

constexpr int64_t kDenseClasses = 256;    // a row of all of so many is dense
constexpr int64_t kShortClasses = 65536;  // so many are told apart by two bytes
constexpr uint8_t kNoProbability = 255;   // the code of a probability of 0
constexpr float kCodeSteps = 254.0f;

inline RecordLayout record_layout(int64_t classes, int64_t k, bool codes, bool tagged) {
  RecordLayout layout{};
  const bool dense = k == classes && classes <= kDenseClasses;
  layout.k = int32_t(k);
  layout.codes = codes;
  layout.index_bytes = dense ? 0 : classes > kShortClasses ? 4 : 2;
  int32_t end = layout.values() + int32_t(k) * (codes ? 1 : 2);
  const auto part = [&](bool there, int32_t size) {
    const int32_t first = there ? end : -1;
    end += there ? size : 0;
    return first;
  };
  layout.scale = part(codes, 2);
  layout.tail = part(!dense, 2);
  layout.tag = part(tagged, 4);
  layout.stride = end;
  return layout;
}

FS_HD inline void put_short(uint8_t* to, uint32_t value) {
  to[0] = uint8_t(value);
  to[1] = uint8_t(value >> 8);
}

FS_HD inline void put_word(uint8_t* to, uint32_t value) {
  put_short(to, value);
  put_short(to + 2, value >> 16);
}

// float16 of a float32, rounded to nearest, ties to even; NaN without its payload.
FS_HD inline uint32_t half_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // from 65520 on
  if (magnitude < 0x38800000u) {                        // below 2^-14: whole parts of 2^-24
    float size;
    memcpy(&size, &magnitude, sizeof size);
    size += 0.5f;  // whose last bit is 2^-24
    memcpy(&bits, &size, sizeof bits);
    return sign | (bits - 0x3f000000u);
  }
  const uint32_t rounded = magnitude + 0x0fffu + ((magnitude >> 13) & 1u);
  return sign | ((rounded - 0x38000000u) >> 13);
}

// Of a finite float16 of 0 or more.
FS_HD inline float half_value(uint32_t half) {
  const uint32_t exponent = half >> 10, fraction = half & 0x3ffu;
  if (exponent == 0) return float(fraction) * 0x1p-24f;
  const uint32_t bits = ((exponent + 112u) << 23) | (fraction << 13);
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The scale of a row of codes, float16, from its lowest finite log-probability (0 where there is
// none, NaN for a row of NaN).
FS_HD inline uint32_t record_scale(float lowest) {
  const float scale = (0.0f - lowest) / kCodeSteps;  // not -0
  return half_bits(scale > 65504.0f ? 65504.0f : scale);
}

FS_HD inline uint8_t record_code(float log_prob, uint32_t scale) {
  if (log_prob == -INFINITY) return kNoProbability;
  if (scale == 0 || scale > 0x7c00u || log_prob != log_prob) return 0;
  const float code = rintf(-log_prob / half_value(scale));
  return uint8_t(code < 0.0f ? 0.0f : code > kCodeSteps ? kCodeSteps : code);
}

FS_HD inline uint32_t get_short(const uint8_t* from) {
  return uint32_t(from[0]) | uint32_t(from[1]) << 8;
}

FS_HD inline uint32_t get_word(const uint8_t* from) {
  return get_short(from) | get_short(from + 2) << 16;
}

// What a code stands for; 0 is not -0.
FS_HD inline float code_value(uint8_t code, float scale) {
  return code == kNoProbability ? -INFINITY : 0.0f - float(code) * scale;
}

// Places [begin, k) of a row, `step` apart: classes to index[place]; log-probabilities to
// values[first + place], float32 of codes, else the bits of a float16.
FS_HD inline void get_classes(const uint8_t* record, const RecordLayout& layout, int32_t begin,
                              int32_t step, int32_t* index, void* values, int64_t first) {
  const int32_t k = layout.k;
  if (layout.index_bytes == 0)
    for (int32_t i = begin; i < k; i += step) index[i] = i;
  else if (layout.index_bytes == 2)
    for (int32_t i = begin; i < k; i += step) index[i] = int32_t(get_short(record + 2 * i));
  else
    for (int32_t i = begin; i < k; i += step) index[i] = int32_t(get_word(record + 4 * i));
  const uint8_t* const from = record + layout.values();
  if (layout.codes) {
    float* const to = static_cast<float*>(values) + first;
    const uint32_t scale = get_short(record + layout.scale);
    const float unit = scale > 0x7c00u ? NAN : half_value(scale);
    for (int32_t i = begin; i < k; i += step) to[i] = code_value(from[i], unit);
  } else {
    uint16_t* const to = static_cast<uint16_t*>(values) + first;
    for (int32_t i = begin; i < k; i += step) to[i] = uint16_t(get_short(from + 2 * i));
  }
}

// Bits of a float16: -inf in a dense row, which leaves nothing over.
FS_HD inline uint16_t get_tail(const uint8_t* record, const RecordLayout& layout) {
  return layout.tail < 0 ? uint16_t(0xfc00u) : uint16_t(get_short(record + layout.tail));
}

// One class of a row. place: among the k by falling log-probability.
FS_HD inline void put_class(uint8_t* record, const RecordLayout& layout, int32_t place,
                            int32_t index, float log_prob, uint32_t scale) {
  int32_t column = place;
  if (layout.index_bytes == 0)
    column = index;
  else if (layout.index_bytes == 2)
    put_short(record + 2 * place, uint32_t(index));
  else
    put_word(record + 4 * place, uint32_t(index));
  uint8_t* const values = record + layout.values();
  if (layout.codes)
    values[column] = record_code(log_prob, scale);
  else
    put_short(values + 2 * column, half_bits(log_prob));
}

// What a row has once.
FS_HD inline void put_rest(uint8_t* record, const RecordLayout& layout, float log_tail,
                           uint32_t scale, uint32_t tag) {
  if (layout.scale >= 0) put_short(record + layout.scale, scale);
  if (layout.tail >= 0) put_short(record + layout.tail, half_bits(log_tail));
  if (layout.tag >= 0) put_word(record + layout.tag, tag);
}
