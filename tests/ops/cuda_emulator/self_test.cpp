// Kernels that are wrong, or right, in one way each: `self_test NAME` runs one. What the emulator
// refuses goes to stderr with exit status 2; what it computes is printed.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "emulator.h"

namespace {

// Sums 0..63 through shared memory; `barrier`: whether it waits where it has to.
unsigned sum_of_block(bool barrier) {
  unsigned out = 0;
  emulator::launch({1, 64, 64 * sizeof(unsigned), 1}, [&] {
    auto* const shared = reinterpret_cast<unsigned*>(emulator::dynamic_shared());
    shared[threadIdx.x] = threadIdx.x;
    if (barrier) __syncthreads();
    unsigned sum = 0;
    for (int i = 0; i < 64; ++i) sum += shared[i];
    if (threadIdx.x == 17) out = sum;
  });
  return out;
}

void sum() {
  for (unsigned order : {0u, 1u}) {
    emulator::set_order(order);
    std::printf("%u\n", sum_of_block(true));
  }
}

void missing_barrier() {
  emulator::set_order(0);
  std::printf("%d\n", sum_of_block(false) == 2016);
}

void warp_sum() {
  emulator::launch({1, 96, 0, 1}, [&] {
    unsigned value = threadIdx.x;
    for (int by = 16; by > 0; by /= 2) value += __shfl_xor_sync(~0u, value, by);
    const unsigned first = __shfl_sync(~0u, value, 0);
    const unsigned votes = __ballot_sync(~0u, threadIdx.x % 2 == 0);
    if (threadIdx.x == 95) std::printf("%u %u\n", first, __popc(votes));
  });
}

void cluster_sum() {
  emulator::launch({4, 32, 4, 2}, [&] {
    auto* const mine = reinterpret_cast<unsigned*>(emulator::dynamic_shared());
    if (threadIdx.x == 0) *mine = blockIdx.x + 1;
    emulator::meet(emulator::Operation::cluster_barrier, ~0u, 0, 0, emulator::Place::current());
    if (threadIdx.x == 0 && emulator::cluster_rank() == 0)
      std::printf("%u\n", *mine + *reinterpret_cast<unsigned*>(emulator::dynamic_shared_of(1)));
    emulator::meet(emulator::Operation::cluster_barrier, ~0u, 0, 0, emulator::Place::current());
  });
}

void diverging_barrier() {
  emulator::launch({1, 64, 0, 1}, [] {
    if (threadIdx.x != 40) __syncthreads();
  });
}

void two_barriers() {
  emulator::launch({1, 64, 0, 1}, [] {
    if (threadIdx.x < 32)
      __syncthreads();
    else
      __syncthreads();
  });
}

void diverging_shuffle() {
  emulator::launch({1, 32, 0, 1}, [] {
    if (threadIdx.x < 16) __shfl_xor_sync(~0u, 1.0f, 1);
  });
}

void outside_mask() {
  emulator::launch({1, 32, 0, 1}, [] {
    if (threadIdx.x < 16) __shfl_sync(0xffffu, 1.0f, 20);
  });
}

void shared_out_of_bounds() {
  emulator::launch({1, 32, 32 * sizeof(float), 1}, [] {
    reinterpret_cast<float*>(emulator::dynamic_shared())[threadIdx.x + 1] = 0;
  });
}

void static_shared_out_of_bounds() {
  emulator::launch({1, 32, 0, 1}, [] {
    __shared__ float part[31];
    volatile unsigned i = threadIdx.x;
    part[i] = 0;
    __syncthreads();
    if (part[0] != 0) std::abort();
  });
}

void global_out_of_bounds() {
  const std::vector<float> data(1000);
  volatile float sink;
  emulator::launch({1, 32, 0, 1}, [&] { sink = data.data()[threadIdx.x + 969]; });
}

void misaligned() {
  std::vector<float> data(1000);
  volatile uint32_t sink;
  emulator::launch({1, 32, 0, 1},
                   [&] { sink = reinterpret_cast<const uint4*>(data.data() + 1)[threadIdx.x].x; });
}

}  // namespace

int main(int count, char** arguments) {
  const std::map<std::string, void (*)()> all = {
      {"sum", sum},
      {"missing_barrier", missing_barrier},
      {"warp_sum", warp_sum},
      {"cluster_sum", cluster_sum},
      {"diverging_barrier", diverging_barrier},
      {"two_barriers", two_barriers},
      {"diverging_shuffle", diverging_shuffle},
      {"outside_mask", outside_mask},
      {"shared_out_of_bounds", shared_out_of_bounds},
      {"static_shared_out_of_bounds", static_shared_out_of_bounds},
      {"global_out_of_bounds", global_out_of_bounds},
      {"misaligned", misaligned},
  };
  try {
    all.at(count > 1 ? arguments[1] : "")();
  } catch (const emulator::EmulationError& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  return 0;
}
