// Memory for large results that come batch after batch: what one batch gave back, the next one
// gets.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace fastscarce::cpu {

// `new_empty` of `like`, contiguous. From kHugeBytes on its memory is kept when the last tensor
// that shares it is gone: fresh pages cost more than what an augmentation writes on them, and the C
// library returns blocks of this size to the system each time. At most two blocks are kept.
torch::stable::Tensor recycled_empty(const torch::stable::Tensor& like,
                                     const std::vector<int64_t>& sizes,
                                     torch::headeronly::ScalarType dtype, int64_t element_size);

}  // namespace fastscarce::cpu
