// Tensors as the CUDA kernels take them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../checks.h"
#include "device.cuh"

namespace fastscarce::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Dtype : int32_t { none, float32, float64, bfloat16, float16 };

struct Matrix {
  const void* data = nullptr;
  int64_t row_stride = 0;
  Dtype dtype = Dtype::none;
};

__device__ inline double number(double x) { return x; }
__device__ inline float number(float x) { return x; }
__device__ inline float number(__half x) { return __half2float(x); }
__device__ inline float number(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class A>
__device__ inline void put(A* to, A x) {
  *to = x;
}
__device__ inline void put(__half* to, float x) { *to = __float2half_rn(x); }
__device__ inline void put(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

// Element i of a row whose dtype the kernel was not compiled for; the branch is the same for all.
template <class A>
__device__ inline A element(const Matrix& m, int64_t row, int64_t i) {
  const int64_t at = row * m.row_stride + i;
  switch (m.dtype) {
    case Dtype::float32:
      return A(load_global(static_cast<const float*>(m.data) + at));
    case Dtype::float64:
      return A(load_global(static_cast<const double*>(m.data) + at));
    case Dtype::bfloat16:
      return A(number(load_global(static_cast<const __nv_bfloat16*>(m.data) + at)));
    default:
      return A(number(load_global(static_cast<const __half*>(m.data) + at)));
  }
}

template <class A>
__device__ inline A shuffle_down(A value, int by) {
  return __shfl_down_sync(0xffffffffu, value, by);
}

inline Dtype dtype_of(const Tensor& tensor, const char* operation) {
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

inline Matrix matrix_of(const Tensor& tensor, const char* operation) {
  return {tensor.const_data_ptr(), tensor.stride(0), dtype_of(tensor, operation)};
}

}  // namespace fastscarce::cuda
