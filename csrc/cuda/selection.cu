// topk, pack_topk and confidence on a GPU: a block a row (confidence: a warp, up to 1024 classes).
//
// topk finds the k-th largest logit by its bits, eight at a time from the highest: a histogram in
// shared memory of those that agree so far, four rounds (eight for float64), whatever k is. What is
// above it, and the first of those that equal it, are then collected in the order of their index by
// a running count, and sorted in shared memory. Counts are integers and every sum has a fixed
// order: the result is the same each time. The row is read again in each round: from L2, where
// rows in flight fit. pack_topk is the same kernel with another end: bytes of a teacher's table.
#include <math.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "device.cuh"
#define FS_HD __host__ __device__
#include "../selection_arguments.h"
#include "tensors.cuh"

namespace fastscarce::cuda {

// clang-format off: each needs those before it
#include "../math/kd_row.h"
#include "../math/selection.h"
#include "../math/record.h"
#include "block.cuh"
// clang-format on

namespace {

constexpr int kWarps = kThreads / 32;
// Chosen logits are sorted in shared memory.
constexpr int64_t kMostChosen = 2048;

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

// Of how many threads before this one `flag` is set; `total` gets the block's count.
__device__ inline int count_before(bool flag, int* shared, int& total) {
  const unsigned votes = __ballot_sync(0xffffffffu, flag);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  if (lane == 0) shared[warp] = __popc(votes);
  __syncthreads();
  int before = __popc(votes & ((1u << lane) - 1u));
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += shared[w];
    total += shared[w];
  }
  __syncthreads();
  return before;
}

struct TopKCall {
  int64_t rows, classes;
  int k, padded;  // padded: the next power of two
  Matrix logits;
  int32_t* indices;
  void* log_probs;
  void* log_tail;
  // Of rows as bytes.
  RecordLayout layout;
  const int64_t* tags;
  uint8_t* records;
};

template <class A, bool Packed>
__global__ void __launch_bounds__(kThreads) topk_kernel(const TopKCall call) {
  using Key = decltype(ordered(A(0)));
  constexpr int kRounds = int(sizeof(Key));
  Key* const keys = dynamic_shared<Key>();
  int32_t* const places = reinterpret_cast<int32_t*>(keys + call.padded);
  __shared__ unsigned histogram[256];
  __shared__ int counts[kWarps];
  __shared__ Key bound;
  __shared__ int wanted;
  [[maybe_unused]] __shared__ uint32_t scale;
  for (int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
    const auto at = [&](int64_t i) { return element<A>(call.logits, row, i); };
    if (threadIdx.x == 0) {
      bound = 0;
      wanted = call.k;
    }
    // The k-th largest key, a byte a round.
    Key known = 0;  // the bits that are settled
    for (int round = kRounds - 1; round >= 0; --round) {
      for (int i = int(threadIdx.x); i < 256; i += kThreads) histogram[i] = 0;
      __syncthreads();
      const Key settled = bound;
      for (int64_t i = threadIdx.x; i < call.classes; i += kThreads) {
        const Key key = ordered(at(i));
        if ((key & known) == settled) atomicAdd(&histogram[(key >> (8 * round)) & 255], 1u);
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        int left = wanted, digit = 255;
        while (int(histogram[digit]) < left) left -= int(histogram[digit--]);
        wanted = left;
        bound = settled | Key(digit) << (8 * round);
      }
      known |= Key(255) << (8 * round);
      __syncthreads();
    }
    // Those above the bound, and the first `wanted` of those that equal it, by index.
    const Key last = bound;
    const int ties = wanted;
    int found = 0, equals = 0;
    for (int64_t from = 0; from < call.classes; from += kThreads) {
      const int64_t i = from + threadIdx.x;
      const Key key = i < call.classes ? ordered(at(i)) : 0;
      const bool same = i < call.classes && key == last;
      int total;
      const int rank = equals + count_before(same, counts, total);
      equals += total;
      const bool taken = i < call.classes && (key > last || (same && rank < ties));
      const int place = found + count_before(taken, counts, total);
      found += total;
      if (taken) {
        keys[place] = key;
        places[place] = int32_t(i);
      }
    }
    for (int i = call.k + int(threadIdx.x); i < call.padded; i += kThreads) {
      keys[i] = 0;
      places[i] = INT32_MAX;
    }
    __syncthreads();
    // Bitonic sort: falling keys, rising indices.
    for (int size = 2; size <= call.padded; size *= 2)
      for (int step = size / 2; step > 0; step /= 2) {
        for (int i = int(threadIdx.x); i < call.padded; i += kThreads) {
          const int j = i ^ step;
          if (j > i) {
            const bool before = keys[i] > keys[j] || (keys[i] == keys[j] && places[i] < places[j]);
            if (before != ((i & size) == 0)) {
              const Key key = keys[i];
              const int32_t place = places[i];
              keys[i] = keys[j];
              places[i] = places[j];
              keys[j] = key;
              places[j] = place;
            }
          }
        }
        __syncthreads();
      }
    // The others' sum on its own: no difference of near numbers.
    const A first = at(places[0]);
    const A top = first > A(-INFINITY) ? first : A(0);
    A chosen = 0, rest = 0;
    for (int i = int(threadIdx.x); i < call.k; i += kThreads)
      chosen += exponential(at(places[i]) - top);
    int seen = 0;
    for (int64_t from = 0; from < call.classes; from += kThreads) {
      const int64_t i = from + threadIdx.x;
      const A x = i < call.classes ? at(i) : A(-INFINITY);
      const Key key = ordered(x);
      const bool same = i < call.classes && key == last;
      int total;
      const int rank = seen + count_before(same, counts, total);
      seen += total;
      if (i < call.classes && (isnan(x) || key < last || (same && rank >= ties)))
        rest += exponential(x - top);
    }
    chosen = sum_over_block(chosen);
    rest = sum_over_block(rest);
    const TopKRow<A> whole = finish_topk(top, chosen, rest, call.classes - call.k);
    if constexpr (Packed) {
      uint8_t* const record = call.records + row * call.layout.stride;
      const auto log_prob = [&](int i) { return float(topk_log_prob(whole, at(places[i]))); };
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
        put_class(record, call.layout, i, places[i], log_prob(i), scale);
    } else {
      for (int i = int(threadIdx.x); i < call.k; i += kThreads) {
        call.indices[row * call.k + i] = places[i];
        static_cast<A*>(call.log_probs)[row * call.k + i] = topk_log_prob(whole, at(places[i]));
      }
      if (threadIdx.x == 0) static_cast<A*>(call.log_tail)[row] = whole.log_tail;
    }
    __syncthreads();
  }
}

struct ConfidenceCall {
  int64_t rows, classes;
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
  int64_t place;
};

template <class A>
__device__ inline Largest<A> larger(const Largest<A>& a, const Largest<A>& b) {
  const bool left = a.first > b.first || (a.first == b.first && a.place < b.place);
  const Largest<A>& win = left ? a : b;
  const Largest<A>& lose = left ? b : a;
  return {win.first, maximum(win.second, lose.first), win.place};
}

template <class A, int Width>
__global__ void __launch_bounds__(kThreads) confidence_kernel(const ConfidenceCall call) {
  __shared__ Largest<A> tops[kWarps];
  const int lane = int(threadIdx.x) % Width;
  const A rate = A(1.0 / call.temperature);
  constexpr int rows_a_block = kThreads / Width;
  for (int64_t row = int64_t(blockIdx.x) * rows_a_block + threadIdx.x / Width; row < call.rows;
       row += int64_t(gridDim.x) * rows_a_block) {
    const auto at = [&](int64_t i) { return element<A>(call.logits, row, i); };
    Largest<A> own = {A(-INFINITY), A(-INFINITY), INT64_MAX};
    for (int64_t i = lane; i < call.classes; i += Width)
      own = larger(own, {at(i), A(-INFINITY), i});
    for (int by = 16; by > 0; by /= 2)
      own = larger(own, {shuffle_down(own.first, by), shuffle_down(own.second, by),
                         __shfl_down_sync(0xffffffffu, own.place, by)});
    if constexpr (Width == 32) {
      own = {__shfl_sync(0xffffffffu, own.first, 0), __shfl_sync(0xffffffffu, own.second, 0),
             __shfl_sync(0xffffffffu, own.place, 0)};
    } else {
      if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = own;
      __syncthreads();
      own = tops[0];
      for (int warp = 1; warp < kWarps; ++warp) own = larger(own, tops[warp]);
      __syncthreads();
    }
    const A top = own.first > A(-INFINITY) ? own.first : A(0);
    A sum = 0, dot = 0;
    for (int64_t i = lane; i < call.classes; i += Width) {
      const A x = (at(i) - top) * rate, e = exponential(x);
      sum += e;
      dot += select(e, e * x, A(0));
    }
    if constexpr (Width == 32) {
      for (int by = 16; by > 0; by /= 2) {
        sum += shuffle_down(sum, by);
        dot += shuffle_down(dot, by);
      }
    } else {
      sum = sum_over_block(sum);
      dot = sum_over_block(dot);
    }
    if (lane != 0) continue;
    ConfidenceRow<A> out = {A(NAN), A(NAN), A(NAN)};
    const bool answer = sum > A(0);
    if (answer) out = finish_confidence(sum, exponential((own.second - top) * rate), dot);
    call.label[row] = answer ? own.place : kNoAnswer;
    static_cast<A*>(call.confidence)[row] = out.confidence;
    static_cast<A*>(call.margin)[row] = out.margin;
    static_cast<A*>(call.entropy)[row] = out.entropy;
    call.mask[row] = out.confidence >= A(call.threshold);
  }
}

unsigned blocks_of(int64_t rows) { return unsigned(std::min<int64_t>(rows, 1 << 20)); }

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
void launch_topk(const TopKCall& call, const char* operation, cudaStream_t stream) {
  const unsigned blocks = blocks_of(call.rows);
  if (call.logits.dtype == Dtype::float64)
    launch_kernel(operation, topk_kernel<double, Packed>,
                  {blocks, kThreads, size_t(call.padded) * 12}, stream, call);
  else
    launch_kernel(operation, topk_kernel<float, Packed>,
                  {blocks, kThreads, size_t(call.padded) * 8}, stream, call);
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
  launch_topk<false>(call, "topk", stream_of(logits));
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
  launch_topk<true>(call, "pack_topk", stream_of(logits));
  return records;
}

template <class A>
void launch(const ConfidenceCall& call, cudaStream_t stream) {
  if (call.classes <= 1024) {
    const int64_t rows_a_block = kThreads / 32;
    launch_kernel("confidence", confidence_kernel<A, 32>,
                  {blocks_of((call.rows + rows_a_block - 1) / rows_a_block), kThreads}, stream,
                  call);
  } else {
    launch_kernel("confidence", confidence_kernel<A, kThreads>, {blocks_of(call.rows), kThreads},
                  stream, call);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> confidence(Tensor logits, double threshold,
                                                              double temperature) {
  check_confidence_arguments(logits, temperature);
  const DeviceGuard guard(logits.get_device());
  ConfidenceCall call;
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
  if (float64)
    launch<double>(call, stream_of(logits));
  else
    launch<float>(call, stream_of(logits));
  return {label, sure, margin, entropy, mask};
}

}  // namespace
}  // namespace fastscarce::cuda

STABLE_TORCH_LIBRARY_IMPL(fastscarce, FASTSCARCE_DEVICE, m) {
  m.impl("topk", TORCH_BOX(&fastscarce::cuda::topk));
  m.impl("pack_topk", TORCH_BOX(&fastscarce::cuda::pack_topk));
  m.impl("confidence", TORCH_BOX(&fastscarce::cuda::confidence));
}
