// CUDA's execution model on one thread of the host, for tests: the kernels of csrc/cuda are
// compiled with g++ against this header and run as written.
//
// Every thread of a block (of a cluster of blocks) is a fiber. It runs until it meets a barrier or
// a warp-wide operation, and goes on when all whom that concerns have met the same one. What a GPU
// leaves undefined is an EmulationError here: threads of a warp at different operations, a thread
// that returned while the others wait, a lane outside the mask. Shared memory is uninitialised, as
// on a GPU; built with -fsanitize=address,undefined, reads past its end, past a tensor's end and
// misaligned vector accesses end the process. Fibers and blocks run in an order that `set_order`
// chooses, so that a missing barrier shows as a result that depends on it.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>

// ---- the language
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One block runs at a time up to its end or to a barrier of its cluster, so blocks can share the
// memory: what it held is lost there.
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

using __nv_bfloat16 = c10::BFloat16;
using __half = c10::Half;
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline float __half2float(__half x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }

using std::isnan;

namespace emulator {

struct EmulationError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Place = std::source_location;

struct Shape {
  dim3 blocks;
  unsigned threads;
  size_t shared_bytes;
  unsigned cluster;  // blocks a cluster
};

// Runs `body` in every thread of the grid.
void launch(const Shape& shape, const std::function<void()>& body);
// Of fibers and blocks; 0 is ascending.
void set_order(unsigned seed);
// Whether launchers may use clusters.
void set_clusters(bool has);
bool has_clusters();

// Bytes that kernels loaded, and in how many loads, of those loads they want counted.
void count_loaded(size_t bytes);
uint64_t loaded();
uint64_t loads();

// ---- what a running thread asks for
enum class Operation { shuffle, ballot, warp_barrier, block_barrier, block_and, cluster_barrier };
// Meets the others of the mask (the block, the cluster), gives them `value`, and takes the value of
// lane `source` (ballot, block_and: what all gave).
uint64_t meet(Operation operation, unsigned mask, uint64_t value, int source, const Place& place);
unsigned char* dynamic_shared();
unsigned cluster_rank();
unsigned cluster_size();
unsigned char* dynamic_shared_of(unsigned rank);

template <class T>
T shuffle(unsigned mask, T value, int source, const Place& place) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet(Operation::shuffle, mask, bits, source, place);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

// ---- barriers and warp-wide operations
inline void __syncthreads(emulator::Place place = emulator::Place::current()) {
  emulator::meet(emulator::Operation::block_barrier, ~0u, 0, 0, place);
}
inline int __syncthreads_and(int holds, emulator::Place place = emulator::Place::current()) {
  return int(emulator::meet(emulator::Operation::block_and, ~0u, holds != 0, 0, place));
}
inline void __syncwarp(unsigned mask = ~0u, emulator::Place place = emulator::Place::current()) {
  emulator::meet(emulator::Operation::warp_barrier, mask, 0, 0, place);
}
inline unsigned __ballot_sync(unsigned mask, int holds,
                              emulator::Place place = emulator::Place::current()) {
  return unsigned(emulator::meet(emulator::Operation::ballot, mask, holds != 0, 0, place));
}
inline int warp_lane() { return int(threadIdx.x % 32); }
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              emulator::Place place = emulator::Place::current()) {
  const int lane = warp_lane();
  return emulator::shuffle(mask, value, lane / width * width + source % width, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, int width = 32,
                   emulator::Place place = emulator::Place::current()) {
  const int lane = warp_lane();
  return emulator::shuffle(mask, value, lane % width + by < width ? lane + by : lane, place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32,
                  emulator::Place place = emulator::Place::current()) {
  const int lane = warp_lane(), source = lane ^ by;
  return emulator::shuffle(mask, value, source / width <= lane / width ? source : lane, place);
}

// ---- memory; one host thread runs them all, so an operation is atomic and a fence nothing
template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}
template <class T>
T atomicOr(T* at, T value) {
  const T before = *at;
  *at |= value;
  return before;
}
inline void __threadfence() {}
template <class T>
T __ldcg(const T* at) {
  return *at;
}
template <class T>
void __stwb(T* at, T value) {
  *at = value;
}

// ---- arithmetic
inline int __popc(unsigned x) { return std::popcount(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline double __longlong_as_double(int64_t x) { return std::bit_cast<double>(x); }
inline int64_t __double_as_longlong(double x) { return std::bit_cast<int64_t>(x); }
// Not inlined: a product that no addition is joined to.
float __fmul_rn(float a, float b);
double __dmul_rn(double a, double b);
