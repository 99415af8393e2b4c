#include "emulator.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

// Calls of the sanitizer's that tell it which stack is in use; absent without it.
#if defined(__SANITIZE_ADDRESS__)
#define FS_ASAN 1
#else
#define FS_ASAN 0
#endif

namespace emulator {
namespace {

constexpr size_t kStack = size_t(256) << 10;

enum class State { ready, waiting, done };

struct Request {
  Operation operation;
  unsigned mask;
  uint64_t value;
  int source;
  Place place;
};

struct Fiber {
  ucontext_t context;
  unsigned char* stack = nullptr;
  State state = State::ready;
  Request request{};
  uint64_t answer = 0;
};

struct Block {
  dim3 index;
  std::vector<Fiber> fibers;
  std::unique_ptr<unsigned char[]> shared;
};

struct Machine {
  const std::function<void()>* body = nullptr;
  ucontext_t host;
  const void* host_stack = nullptr;
  size_t host_stack_size = 0;
  std::vector<Block> blocks;  // of the cluster that runs
  Block* block = nullptr;
  Fiber* fiber = nullptr;
  unsigned rank = 0;
  std::exception_ptr failure;
  std::vector<unsigned char*> stacks;  // kept for the next launch
};
Machine machine;
unsigned order_seed = 0;
bool clusters_allowed = true;
uint64_t bytes_loaded = 0, loads_counted = 0;

bool of_block(Operation x) { return x == Operation::block_barrier || x == Operation::block_and; }

const char* name_of(Operation operation) {
  switch (operation) {
    case Operation::shuffle:
      return "a shuffle";
    case Operation::ballot:
      return "a ballot";
    case Operation::warp_barrier:
      return "__syncwarp";
    case Operation::block_barrier:
    case Operation::block_and:
      return "__syncthreads";
    default:
      return "the cluster's barrier";
  }
}

std::string text_of(const Fiber& fiber) {
  if (fiber.state == State::done) return "returned";
  const Request& r = fiber.request;
  return std::string("waits at ") + name_of(r.operation) + " of " + r.place.file_name() + ":" +
         std::to_string(r.place.line());
}

[[noreturn]] void diverged(const Block& block, size_t a, size_t b) {
  throw EmulationError("Threads diverge: thread " + std::to_string(a) + " of block " +
                       std::to_string(block.index.x) + " " + text_of(block.fibers[a]) +
                       ", thread " + std::to_string(b) + " " + text_of(block.fibers[b]) + ".");
}

bool same_request(const Fiber& a, const Fiber& b) {
  const Request &x = a.request, &y = b.request;
  return b.state == State::waiting && x.operation == y.operation && x.mask == y.mask &&
         x.place.line() == y.place.line() &&
         std::strcmp(x.place.file_name(), y.place.file_name()) == 0;
}

unsigned char* new_stack() {
  if (machine.stacks.empty()) {
    // A page below that can't be touched: a stack that overflows ends the process.
    void* const memory = mmap(nullptr, kStack + 4096, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, 4096, PROT_NONE);
    return static_cast<unsigned char*>(memory) + 4096;
  }
  unsigned char* const stack = machine.stacks.back();
  machine.stacks.pop_back();
#if FS_ASAN
  __asan_unpoison_memory_region(stack, kStack);
#endif
  return stack;
}

void to_host([[maybe_unused]] bool last) {
#if FS_ASAN
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, machine.host_stack,
                                 machine.host_stack_size);
#endif
  swapcontext(&machine.fiber->context, &machine.host);
#if FS_ASAN
  __sanitizer_finish_switch_fiber(fake, &machine.host_stack, &machine.host_stack_size);
#endif
}

void thread_main() {
#if FS_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &machine.host_stack, &machine.host_stack_size);
#endif
  try {
    (*machine.body)();
  } catch (...) {
    machine.failure = std::current_exception();
  }
  machine.fiber->state = State::done;
  to_host(true);
}

void resume(Block& block, size_t thread) {
  Fiber& fiber = block.fibers[thread];
  machine.block = &block;
  machine.fiber = &fiber;
  threadIdx = dim3(unsigned(thread), 0, 0);
  blockIdx = block.index;
#if FS_ASAN
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, kStack);
#endif
  swapcontext(&machine.host, &fiber.context);
#if FS_ASAN
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  if (machine.failure) std::rethrow_exception(std::exchange(machine.failure, nullptr));
}

// Lets the lanes of a warp go on that have all met the same operation.
bool release_warp(Block& block, size_t first) {
  const size_t lanes = std::min<size_t>(32, block.fibers.size() - first);
  bool released = false;
  for (size_t lane = 0; lane < lanes; ++lane) {
    Fiber& fiber = block.fibers[first + lane];
    if (fiber.state != State::waiting || of_block(fiber.request.operation) ||
        fiber.request.operation == Operation::cluster_barrier)
      continue;
    const unsigned mask = fiber.request.mask;
    const auto in_mask = [&](size_t other) { return (mask >> other & 1u) != 0; };
    if (!in_mask(lane)) throw EmulationError("A lane is outside its own mask.");
    bool all = true;
    unsigned votes = 0;
    for (size_t other = 0; other < 32; ++other) {
      if (!in_mask(other)) continue;
      if (other >= lanes) throw EmulationError("A mask names lanes that the block does not have.");
      const Fiber& peer = block.fibers[first + other];
      // A part of the warp may meet on its own before it comes here; should it never come, nothing
      // moves, and release_block says so.
      if (peer.state == State::ready || (peer.state == State::waiting && peer.request.mask != mask))
        all = false;
      else if (!same_request(fiber, peer))
        diverged(block, first + lane, first + other);
      else
        votes |= unsigned(peer.request.value & 1u) << other;
    }
    if (!all) continue;
    for (size_t other = 0; other < lanes; ++other) {
      if (!in_mask(other)) continue;
      Fiber& peer = block.fibers[first + other];
      const size_t source = size_t(peer.request.source);
      if (peer.request.operation == Operation::shuffle && (source >= lanes || !in_mask(source)))
        throw EmulationError("A shuffle reads a lane outside its mask.");
      peer.answer = peer.request.operation == Operation::shuffle
                        ? block.fibers[first + source].request.value
                        : votes;
    }
    for (size_t other = 0; other < lanes; ++other)
      if (in_mask(other)) block.fibers[first + other].state = State::ready;
    released = true;
  }
  return released;
}

// As above for a barrier of the block, when nothing else moves.
bool release_block(Block& block) {
  const Fiber& one = block.fibers[0];
  for (size_t i = 1; i < block.fibers.size(); ++i) {
    const Fiber& other = block.fibers[i];
    if (one.state == State::done ? other.state != State::done : !same_request(one, other))
      diverged(block, 0, i);
  }
  if (one.state == State::done || one.request.operation == Operation::cluster_barrier) return false;
  uint64_t holds = 1;
  for (const Fiber& fiber : block.fibers) holds &= fiber.request.value;
  for (Fiber& fiber : block.fibers) {
    fiber.answer = holds;
    fiber.state = State::ready;
  }
  return true;
}

// Runs a block until all its threads returned or wait for their cluster.
void run_block(Block& block) {
  const size_t threads = block.fibers.size();
  for (unsigned turn = order_seed;; turn += order_seed) {
    bool moved = false;
    for (size_t i = 0; i < threads; ++i) {
      const size_t thread = turn % 2 == 0 ? i : threads - 1 - i;
      if (block.fibers[thread].state != State::ready) continue;
      resume(block, thread);
      moved = true;
    }
    for (size_t first = 0; first < threads; first += 32)
      if (release_warp(block, first)) moved = true;
    if (!moved && !release_block(block)) return;
  }
}

void run_cluster() {
  for (;;) {
    for (size_t rank = 0; rank < machine.blocks.size(); ++rank) {
      machine.rank = unsigned(rank);
      run_block(machine.blocks[rank]);
    }
    const bool done = machine.blocks[0].fibers[0].state == State::done;
    for (Block& block : machine.blocks)
      if ((block.fibers[0].state == State::done) != done)
        throw EmulationError("A block returned while its cluster waits.");
    if (done) return;
    for (Block& block : machine.blocks) {
      if (!same_request(machine.blocks[0].fibers[0], block.fibers[0]))
        throw EmulationError("Blocks of a cluster wait at different barriers.");
      for (Fiber& fiber : block.fibers) fiber.state = State::ready;
    }
  }
}

struct StacksBack {
  ~StacksBack() {
    for (Block& block : machine.blocks)
      for (Fiber& fiber : block.fibers)
        if (fiber.stack) machine.stacks.push_back(fiber.stack);
    machine.blocks.clear();
  }
};

}  // namespace

void set_order(unsigned seed) { order_seed = seed; }
void set_clusters(bool has) { clusters_allowed = has; }
bool has_clusters() { return clusters_allowed; }
void count_loaded(size_t bytes) {
  bytes_loaded += bytes;
  ++loads_counted;
}
uint64_t loaded() { return bytes_loaded; }
uint64_t loads() { return loads_counted; }

void launch(const Shape& shape, const std::function<void()>& body) {
  if (machine.fiber) throw EmulationError("A kernel launches a kernel.");
  const unsigned cluster = shape.cluster == 0 ? 1 : shape.cluster;
  if (shape.blocks.x == 0 || shape.blocks.y == 0 || shape.threads == 0 || shape.threads > 1024 ||
      cluster > 8 || shape.blocks.x % cluster != 0)
    throw EmulationError("A GPU refuses the launch.");
  machine.body = &body;
  blockDim = dim3(shape.threads);
  gridDim = shape.blocks;
  const uint64_t clusters = uint64_t(shape.blocks.x) * shape.blocks.y / cluster;
  struct Idle {
    ~Idle() { machine.fiber = nullptr; }
  } idle;
  for (uint64_t k = 0; k < clusters; ++k) {
    const uint64_t at = (order_seed % 2 == 0 ? k : clusters - 1 - k) * cluster;
    const StacksBack back;
    machine.blocks.resize(cluster);
    for (unsigned rank = 0; rank < cluster; ++rank) {
      Block& block = machine.blocks[rank];
      block.index = dim3(unsigned((at + rank) % shape.blocks.x), unsigned(at / shape.blocks.x), 0);
      block.shared.reset(new unsigned char[shape.shared_bytes]);
      std::memset(block.shared.get(), 0xff, shape.shared_bytes);  // NaN
      block.fibers = std::vector<Fiber>(shape.threads);
      for (Fiber& fiber : block.fibers) {
        fiber.stack = new_stack();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, &thread_main, 0);
      }
    }
    run_cluster();
  }
}

uint64_t meet(Operation operation, unsigned mask, uint64_t value, int source, const Place& place) {
  Fiber& fiber = *machine.fiber;
  fiber.request = {operation, mask, value, source, place};
  fiber.state = State::waiting;
  to_host(false);
  return fiber.answer;
}

unsigned char* dynamic_shared() { return machine.block->shared.get(); }
unsigned char* dynamic_shared_of(unsigned rank) { return machine.blocks.at(rank).shared.get(); }
unsigned cluster_rank() { return machine.rank; }
unsigned cluster_size() { return unsigned(machine.blocks.size()); }

}  // namespace emulator

float __fmul_rn(float a, float b) { return a * b; }
double __dmul_rn(double a, double b) { return a * b; }
