// Tensors as the CPU kernels take them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

#include "../checks.h"
#include "kd_loss.h"

namespace fastscarce::cpu {

// Work below this many logits stays on one thread.
constexpr int64_t kLogitsPerThread = 16384;
// Gradients from this size on are written past the caches: they would not stay in one anyway, and a
// cached write reads its line from memory first.
constexpr int64_t kStreamBytes = int64_t(8) << 20;
// Fresh memory from this size on is asked for in huge pages: a page fault every 4 KiB costs more
// than the arithmetic of the 1024 logits on it.
constexpr int64_t kHugeBytes = int64_t(4) << 20;

inline Dtype dtype_of(const torch::stable::Tensor& tensor, const char* operation) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      check(false, operation, "float32, float64, bfloat16 or float16 tensors");
  }
  return Dtype::none;
}

inline Matrix matrix_of(const torch::stable::Tensor& tensor, const char* operation) {
  return {tensor.const_data_ptr(), tensor.stride(0), dtype_of(tensor, operation)};
}

inline TopKTeacher topk_of(const torch::stable::Tensor& indices,
                           const torch::stable::Tensor& log_probs,
                           const torch::stable::Tensor& log_tail) {
  return {indices.size(1),
          static_cast<const int32_t*>(indices.const_data_ptr()),
          matrix_of(log_probs, "kd_loss_topk"),
          {log_tail.const_data_ptr(), 1, dtype_of(log_tail, "kd_loss_topk")}};
}

inline void ask_for_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kHugeBytes) return;
  constexpr uintptr_t page = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + uintptr_t(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace fastscarce::cpu
