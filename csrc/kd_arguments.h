// What both back ends of kd_loss do with their arguments before any kernel runs.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>

#include "checks.h"
#include "math/divergence_names.h"
#include "math/kd_factors.h"

namespace fastscarce {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int32_t type_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    case ScalarType::Bool:
      return aoti_torch_dtype_bool();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    default:
      return aoti_torch_dtype_float32();
  }
}

// A contiguous tensor without content on the device of `like`; a size of -1 leaves a dimension out.
inline Tensor empty_of(const Tensor& like, int64_t rows, int64_t columns,
                       std::optional<ScalarType> dtype = std::nullopt) {
  std::array<int64_t, 2> sizes{}, strides{};
  int64_t dims = 0;
  if (rows >= 0) sizes[dims++] = rows;
  if (columns >= 0) sizes[dims++] = columns;
  strides = {dims == 2 ? columns : 1, 1};
  int32_t device_type, device_index, type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  if (dtype) type = type_of(*dtype);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes.data(), strides.data(), type,
                                                         device_type, device_index, &handle));
  return Tensor(handle);
}

// On a CPU only: the tensor is host memory.
inline void write_scalar(const Tensor& tensor, bool float64, double value) {
  if (float64)
    *static_cast<double*>(tensor.mutable_data_ptr()) = value;
  else
    *static_cast<float*>(tensor.mutable_data_ptr()) = float(value);
}

inline void check_kd_arguments(const Tensor& student, const std::optional<Tensor>& teacher,
                               const std::optional<Tensor>& target,
                               const std::optional<Tensor>& partner,
                               const std::optional<Tensor>& share,
                               const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& class_weight, int64_t divergence) {
  check(student.dim() == 2 && student.size(1) > 0, "kd_loss", "(rows, classes) student logits");
  const int64_t rows = student.size(0), classes = student.size(1);
  const auto same_device = [&](const Tensor& t) { return t.is_cuda() == student.is_cuda(); };
  const auto is_matrix = [&](const Tensor& t) {
    return t.dim() == 2 && t.size(0) == rows && t.size(1) == classes &&
           (classes == 1 || t.stride(1) == 1) && same_device(t);
  };
  const auto is_column = [&](const Tensor& t, ScalarType dtype) {
    return t.dim() == 1 && t.size(0) == rows && t.is_contiguous() && t.scalar_type() == dtype &&
           same_device(t);
  };
  check(is_matrix(student), "kd_loss", "student rows without gaps");
  check(!teacher || is_matrix(*teacher), "kd_loss", "teacher logits of the student's shape");
  check(!target || is_column(*target, ScalarType::Long) ||
            (is_matrix(*target) && target->scalar_type() != ScalarType::Long),
        "kd_loss", "int64 targets (rows,) or float targets (rows, classes)");
  const bool index = target && target->scalar_type() == ScalarType::Long;
  check(partner.has_value() == share.has_value() && (!partner || index), "kd_loss",
        "partner and share together, with index targets");
  check(!partner || is_column(*partner, ScalarType::Long), "kd_loss", "int64 partners (rows,)");
  check(!share || is_column(*share, ScalarType::Float), "kd_loss", "float32 shares (rows,)");
  check(divergence >= kKl && divergence <= kLogitStandard, "kd_loss", "a divergence it knows");
  check(!weight || is_column(*weight, ScalarType::Float), "kd_loss", "float32 weights (rows,)");
  check(!class_weight ||
            (class_weight->dim() == 1 && class_weight->size(0) == classes &&
             class_weight->is_contiguous() && class_weight->scalar_type() == ScalarType::Float &&
             same_device(*class_weight) && index),
        "kd_loss", "float32 class weights (classes,), with index targets");
}

inline void check_topk_teacher(const Tensor& student, const Tensor& indices,
                               const Tensor& log_probs, const Tensor& log_tail) {
  const auto is_matrix = [&](const Tensor& t) {
    return t.dim() == 2 && t.size(0) == student.size(0) && t.size(1) == indices.size(1) &&
           t.is_contiguous() && t.is_cuda() == student.is_cuda();
  };
  check(indices.dim() == 2 && is_matrix(indices) && indices.scalar_type() == ScalarType::Int,
        "kd_loss_topk", "contiguous int32 indices (rows, k)");
  check(indices.size(1) >= 1 && indices.size(1) <= student.size(1), "kd_loss_topk",
        "k in 1 to classes");
  check(is_matrix(log_probs), "kd_loss_topk", "contiguous log-probabilities (rows, k)");
  check(log_tail.dim() == 1 && log_tail.size(0) == student.size(0) && log_tail.is_contiguous() &&
            log_tail.is_cuda() == student.is_cuda(),
        "kd_loss_topk", "contiguous log tails (rows,)");
}

inline void check_topk_mixture(const Tensor& student, const std::optional<Tensor>& indices,
                               const std::optional<Tensor>& log_probs,
                               const std::optional<Tensor>& log_tail,
                               const std::optional<Tensor>& mix, int64_t tail_policy) {
  check(tail_policy >= kTailUniform && tail_policy <= kTailSupport, "kd_loss_topk",
        "a tail policy it knows");
  const bool two = mix.has_value();
  check(indices.has_value() == two && log_probs.has_value() == two && log_tail.has_value() == two,
        "kd_loss_topk", "all of a second teacher and its mixture, or nothing");
  if (!two) return;
  check_topk_teacher(student, *indices, *log_probs, *log_tail);
  check(tail_policy == kTailUniform || tail_policy == kTailRenorm, "kd_loss_topk",
        "the tail policy uniform or renorm for two teachers");
  check(mix->dim() == 1 && mix->size(0) == student.size(0) && mix->is_contiguous() &&
            mix->scalar_type() == ScalarType::Float && mix->is_cuda() == student.is_cuda(),
        "kd_loss_topk", "float32 mixture weights (rows,)");
}

inline void check_kd_gradient(const Tensor& student, const Tensor& gradient) {
  check(gradient.dim() == 2 && gradient.size(0) == student.size(0) &&
            gradient.size(1) == student.size(1) && gradient.is_contiguous() &&
            gradient.scalar_type() == student.scalar_type() &&
            gradient.is_cuda() == student.is_cuda(),
        "kd_loss", "a contiguous gradient of the student's shape and dtype");
}

inline void check_kd_backward_arguments(const Tensor& gradient, const Tensor& factor,
                                        const Tensor& upstream) {
  const ScalarType loss =
      gradient.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto same_device = [&](const Tensor& t) { return t.is_cuda() == gradient.is_cuda(); };
  check(gradient.dim() == 2 && gradient.is_contiguous(), "kd_loss_backward",
        "a contiguous gradient (rows, classes)");
  check(factor.dim() == 0 && factor.scalar_type() == loss && same_device(factor),
        "kd_loss_backward", "the factor that kd_loss returned");
  check(upstream.scalar_type() == loss && same_device(upstream) &&
            (upstream.dim() == 0 || (upstream.dim() == 1 && upstream.is_contiguous() &&
                                     upstream.size(0) == gradient.size(0))),
        "kd_loss_backward", "an upstream gradient of the loss's dtype and shape");
}

}  // namespace fastscarce
