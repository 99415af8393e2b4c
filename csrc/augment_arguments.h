// What both back ends of augment do with their arguments before any kernel runs.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "checks.h"

namespace fastscarce {

constexpr int64_t kPlanRowBytes = 128;
// Places in an image are counted in 32 bits.
constexpr int64_t kLargestImage = int64_t(1) << 30;
constexpr int64_t kLargestSide = 32767;

inline void check_augment_arguments(const torch::stable::Tensor& images,
                                    const torch::stable::Tensor& plan,
                                    const std::optional<torch::stable::Tensor>& index,
                                    const std::vector<double>& mean,
                                    const std::vector<double>& std) {
  using torch::headeronly::ScalarType;
  const char* const name = "augment";
  check(images.scalar_type() == ScalarType::Byte && images.dim() == 4, name,
        "uint8 images (n, height, width, channels)");
  check(images.is_contiguous(), name, "images whose rows have no gaps");
  const int64_t channels = images.size(3);
  check(channels == 1 || channels == 3, name, "1 or 3 channels");
  check(images.size(1) > 0 && images.size(2) > 0 && images.size(1) <= kLargestSide &&
            images.size(2) <= kLargestSide &&
            images.size(1) * images.size(2) * channels <= kLargestImage,
        name, "images of 1 to 32767 pixels a side and at most 2**30 bytes");
  check(plan.scalar_type() == ScalarType::Byte && plan.dim() == 2 &&
            plan.size(1) == kPlanRowBytes && plan.is_contiguous(),
        name, "a plan of uint8 (rows, 128)");
  check(reinterpret_cast<uintptr_t>(plan.const_data_ptr()) % 8 == 0, name,
        "a plan that lies at a multiple of 8 bytes");
  if (index) {
    check(index->scalar_type() == ScalarType::Long && index->dim() == 1 &&
              index->size(0) == plan.size(0) && index->is_contiguous(),
          name, "an int64 index (rows,)");
  } else {
    check(images.size(0) == plan.size(0), name, "an image a row of the plan, or an index");
  }
  check((mean.size() == 1 || int64_t(mean.size()) == channels) &&
            (std.size() == 1 || int64_t(std.size()) == channels),
        name, "a mean and a deviation, one or one a channel");
  for (const double value : std) check(value > 0, name, "positive deviations");
}

// As `pixels` counts them; -1 for another dtype.
inline int64_t pixels_of(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  return type == ScalarType::Float      ? 0
         : type == ScalarType::BFloat16 ? 1
         : type == ScalarType::Half     ? 2
         : type == ScalarType::Byte     ? 3
                                        : -1;
}
inline torch::headeronly::ScalarType dtype_of_pixels(int64_t pixels) {
  using torch::headeronly::ScalarType;
  check(pixels >= 0 && pixels <= 3, "augment", "pixels of 0 to 3");
  const ScalarType types[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half,
                              ScalarType::Byte};
  return types[pixels];
}

// Of (rows, channels, height, width) numbers, in either layout.
inline void check_augment_out(const torch::stable::Tensor& out, const torch::stable::Tensor& images,
                              int64_t rows, bool channels_last) {
  const int64_t h = images.size(1), w = images.size(2), c = images.size(3);
  const char* const name = "augment";
  check(pixels_of(out.scalar_type()) >= 0, name, "out in float32, bfloat16, float16 or uint8");
  check(out.dim() == 4 && out.size(0) == rows && out.size(1) == c && out.size(2) == h &&
            out.size(3) == w,
        name, "out of (rows, channels, height, width)");
  const int64_t strides[4] = {c * h * w, channels_last ? 1 : h * w, channels_last ? w * c : w,
                              channels_last ? c : 1};
  for (int i = 0; i < 4; ++i)
    check(out.size(i) == 1 || out.stride(i) == strides[i], name, "out in the layout asked for");
}

}  // namespace fastscarce
