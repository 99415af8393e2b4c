// Carries a plan out on a CPU: uint8 images (n, height, width, channels) and a row a result in;
// levels or normalised numbers (rows, channels, height, width) out, either layout.
#pragma once

#include <cstdint>

namespace fastscarce::cpu {

enum class Pixels : int64_t { float32, bfloat16, float16, uint8 };

struct AugmentCall {
  int64_t rows = 0, sources = 0;
  int height = 0, width = 0, channels = 0;
  const uint8_t* images = nullptr;
  const int64_t* index = nullptr;  // (rows,): which image each row reads; null: the row's own
  const void* plan = nullptr;      // PlanRow (rows,)
  void* out = nullptr;
  Pixels dtype = Pixels::float32;
  bool channels_last = false;
  bool fast = false;    // colour operations in a row as one matrix
  bool stream = false;  // write past the caches
  float scale[3] = {}, shift[3] = {};
};

using AugmentKernel = void (*)(const AugmentCall&, int64_t begin, int64_t end);

namespace augment_scalar {
AugmentKernel augment_kernel(int channels);
}
#if defined(__x86_64__)
namespace augment_avx2 {
AugmentKernel augment_kernel(int channels);
}
namespace augment_avx512 {
AugmentKernel augment_kernel(int channels);
}
#endif

}  // namespace fastscarce::cpu
