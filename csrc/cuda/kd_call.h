// One call of a distillation loss, as its kernels take it, and who launches them. Terms:
// csrc/math/kd_row.h.
#pragma once

#include <cstdint>

#include "tensors.cuh"

namespace fastscarce::cuda {

// A teacher's k largest classes; csrc/math/topk_teacher.h.
struct TopKTeacher {
  int64_t k;
  const int32_t* indices;
  Matrix log_probs, log_tail;
};

// Between the kernels of one call.
constexpr int kMostPieces = 256;
constexpr int kRowsAPiece = 1024;  // at least
constexpr int kMostBlocks = 2048;
struct Workspace {
  unsigned finished;
  double weights[kMostPieces], labels[kMostPieces];
  double losses[kMostBlocks];
};

struct KdCall {
  int64_t rows, classes;
  Matrix student, teacher, soft;
  const int64_t* target;
  const int64_t* partner;
  const float* share;
  const float* weight;
  const float* class_weight;  // multiplies index labels
  int64_t ignore_index, reduction;
  double temperature, distillation, label, label_smoothing, threshold;
  int64_t divergence;
  double first, second;
  TopKTeacher named[2];  // instead of `teacher`
  int named_count, tail_policy;
  const float* mix;
  void* gradient;
  void* losses;  // of each row, without a reduction; otherwise the one loss
  void* factor;
  Workspace* workspace;
  int pieces;  // of rows whose sums are in the workspace; 0: the sums are known
  int room;    // of HeldRows
  int marks;   // where kd_topk.cu's begin in shared memory
};

// `tail` marks the k in shared memory, a bit a class.
constexpr int64_t kMostMarked = int64_t(40) * 1024 * 8;

void launch_kl(const KdCall& call, const Device& device, cudaStream_t stream);
void launch_divergence(const KdCall& call, const Device& device, cudaStream_t stream);
void launch_topk_teacher(const KdCall& call, const Device& device, cudaStream_t stream);

}  // namespace fastscarce::cuda
