// Augmentation on a GPU: csrc/cpu/augment.h says of what.
//
// Two kernels. The first renders: a block a row carries out tables, warp, sharpening and what
// crosses channels, one after the other over scratch memory that stays in L2; statistics are
// integer sums in shared memory, so their order does not matter. A row without operations is not
// touched. The second, a thread a pixel, mixes each row's rendering with its partner's, normalises,
// casts and stores: each result is written once. Arithmetic is csrc/math/augment.h's, rounding for
// rounding. No host synchronisation: a row whose index or plan can't be carried out is black.
#include <math.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "device.cuh"
#define FS_HD __host__ __device__
#include "../augment_arguments.h"
#include "tensors.cuh"

namespace fastscarce::cuda {
namespace {

#include "../math/augment.h"

constexpr int kRenderThreads = 512;
constexpr int kStoreThreads = 256;
constexpr int64_t kMostRows = 65535;  // blocks in the second dimension of a grid

struct Call {
  int64_t rows, sources, bytes;  // bytes: of an image
  int height, width;
  const uint8_t* images;
  const int64_t* index;
  const PlanRow* plan;
  uint8_t* scratch;          // (rows, 2, bytes)
  const uint8_t** rendered;  // (rows,): where the row's levels are; null: black
  void* out;
  int64_t pixels;
  bool channels_last, fast;
  float scale[3], shift[3];
};

// What the threads of a block share of the row that they render.
struct Shared {
  uint8_t table[3][kLevels], next[3][kLevels];
  unsigned counts[3][kLevels];
  unsigned long long sums[3];
};

template <int C>
class Renderer {
 public:
  __device__ Renderer(const Call& call, Shared& shared, const PlanRow& plan, int64_t row,
                      const uint8_t* source)
      : call_(call), shared_(shared), plan_(plan), current_(source) {
    spare_ = call.scratch + 2 * row * call.bytes;
    other_ = spare_ + call.bytes;
  }

  __device__ const uint8_t* run() {
    const bool warps = !is_identity(plan_.matrix);
    for (int slot = 0; slot <= kSlots; ++slot) {
      if (warps && slot == plan_.warp_at) warp();
      if (slot < kSlots && !(call_.fast && fold(slot, warps))) operate(slot);
    }
    flush();
    erase();
    return current_;
  }

 private:
  __device__ int64_t area() const { return int64_t(call_.height) * call_.width; }
  __device__ void turn() {
    __syncthreads();
    current_ = spare_;
    uint8_t* const free = other_;
    other_ = spare_;
    spare_ = free;
  }
  template <class Of>
  __device__ void over_bytes(Of of) const {
    for (int64_t i = threadIdx.x; i < call_.bytes; i += kRenderThreads) of(i);
  }
  template <class Of>
  __device__ void over_pixels(Of of) const {
    for (int64_t i = threadIdx.x; i < area(); i += kRenderThreads) of(i);
  }
  template <class Of>
  __device__ void over_levels(Of of) const {
    for (int i = int(threadIdx.x); i < C * kLevels; i += kRenderThreads)
      of(i / kLevels, i % kLevels);
    __syncthreads();
  }
  __device__ Pixel pixel(int64_t i) const {
    const uint8_t* const at = current_ + C * i;
    return {float(at[0]), C == 3 ? float(at[1]) : 0.0f, C == 3 ? float(at[2]) : 0.0f};
  }
  __device__ void put_pixel(int64_t i, Pixel p) {
    uint8_t* const to = spare_ + C * i;
    to[0] = level(p.red);
    if (C == 3) to[1] = level(p.green), to[2] = level(p.blue);
  }

  __device__ void flush() {
    if (!pending_) return;
    over_bytes([&](int64_t i) { spare_[i] = shared_.table[i % C][current_[i]]; });
    pending_ = false;
    turn();
  }

  // `next` becomes part of what is pending.
  __device__ void append() {
    if (pending_) {
      over_levels(
          [&](int c, int v) { shared_.counts[c][v] = shared_.next[c][shared_.table[c][v]]; });
      over_levels([&](int c, int v) { shared_.table[c][v] = uint8_t(shared_.counts[c][v]); });
    } else {
      over_levels([&](int c, int v) { shared_.table[c][v] = shared_.next[c][v]; });
    }
    pending_ = true;
  }

  __device__ void count_levels() {
    over_levels([&](int c, int v) { shared_.counts[c][v] = 0; });
    over_bytes([&](int64_t i) { atomicAdd(&shared_.counts[i % C][current_[i]], 1u); });
    __syncthreads();
  }

  template <class Of>
  __device__ void sum_pixels(int sums, Of of) {
    if (threadIdx.x < 3) shared_.sums[threadIdx.x] = 0;
    __syncthreads();
    unsigned long long own[3] = {0, 0, 0};
    over_pixels([&](int64_t i) { of(i, own); });
    for (int k = 0; k < sums; ++k) atomicAdd(&shared_.sums[k], own[k]);
    __syncthreads();
  }

  __device__ void operate(int slot) {
    const uint8_t operation = plan_.operation[slot];
    const float argument = plan_.argument[slot], rest = plan_.rest[slot];
    if (operation == kContrast) {
      flush();
      sum_pixels(1, [&](int64_t i, unsigned long long* sums) {
        const Pixel p = pixel(i);
        sums[0] += (unsigned long long)(C == 1 ? p.red : luma(p.red, p.green, p.blue));
      });
      const float mean = float(double(shared_.sums[0]) / double(area()));
      over_levels(
          [&](int c, int v) { shared_.next[c][v] = contrast_level(v, mean, argument, rest); });
      append();
    } else if (operation == kAutocontrast || operation == kEqualize) {
      flush();
      count_levels();
      if (operation == kAutocontrast)
        stretch();
      else
        equalize();
      __syncthreads();
      append();
    } else if (is_table(operation)) {
      over_levels([&](int c, int v) { shared_.next[c][v] = plain_level(operation, argument, v); });
      append();
    } else if (operation == kSharpness) {
      if (call_.height < 3 || call_.width < 3) return;
      flush();
      sharpen(rest);
    } else if (C == 3 && (operation == kColor || operation == kHue)) {
      flush();
      over_pixels([&](int64_t i) {
        const Pixel p = pixel(i);
        put_pixel(i, operation == kColor ? saturated(p, argument, rest) : hue_turned(p, argument));
      });
      turn();
    }
  }

  // A thread a channel: 256 steps, once a row.
  __device__ void stretch() {
    const int c = int(threadIdx.x);
    if (c >= C) return;
    int low = 0, high = kLevels - 1;
    while (low < kLevels - 1 && shared_.counts[c][low] == 0) ++low;
    while (high > 0 && shared_.counts[c][high] == 0) --high;
    for (int v = 0; v < kLevels; ++v)
      shared_.next[c][v] = v < low ? uint8_t(0) : autocontrast_level(v, low, high);
  }
  __device__ void equalize() {
    const int c = int(threadIdx.x);
    if (c >= C) return;
    int highest = kLevels - 1;
    while (highest > 0 && shared_.counts[c][highest] == 0) --highest;
    int64_t below = 0;
    for (int v = 0; v < kLevels; ++v) {
      shared_.next[c][v] = equalize_level(v, below, area(), shared_.counts[c][highest]);
      below += shared_.counts[c][v];
    }
  }

  __device__ void sharpen(float rest) {
    const int pitch = call_.width * C;
    over_bytes([&](int64_t i) {
      const int line = int(i / pitch), at = int(i % pitch);
      const int middle = current_[i];
      if (line == 0 || line == call_.height - 1 || at < C || at >= pitch - C) {
        spare_[i] = uint8_t(middle);
        return;
      }
      int sum = 4 * middle;
      for (int down = -pitch; down <= pitch; down += pitch)
        for (int across = -C; across <= C; across += C) sum += current_[i + down + across];
      spare_[i] = sharp_level(middle, sum, rest);
    });
    turn();
  }

  __device__ bool fold(int& slot, bool warps) {
    int last = slot, found = 0;
    for (int at = slot; at < kSlots && !(warps && at == plan_.warp_at && at > slot); ++at) {
      if (is_linear(plan_.operation[at]))
        last = at, ++found;
      else if (!is_neutral(plan_.operation[at]))
        break;
    }
    if (found < 2) return false;
    flush();
    sum_pixels(3, [&](int64_t i, unsigned long long* sums) {
      for (int c = 0; c < C; ++c) sums[c] += current_[C * i + c];
    });
    Pixel mean = {float(double(shared_.sums[0]) / double(area())),
                  float(double(shared_.sums[1]) / double(area())),
                  float(double(shared_.sums[2]) / double(area()))};
    ColourMatrix matrix = {{{1, 0, 0}, {0, 1, 0}, {0, 0, 1}}, {0, 0, 0}};
    for (int at = slot; at <= last; ++at)
      if (is_linear(plan_.operation[at]))
        add_operation(matrix, plan_.operation[at], plan_.argument[at], plan_.rest[at], C, mean);
    slot = last;
    over_pixels([&](int64_t i) {
      const Pixel p = transformed(matrix, pixel(i));
      put_pixel(i, {plus(p.red, 0.5f), plus(p.green, 0.5f), plus(p.blue, 0.5f)});
    });
    turn();
    return true;
  }

  __device__ void warp() {
    flush();
    const Axis across = axis_of(plan_.matrix, call_.width);
    const Axis down = axis_of(plan_.matrix + 3, call_.height);
    const float right = across.side - 1.0f, bottom = down.side - 1.0f;
    over_pixels([&](int64_t i) {
      const float x_out = float(int(i % call_.width)) - 0.5f * right;
      const float y_out = float(int(i / call_.width)) - 0.5f * bottom;
      float x = coordinate(across, x_out, y_out), y = coordinate(down, x_out, y_out);
      if (plan_.border == kReflect) {
        x = reflected(x, across.side);
        y = reflected(y, down.side);
      }
      uint8_t* const to = spare_ + C * i;
      if (plan_.sampling == kBilinear) {
        fetch_bilinear<C>(current_, call_.width, call_.height, plan_, x, y, to);
        return;
      }
      x = whole(x);
      y = whole(y);
      const bool inside = x >= 0.0f && x <= right && y >= 0.0f && y <= bottom;
      const uint8_t* const from =
          inside ? current_ + (int64_t(y) * call_.width + int64_t(x)) * C : plan_.fill;
      for (int c = 0; c < C; ++c) to[c] = from[c];
    });
    turn();
  }

  __device__ void erase() {
    const int16_t* const box = plan_.erase;
    if (box[2] <= box[0] || box[3] <= box[1]) return;
    over_bytes([&](int64_t i) {
      const int y = int(i / C / call_.width), x = int(i / C % call_.width);
      const bool inside = y >= box[0] && y < box[2] && x >= box[1] && x < box[3];
      spare_[i] = inside ? plan_.erase_fill[i % C] : current_[i];
    });
    turn();
  }

  const Call& call_;
  Shared& shared_;
  const PlanRow& plan_;
  const uint8_t* current_;
  uint8_t *spare_, *other_;
  bool pending_ = false;
};

template <int C>
__global__ void __launch_bounds__(kRenderThreads) augment_render_kernel(const Call call) {
  __shared__ Shared shared;
  __shared__ PlanRow plan;
  for (int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
    __syncthreads();
    if (threadIdx.x == 0) plan = call.plan[row];
    __syncthreads();
    const int64_t source = call.index ? call.index[row] : row;
    const bool sound =
        source >= 0 && source < call.sources && is_sound(plan, call.rows, call.height, call.width);
    const uint8_t* result = nullptr;
    if (sound) {
      Renderer<C> renderer(call, shared, plan, row, call.images + source * call.bytes);
      result = renderer.run();
    }
    if (threadIdx.x == 0) call.rendered[row] = result;
  }
}

template <class T>
__device__ inline void put_number(void* out, int64_t at, float value) {
  put(static_cast<T*>(out) + at, value);
}

template <int C>
__global__ void __launch_bounds__(kStoreThreads) augment_store_kernel(const Call call) {
  const int64_t area = int64_t(call.height) * call.width;
  const int64_t i = int64_t(blockIdx.x) * kStoreThreads + threadIdx.x;
  if (i >= area) return;
  const int y = int(i / call.width), x = int(i % call.width);
  for (int64_t row = blockIdx.y; row < call.rows; row += gridDim.y) {
    const PlanRow& plan = call.plan[row];
    const uint8_t* own = call.rendered[row];
    const uint8_t* partner = nullptr;
    if (own && plan.mix != kAlone && plan.partner != row) partner = call.rendered[plan.partner];
    if (partner && plan.mix == kCutMix) {
      const int16_t* const box = plan.box;
      if (y >= box[0] && y < box[2] && x >= box[1] && x < box[3]) own = partner;
      partner = nullptr;
    }
    for (int c = 0; c < C; ++c) {
      float value = own ? float(own[C * i + c]) : 0.0f;
      if (partner) value = mixed(value, float(partner[C * i + c]), plan.lam);
      const int64_t at = row * call.bytes + (call.channels_last ? C * i + c : c * area + i);
      if (call.pixels == 3) {
        static_cast<uint8_t*>(call.out)[at] = level(whole(value));
        continue;
      }
      value = normalised(value, call.scale[c], call.shift[c]);
      if (call.pixels == 0)
        put_number<float>(call.out, at, value);
      else if (call.pixels == 1)
        put_number<__nv_bfloat16>(call.out, at, value);
      else
        put_number<__half>(call.out, at, value);
    }
  }
}

template <int C>
void launch(const Call& call, cudaStream_t stream) {
  launch_kernel("augment", augment_render_kernel<C>,
                {unsigned(std::min<int64_t>(call.rows, 1 << 20)), kRenderThreads}, stream, call);
  const int64_t area = int64_t(call.height) * call.width;
  const dim3 grid(unsigned((area + kStoreThreads - 1) / kStoreThreads),
                  unsigned(std::min(call.rows, kMostRows)));
  launch_kernel("augment", augment_store_kernel<C>, {grid, kStoreThreads}, stream, call);
}

void run(const Tensor& images, const Tensor& plan, const std::optional<Tensor>& index,
         const std::vector<double>& mean, const std::vector<double>& std, bool channels_last,
         bool fast, Tensor& out) {
  Call call;
  call.rows = plan.size(0);
  if (call.rows == 0) return;
  const DeviceGuard guard(images.get_device());
  call.sources = images.size(0);
  call.height = int(images.size(1));
  call.width = int(images.size(2));
  const int64_t channels = images.size(3);
  call.bytes = channels * call.height * call.width;
  call.images = static_cast<const uint8_t*>(images.const_data_ptr());
  call.index = index ? static_cast<const int64_t*>(index->const_data_ptr()) : nullptr;
  call.plan = static_cast<const PlanRow*>(plan.const_data_ptr());
  Tensor scratch = torch::stable::new_empty(images, {call.rows, 2, call.bytes}, ScalarType::Byte);
  Tensor places = torch::stable::new_empty(images, {call.rows}, ScalarType::Long);
  call.scratch = static_cast<uint8_t*>(scratch.mutable_data_ptr());
  call.rendered = static_cast<const uint8_t**>(places.mutable_data_ptr());
  call.out = out.mutable_data_ptr();
  call.pixels = pixels_of(out.scalar_type());
  call.channels_last = channels_last;
  call.fast = fast;
  for (int64_t c = 0; c < 3; ++c) {
    const double deviation = std[std.size() == 1 ? 0 : size_t(std::min(c, channels - 1))];
    const double centre = mean[mean.size() == 1 ? 0 : size_t(std::min(c, channels - 1))];
    call.scale[c] = float(1.0 / (255.0 * deviation));
    call.shift[c] = float(-centre / deviation);
  }
  if (channels == 1)
    launch<1>(call, stream_of(images));
  else
    launch<3>(call, stream_of(images));
}

Tensor augment(Tensor images, Tensor plan, std::optional<Tensor> index, std::vector<double> mean,
               std::vector<double> std, int64_t pixels, bool channels_last, bool fast) {
  check_augment_arguments(images, plan, index, mean, std);
  const int64_t h = images.size(1), w = images.size(2), c = images.size(3);
  const auto type = dtype_of_pixels(pixels);
  if (!channels_last) {
    Tensor out = torch::stable::new_empty(images, {plan.size(0), c, h, w}, type);
    run(images, plan, index, mean, std, channels_last, fast, out);
    return out;
  }
  Tensor out = torch::stable::new_empty(images, {plan.size(0), h, w, c}, type);
  Tensor view = torch::stable::transpose(torch::stable::transpose(out, 2, 3), 1, 2);
  run(images, plan, index, mean, std, channels_last, fast, view);
  return view;
}

void augment_out(Tensor images, Tensor plan, std::optional<Tensor> index, std::vector<double> mean,
                 std::vector<double> std, bool channels_last, bool fast, Tensor out) {
  check_augment_arguments(images, plan, index, mean, std);
  check_augment_out(out, images, plan.size(0), channels_last);
  run(images, plan, index, mean, std, channels_last, fast, out);
}

}  // namespace
}  // namespace fastscarce::cuda

STABLE_TORCH_LIBRARY_IMPL(fastscarce, FASTSCARCE_DEVICE, m) {
  m.impl("augment", TORCH_BOX(&fastscarce::cuda::augment));
  m.impl("augment_out", TORCH_BOX(&fastscarce::cuda::augment_out));
}
