// csrc/cuda/device.cuh for the emulator: tensors are the CPU's, a launch runs at once.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include "emulator.h"

#define FASTSCARCE_DEVICE CPU

using cudaStream_t = void*;

namespace fastscarce::cuda {

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulator::dynamic_shared());
}

template <class T>
T load_global(const T* at) {
  emulator::count_loaded(sizeof(T));
  return *at;
}

inline float exp2_approximate(float x) { return std::exp2(x); }

inline unsigned cluster_rank() { return emulator::cluster_rank(); }
inline unsigned cluster_size() { return emulator::cluster_size(); }
inline void cluster_barrier(emulator::Place place = emulator::Place::current()) {
  emulator::meet(emulator::Operation::cluster_barrier, ~0u, 0, 0, place);
}
template <class T>
const T* cluster_shared(T* mine, unsigned rank) {
  const auto at = reinterpret_cast<unsigned char*>(mine) - emulator::dynamic_shared();
  return reinterpret_cast<const T*>(emulator::dynamic_shared_of(rank) + at);
}

struct Device {
  int multiprocessors, l2_bytes, shared_bytes;
  bool clusters;
};
inline Device device_of(const torch::stable::Tensor&) {
  return {1, 1 << 20, 227 << 10, emulator::has_clusters()};
}

inline cudaStream_t stream_of(const torch::stable::Tensor&) { return nullptr; }

struct Grid {
  dim3 blocks;
  unsigned threads;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
};

template <class... Parameters, class... Arguments>
void launch_kernel(const char*, void (*kernel)(Parameters...), const Grid& grid, cudaStream_t,
                   const Arguments&... arguments) {
  emulator::launch({grid.blocks, grid.threads, grid.shared_bytes, grid.cluster},
                   [&] { kernel(Parameters(arguments)...); });
}

}  // namespace fastscarce::cuda
