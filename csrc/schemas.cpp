// Every operator of fastscarce, a line each. CPU kernels are in cpu/, CUDA kernels in cuda/; fake
// kernels and gradients are registered by fastscarce/_ops.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastscarce, m) {
  m.def("isa() -> str");
  m.def("set_isa(str name) -> str");
  // distillation, label: weights of the two terms. `_out` writes the gradient to `out` where it is
  // given, and returns none then; and the statistics of the rows where they are.
  m.def(
      "kd_loss(Tensor student, Tensor? teacher, Tensor? target, Tensor? partner, Tensor? share, "
      "Tensor? weight, Tensor? class_weight, int divergence, float first, float second, "
      "float temperature, float distillation, float label, float label_smoothing, "
      "float threshold, int ignore_index, int reduction, bool with_gradient) "
      "-> (Tensor loss, Tensor gradient, Tensor factor)");
  m.def(
      "kd_loss_out(Tensor student, Tensor? teacher, Tensor? target, Tensor? partner, "
      "Tensor? share, Tensor? weight, Tensor? class_weight, int divergence, float first, "
      "float second, float temperature, float distillation, float label, float label_smoothing, "
      "float threshold, int ignore_index, int reduction, bool with_gradient, Tensor(a!)? out, "
      "Tensor(b!)? student_label, Tensor(c!)? teacher_label, Tensor(d!)? confidence, "
      "Tensor(e!)? entropy, Tensor(f!)? agreement) "
      "-> (Tensor loss, Tensor gradient, Tensor factor)");
  m.def(
      "kd_loss_topk(Tensor student, Tensor indices, Tensor log_probs, Tensor log_tail, "
      "Tensor? second_indices, Tensor? second_log_probs, Tensor? second_log_tail, Tensor? mix, "
      "Tensor? target, Tensor? partner, Tensor? share, Tensor? weight, Tensor? class_weight, "
      "int tail_policy, float temperature, float distillation, float label, "
      "float label_smoothing, float threshold, int ignore_index, int reduction, "
      "bool with_gradient) -> (Tensor loss, Tensor gradient, Tensor factor)");
  m.def(
      "kd_loss_topk_out(Tensor student, Tensor indices, Tensor log_probs, Tensor log_tail, "
      "Tensor? second_indices, Tensor? second_log_probs, Tensor? second_log_tail, Tensor? mix, "
      "Tensor? target, Tensor? partner, Tensor? share, Tensor? weight, Tensor? class_weight, "
      "int tail_policy, float temperature, float distillation, float label, "
      "float label_smoothing, float threshold, int ignore_index, int reduction, "
      "bool with_gradient, Tensor(a!)? out, Tensor(b!)? student_label, "
      "Tensor(c!)? teacher_label, Tensor(d!)? confidence, Tensor(e!)? entropy, "
      "Tensor(f!)? agreement) -> (Tensor loss, Tensor gradient, Tensor factor)");
  m.def(
      "kd_statistics(Tensor student, Tensor? teacher, Tensor? indices, Tensor? log_probs, "
      "Tensor? log_tail, Tensor? second_indices, Tensor? second_log_probs, "
      "Tensor? second_log_tail, Tensor? mix, int tail_policy, float temperature) "
      "-> (Tensor student_label, Tensor teacher_label, Tensor confidence, Tensor entropy, "
      "Tensor agreement)");
  m.def("topk(Tensor logits, int k) -> (Tensor indices, Tensor log_probs, Tensor log_tail)");
  // Rows of the teacher's table, uint8; codes: u8 codes for float16 values; tags: int64 (rows,).
  m.def("pack_topk(Tensor logits, int k, bool codes, Tensor? tags) -> Tensor");
  m.def(
      "unpack_topk(Tensor records, int classes, int k, bool codes, bool tagged) "
      "-> (Tensor indices, Tensor log_probs, Tensor log_tail)");
  // Rows of the table by sample id. `starts`: where a bucket of 2**shift ids begins among the
  // sorted `ids`; `order`: place among all rows of the `shards` of each of these. An id that is not
  // there has place -1 and a row of zeros.
  m.def(
      "table_places(Tensor wanted, Tensor ids, Tensor starts, int shift, Tensor? order) "
      "-> (Tensor places, int missing)");
  m.def(
      "table_rows(Tensor wanted, Tensor ids, Tensor starts, int shift, Tensor? order, "
      "Tensor[] shards) -> (Tensor records, int missing)");
  m.def(
      "confidence(Tensor logits, float threshold, float temperature) -> (Tensor label, "
      "Tensor confidence, Tensor margin, Tensor entropy, Tensor mask)");
  m.def(
      "dist_loss(Tensor student, Tensor teacher, float temperature, float inter, float intra, "
      "bool with_gradient) -> (Tensor loss, Tensor gradient, Tensor factor)");
  // A row of `plan` (uint8, 128 bytes) a result; `index`: which image each row reads. `pixels`: of
  // the result, 0 float32, 1 bfloat16, 2 float16, 3 uint8, which is not normalised.
  m.def(
      "augment(Tensor images, Tensor plan, Tensor? index, float[] mean, float[] std, int pixels, "
      "bool channels_last, bool fast) -> Tensor");
  m.def(
      "augment_out(Tensor images, Tensor plan, Tensor? index, float[] mean, float[] std, "
      "bool channels_last, bool fast, Tensor(a!) out) -> ()");
  m.def("kd_loss_backward(Tensor gradient, Tensor factor, Tensor upstream) -> Tensor");
  m.def("kd_loss_backward_(Tensor(a!) gradient, Tensor factor, Tensor upstream) -> ()");
}
