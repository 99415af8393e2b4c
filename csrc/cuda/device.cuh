// What a kernel and its launcher need of CUDA beside the language: launches, streams, shared memory
// of a size known at the launch.
//
// The tests compile the same sources with g++ for an emulator of CUDA's execution model, and name
// its header as FASTSCARCE_EMULATOR; it offers what follows under the same names.
#pragma once

#ifdef FASTSCARCE_EMULATOR
#include FASTSCARCE_EMULATOR
#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>

// The dispatch key of the operators.
#define FASTSCARCE_DEVICE CUDA

namespace fastscarce::cuda {

using torch::stable::accelerator::DeviceGuard;

template <class T>
__device__ inline T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

// Of the logits: the emulator counts them.
template <class T>
__device__ inline T load_global(const T* at) {
  return *at;
}

// 2^x within 2 ulp; results below 2^-126 are 0.
__device__ inline float exp2_approximate(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// ---- clusters of blocks; a block is one of its own where the GPU has none
__device__ inline unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().block_rank();
#else
  return 0;
#endif
}
__device__ inline unsigned cluster_size() {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().num_blocks();
#else
  return 1;
#endif
}
__device__ inline void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#endif
}
// Where block `rank` has what lies at `mine` in the shared memory of this block.
template <class T>
__device__ inline const T* cluster_shared(T* mine, [[maybe_unused]] unsigned rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
#else
  return mine;
#endif
}

inline cudaStream_t stream_of(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// More has to be asked for.
constexpr size_t kUsualShared = size_t(48) << 10;

struct Grid {
  dim3 blocks;
  unsigned threads;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks a cluster; divides the blocks
};

inline void check_cuda(cudaError_t error, const char* operation) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(operation) + " on CUDA: " + cudaGetErrorString(error));
}

// What the launchers choose by.
struct Device {
  int multiprocessors, l2_bytes, shared_bytes;  // shared_bytes: at most, of a block
  bool clusters;
};

inline Device device_of(const torch::stable::Tensor& tensor) {
  constexpr int kMostDevices = 64;
  // Filled once a device.
  static Device known[kMostDevices];
  static std::atomic<bool> filled[kMostDevices];
  const int index = tensor.get_device();
  const bool fits = index >= 0 && index < kMostDevices;
  if (fits && filled[index].load(std::memory_order_acquire)) return known[index];
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, name, index), "kd_loss");
    return value;
  };
  const Device device = {attribute(cudaDevAttrMultiProcessorCount),
                         attribute(cudaDevAttrL2CacheSize),
                         attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                         attribute(cudaDevAttrComputeCapabilityMajor) >= 9};
  static std::mutex writing;
  const std::lock_guard<std::mutex> guard(writing);
  if (fits && !filled[index].load(std::memory_order_relaxed)) {
    known[index] = device;
    filled[index].store(true, std::memory_order_release);
  }
  return device;
}

template <class... Parameters, class... Arguments>
void launch_kernel(const char* operation, void (*kernel)(Parameters...), const Grid& grid,
                   cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {grid.cluster, 1, 1};
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  if (grid.shared_bytes > kUsualShared)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    int(grid.shared_bytes)),
               operation);
  check_cuda(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), operation);
}

}  // namespace fastscarce::cuda

#endif
