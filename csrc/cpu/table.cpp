// The operators table_places and table_rows: rows of the teacher's table by sample id.
//
// Ids are sorted; those of one bucket (2**shift consecutive ids) lie between two entries of
// `starts`. Hashed ids spread evenly, about one to a bucket, so a row costs a line of memory of
// `starts`, one of `ids` and its own; where ids lie at the head of their rows, two of these are
// one. What bounds the time is how many lines are on their way at once: rows go through four
// stages, each a few rows behind the one that asked for its memory. One thread: 256 rows take
// microseconds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../kd_arguments.h"

namespace fastscarce::cpu {
namespace {

constexpr int64_t kAhead = 16;         // rows between two stages
constexpr int64_t kHeld = 4 * kAhead;  // rows in the stages
constexpr int64_t kLine = 64;          // bytes of memory that come at once
constexpr int64_t kFew = 8;            // ids of a bucket that are looked at one after the other

// Rows of shards that follow one another.
class Shards {
 public:
  explicit Shards(const std::vector<Tensor>& shards) {
    check(!shards.empty(), "table_rows", "one shard or more");
    for (const Tensor& shard : shards) {
      check(shard.dim() == 2 && shard.scalar_type() == ScalarType::Byte && shard.stride(1) == 1 &&
                shard.size(1) == shards[0].size(1) && !shard.is_cuda(),
            "table_rows", "uint8 shards (rows, bytes) of as many bytes, in host memory");
      parts_.push_back(
          {rows_, shard.stride(0), static_cast<const uint8_t*>(shard.const_data_ptr())});
      rows_ += shard.size(0);
    }
    bytes_ = shards[0].size(1);
  }
  int64_t rows() const { return rows_; }
  int64_t bytes() const { return bytes_; }
  bool one() const { return parts_.size() == 1; }
  // place: 0 to rows, excluded.
  const uint8_t* row(int64_t place) const {
    const Part* part = parts_.data();
    if (!one())
      part = &*std::prev(
          std::upper_bound(parts_.begin(), parts_.end(), place,
                           [](int64_t value, const Part& other) { return value < other.first; }));
    return part->memory + (place - part->first) * part->stride;
  }
  void prefetch(const uint8_t* row) const {
    for (int64_t byte = 0; byte + kLine < bytes_; byte += kLine) __builtin_prefetch(row + byte);
    __builtin_prefetch(row + bytes_ - 1);
  }

 private:
  struct Part {
    int64_t first, stride;
    const uint8_t* memory;
  };
  std::vector<Part> parts_;
  int64_t rows_ = 0, bytes_ = 0;
};

// Sorted ids in buckets.
class Ids {
 public:
  Ids(const Tensor& ids, const Tensor& starts, int64_t shift)
      : ids_(static_cast<const int64_t*>(ids.const_data_ptr())),
        starts_(static_cast<const int32_t*>(starts.const_data_ptr())),
        rows_(ids.size(0)),
        stride_(ids.stride(0)),
        buckets_(uint64_t(starts.size(0)) - 1),
        first_(rows_ ? uint64_t(ids_[0]) : 0),
        shift_(int(shift)) {}
  uint64_t bucket(int64_t id) const {
    return std::min((uint64_t(id) - first_) >> shift_, buckets_);
  }
  const int32_t* start(uint64_t bucket) const { return starts_ + bucket; }
  // Place of a bucket's first id, held within the ids whatever `starts` says.
  int64_t low(uint64_t bucket) const { return std::clamp<int64_t>(starts_[bucket], 0, rows_); }
  const int64_t* id(int64_t place) const { return ids_ + place * stride_; }
  // Place of an id, or -1.
  int64_t find(int64_t wanted, uint64_t bucket) const {
    if (bucket == buckets_) return -1;
    int64_t from = low(bucket), to = low(bucket + 1);
    while (to - from > kFew) {
      const int64_t middle = from + (to - from) / 2;
      (*id(middle) <= wanted ? from : to) = middle;
    }
    while (from < to && *id(from) < wanted) ++from;
    return from < to && *id(from) == wanted ? from : -1;
  }

 private:
  const int64_t* ids_;
  const int32_t* starts_;
  int64_t rows_, stride_;
  uint64_t buckets_, first_;
  int shift_;
};

void check_vector(const Tensor& tensor, ScalarType type, const char* need) {
  check(tensor.dim() == 1 && tensor.scalar_type() == type && !tensor.is_cuda(), "table_rows", need);
}

// Finds rows in order: found(row, place) of each, place -1 where there is none. ask(place) asks for
// a row's memory; early: also for that of a bucket's first id, which is most often the one that is
// wanted. Returns how many are not there.
template <class Ask, class Found>
int64_t find(const Tensor& wanted, const Tensor& ids, const Tensor& starts, int64_t shift,
             const std::optional<Tensor>& order, bool early, Ask ask, Found found) {
  check_vector(wanted, ScalarType::Long, "int64 wanted (rows,)");
  check_vector(ids, ScalarType::Long, "int64 ids (rows,)");
  check_vector(starts, ScalarType::Int, "int32 starts (buckets + 1,)");
  check(wanted.is_contiguous() && starts.is_contiguous(), "table_rows",
        "wanted and starts without gaps");
  check(starts.size(0) > 0 && shift >= 0 && shift < 64, "table_rows", "a shift in 0 to 63");
  const int64_t* turned = nullptr;
  if (order) {
    check_vector(*order, ScalarType::Long, "int64 order (rows,)");
    check(order->size(0) == ids.size(0) && order->is_contiguous(), "table_rows",
          "an order of all ids without gaps");
    turned = static_cast<const int64_t*>(order->const_data_ptr());
  }
  const Ids among(ids, starts, shift);
  const int64_t* const numbers = static_cast<const int64_t*>(wanted.const_data_ptr());
  const int64_t rows = wanted.size(0), held = ids.size(0);
  uint64_t buckets[kHeld];
  int64_t asked[kHeld], places[kHeld], missing = 0;
  for (int64_t step = 0; step < rows + 3 * kAhead; ++step) {
    if (const int64_t row = step; row < rows) {
      buckets[row % kHeld] = among.bucket(numbers[row]);
      __builtin_prefetch(among.start(buckets[row % kHeld]));
    }
    if (const int64_t row = step - kAhead; row >= 0 && row < rows) {
      const int64_t low = among.low(buckets[row % kHeld]);
      __builtin_prefetch(among.id(low));
      const bool now = early && !turned && low < held;
      asked[row % kHeld] = now ? low : -1;
      if (turned) __builtin_prefetch(turned + low);
      if (now) ask(low);
    }
    if (const int64_t row = step - 2 * kAhead; row >= 0 && row < rows) {
      int64_t place = among.find(numbers[row], buckets[row % kHeld]);
      missing += place < 0;
      if (turned && place >= 0) place = turned[place];
      if (place >= 0 && place != asked[row % kHeld]) ask(place);
      places[row % kHeld] = place;
    }
    if (const int64_t row = step - 3 * kAhead; row >= 0) found(row, places[row % kHeld]);
  }
  return missing;
}

std::tuple<Tensor, int64_t> table_places(Tensor wanted, Tensor ids, Tensor starts, int64_t shift,
                                         std::optional<Tensor> order) {
  Tensor places = empty_of(wanted, wanted.size(0), -1, ScalarType::Long);
  int64_t* const to = static_cast<int64_t*>(places.mutable_data_ptr());
  const int64_t missing = find(
      wanted, ids, starts, shift, order, false, [](int64_t) {},
      [&](int64_t row, int64_t place) { to[row] = place; });
  return {places, missing};
}

std::tuple<Tensor, int64_t> table_rows(Tensor wanted, Tensor ids, Tensor starts, int64_t shift,
                                       std::optional<Tensor> order, std::vector<Tensor> shards) {
  const Shards from(shards);
  const int64_t bytes = from.bytes();
  Tensor records = empty_of(wanted, wanted.size(0), bytes, ScalarType::Byte);
  uint8_t* const to = static_cast<uint8_t*>(records.mutable_data_ptr());
  const int64_t missing = find(
      wanted, ids, starts, shift, order, from.one(),
      [&](int64_t place) {
        check(place < from.rows(), "table_rows", "shards of as many rows as ids");
        from.prefetch(from.row(place));
      },
      [&](int64_t row, int64_t place) {
        if (place < 0)
          std::memset(to + row * bytes, 0, size_t(bytes));
        else
          std::memcpy(to + row * bytes, from.row(place), size_t(bytes));
      });
  return {records, missing};
}

}  // namespace
}  // namespace fastscarce::cpu

STABLE_TORCH_LIBRARY_IMPL(fastscarce, CPU, m) {
  m.impl("table_places", TORCH_BOX(&fastscarce::cpu::table_places));
  m.impl("table_rows", TORCH_BOX(&fastscarce::cpu::table_rows));
}
