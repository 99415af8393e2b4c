// topk, pack_topk and confidence on a GPU, over rows that are read once (held_rows.cuh).
//
// topk finds the k-th largest logit by its bits, eight at a time from the highest: a histogram in
// shared memory of those that agree so far, a round a byte that the dtype has, whatever k is. Where
// more logits equal it than are wanted, more rounds find the last index among them. The k are then
// collected in any order and sorted in shared memory. Counts are integers and every sum has a fixed
// order: the result is the same each time. pack_topk is the same kernel with another end: bytes of
// a teacher's table; unpack_topk reads them.
#include <math.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "device.cuh"
#define FS_HD __host__ __device__
#include "../selection_arguments.h"
#include "tensors.cuh"

namespace fastscarce::cuda {
namespace {

// clang-format off: each needs those before it
#include "../math/kd_row.h"
#include "../math/selection.h"
#include "../math/record.h"
#include "block.cuh"
#include "chunks.cuh"
#include "exponential.cuh"
#include "held_rows.cuh"
// clang-format on

// Chosen logits are sorted in shared memory.
constexpr int64_t kMostChosen = 2048;
constexpr int64_t kMostGrid = int64_t(1) << 20;

// Numbers whose order as unsigned integers is that of the logits. NaN counts as -inf here: the sum
// of exponentials finds it.
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(isnan(x) ? -INFINITY : x + 0.0f);  // -0 becomes 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline uint64_t ordered(double x) {
  const uint64_t bits = __double_as_longlong(isnan(x) ? -double(INFINITY) : x + 0.0);
  return bits & 0x8000000000000000ull ? ~bits : bits | 0x8000000000000000ull;
}
__device__ inline float logit_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
__device__ inline double logit_of(uint64_t key) {
  return __longlong_as_double(
      int64_t(key & 0x8000000000000000ull ? key & 0x7fffffffffffffffull : ~key));
}

// Bytes of a key in which numbers of S differ: the others follow from the sign.
template <class S>
constexpr int kKeyBytes = sizeof(S) == 2 ? (std::is_same_v<S, __half> ? 3 : 2) : int(sizeof(S));

constexpr int kDigits = 256;
static_assert(kDigits == kThreads);

// Where the `wanted`-th largest is: its digit, how many have that, how many of those are wanted.
struct Digit {
  int digit, count, wanted;
};

// Of the histograms of all blocks of a row, by all its threads.
template <class Threads>
__device__ inline Digit find_digit(const Threads& group, unsigned* histogram, int wanted) {
  __shared__ int sums[kThreads / 32];
  __shared__ Digit found;
  if (group.blocks > 1)
    cluster_barrier();
  else
    __syncthreads();
  // A thread a digit, from the largest.
  const int digit = kDigits - 1 - int(threadIdx.x), lane = int(threadIdx.x) % 32;
  int count = 0;
  for (int k = 0; k < group.blocks; ++k)
    count +=
        int(group.blocks > 1 ? cluster_shared(histogram, unsigned(k))[digit] : histogram[digit]);
  int until = count;
  for (int by = 1; by < 32; by *= 2) {
    const int other = __shfl_sync(0xffffffffu, until, lane < by ? lane : lane - by);
    if (lane >= by) until += other;
  }
  if (lane == 31) sums[threadIdx.x / 32] = until;
  __syncthreads();
  for (int warp = 0; warp < int(threadIdx.x) / 32; ++warp) until += sums[warp];
  if (until - count < wanted && wanted <= until) found = {digit, count, wanted - (until - count)};
  __syncthreads();
  return found;
}

// Counts digits, those of a run at once: near logits have the same.
struct Counter {
  unsigned* histogram;
  int last = 0;
  unsigned run = 0;

  __device__ void add(int digit) {
    if (digit != last) {
      flush();
      last = digit;
    }
    ++run;
  }
  __device__ void flush() {
    if (run != 0) atomicAdd(&histogram[last], run);
    run = 0;
  }
};

struct TopKCall {
  int64_t rows, classes;
  int k, padded;     // padded: the next power of two
  int room, memory;  // of HeldRows; where TopKMemory begins in shared memory
  Matrix logits;
  int32_t* indices;
  void* log_probs;
  void* log_tail;
  // Of rows as bytes.
  uint8_t* records;
  RecordLayout layout;
  const int64_t* tags;
};

// In shared memory, beside the row. `found`: of the k, in this block.
template <class Key>
struct TopKMemory {
  Key* keys;
  int32_t* places;
  unsigned* histograms;  // two, in turn: one is cleared while the other is read
  unsigned* found;

  __device__ TopKMemory(unsigned char* memory, int padded)
      : keys(reinterpret_cast<Key*>(memory)),
        places(reinterpret_cast<int32_t*>(keys + padded)),
        histograms(reinterpret_cast<unsigned*>(places + padded)),
        found(histograms + 2 * kDigits) {}
  static constexpr int64_t bytes(int padded) {
    return padded * int64_t(sizeof(Key) + 4) + (2 * kDigits + 4) * 4;
  }
};

// Bitonic, over a block: falling keys, rising indices.
template <class Key>
__device__ inline void sort(const TopKMemory<Key>& memory, int count) {
  Key* const keys = memory.keys;
  int32_t* const places = memory.places;
  for (int size = 2; size <= count; size *= 2)
    for (int step = size / 2; step > 0; step /= 2) {
      for (int i = int(threadIdx.x); i < count; i += kThreads) {
        const int j = i ^ step;
        if (j <= i) continue;
        const bool before = keys[i] > keys[j] || (keys[i] == keys[j] && places[i] < places[j]);
        if (before == ((i & size) == 0)) continue;
        const Key key = keys[i];
        const int32_t place = places[i];
        keys[i] = keys[j];
        places[i] = places[j];
        keys[j] = key;
        places[j] = place;
      }
      __syncthreads();
    }
}

// A row as bytes, by all threads of a block.
template <class A, class Key>
__device__ inline void put_record(const TopKCall& call, int64_t row, const TopKMemory<Key>& memory,
                                  const TopKRow<A>& whole) {
  __shared__ uint32_t scale;
  uint8_t* const record = call.records + row * call.layout.stride;
  const auto log_prob = [&](int i) {
    return float(topk_log_prob(whole, logit_of(memory.keys[i])));
  };
  if (threadIdx.x == 0) {
    scale = 0;
    if (call.layout.codes) {
      int lowest = call.k - 1;
      while (lowest > 0 && isinf(log_prob(lowest))) --lowest;
      scale = record_scale(isinf(log_prob(lowest)) ? 0.0f : log_prob(lowest));
    }
    put_rest(record, call.layout, float(whole.log_tail), scale,
             call.tags ? uint32_t(call.tags[row]) : 0);
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < call.k; i += kThreads)
    put_class(record, call.layout, i, memory.places[i], log_prob(i), scale);
}

template <class Rows, bool Packed>
__global__ void __launch_bounds__(kThreads, Rows::blocks) topk_kernel(const TopKCall call) {
  using S = typename Rows::S;
  using A = typename Rows::A;
  using Key = decltype(ordered(A(0)));
  constexpr int n = Rows::n, kKeyBits = 8 * int(sizeof(Key));
  const TopKMemory<Key> memory(dynamic_shared<unsigned char>() + call.memory, call.padded);
  const typename ExponentialOf<S>::type at_one(1.0);
  Rows held(call.logits, {}, nullptr, call.classes, call.room);
  int turn = 0;
  // One round; digit_of(key, i): that of element i, or -1 where it is not counted.
  const auto round = [&](bool fresh, int wanted, auto digit_of) {
    unsigned* const histogram = memory.histograms + turn * kDigits;
    turn ^= 1;
    histogram[threadIdx.x] = 0;
    if (threadIdx.x == 0) *memory.found = 0;
    __syncthreads();
    Counter counter = {histogram};
    const auto count = [&](int from, const A(&s)[n], const A(&)[n]) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if (from + j < 0 || from + j >= held.classes) continue;
        const int digit = digit_of(s[j], from + j);
        if (digit >= 0) counter.add(digit);
      }
    };
    if (fresh)
      held.first_sweep(count);
    else
      held.sweep(count);
    counter.flush();
    return find_digit(held.group, histogram, wanted);
  };
  for (int64_t row = held.from_row(); row < call.rows; row += held.row_step()) {
    held.place(row);
    A top = A(-INFINITY);
    Key last = 0, known = 0;  // the k-th largest, and which of its bits are settled
    Digit at = {0, 0, call.k};
    for (int shift = kKeyBits - 8; shift >= kKeyBits - 8 * kKeyBytes<S>; shift -= 8) {
      at = round(known == 0, at.wanted, [&](A x, int) {
        top = maximum(top, x);
        const Key key = ordered(x);
        return (key & known) == last ? int(key >> shift & 255u) : -1;
      });
      last |= Key(at.digit) << shift;
      known |= Key(255) << shift;
    }
    if (!(last >> (kKeyBits - 1))) last |= ~known;
    // Of more that equal it, those with the smallest indices.
    int last_place = INT32_MAX;
    if (at.count > at.wanted) {
      const bool high = call.classes > 65536;
      uint32_t place = high ? 0 : 0xffff0000u, settled = place;
      for (int shift = high ? 24 : 8; shift >= 0; shift -= 8) {
        at = round(false, at.wanted, [&](A x, int i) {
          const uint32_t from_end = ~uint32_t(i);
          return ordered(x) == last && (from_end & settled) == place ? int(from_end >> shift & 255u)
                                                                     : -1;
        });
        place |= uint32_t(at.digit) << shift;
        settled |= 255u << shift;
      }
      last_place = int(~place);
    }
    top = held.group.reduce(top, [](A a, A b) { return maximum(a, b); });
    top = top > A(-INFINITY) ? top : A(0);
    // The others' sum on its own: no difference of near numbers.
    A sums[] = {A(0), A(0)};  // of the k, of the others
    held.sweep([&](int from, const A(&s)[n], const A(&)[n]) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if (from + j < 0 || from + j >= held.classes) continue;
        const Key key = ordered(s[j]);
        if (key > last || (key == last && from + j <= last_place)) {
          const unsigned place = atomicAdd(memory.found, 1u);
          memory.keys[place] = key;
          memory.places[place] = from + j;
        } else {
          sums[1] += at_one(s[j] - top);
        }
        if (isnan(s[j])) sums[1] = s[j];
      }
    });
    if (held.group.blocks > 1)
      cluster_barrier();
    else
      __syncthreads();
    if (held.group.rank == 0) {
      unsigned found = *memory.found;
      for (int k = 1; k < held.group.blocks; ++k) {
        const unsigned more = *cluster_shared(memory.found, unsigned(k));
        for (unsigned i = threadIdx.x; i < more; i += kThreads) {
          memory.keys[found + i] = cluster_shared(memory.keys, unsigned(k))[i];
          memory.places[found + i] = cluster_shared(memory.places, unsigned(k))[i];
        }
        found += more;
      }
      for (int i = call.k + int(threadIdx.x); i < call.padded; i += kThreads) {
        memory.keys[i] = 0;
        memory.places[i] = INT32_MAX;
      }
      __syncthreads();
      sort(memory, call.padded);
      for (int i = int(threadIdx.x); i < call.k; i += kThreads)
        sums[0] += exponential(logit_of(memory.keys[i]) - top);
    }
    held.group.sum(sums);
    if (held.group.rank != 0) continue;
    const TopKRow<A> whole = finish_topk(top, sums[0], sums[1], call.classes - call.k);
    if constexpr (Packed) {
      put_record(call, row, memory, whole);
      continue;
    }
    for (int i = int(threadIdx.x); i < call.k; i += kThreads) {
      call.indices[row * call.k + i] = memory.places[i];
      static_cast<A*>(call.log_probs)[row * call.k + i] =
          topk_log_prob(whole, logit_of(memory.keys[i]));
    }
    if (threadIdx.x == 0) static_cast<A*>(call.log_tail)[row] = whole.log_tail;
  }
  held.group.leave();
}

struct ConfidenceCall {
  int64_t rows, classes;
  int room;  // of HeldRows
  Matrix logits;
  double threshold, temperature;
  int64_t* label;
  void* confidence;
  void* margin;
  void* entropy;
  bool* mask;
};

// The two largest of a part of a row, and where the first is.
template <class A>
struct Largest {
  A first, second;
  int place;

  __device__ void add(A x, int i) {  // of rising i
    const bool larger = x > first;
    second = larger ? first : maximum(second, x);
    place = larger ? i : place;
    first = larger ? x : first;
  }
  __device__ static Largest of(const Largest& a, const Largest& b) {
    const bool left = a.first > b.first || (a.first == b.first && a.place < b.place);
    const Largest& win = left ? a : b;
    const Largest& lose = left ? b : a;
    return {win.first, maximum(win.second, lose.first), win.place};
  }
};

template <class Rows>
__global__ void __launch_bounds__(kThreads, Rows::blocks)
    confidence_kernel(const ConfidenceCall call) {
  using A = typename Rows::A;
  constexpr int n = Rows::n;
  const A rate = A(1.0 / call.temperature);
  const typename ExponentialOf<typename Rows::S>::type at_temperature(1.0 / call.temperature);
  Rows held(call.logits, {}, nullptr, call.classes, call.room);
  for (int64_t row = held.from_row(); row < call.rows; row += held.row_step()) {
    held.place(row);
    Largest<A> own = {A(-INFINITY), A(-INFINITY), INT32_MAX};
    held.first_sweep([&](int from, const A(&s)[n], const A(&)[n]) {
#pragma unroll
      for (int j = 0; j < n; ++j) own.add(s[j], from + j);
    });
    own = held.group.reduce(
        own, [](const Largest<A>& a, const Largest<A>& b) { return Largest<A>::of(a, b); });
    const A top = own.first > A(-INFINITY) ? own.first : A(0);
    A sums[] = {A(0), A(0)};
    held.sweep([&](int, const A(&s)[n], const A(&)[n]) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const A x = s[j] - top, e = at_temperature(x);
        sums[0] += e;
        sums[1] += select(e, e * (x * rate), A(0));
      }
    });
    held.group.sum(sums);
    if (!held.group.leads()) continue;
    ConfidenceRow<A> out = {A(NAN), A(NAN), A(NAN)};
    const bool answer = sums[0] > A(0);
    if (answer) out = finish_confidence(sums[0], exponential((own.second - top) * rate), sums[1]);
    call.label[row] = answer ? own.place : kNoAnswer;
    static_cast<A*>(call.confidence)[row] = out.confidence;
    static_cast<A*>(call.margin)[row] = out.margin;
    static_cast<A*>(call.entropy)[row] = out.entropy;
    call.mask[row] = out.confidence >= A(call.threshold);
  }
  held.group.leave();
}

TopKCall topk_call(const Tensor& logits, int64_t k, const char* operation) {
  check(k <= kMostChosen, operation, "k of at most 2048 on a GPU");
  TopKCall call{};
  call.rows = logits.size(0);
  call.classes = logits.size(1);
  call.k = int(k);
  call.padded = 1;
  while (call.padded < call.k) call.padded *= 2;
  call.logits = matrix_of(logits, operation);
  return call;
}

template <bool Packed>
void launch_topk(TopKCall call, const Tensor& logits, const char* operation) {
  const Device device = device_of(logits);
  with_one_row<Kinds::split>(call.logits, call.classes, [&](auto type) {
    using Rows = typename decltype(type)::type;
    using Key = decltype(ordered(typename Rows::A(0)));
    const RowsLaunch launch = launch_of<Rows>(call.rows, call.classes, device, kMostGrid, 0,
                                              TopKMemory<Key>::bytes(call.padded));
    call.room = launch.room;
    call.memory = launch.memory;
    launch_kernel(operation, topk_kernel<Rows, Packed>, launch.grid, stream_of(logits), call);
  });
}

std::tuple<Tensor, Tensor, Tensor> topk(Tensor logits, int64_t k) {
  check_topk_arguments(logits, k);
  const DeviceGuard guard(logits.get_device());
  TopKCall call = topk_call(logits, k, "topk");
  const bool float64 = call.logits.dtype == Dtype::float64;
  const ScalarType type = float64 ? ScalarType::Double : ScalarType::Float;
  Tensor indices = empty_of(logits, call.rows, k, ScalarType::Int);
  Tensor log_probs = empty_of(logits, call.rows, k, type);
  Tensor log_tail = empty_of(logits, call.rows, -1, type);
  if (call.rows == 0) return {indices, log_probs, log_tail};
  call.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  call.log_probs = log_probs.mutable_data_ptr();
  call.log_tail = log_tail.mutable_data_ptr();
  launch_topk<false>(call, logits, "topk");
  return {indices, log_probs, log_tail};
}

Tensor pack_topk(Tensor logits, int64_t k, bool codes, std::optional<Tensor> tags) {
  check_pack_arguments(logits, k, tags);
  const DeviceGuard guard(logits.get_device());
  TopKCall call = topk_call(logits, k, "pack_topk");
  call.layout = record_layout(call.classes, k, codes, tags.has_value());
  Tensor records = empty_of(logits, call.rows, call.layout.stride, ScalarType::Byte);
  if (call.rows == 0) return records;
  call.tags = tags ? static_cast<const int64_t*>(tags->const_data_ptr()) : nullptr;
  call.records = static_cast<uint8_t*>(records.mutable_data_ptr());
  launch_topk<true>(call, logits, "pack_topk");
  return records;
}

// A warp a row: bytes of neighbours are read together.
__global__ void unpack_kernel(const uint8_t* records, RecordLayout layout, int64_t rows,
                              int32_t* indices, void* log_probs, uint16_t* log_tail) {
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (row >= rows) return;
  const int32_t lane = int32_t(threadIdx.x % 32);
  const uint8_t* const record = records + row * layout.stride;
  const int64_t first = row * layout.k;
  get_classes(record, layout, lane, 32, indices + first, log_probs, first);
  if (lane == 0) log_tail[row] = get_tail(record, layout);
}

std::tuple<Tensor, Tensor, Tensor> unpack_topk(Tensor records, int64_t classes, int64_t k,
                                               bool codes, bool tagged) {
  const RecordLayout layout = record_layout(classes, k, codes, tagged);
  check_unpack_arguments(records, classes, k, layout.stride);
  const DeviceGuard guard(records.get_device());
  const int64_t rows = records.size(0);
  Tensor indices = empty_of(records, rows, k, ScalarType::Int);
  Tensor log_probs = empty_of(records, rows, k, codes ? ScalarType::Float : ScalarType::Half);
  Tensor log_tail = empty_of(records, rows, -1, ScalarType::Half);
  if (rows == 0) return {indices, log_probs, log_tail};
  constexpr int64_t kRows = kThreads / 32;
  const Grid grid = {dim3(unsigned((rows + kRows - 1) / kRows)), kThreads};
  launch_kernel("unpack_topk", unpack_kernel, grid, stream_of(records),
                static_cast<const uint8_t*>(records.const_data_ptr()), layout, rows,
                static_cast<int32_t*>(indices.mutable_data_ptr()), log_probs.mutable_data_ptr(),
                static_cast<uint16_t*>(log_tail.mutable_data_ptr()));
  return {indices, log_probs, log_tail};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> confidence(Tensor logits, double threshold,
                                                              double temperature) {
  check_confidence_arguments(logits, temperature);
  const DeviceGuard guard(logits.get_device());
  ConfidenceCall call{};
  call.rows = logits.size(0);
  call.classes = logits.size(1);
  call.logits = matrix_of(logits, "confidence");
  call.threshold = threshold;
  call.temperature = temperature;
  const bool float64 = call.logits.dtype == Dtype::float64;
  const ScalarType type = float64 ? ScalarType::Double : ScalarType::Float;
  Tensor label = empty_of(logits, call.rows, -1, ScalarType::Long);
  Tensor sure = empty_of(logits, call.rows, -1, type);
  Tensor margin = empty_of(logits, call.rows, -1, type);
  Tensor entropy = empty_of(logits, call.rows, -1, type);
  Tensor mask = empty_of(logits, call.rows, -1, ScalarType::Bool);
  call.label = static_cast<int64_t*>(label.mutable_data_ptr());
  call.confidence = sure.mutable_data_ptr();
  call.margin = margin.mutable_data_ptr();
  call.entropy = entropy.mutable_data_ptr();
  call.mask = static_cast<bool*>(mask.mutable_data_ptr());
  if (call.rows == 0) return {label, sure, margin, entropy, mask};
  const Device device = device_of(logits);
  with_one_row<Kinds::few>(call.logits, call.classes, [&](auto type) {
    using Rows = typename decltype(type)::type;
    const RowsLaunch launch = launch_of<Rows>(call.rows, call.classes, device, kMostGrid);
    call.room = launch.room;
    launch_kernel("confidence", confidence_kernel<Rows>, launch.grid, stream_of(logits), call);
  });
  return {label, sure, margin, entropy, mask};
}

}  // namespace
}  // namespace fastscarce::cuda

STABLE_TORCH_LIBRARY_IMPL(fastscarce, FASTSCARCE_DEVICE, m) {
  m.impl("topk", TORCH_BOX(&fastscarce::cuda::topk));
  m.impl("pack_topk", TORCH_BOX(&fastscarce::cuda::pack_topk));
  m.impl("unpack_topk", TORCH_BOX(&fastscarce::cuda::unpack_topk));
  m.impl("confidence", TORCH_BOX(&fastscarce::cuda::confidence));
}
