// An image through a plan's matrix. Included after augment_pixels.inl.
//
// The coordinates of a line are computed first, by vectorised loops; then each pixel is fetched.
// Sources are read, and results written, by the four bytes: the caller sees to it that a byte
// follows either.

struct Warp {
  const uint8_t* source;
  uint8_t* to;
  int height, width;
  const PlanRow* row;
};

struct Lines {   // scratch of `stride` numbers each, at least the width
  float *x, *y;  // and as many again: together room for three planes
  int stride = 0;
  int32_t* at;
  float *across, *down;
  uint32_t* taps[4];
};

// Brings an image near before it is read in another order than it lies in.
inline void fetch_ahead(const uint8_t* image, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(image + at);
}

// Writes a byte more than a pixel of three, which the next pixel then overwrites.
template <int C>
void copy_pixel(uint8_t* to, const uint8_t* from) {
  std::memcpy(to, from, C == 3 ? 4 : 1);
}

// Local copies: a store to a line could change what a reference names, for all a compiler knows.
inline void coordinates(const Warp& warp, const Axis across, const Axis down, int line,
                        const Lines& lines) {
  const int width = warp.width;
  const float left = -0.5f * float(width - 1);
  const float y = float(line) - 0.5f * float(warp.height - 1);
  float* const __restrict xs = lines.x;
  float* const __restrict ys = lines.y;
  for (int i = 0; i < width; ++i) {
    const float x = left + float(i);
    xs[i] = coordinate(across, x, y);
    ys[i] = coordinate(down, x, y);
  }
  if (warp.row->border == kReflect) {
    for (int i = 0; i < width; ++i) {
      xs[i] = reflected(xs[i], across.side);
      ys[i] = reflected(ys[i], down.side);
    }
  }
}

template <int C>
void warp_nearest(const Warp& warp, const Axis& across, const Axis& down, const Lines& lines) {
  const float right = across.side - 1.0f, bottom = down.side - 1.0f;
  const int width = warp.width, height = warp.height;
  const uint8_t* const source = warp.source;
  const uint8_t* const fill = warp.row->fill;
  int32_t* const __restrict at = lines.at;
  const float* const __restrict xs = lines.x;
  const float* const __restrict ys = lines.y;
  for (int line = 0; line < height; ++line) {
    coordinates(warp, across, down, line, lines);
    for (int i = 0; i < width; ++i) {
      const float x = whole(xs[i]), y = whole(ys[i]);
      const bool inside = (x >= 0.0f) & (x <= right) & (y >= 0.0f) & (y <= bottom);
      const int place = int(between(y, 0.0f, bottom)) * width + int(between(x, 0.0f, right));
      at[i] = inside ? C * place : -1;
    }
    uint8_t* to = warp.to + int64_t(line) * width * C;
    for (int i = 0; i < width; ++i, to += C) copy_pixel<C>(to, at[i] < 0 ? fill : source + at[i]);
  }
}

// The image with a pixel of the fill around it, so that every tap that counts is there: lines of
// width + 2 pixels, and a few bytes after the last. Of a mirrored border no tap counts.
template <int C>
void pad_image(const Warp& warp, uint8_t* to) {
  const int width = warp.width, height = warp.height;
  const int64_t pitch = int64_t(width + 2) * C;
  const uint8_t* const fill = warp.row->fill;
  for (int x = 0; x < width + 2; ++x) copy_pixel<C>(to + C * x, fill);
  for (int line = 0; line < height; ++line) {
    uint8_t* const at = to + (line + 1) * pitch;
    std::memcpy(at, fill, C);
    std::memcpy(at + C, warp.source + int64_t(line) * width * C, size_t(width) * C);
    std::memcpy(at + C + int64_t(width) * C, fill, C);
  }
  uint8_t* const last = to + (height + 1) * pitch;
  for (int x = 0; x < width + 2; ++x) copy_pixel<C>(last + C * x, fill);
}
constexpr int64_t padded_bytes(int64_t height, int64_t width, int64_t channels) {
  return (height + 2) * (width + 2) * channels + 8;
}

// `between` of a number that is no NaN, as a compiler makes vectors of it.
inline float held(float x, float low, float high) {
  const float up = x < low ? low : x;
  return up > high ? high : up;
}

// A line of results: all taps are fetched, then all are weighed. Coordinates are held within a
// pixel of the image: beyond, all taps are the fill.
template <int C>
void warp_bilinear(const Warp& warp, const Axis& across, const Axis& down, const Lines& lines,
                   uint8_t* padded) {
  pad_image<C>(warp, padded);
  const int width = warp.width, height = warp.height;
  const int pitch = (width + 2) * C;
  const uint8_t* const origin = padded + pitch + C;
  const float wide = across.side, tall = down.side, right = wide - 1.0f, bottom = tall - 1.0f;
  const float* const __restrict xs = lines.x;
  const float* const __restrict ys = lines.y;
  float* const __restrict shares_x = lines.across;
  float* const __restrict shares_y = lines.down;
  int32_t* const __restrict at = lines.at;
  uint32_t* const __restrict t0 = lines.taps[0];
  uint32_t* const __restrict t1 = lines.taps[1];
  uint32_t* const __restrict t2 = lines.taps[2];
  uint32_t* const __restrict t3 = lines.taps[3];
  for (int line = 0; line < height; ++line) {
    coordinates(warp, across, down, line, lines);
    for (int i = 0; i < width; ++i) {
      const float x = held(xs[i], -1.0f, wide), y = held(ys[i], -1.0f, tall);
      const float left = held(__builtin_floorf(x), -1.0f, right);
      const float top = held(__builtin_floorf(y), -1.0f, bottom);
      shares_x[i] = plus(x, -left);
      shares_y[i] = plus(y, -top);
      at[i] = int(top) * pitch + int(left) * C;
    }
    for (int i = 0; i < width; ++i) {
      const uint8_t *const upper = origin + at[i], *const lower = upper + pitch;
      if constexpr (C == 3) {
        std::memcpy(t0 + i, upper, 4);
        std::memcpy(t1 + i, upper + C, 4);
        std::memcpy(t2 + i, lower, 4);
        std::memcpy(t3 + i, lower + C, 4);
      } else {
        t0[i] = upper[0], t1[i] = upper[C], t2[i] = lower[0], t3[i] = lower[C];
      }
    }
    // The coordinates are done with: their room takes a plane a channel.
    for (int c = 0; c < C; ++c) {
      float* const __restrict plane = lines.x + c * lines.stride;
      for (int i = 0; i < width; ++i) {
        const float a = float(int32_t((t0[i] >> (8 * c)) & 255u));
        const float b = float(int32_t((t1[i] >> (8 * c)) & 255u));
        const float d = float(int32_t((t2[i] >> (8 * c)) & 255u));
        const float e = float(int32_t((t3[i] >> (8 * c)) & 255u));
        const float share = shares_x[i];
        const float upper = interpolated(a, b, share), lower = interpolated(d, e, share);
        plane[i] = whole(interpolated(upper, lower, shares_y[i]));
      }
    }
    from_planes<C>(lines.x, lines.stride, width, warp.to + int64_t(line) * width * C);
  }
}

// Whole pixels moved, mirrored or not: no arithmetic on levels, and lines are copied.
template <int C>
bool moved_whole(const Warp& warp) {
  const float* const m = warp.row->matrix;
  const bool straight = m[1] == 0.0f && m[3] == 0.0f && m[4] == 1.0f;
  if (!straight || (m[0] != 1.0f && m[0] != -1.0f)) return false;
  if (m[2] != __builtin_floorf(m[2]) || m[5] != __builtin_floorf(m[5])) return false;
  if (warp.row->border == kReflect && (m[2] != 0.0f || m[5] != 0.0f)) return false;
  const int width = warp.width, height = warp.height;
  const int shift_x = int(between(m[2], -float(width), float(width)));
  const int shift_y = int(between(m[5], -float(height), float(height)));
  // Output columns [from, till) have a source.
  const bool mirrored = m[0] < 0.0f;
  const int from = mirrored ? std::max(0, shift_x) : std::max(0, -shift_x);
  const int till = mirrored ? std::min(width, width + shift_x) : std::min(width, width - shift_x);
  for (int line = 0; line < height; ++line) {
    uint8_t* const to = warp.to + int64_t(line) * width * C;
    const int source_line = line + shift_y;
    const bool empty = source_line < 0 || source_line >= height || from >= till;
    for (int x = 0; x < (empty ? width : from); ++x) copy_pixel<C>(to + C * x, warp.row->fill);
    if (empty) continue;
    const uint8_t* const source = warp.source + int64_t(source_line) * width * C;
    if (mirrored) {
      const uint8_t* at = source + C * (width - 1 - from + shift_x);
      for (int x = from; x < till; ++x, at -= C) copy_pixel<C>(to + C * x, at);
    } else {
      std::memcpy(to + C * from, source + C * (from + shift_x), size_t(C) * size_t(till - from));
    }
    for (int x = till; x < width; ++x) copy_pixel<C>(to + C * x, warp.row->fill);
  }
  return true;
}

template <int C>
void warp_image(const Warp& warp, const Lines& lines, uint8_t* padded) {
  fetch_ahead(warp.source, int64_t(warp.height) * warp.width * C);
  if (moved_whole<C>(warp)) return;
  const Axis across = axis_of(warp.row->matrix, warp.width);
  const Axis down = axis_of(warp.row->matrix + 3, warp.height);
  if (warp.row->sampling == kNearest)
    warp_nearest<C>(warp, across, down, lines);
  else
    warp_bilinear<C>(warp, across, down, lines, padded);
}
