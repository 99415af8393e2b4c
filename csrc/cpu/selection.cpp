// The operators topk and confidence on a CPU: tensors in, threads over rows.
#include "selection.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#include "../selection_arguments.h"
#include "isa.h"
#include "tensors.h"

namespace fastscarce::cpu {
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
  m.impl("confidence", TORCH_BOX(&fastscarce::cpu::confidence));
}
