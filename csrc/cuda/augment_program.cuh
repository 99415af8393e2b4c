// A row of a plan as the kernel that stores carries it out at a pixel: which image it reads, tables
// of levels, matrices. Included inside the namespace of its user, after math/augment.h.
//
// A block a row prepares the program. Most rows need nothing of the image, and cost a few stores.
// Those with a contrast, an autocontrast or an equalize are looked at once for each: integer sums
// in shared memory, whose order does not matter. Sharpening alone reads neighbours, so what comes
// up to it is written out to scratch memory, which stays in L2, and the program goes on from there.

enum class Kind : uint8_t { nothing, table, colour, hue, matrix };

struct alignas(16) Header {
  const uint8_t* image;  // null: black
  Kind kind[kSlots];
  uint8_t first;  // the slots before it are in the image
  bool warps;     // the warp is not
  ColourMatrix matrix[kSlots];
};
struct Program {
  Header header;
  uint8_t table[kSlots][3][kLevels];
};

struct Size {
  int height, width;
  __device__ int64_t area() const { return int64_t(height) * width; }
};

template <int C>
__device__ inline Pixel pixel_of(const uint8_t* levels) {
  return {float(levels[0]), C == 3 ? float(levels[1]) : 0.0f, C == 3 ? float(levels[2]) : 0.0f};
}
template <int C>
__device__ inline void put_pixel(uint8_t* levels, Pixel p) {
  levels[0] = level(p.red);
  if (C == 3) levels[1] = level(p.green), levels[2] = level(p.blue);
}

// What slots `from` to `till` make of a pixel.
template <int C>
__device__ inline void operate(const Program& program, const PlanRow& plan, int from, int till,
                               uint8_t* levels) {
  for (int slot = from; slot < till; ++slot) {
    const Kind kind = program.header.kind[slot];
    if (kind == Kind::nothing) continue;
    if (kind == Kind::table) {
      for (int c = 0; c < C; ++c) levels[c] = program.table[slot][c][levels[c]];
      continue;
    }
    const Pixel p = pixel_of<C>(levels);
    if (kind == Kind::matrix) {
      const Pixel q = transformed(program.header.matrix[slot], p);
      put_pixel<C>(levels, {plus(q.red, 0.5f), plus(q.green, 0.5f), plus(q.blue, 0.5f)});
    } else if (kind == Kind::colour) {
      put_pixel<C>(levels, saturated(p, plan.argument[slot], plan.rest[slot]));
    } else {
      put_pixel<C>(levels, hue_turned(p, plan.argument[slot]));
    }
  }
}

// The levels at a pixel after slots 0 to `till`, and after the warp where it comes before `till`.
template <int C>
__device__ inline void evaluate(const Program& program, const PlanRow& plan, Size size, int till,
                                int x, int y, uint8_t* levels) {
  const uint8_t* const image = program.header.image;
  const int first = program.header.first;
  const auto fetch = [&](int64_t place, uint8_t* to, int slots) {
    for (int c = 0; c < C; ++c) to[c] = image[C * place + c];
    operate<C>(program, plan, first, slots, to);
  };
  if (!program.header.warps || plan.warp_at > till) {
    fetch(int64_t(y) * size.width + x, levels, till);
    return;
  }
  const int before = plan.warp_at;
  const Axis across = axis_of(plan.matrix, size.width);
  const Axis down = axis_of(plan.matrix + 3, size.height);
  const float right = across.side - 1.0f, bottom = down.side - 1.0f;
  const float x_out = float(x) - 0.5f * right, y_out = float(y) - 0.5f * bottom;
  float column = coordinate(across, x_out, y_out), line = coordinate(down, x_out, y_out);
  if (plan.border == kReflect) {
    column = reflected(column, across.side);
    line = reflected(line, down.side);
  }
  const auto tap = [&](float at_column, float at_line, uint8_t* to) {
    if (at_column >= 0.0f && at_column <= right && at_line >= 0.0f && at_line <= bottom)
      fetch(int64_t(at_line) * size.width + int64_t(at_column), to, before);
    else
      for (int c = 0; c < C; ++c) to[c] = plan.fill[c];
  };
  if (plan.sampling == kNearest) {
    tap(whole(column), whole(line), levels);
  } else {
    // Beyond a pixel outside all taps are the fill; of a mirrored border no tap outside counts.
    column = between(column, -1.0f, across.side);
    line = between(line, -1.0f, down.side);
    const float left = __builtin_floorf(column), top = __builtin_floorf(line);
    const float share_x = plus(column, -left), share_y = plus(line, -top);
    uint8_t a[3], b[3], d[3], e[3];
    tap(left, top, a);
    tap(left + 1.0f, top, b);
    tap(left, top + 1.0f, d);
    tap(left + 1.0f, top + 1.0f, e);
    for (int c = 0; c < C; ++c) {
      const float upper = interpolated(float(a[c]), float(b[c]), share_x);
      const float lower = interpolated(float(d[c]), float(e[c]), share_x);
      levels[c] = level(whole(interpolated(upper, lower, share_y)));
    }
  }
  operate<C>(program, plan, before, till, levels);
}

// What the threads of a block share of the row that they prepare.
struct Prepared {
  PlanRow plan;
  Program program;
  uint8_t next[3][kLevels];
  unsigned counts[3][kLevels];
  unsigned long long sums[3];
};

// kThreads: of the block. scratch: two images.
template <int C, int kThreads>
class Preparation {
 public:
  __device__ Preparation(Prepared& shared, Size size, uint8_t* scratch)
      : shared_(shared), size_(size), scratch_(scratch) {}

  // The plan and the header's image are there.
  __device__ void run(bool fast) {
    Header& header = shared_.program.header;
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < kSlots; ++slot) header.kind[slot] = Kind::nothing;
      header.first = 0;
      header.warps = !is_identity(shared_.plan.matrix);
    }
    __syncthreads();
    for (int slot = 0; slot < kSlots; ++slot)
      if (!(fast && fold(slot))) operate(slot);
  }

 private:
  template <class Of>
  __device__ void over_pixels(Of of) const {
    for (int64_t i = threadIdx.x; i < size_.area(); i += kThreads)
      of(i, int(i % size_.width), int(i / size_.width));
  }
  template <class Of>
  __device__ void over_levels(Of of) const {
    for (int i = int(threadIdx.x); i < C * kLevels; i += kThreads) of(i / kLevels, i % kLevels);
    __syncthreads();
  }
  // The levels before a slot, a pixel after the other.
  template <class Of>
  __device__ void look(int slot, Of of) const {
    over_pixels([&](int64_t i, int x, int y) {
      uint8_t levels[3];
      evaluate<C>(shared_.program, shared_.plan, size_, slot, x, y, levels);
      of(i, levels);
    });
  }
  __device__ void set_kind(int slot, Kind kind) {
    if (threadIdx.x == 0) shared_.program.header.kind[slot] = kind;
    __syncthreads();
  }

  // `next` becomes the slot's table, and takes up the one right before it.
  __device__ void append(int slot) {
    const Header& header = shared_.program.header;
    int last = slot - 1;
    const auto joins = [&](int at) {
      return at >= header.first && !(header.warps && shared_.plan.warp_at == at + 1);
    };
    while (joins(last) && header.kind[last] == Kind::nothing) --last;
    const bool joined = joins(last) && header.kind[last] == Kind::table;
    auto& table = shared_.program.table;
    over_levels(
        [&](int c, int v) { table[slot][c][v] = shared_.next[c][joined ? table[last][c][v] : v]; });
    if (joined) set_kind(last, Kind::nothing);
    set_kind(slot, Kind::table);
  }

  __device__ void count_levels(int slot) {
    over_levels([&](int c, int v) { shared_.counts[c][v] = 0; });
    look(slot, [&](int64_t, const uint8_t* levels) {
      for (int c = 0; c < C; ++c) atomicAdd(&shared_.counts[c][levels[c]], 1u);
    });
    __syncthreads();
  }

  template <class Of>
  __device__ void sum_pixels(int slot, int sums, Of of) {
    if (threadIdx.x < 3) shared_.sums[threadIdx.x] = 0;
    __syncthreads();
    unsigned long long own[3] = {0, 0, 0};
    look(slot, [&](int64_t, const uint8_t* levels) { of(pixel_of<C>(levels), own); });
    for (int k = 0; k < sums; ++k) atomicAdd(&shared_.sums[k], own[k]);
    __syncthreads();
  }
  __device__ float mean(int of) const {
    return float(double(shared_.sums[of]) / double(size_.area()));
  }

  __device__ void operate(int slot) {
    const uint8_t operation = shared_.plan.operation[slot];
    const float argument = shared_.plan.argument[slot], rest = shared_.plan.rest[slot];
    if (operation == kSharpness) {
      if (size_.height >= 3 && size_.width >= 3) sharpen(slot, rest);
    } else if (operation == kColor || operation == kHue) {
      if (C == 3) set_kind(slot, operation == kColor ? Kind::colour : Kind::hue);
    } else if (operation == kContrast) {
      sum_pixels(slot, 1, [&](Pixel p, unsigned long long* sums) {
        sums[0] += (unsigned long long)(C == 1 ? p.red : luma(p.red, p.green, p.blue));
      });
      const float grey = mean(0);
      over_levels(
          [&](int c, int v) { shared_.next[c][v] = contrast_level(v, grey, argument, rest); });
      append(slot);
    } else if (operation == kAutocontrast || operation == kEqualize) {
      count_levels(slot);
      if (int(threadIdx.x) < C) {  // a thread a channel: 256 steps, once a row
        if (operation == kAutocontrast)
          stretch(int(threadIdx.x));
        else
          equalize(int(threadIdx.x));
      }
      __syncthreads();
      append(slot);
    } else if (is_table(operation)) {
      over_levels([&](int c, int v) { shared_.next[c][v] = plain_level(operation, argument, v); });
      append(slot);
    }
  }

  __device__ void stretch(int c) {
    int low = 0, high = kLevels - 1;
    while (low < kLevels - 1 && shared_.counts[c][low] == 0) ++low;
    while (high > 0 && shared_.counts[c][high] == 0) --high;
    for (int v = 0; v < kLevels; ++v)
      shared_.next[c][v] = v < low ? uint8_t(0) : autocontrast_level(v, low, high);
  }
  __device__ void equalize(int c) {
    int highest = kLevels - 1;
    while (highest > 0 && shared_.counts[c][highest] == 0) --highest;
    int64_t below = 0;
    for (int v = 0; v < kLevels; ++v) {
      shared_.next[c][v] = equalize_level(v, below, size_.area(), shared_.counts[c][highest]);
      below += shared_.counts[c][v];
    }
  }

  // Writes the image out as it is after this slot.
  __device__ void sharpen(int slot, float rest) {
    Header& header = shared_.program.header;
    const int64_t bytes = size_.area() * C;
    uint8_t* const halves[2] = {scratch_, scratch_ + bytes};
    bool changed = header.warps && shared_.plan.warp_at <= slot;
    for (int at = header.first; at < slot; ++at) changed |= header.kind[at] != Kind::nothing;
    const uint8_t* from = header.image;
    if (changed) {
      uint8_t* const to = from == halves[0] ? halves[1] : halves[0];
      look(slot, [&](int64_t i, const uint8_t* levels) {
        for (int c = 0; c < C; ++c) to[C * i + c] = levels[c];
      });
      from = to;
    }
    __syncthreads();
    uint8_t* const to = from == halves[0] ? halves[1] : halves[0];
    const int64_t pitch = int64_t(size_.width) * C;
    over_pixels([&](int64_t i, int x, int y) {
      const bool border = y == 0 || y == size_.height - 1 || x == 0 || x == size_.width - 1;
      for (int c = 0; c < C; ++c) {
        const uint8_t* const at = from + C * i + c;
        if (border) {
          to[C * i + c] = *at;
          continue;
        }
        int sum = 4 * int(*at);
        for (int64_t down = -pitch; down <= pitch; down += pitch)
          for (int side = -C; side <= C; side += C) sum += at[down + side];
        to[C * i + c] = sharp_level(*at, sum, rest);
      }
    });
    __syncthreads();
    if (threadIdx.x == 0) {
      header.image = to;
      header.first = uint8_t(slot + 1);
      if (shared_.plan.warp_at <= slot) header.warps = false;
    }
    __syncthreads();
  }

  // Linear operations from this slot on as one matrix, where there are two or more before the warp
  // or the end; moves `slot` to the last of them.
  __device__ bool fold(int& slot) {
    const PlanRow& plan = shared_.plan;
    int last = slot, found = 0;
    for (int at = slot; at < kSlots; ++at) {
      if (shared_.program.header.warps && at == plan.warp_at && at > slot) break;
      if (is_linear(plan.operation[at]))
        last = at, ++found;
      else if (!is_neutral(plan.operation[at]))
        break;
    }
    if (found < 2) return false;
    sum_pixels(slot, 3, [&](Pixel p, unsigned long long* sums) {
      sums[0] += (unsigned long long)p.red;
      sums[1] += (unsigned long long)p.green;
      sums[2] += (unsigned long long)p.blue;
    });
    if (threadIdx.x == 0) {
      ColourMatrix matrix = {{{1, 0, 0}, {0, 1, 0}, {0, 0, 1}}, {0, 0, 0}};
      for (int at = slot; at <= last; ++at)
        if (is_linear(plan.operation[at]))
          add_operation(matrix, plan.operation[at], plan.argument[at], plan.rest[at], C,
                        {mean(0), mean(1), mean(2)});
      shared_.program.header.matrix[slot] = matrix;
    }
    set_kind(slot, Kind::matrix);
    slot = last;
    return true;
  }

  Prepared& shared_;
  const Size size_;
  uint8_t* const scratch_;
};
