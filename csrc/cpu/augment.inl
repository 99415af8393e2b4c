// Rows of a plan on a CPU. Included after augment_pixels.inl and augment_warp.inl.
//
// A row is rendered as levels in scratch memory that stays in the second cache: tables, warp,
// sharpening and what crosses channels each pass over it there; then one pass mixes it with its
// partner's rendering, normalises, casts and stores, which is what costs. The last rendered rows
// are kept, so neighbours that are mixed with each other are rendered once. A row without
// operations is read where it lies.

template <int C>
class Renderer {
 public:
  explicit Renderer(const AugmentCall& call)
      : call_(call),
        bytes_(int64_t(call.height) * call.width * C),
        room_((bytes_ + kPad + 63) / 64 * 64) {
    // Kept from call to call: fresh pages cost more than what is done on them.
    static thread_local std::vector<uint8_t> memory;
    static thread_local std::vector<float> numbers;
    static thread_local std::vector<uint32_t> words;
    const size_t needed =
        size_t(room_ * (kBuffers + 1) + padded_bytes(call.height, call.width, int64_t(C)));
    if (memory.size() < needed) memory.resize(needed);
    const size_t width = size_t(call.width + kBlock - 1) / kBlock * kBlock;
    if (numbers.size() < width * 6) numbers.resize(width * 6);
    if (words.size() < width * 5) words.resize(width * 5);
    for (int i = 0; i < kBuffers; ++i) buffers_[i] = memory.data() + i * room_;
    pasted_ = memory.data() + room_ * kBuffers;
    padded_ = pasted_ + room_;
    numbers_ = numbers.data();
    lines_.x = numbers_, lines_.y = numbers_ + width;
    lines_.across = numbers_ + 3 * width, lines_.down = numbers_ + 4 * width;
    lines_.stride = int(width);
    for (size_t k = 0; k < 4; ++k) lines_.taps[k] = words.data() + k * width;
    lines_.at = reinterpret_cast<int32_t*>(words.data() + 4 * width);
  }

  void rows(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const PlanRow& plan = row_of(row);
      const uint8_t* const own = render(row);
      const bool mixes = plan.mix != kAlone && plan.partner != row;
      store(row, plan, own, mixes ? render(plan.partner) : nullptr);
    }
  }

 private:
  static constexpr int kBuffers = 4;  // two for each of the two rows that are kept
  static constexpr int kPad = 8;      // pixels are read and written by the four bytes

  const PlanRow& row_of(int64_t row) const { return static_cast<const PlanRow*>(call_.plan)[row]; }

  // The row's levels, interleaved: its own image, or scratch that holds till the next but one call.
  const uint8_t* render(int64_t row) {
    for (int kept = 0; kept < 2; ++kept) {
      if (kept_row_[kept] == row) {
        last_ = kept;
        return kept_[kept];
      }
    }
    last_ ^= 1;
    spare_ = buffers_[2 * last_];
    other_ = buffers_[2 * last_ + 1];
    kept_row_[last_] = row;
    const PlanRow& plan = row_of(row);
    const int64_t source = call_.index ? call_.index[row] : row;
    const bool is_last = source + 1 == call_.sources;
    current_ = call_.images + source * bytes_;
    pending_ = false;
    const bool warps = !is_identity(plan.matrix);
    for (int slot = 0; slot <= kSlots; ++slot) {
      if (warps && slot == plan.warp_at) {
        flush();
        if (is_last && current_ == call_.images + source * bytes_) copy();
        warp_image<C>({current_, spare_, call_.height, call_.width, &plan}, lines_, padded_);
        turn();
      }
      if (slot < kSlots && !(call_.fast && fold(plan, slot, warps))) operate(plan, slot);
    }
    flush();
    erase(plan);
    return kept_[last_] = current_;
  }

  // What was written to `spare_` is the image now.
  void turn() {
    current_ = spare_;
    std::swap(spare_, other_);
  }
  void copy() {
    std::memcpy(spare_, current_, size_t(bytes_));
    turn();
  }
  void flush() {
    if (!pending_) return;
    look_up<C>(table_, current_, spare_, bytes_);
    pending_ = false;
    turn();
  }

  void operate(const PlanRow& plan, int slot) {
    const uint8_t operation = plan.operation[slot];
    const float argument = plan.argument[slot], rest = plan.rest[slot];
    if (is_table(operation)) {
      const bool looks =
          operation == kAutocontrast || operation == kEqualize || operation == kContrast;
      if (looks) flush();
      Table next;
      next.same = C == 1 || (operation != kAutocontrast && operation != kEqualize);
      if (operation == kContrast) {
        const float mean = mean_luma();
        for (int v = 0; v < kLevels; ++v) next.of[0][v] = contrast_level(v, mean, argument, rest);
      } else if (operation == kAutocontrast) {
        autocontrast(next);
      } else if (operation == kEqualize) {
        equalize(next);
      } else {
        for (int v = 0; v < kLevels; ++v) next.of[0][v] = plain_level(operation, argument, v);
      }
      append(next);
    } else if (operation == kSharpness) {
      if (call_.height < 3 || call_.width < 3) return;
      flush();
      sharpen(rest);
    } else if (C == 3 && (operation == kColor || operation == kHue)) {
      flush();
      cross(operation, argument, rest);
    }
  }

  // Linear operations from this slot on as one matrix, where there are two or more before the warp
  // or the end; moves `slot` to the last of them.
  bool fold(const PlanRow& plan, int& slot, bool warps) {
    int last = slot, found = 0;
    for (int at = slot; at < kSlots && !(warps && at == plan.warp_at && at > slot); ++at) {
      if (is_linear(plan.operation[at]))
        last = at, ++found;
      else if (!is_neutral(plan.operation[at]))
        break;
    }
    if (found < 2) return false;
    flush();
    ColourMatrix matrix = {{{1, 0, 0}, {0, 1, 0}, {0, 0, 1}}, {0, 0, 0}};
    const Pixel mean = mean_levels();
    for (; slot < last; ++slot)
      if (is_linear(plan.operation[slot]))
        add_operation(matrix, plan.operation[slot], plan.argument[slot], plan.rest[slot], C, mean);
    add_operation(matrix, plan.operation[slot], plan.argument[slot], plan.rest[slot], C, mean);
    const int width = call_.width;
    float* const __restrict red = numbers_;
    float* const __restrict green = C == 3 ? red + width : red;
    float* const __restrict blue = C == 3 ? green + width : red;
    for (int line = 0; line < call_.height; ++line) {
      const int64_t at = int64_t(line) * width * C;
      to_planes<C>(current_ + at, width, red, width);
      for (int x = 0; x < width; ++x) {
        const Pixel p =
            transformed(matrix, {red[x], C == 3 ? green[x] : 0.0f, C == 3 ? blue[x] : 0.0f});
        red[x] = p.red + 0.5f;  // cut off to the nearest
        if (C == 3) green[x] = p.green + 0.5f, blue[x] = p.blue + 0.5f;
      }
      from_planes<C>(red, width, width, spare_ + at);
    }
    turn();
    return true;
  }

  Pixel mean_levels() const {
    int64_t sums[3] = {};
    for (int64_t at = 0; at < bytes_; at += C)
      for (int c = 0; c < C; ++c) sums[c] += current_[at + c];
    const double count = double(bytes_ / C);
    return {float(double(sums[0]) / count), float(double(sums[1]) / count),
            float(double(sums[2]) / count)};
  }

  void append(const Table& next) {
    if (!pending_) {
      table_ = next;
      pending_ = true;
      return;
    }
    const bool same = table_.same && next.same;
    for (int c = 0; c < (same ? 1 : C); ++c) {
      const uint8_t* const first = table_.of[table_.same ? 0 : c];
      const uint8_t* const second = next.of[next.same ? 0 : c];
      uint8_t both[kLevels];
      for (int v = 0; v < kLevels; ++v) both[v] = second[first[v]];
      std::memcpy(table_.of[c], both, kLevels);
    }
    table_.same = same;
  }

  // Mean of whole levels, exact before its one rounding.
  float mean_luma() {
    int64_t sum = 0;
    for (int line = 0; line < call_.height; ++line) {
      const uint8_t* const from = current_ + int64_t(line) * call_.width * C;
      if constexpr (C == 1) {
        for (int x = 0; x < call_.width; ++x) sum += from[x];
      } else {
        float* const planes = numbers_;
        to_planes<C>(from, call_.width, planes, call_.width);
        int32_t part = 0;
        for (int x = 0; x < call_.width; ++x)
          part += int32_t(luma(planes[x], planes[call_.width + x], planes[2 * call_.width + x]));
        sum += part;
      }
    }
    return float(double(sum) / double(int64_t(call_.height) * call_.width));
  }

  void autocontrast(Table& next) {
    // A register of 48 bytes holds each channel in the same places each time.
    constexpr int kPeriod = 48;
    uint8_t low[kPeriod], high[kPeriod];
    std::memset(low, 255, kPeriod);
    std::memset(high, 0, kPeriod);
    int64_t at = 0;
    for (; at + kPeriod <= bytes_; at += kPeriod)
      for (int i = 0; i < kPeriod; ++i) {
        const uint8_t value = current_[at + i];
        low[i] = value < low[i] ? value : low[i];
        high[i] = value > high[i] ? value : high[i];
      }
    for (int i = 0; at < bytes_; ++at, ++i) {
      low[i] = std::min(low[i], current_[at]);
      high[i] = std::max(high[i], current_[at]);
    }
    for (int c = 0; c < C; ++c) {
      for (int i = c; i < kPeriod; i += C) {
        low[c] = std::min(low[c], low[i]);
        high[c] = std::max(high[c], high[i]);
      }
      for (int v = 0; v < kLevels; ++v)
        next.of[c][v] = v < low[c] ? uint8_t(0) : autocontrast_level(v, low[c], high[c]);
    }
  }

  void equalize(Table& next) {
    // Two counts a channel: neighbours of one level would wait for each other.
    uint32_t counts[2 * C][kLevels] = {};
    int64_t at = 0;
    for (; at + 2 * C <= bytes_; at += 2 * C)
      for (int i = 0; i < 2 * C; ++i) ++counts[i][current_[at + i]];
    for (int c = 0; at < bytes_; ++at, ++c) ++counts[c][current_[at]];
    const int64_t count = bytes_ / C;
    for (int c = 0; c < C; ++c) {
      int highest = 0;
      for (int v = 0; v < kLevels; ++v) {
        counts[c][v] += counts[C + c][v];
        if (counts[c][v] != 0) highest = v;
      }
      int64_t below = 0;
      for (int v = 0; v < kLevels; ++v) {
        next.of[c][v] = equalize_level(v, below, count, counts[c][highest]);
        below += counts[c][v];
      }
    }
  }

  void sharpen(float rest) {
    const int pitch = call_.width * C;
    std::memcpy(spare_, current_, size_t(pitch));
    for (int line = 1; line + 1 < call_.height; ++line) {
      const uint8_t* const __restrict middle = current_ + int64_t(line) * pitch;
      uint8_t* const __restrict to = spare_ + int64_t(line) * pitch;
      std::memcpy(to, middle, C);
      for (int i = C; i < pitch - C; ++i) {
        int sum = 4 * int(middle[i]);
        for (int across = -C; across <= C; across += C)
          sum += int(middle[i + across - pitch]) + int(middle[i + across]) +
                 int(middle[i + across + pitch]);
        to[i] = sharp_level(middle[i], sum, rest);
      }
      std::memcpy(to + pitch - C, middle + pitch - C, C);
    }
    const int64_t last = int64_t(call_.height - 1) * pitch;
    std::memcpy(spare_ + last, current_ + last, size_t(pitch));
    turn();
  }

  // Operations that need all channels of a pixel.
  void cross(uint8_t operation, float argument, float rest) {
    const int width = call_.width;
    float* const __restrict red = numbers_;
    float* const __restrict green = red + width;
    float* const __restrict blue = green + width;
    for (int line = 0; line < call_.height; ++line) {
      const int64_t at = int64_t(line) * width * C;
      to_planes<C>(current_ + at, width, red, width);
      if (operation == kColor) {
        for (int x = 0; x < width; ++x) {
          const Pixel p = saturated({red[x], green[x], blue[x]}, argument, rest);
          red[x] = p.red, green[x] = p.green, blue[x] = p.blue;
        }
      } else {
        for (int x = 0; x < width; ++x) {
          const Pixel p = hue_turned({red[x], green[x], blue[x]}, argument);
          red[x] = p.red, green[x] = p.green, blue[x] = p.blue;
        }
      }
      from_planes<C>(red, width, width, spare_ + at);
    }
    turn();
  }

  void erase(const PlanRow& plan) {
    const int16_t* const box = plan.erase;
    if (box[2] <= box[0] || box[3] <= box[1]) return;
    if (current_ != buffers_[2 * last_] && current_ != buffers_[2 * last_ + 1]) copy();
    uint8_t* const image = other_;  // where `current_` lies, after any turn
    for (int y = box[0]; y < box[2]; ++y)
      for (int x = box[1]; x < box[3]; ++x)
        std::memcpy(image + (int64_t(y) * call_.width + x) * C, plan.erase_fill, C);
  }

  void store(int64_t row, const PlanRow& plan, const uint8_t* own, const uint8_t* partner) {
    const int width = call_.width;
    const int64_t pitch = int64_t(width) * C;
    const int16_t* const box = plan.box;
    const bool blends = partner && plan.mix == kMixUp;
    if (call_.dtype != Pixels::uint8 && !blends) {
      const bool cuts = partner && box[2] > box[0] && box[3] > box[1];
      const int top = cuts ? box[0] : call_.height, bottom = cuts ? box[2] : call_.height;
      store_lines(row, 0, top, own);
      if (!cuts) return;
      std::memcpy(pasted_, own + top * pitch, size_t((bottom - top) * pitch));
      for (int y = top; y < bottom; ++y)
        std::memcpy(pasted_ + (y - top) * pitch + box[1] * C, partner + y * pitch + box[1] * C,
                    size_t(box[3] - box[1]) * C);
      store_lines(row, top, bottom, pasted_);
      store_lines(row, bottom, call_.height, own + bottom * pitch);
      return;
    }
    for (int y = 0; y < call_.height; ++y) {
      const uint8_t* line = own + y * pitch;
      const uint8_t* const others = partner ? partner + y * pitch : nullptr;
      if (others && !blends && y >= box[0] && y < box[2] && box[3] > box[1]) {
        uint8_t* const both = mixed_line();
        std::memcpy(both, line, size_t(pitch));
        std::memcpy(both + box[1] * C, others + box[1] * C, size_t(box[3] - box[1]) * C);
        line = both;
      }
      store_line(row, y, line, blends ? others : nullptr, plan.lam);
    }
  }

  void store_lines(int64_t row, int first, int end, const uint8_t* from) {
    if (call_.dtype == Pixels::float32) return store_lines<Pixels::float32>(row, first, end, from);
    if (call_.dtype == Pixels::bfloat16)
      return store_lines<Pixels::bfloat16>(row, first, end, from);
    store_lines<Pixels::float16>(row, first, end, from);
  }

  template <Pixels D>
  void store_lines(int64_t row, int first, int end, const uint8_t* from) {
    const int64_t width = call_.width, area = call_.height * width;
    const int64_t pixels = (end - first) * width;
    const int64_t at = row * bytes_ + first * width * (call_.channels_last ? C : 1);
    const auto to = reinterpret_cast<uintptr_t>(call_.out) + uintptr_t(at) * sizeof(float);
    const bool stream = call_.stream && to % 32 == 0 && (call_.channels_last || area % 8 == 0);
    if (call_.channels_last)
      store_interleaved<C, D>(from, pixels, call_.scale, call_.shift, call_.out, at, stream);
    else
      store_planes<C, D>(from, pixels, call_.scale, call_.shift, call_.out, at, area, stream);
  }

  void store_line(int64_t row, int y, const uint8_t* line, const uint8_t* others, float lam) {
    const int width = call_.width;
    const int64_t area = int64_t(call_.height) * width;
    const bool levels = call_.dtype == Pixels::uint8;
    uint8_t* const bytes = static_cast<uint8_t*>(call_.out);
    const int64_t packed = row * bytes_ + int64_t(y) * width * C;
    if (levels && !others && call_.channels_last) {
      std::memcpy(bytes + packed, line, size_t(width) * C);
      return;
    }
    if (call_.channels_last) {
      // Interleaved as they are: one plane of width x channels numbers.
      float* const __restrict all = numbers_;
      to_planes<1>(line, width * C, all, 0);
      if (others)
        for (int i = 0; i < width * C; ++i) all[i] = mixed(all[i], float(others[i]), lam);
      if (levels) return store_levels(all, bytes + packed, width * C);
      normalise_interleaved(all);
      store_floats(all, call_.out, packed, width * C, call_.dtype, call_.stream);
      return;
    }
    float* const planes = numbers_;
    to_planes<C>(line, width, planes, width);
    float* const second = planes + C * width;
    if (others) to_planes<C>(others, width, second, width);
    for (int c = 0; c < C; ++c) {
      float* const __restrict plane = planes + c * width;
      if (others)
        for (int x = 0; x < width; ++x) plane[x] = mixed(plane[x], second[c * width + x], lam);
      const int64_t at = row * bytes_ + c * area + int64_t(y) * width;
      if (levels) {
        store_levels(plane, bytes + at, width);
        continue;
      }
      const float scale = call_.scale[c], shift = call_.shift[c];
      for (int x = 0; x < width; ++x) plane[x] = normalised(plane[x], scale, shift);
      store_floats(plane, call_.out, at, width, call_.dtype, call_.stream);
    }
  }

  void normalise_interleaved(float* __restrict all) const {
    constexpr int kPeriod = 48;
    float scale[kPeriod], shift[kPeriod];
    for (int i = 0; i < kPeriod; ++i) scale[i] = call_.scale[i % C], shift[i] = call_.shift[i % C];
    const int n = call_.width * C;
    int at = 0;
    for (; at + kPeriod <= n; at += kPeriod)
      for (int i = 0; i < kPeriod; ++i) all[at + i] = normalised(all[at + i], scale[i], shift[i]);
    for (int i = 0; at + i < n; ++i) all[at + i] = normalised(all[at + i], scale[i], shift[i]);
  }

  uint8_t* mixed_line() { return reinterpret_cast<uint8_t*>(numbers_ + call_.width * C); }

  const AugmentCall& call_;
  const int64_t bytes_, room_;
  float* numbers_;  // two lines of planes
  uint8_t* buffers_[kBuffers];
  uint8_t* pasted_;  // lines with a box of the partner's
  uint8_t* padded_;  // of a warp's source
  Lines lines_;
  // The rows whose renderings still stand.
  int64_t kept_row_[2] = {-1, -1};
  const uint8_t* kept_[2] = {};
  int last_ = 0;
  // Of the row that is rendered now.
  const uint8_t* current_ = nullptr;
  uint8_t *spare_ = nullptr, *other_ = nullptr;
  bool pending_ = false;
  Table table_;
};

template <int C>
void augment_rows(const AugmentCall& call, int64_t begin, int64_t end) {
  Renderer<C>(call).rows(begin, end);
#if FS_VECTORS
  if (call.stream) _mm_sfence();
#endif
}

AugmentKernel augment_kernel(int channels) {
  return channels == 1 ? &augment_rows<1> : &augment_rows<3>;
}
