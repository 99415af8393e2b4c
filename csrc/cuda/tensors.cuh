// Tensors as the CUDA kernels take them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../checks.h"
#include "device.cuh"

namespace fastscarce::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Dtype : int32_t { none, float32, float64, bfloat16, float16 };

template <class S>
constexpr Dtype dtype_of() {
  if constexpr (std::is_same_v<S, float>)
    return Dtype::float32;
  else if constexpr (std::is_same_v<S, double>)
    return Dtype::float64;
  else if constexpr (std::is_same_v<S, __nv_bfloat16>)
    return Dtype::bfloat16;
  else
    return Dtype::float16;
}

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

// f(pointer to the row) of a dtype that the kernel was not compiled for; the branch is the same for
// all.
template <class F>
__device__ inline void with_row(const Matrix& m, int64_t row, F f) {
  const int64_t at = row * m.row_stride;
  switch (m.dtype) {
    case Dtype::float32:
      return f(static_cast<const float*>(m.data) + at);
    case Dtype::float64:
      return f(static_cast<const double*>(m.data) + at);
    case Dtype::bfloat16:
      return f(static_cast<const __nv_bfloat16*>(m.data) + at);
    default:
      return f(static_cast<const __half*>(m.data) + at);
  }
}

template <class A>
__device__ inline A element(const Matrix& m, int64_t row, int64_t i) {
  A out;
  with_row(m, row, [&](const auto* data) { out = A(number(load_global(data + i))); });
  return out;
}

// n elements that lie one after the other: 16 bytes at a time (8 or 4 where there are no more)
// where they begin on such a boundary.
template <class T, int n>
__device__ inline void load_run(const T* at, T (&to)[n]) {
  constexpr size_t bytes = n * sizeof(T);
  using Word = std::conditional_t<bytes % 16 == 0, uint4,
                                  std::conditional_t<bytes % 8 == 0, uint2, uint32_t>>;
  if (reinterpret_cast<uintptr_t>(at) % sizeof(Word) == 0) {
    Word words[bytes / sizeof(Word)];
#pragma unroll
    for (int k = 0; k < int(bytes / sizeof(Word)); ++k)
      words[k] = load_global(reinterpret_cast<const Word*>(at) + k);
    memcpy(to, words, bytes);
    return;
  }
#pragma unroll
  for (int j = 0; j < n; ++j) to[j] = load_global(at + j);
}

// Elements from..from + n of a row of so many classes, `outside` where they are outside it.
template <class A, int n>
__device__ inline void elements(const Matrix& m, int64_t row, int from, int classes, A outside,
                                A (&to)[n]) {
  with_row(m, row, [&](const auto* data) {
    using T = std::remove_const_t<std::remove_reference_t<decltype(*data)>>;
    if (from >= 0 && from <= classes - n) {
      T values[n];
      load_run(data + from, values);
#pragma unroll
      for (int j = 0; j < n; ++j) to[j] = A(number(values[j]));
      return;
    }
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const int i = from + j;
      to[j] = i >= 0 && i < classes ? A(number(load_global(data + i))) : outside;
    }
  });
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
