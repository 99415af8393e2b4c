// Augmentation on a GPU: csrc/cpu/augment.h says of what.
//
// Two kernels. The first prepares a program for each row, a block a row: augment_program.cuh. The
// second stores, a block a tile of one row, so that its branches are the same for all its threads:
// it takes the row's program, and the partner's where the tile has pixels of it, into shared
// memory, evaluates each pixel from the source to its level in registers, and writes the tile out
// normalised and cast, sixteen bytes at a time where they are aligned. Arithmetic is
// csrc/math/augment.h's, rounding for rounding. Launches and memory depend on shapes alone, and the
// host waits for nothing: a row whose index or plan can't be carried out is black.
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
#include "augment_program.cuh"

constexpr int kPrepareThreads = 512;
constexpr int kStoreThreads = 256;
constexpr int kTile = 1024;           // pixels of a block
constexpr int64_t kMostRows = 65535;  // blocks in the second dimension of a grid

struct Call {
  int64_t rows, sources;
  Size size;
  const uint8_t* images;
  const int64_t* index;
  const PlanRow* plan;
  uint8_t* scratch;   // (rows, 2) images
  Program* programs;  // (rows,)
  void* out;
  bool channels_last, fast;
  float scale[3], shift[3];
};

// All threads of the block take part.
template <class T>
__device__ inline void copy(T* to, const T* from) {
  static_assert(sizeof(T) % 8 == 0 && alignof(T) >= 8, "whole words");
  for (unsigned i = threadIdx.x; i < sizeof(T) / 8; i += blockDim.x)
    reinterpret_cast<uint64_t*>(to)[i] = reinterpret_cast<const uint64_t*>(from)[i];
}
__device__ inline void copy_tables(Program& to, const Program& from, const Header& header) {
  for (int slot = 0; slot < kSlots; ++slot) {
    if (header.kind[slot] != Kind::table) continue;
    const auto* const words = reinterpret_cast<const uint32_t*>(from.table[slot]);
    for (unsigned i = threadIdx.x; i < 3 * kLevels / 4; i += blockDim.x)
      reinterpret_cast<uint32_t*>(to.table[slot])[i] = words[i];
  }
}

template <int C>
__global__ void __launch_bounds__(kPrepareThreads) augment_prepare_kernel(const Call call) {
  __shared__ Prepared shared;
  const int64_t bytes = call.size.area() * C;
  for (int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
    __syncthreads();
    copy(&shared.plan, call.plan + row);
    __syncthreads();
    const int64_t source = call.index ? call.index[row] : row;
    const bool sound = source >= 0 && source < call.sources &&
                       is_sound(shared.plan, call.rows, call.size.height, call.size.width);
    if (threadIdx.x == 0)
      shared.program.header.image = sound ? call.images + source * bytes : nullptr;
    __syncthreads();
    if (sound) {
      uint8_t* const scratch = call.scratch + 2 * row * bytes;
      Preparation<C, kPrepareThreads>(shared, call.size, scratch).run(call.fast);
    }
    copy(&call.programs[row].header, &shared.program.header);
    if (sound) copy_tables(call.programs[row], shared.program, shared.program.header);
  }
}

// A tile of levels, interleaved, and the partner's where the two are blended.
struct Tile {
  alignas(16) uint8_t own[3 * kTile];
  alignas(16) uint8_t other[3 * kTile];
};

template <int C>
__device__ inline void fill_tile(const Program& program, const PlanRow& plan, Size size, int x,
                                 int y, uint8_t* levels) {
  const int16_t* const box = plan.erase;
  if (!program.header.image) {
    for (int c = 0; c < C; ++c) levels[c] = 0;
  } else if (y >= box[0] && y < box[2] && x >= box[1] && x < box[3]) {
    for (int c = 0; c < C; ++c) levels[c] = plan.erase_fill[c];
  } else {
    evaluate<C>(program, plan, size, kSlots, x, y, levels);
  }
}

template <class T>
__device__ inline void put_level(T* to, float value, float scale, float shift) {
  put(to, normalised(value, scale, shift));
}
__device__ inline void put_level(uint8_t* to, float value, float, float) {
  *to = level(whole(value));
}

// `count` numbers one after the other, sixteen bytes at a time where they are aligned: number i is
// value(i), of channel(i).
template <class T, class Value, class Channel>
__device__ inline void store(const Call& call, T* to, int count, Value value, Channel channel) {
  constexpr int kChunk = 16 / int(sizeof(T));
  const auto put_one = [&](T* at, int i) {
    const int c = channel(i);
    put_level(at, value(i), call.scale[c], call.shift[c]);
  };
  const int chunks = reinterpret_cast<uintptr_t>(to) % 16 == 0 ? count / kChunk : 0;
  for (int chunk = int(threadIdx.x); chunk < chunks; chunk += kStoreThreads) {
    alignas(16) T numbers[kChunk];
#pragma unroll
    for (int k = 0; k < kChunk; ++k) put_one(numbers + k, chunk * kChunk + k);
    *reinterpret_cast<uint4*>(to + chunk * kChunk) = *reinterpret_cast<const uint4*>(numbers);
  }
  for (int i = chunks * kChunk + int(threadIdx.x); i < count; i += kStoreThreads)
    put_one(to + i, i);
}

template <int C, class T>
__global__ void __launch_bounds__(kStoreThreads) augment_store_kernel(const Call call) {
  __shared__ PlanRow plan, partner_plan;
  __shared__ Program program, partner_program;
  __shared__ Tile tile;
  const int64_t area = call.size.area(), start = int64_t(blockIdx.x) * kTile;
  const int width = call.size.width;
  const int pixels = int(area - start < kTile ? area - start : kTile);
  const int top = int(start / width), bottom = int((start + pixels - 1) / width);
  for (int64_t row = blockIdx.y; row < call.rows; row += gridDim.y) {
    __syncthreads();
    copy(&plan, call.plan + row);
    copy(&program.header, &call.programs[row].header);
    __syncthreads();
    const bool sound = program.header.image != nullptr;
    if (sound) copy_tables(program, call.programs[row], program.header);
    const int16_t* const box = plan.box;
    bool mixes = sound && plan.mix != kAlone && plan.partner != row;
    if (mixes && plan.mix == kCutMix) mixes = bottom >= box[0] && top < box[2] && box[3] > box[1];
    if (mixes) {
      copy(&partner_plan, call.plan + plan.partner);
      copy(&partner_program.header, &call.programs[plan.partner].header);
      __syncthreads();
      mixes = partner_program.header.image != nullptr;
      if (mixes) copy_tables(partner_program, call.programs[plan.partner], partner_program.header);
    }
    __syncthreads();
    const bool blends = mixes && plan.mix == kMixUp;
    for (int i = int(threadIdx.x); i < pixels; i += kStoreThreads) {
      const int y = int((start + i) / width), x = int((start + i) % width);
      const bool pasted =
          mixes && !blends && y >= box[0] && y < box[2] && x >= box[1] && x < box[3];
      if (pasted)
        fill_tile<C>(partner_program, partner_plan, call.size, x, y, tile.own + C * i);
      else
        fill_tile<C>(program, plan, call.size, x, y, tile.own + C * i);
      if (blends) fill_tile<C>(partner_program, partner_plan, call.size, x, y, tile.other + C * i);
    }
    __syncthreads();
    const auto value = [&](int at) {
      const float own = float(tile.own[at]);
      return blends ? mixed(own, float(tile.other[at]), plan.lam) : own;
    };
    T* const to = static_cast<T*>(call.out) + row * area * C;
    if (call.channels_last) {
      store(call, to + C * start, C * pixels, value, [](int i) { return i % C; });
    } else {
      for (int c = 0; c < C; ++c)
        store(
            call, to + c * area + start, pixels, [&](int i) { return value(C * i + c); },
            [&](int) { return c; });
    }
  }
}

template <int C, class T>
void launch(const Call& call, cudaStream_t stream) {
  launch_kernel("augment", augment_prepare_kernel<C>,
                {unsigned(std::min<int64_t>(call.rows, 1 << 20)), kPrepareThreads}, stream, call);
  const int64_t area = int64_t(call.size.height) * call.size.width;
  const dim3 grid(unsigned((area + kTile - 1) / kTile), unsigned(std::min(call.rows, kMostRows)));
  launch_kernel("augment", augment_store_kernel<C, T>, {grid, kStoreThreads}, stream, call);
}
template <int C>
void launch(const Call& call, int64_t pixels, cudaStream_t stream) {
  if (pixels == 0)
    launch<C, float>(call, stream);
  else if (pixels == 1)
    launch<C, __nv_bfloat16>(call, stream);
  else if (pixels == 2)
    launch<C, __half>(call, stream);
  else
    launch<C, uint8_t>(call, stream);
}

void run(const Tensor& images, const Tensor& plan, const std::optional<Tensor>& index,
         const std::vector<double>& mean, const std::vector<double>& std, bool channels_last,
         bool fast, Tensor& out) {
  Call call;
  call.rows = plan.size(0);
  if (call.rows == 0) return;
  const DeviceGuard guard(images.get_device());
  call.sources = images.size(0);
  call.size = {int(images.size(1)), int(images.size(2))};
  const int64_t channels = images.size(3);
  const int64_t bytes = channels * images.size(1) * images.size(2);
  call.images = static_cast<const uint8_t*>(images.const_data_ptr());
  call.index = index ? static_cast<const int64_t*>(index->const_data_ptr()) : nullptr;
  call.plan = static_cast<const PlanRow*>(plan.const_data_ptr());
  Tensor scratch = torch::stable::new_empty(images, {call.rows, 2, bytes}, ScalarType::Byte);
  Tensor programs =
      torch::stable::new_empty(images, {call.rows, int64_t(sizeof(Program))}, ScalarType::Byte);
  call.scratch = static_cast<uint8_t*>(scratch.mutable_data_ptr());
  call.programs = reinterpret_cast<Program*>(programs.mutable_data_ptr());
  call.out = out.mutable_data_ptr();
  call.channels_last = channels_last;
  call.fast = fast;
  for (int64_t c = 0; c < 3; ++c) {
    const double deviation = std[std.size() == 1 ? 0 : size_t(std::min(c, channels - 1))];
    const double centre = mean[mean.size() == 1 ? 0 : size_t(std::min(c, channels - 1))];
    call.scale[c] = float(1.0 / (255.0 * deviation));
    call.shift[c] = float(-centre / deviation);
  }
  const int64_t pixels = pixels_of(out.scalar_type());
  if (channels == 1)
    launch<1>(call, pixels, stream_of(images));
  else
    launch<3>(call, pixels, stream_of(images));
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
