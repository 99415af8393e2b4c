// Blocks that are given back wait in a list for a result of about their size.
#include "recycled.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>

#include "tensors.h"

namespace fastscarce::cpu {
namespace {

constexpr size_t kKept = 2;  // a result in use and the next one take turns
constexpr size_t kPage = size_t(2) << 20;

struct Block {
  void* memory;
  size_t bytes;
};

class Blocks {
 public:
  Block get(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto block = kept_.begin(); block != kept_.end(); ++block) {
        if (block->bytes < bytes || block->bytes > 2 * bytes) continue;
        const Block found = *block;
        kept_.erase(block);
        return found;
      }
    }
    const size_t whole = (bytes + kPage - 1) / kPage * kPage;
    void* const memory = std::aligned_alloc(kPage, whole);
    check(memory != nullptr, "augment", "more memory for its result than is free");
    ask_for_huge_pages(memory, int64_t(whole));
    return {memory, whole};
  }

  void give_back(Block block) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      kept_.push_back(block);
      if (kept_.size() <= kKept) return;
      block = kept_.front();  // of a size that is not asked for any more
      kept_.erase(kept_.begin());
    }
    std::free(block.memory);
  }

 private:
  std::mutex mutex_;
  std::vector<Block> kept_;
};

// Never destroyed: tensors may outlive everything else.
Blocks& blocks() {
  static Blocks* const all = new Blocks;
  return *all;
}

}  // namespace

torch::stable::Tensor recycled_empty(const torch::stable::Tensor& like,
                                     const std::vector<int64_t>& sizes,
                                     torch::headeronly::ScalarType dtype, int64_t element_size) {
  std::vector<int64_t> strides(sizes.size());
  int64_t numbers = 1;
  for (size_t axis = sizes.size(); axis-- > 0; numbers *= sizes[axis]) strides[axis] = numbers;
  const int64_t bytes = numbers * element_size;
  if (bytes < kHugeBytes) return torch::stable::new_empty(like, sizes, dtype);
  const Block block = blocks().get(size_t(bytes));
  return torch::stable::from_blob(block.memory, sizes, strides, like.device(), dtype,
                                  [block](void*) { blocks().give_back(block); });
}

}  // namespace fastscarce::cpu
