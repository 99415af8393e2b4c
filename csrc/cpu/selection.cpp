// The operators topk and confidence on a CPU: tensors in, threads over rows.
#include "selection.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "../selection_arguments.h"
#include "isa.h"
#include "tensors.h"

namespace fastscarce::cpu {

#include "../math/record.h"

SelectionKernels selection_kernels(Dtype dtype) {
  const bool float64 = dtype == Dtype::float64;
#if defined(__x86_64__)
  if (!float64) switch (isa()) {
      case Isa::avx512:
        return avx512::selection_kernels(false);
      case Isa::avx2:
        return avx2::selection_kernels(false);
      case Isa::emulated:
        return emulated::selection_kernels(false);
      default:
        break;
    }
#endif
  return scalar::selection_kernels(float64);
}

namespace {

template <class Of>
void over_rows(int64_t rows, int64_t classes, Of of) {
  const int64_t grain = std::max<int64_t>(1, kLogitsPerThread / classes);
  if (rows > 0) torch::stable::parallel_for(0, rows, grain, of);
}

std::tuple<Tensor, Tensor, Tensor> topk(Tensor logits, int64_t k) {
  check_topk_arguments(logits, k);
  const int64_t rows = logits.size(0);
  TopKCall call;
  call.logits = matrix_of(logits, "topk");
  call.classes = logits.size(1);
  call.k = k;
  const ScalarType type =
      call.logits.dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
  Tensor indices = empty_of(logits, rows, k, ScalarType::Int);
  Tensor log_probs = empty_of(logits, rows, k, type), log_tail = empty_of(logits, rows, -1, type);
  call.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  call.log_probs = log_probs.mutable_data_ptr();
  call.log_tail = log_tail.mutable_data_ptr();
  const SelectionKernels run = selection_kernels(call.logits.dtype);
  over_rows(rows, call.classes, [&](int64_t begin, int64_t end) { run.topk(call, begin, end); });
  return {indices, log_probs, log_tail};
}

// Rows [begin, end) as bytes. What topk makes of a few rows stays in a cache until it is packed.
template <class A>
void pack_rows(const TopKCall& call, const RecordLayout& layout, const SelectionKernels& run,
               const int64_t* tags, uint8_t* records, int64_t begin, int64_t end) {
  constexpr int64_t kRows = 16;
  const int64_t size = call.logits.dtype == Dtype::float64   ? 8
                       : call.logits.dtype == Dtype::float32 ? 4
                                                             : 2;
  std::vector<int32_t> indices(size_t(kRows * call.k));
  std::vector<A> log_probs(size_t(kRows * call.k)), tails(kRows);
  TopKCall part = call;
  part.indices = indices.data();
  part.log_probs = log_probs.data();
  part.log_tail = tails.data();
  for (int64_t first = begin; first < end; first += kRows) {
    part.logits.data =
        static_cast<const char*>(call.logits.data) + first * call.logits.row_stride * size;
    const int64_t rows = std::min(kRows, end - first);
    run.topk(part, 0, rows);
    for (int64_t row = 0; row < rows; ++row) {
      const int32_t* const index = indices.data() + row * call.k;
      const A* const values = log_probs.data() + row * call.k;
      uint8_t* const record = records + (first + row) * layout.stride;
      uint32_t scale = 0;
      if (layout.codes) {
        int64_t last = call.k - 1;
        while (last > 0 && std::isinf(values[last])) --last;
        scale = record_scale(std::isinf(values[last]) ? 0.0f : float(values[last]));
      }
      for (int32_t i = 0; i < layout.k; ++i)
        put_class(record, layout, i, index[i], float(values[i]), scale);
      put_rest(record, layout, float(tails[size_t(row)]), scale,
               tags ? uint32_t(tags[first + row]) : 0);
    }
  }
}

Tensor pack_topk(Tensor logits, int64_t k, bool codes, std::optional<Tensor> tags) {
  check_pack_arguments(logits, k, tags);
  const int64_t rows = logits.size(0);
  TopKCall call;
  call.logits = matrix_of(logits, "pack_topk");
  call.classes = logits.size(1);
  call.k = k;
  const RecordLayout layout = record_layout(call.classes, k, codes, tags.has_value());
  Tensor records = empty_of(logits, rows, layout.stride, ScalarType::Byte);
  uint8_t* const to = static_cast<uint8_t*>(records.mutable_data_ptr());
  const int64_t* const tag = tags ? static_cast<const int64_t*>(tags->const_data_ptr()) : nullptr;
  const SelectionKernels run = selection_kernels(call.logits.dtype);
  const bool float64 = call.logits.dtype == Dtype::float64;
  over_rows(rows, call.classes, [&](int64_t begin, int64_t end) {
    if (float64)
      pack_rows<double>(call, layout, run, tag, to, begin, end);
    else
      pack_rows<float>(call, layout, run, tag, to, begin, end);
  });
  return records;
}

std::tuple<Tensor, Tensor, Tensor> unpack_topk(Tensor records, int64_t classes, int64_t k,
                                               bool codes, bool tagged) {
  const RecordLayout layout = record_layout(classes, k, codes, tagged);
  check_unpack_arguments(records, classes, k, layout.stride);
  const int64_t rows = records.size(0);
  Tensor indices = empty_of(records, rows, k, ScalarType::Int);
  Tensor log_probs = empty_of(records, rows, k, codes ? ScalarType::Float : ScalarType::Half);
  Tensor log_tail = empty_of(records, rows, -1, ScalarType::Half);
  const uint8_t* const from = static_cast<const uint8_t*>(records.const_data_ptr());
  int32_t* const index = static_cast<int32_t*>(indices.mutable_data_ptr());
  void* const values = log_probs.mutable_data_ptr();
  uint16_t* const tail = static_cast<uint16_t*>(log_tail.mutable_data_ptr());
  over_rows(rows, k, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* const record = from + row * layout.stride;
      get_classes(record, layout, 0, 1, index + row * k, values, row * k);
      tail[row] = get_tail(record, layout);
    }
  });
  return {indices, log_probs, log_tail};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> confidence(Tensor logits, double threshold,
                                                              double temperature) {
  check_confidence_arguments(logits, temperature);
  const int64_t rows = logits.size(0);
  ConfidenceCall call;
  call.logits = matrix_of(logits, "confidence");
  call.classes = logits.size(1);
  call.no_answer = kNoAnswer;
  call.threshold = threshold;
  call.temperature = temperature;
  const ScalarType type =
      call.logits.dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
  Tensor label = empty_of(logits, rows, -1, ScalarType::Long);
  Tensor sure = empty_of(logits, rows, -1, type), margin = empty_of(logits, rows, -1, type);
  Tensor entropy = empty_of(logits, rows, -1, type);
  Tensor mask = empty_of(logits, rows, -1, ScalarType::Bool);
  call.label = static_cast<int64_t*>(label.mutable_data_ptr());
  call.confidence = sure.mutable_data_ptr();
  call.margin = margin.mutable_data_ptr();
  call.entropy = entropy.mutable_data_ptr();
  call.mask = static_cast<bool*>(mask.mutable_data_ptr());
  const SelectionKernels run = selection_kernels(call.logits.dtype);
  over_rows(rows, call.classes,
            [&](int64_t begin, int64_t end) { run.confidence(call, begin, end); });
  return {label, sure, margin, entropy, mask};
}

}  // namespace
}  // namespace fastscarce::cpu

STABLE_TORCH_LIBRARY_IMPL(fastscarce, CPU, m) {
  m.impl("topk", TORCH_BOX(&fastscarce::cpu::topk));
  m.impl("pack_topk", TORCH_BOX(&fastscarce::cpu::pack_topk));
  m.impl("unpack_topk", TORCH_BOX(&fastscarce::cpu::unpack_topk));
  m.impl("confidence", TORCH_BOX(&fastscarce::cpu::confidence));
}
