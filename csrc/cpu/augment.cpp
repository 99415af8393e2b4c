// The operators augment and augment_out on a CPU: tensors in, threads over rows.
#include "augment.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../augment_arguments.h"
#include "isa.h"
#include "recycled.h"
#include "tensors.h"

namespace fastscarce::cpu {
namespace {

using torch::stable::Tensor;
#define FS_HD
#include "../math/augment.h"

AugmentKernel kernel(int channels) {
#if defined(__x86_64__)
  const bool wide = isa() == Isa::avx512 && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl");
  if (wide) return augment_avx512::augment_kernel(channels);
  if (isa() != Isa::scalar) return augment_avx2::augment_kernel(channels);
#endif
  return augment_scalar::augment_kernel(channels);
}

int64_t bytes_of(Pixels type) {
  return type == Pixels::float32 ? 4 : type == Pixels::uint8 ? 1 : 2;
}

void run(const Tensor& images, const Tensor& plan, const std::optional<Tensor>& index,
         const std::vector<double>& mean, const std::vector<double>& std, bool channels_last,
         bool fast, Tensor& out) {
  AugmentCall call;
  call.rows = plan.size(0);
  call.sources = images.size(0);
  call.height = int(images.size(1));
  call.width = int(images.size(2));
  call.channels = int(images.size(3));
  call.images = static_cast<const uint8_t*>(images.const_data_ptr());
  call.plan = plan.const_data_ptr();
  call.dtype = Pixels(pixels_of(out.scalar_type()));
  call.channels_last = channels_last;
  call.fast = fast;
  if (index) {
    call.index = static_cast<const int64_t*>(index->const_data_ptr());
    for (int64_t row = 0; row < call.rows; ++row)
      check(call.index[row] >= 0 && call.index[row] < call.sources, "augment",
            "an index of images that are there");
  }
  const PlanRow* const rows = static_cast<const PlanRow*>(call.plan);
  for (int64_t row = 0; row < call.rows; ++row)
    check(is_sound(rows[row], call.rows, call.height, call.width), "augment",
          "a plan drawn for these rows and this image size");
  for (int c = 0; c < call.channels; ++c) {
    const double deviation = std[std.size() == 1 ? 0 : size_t(c)];
    call.scale[c] = float(1.0 / (255.0 * deviation));
    call.shift[c] = float(-mean[mean.size() == 1 ? 0 : size_t(c)] / deviation);
  }
  const int64_t numbers = call.rows * call.channels * call.height * call.width;
  const int64_t bytes = numbers * bytes_of(call.dtype);
  call.out = out.mutable_data_ptr();
  call.stream = bytes >= kStreamBytes;
  ask_for_huge_pages(call.out, bytes);
  if (call.rows == 0) return;
  const AugmentKernel of = kernel(call.channels);
  const int64_t area = std::max<int64_t>(1, numbers / call.rows);
  // Two rows at least: neighbours share their renderings.
  const int64_t grain = std::max<int64_t>(2, kLogitsPerThread / area);
  torch::stable::parallel_for(0, call.rows, grain,
                              [&](int64_t begin, int64_t end) { of(call, begin, end); });
}

Tensor augment(Tensor images, Tensor plan, std::optional<Tensor> index, std::vector<double> mean,
               std::vector<double> std, int64_t pixels, bool channels_last, bool fast) {
  check_augment_arguments(images, plan, index, mean, std);
  const int64_t h = images.size(1), w = images.size(2), c = images.size(3);
  const auto type = dtype_of_pixels(pixels);
  if (!channels_last) {
    Tensor out = recycled_empty(images, {plan.size(0), c, h, w}, type, bytes_of(Pixels(pixels)));
    run(images, plan, index, mean, std, channels_last, fast, out);
    return out;
  }
  // Channels last is a view of what lies interleaved.
  Tensor out = recycled_empty(images, {plan.size(0), h, w, c}, type, bytes_of(Pixels(pixels)));
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
}  // namespace fastscarce::cpu

STABLE_TORCH_LIBRARY_IMPL(fastscarce, CPU, m) {
  m.impl("augment", TORCH_BOX(&fastscarce::cpu::augment));
  m.impl("augment_out", TORCH_BOX(&fastscarce::cpu::augment_out));
}
