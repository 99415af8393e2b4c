// Distillation loss: The 16-lane body of AVX-512 in pairs of AVX2 registers: tests run it where
// there is no AVX-512.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "dist.h"
#include "kd_loss.h"
#include "selection.h"

// kd_row.h: no device here, and a call in a loop over classes would empty its registers.
#define FS_HD __attribute__((always_inline))
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace fastscarce::cpu::emulated {

// clang-format off: each needs those before it
#include "../math/kd_row.h"
#include "../math/divergence.h"
#include "../math/selection.h"
#include "../math/topk_teacher.h"
#include "../math/statistics.h"
#include "../math/dist.h"
namespace half {
#include "vec_avx2.inl"
}  // namespace half
#include "vec_emulated.inl"
#include "vec_math.inl"
#include "block8.inl"
#include "convert.inl"
#include "kd_label.inl"
#include "kd_lanes.inl"
#include "kd_scale.inl"
#include "pending.inl"
#include "kd_loss.inl"
#include "kd_parts.inl"
#include "divergence.inl"
#include "divergence_lanes.inl"
#include "kd_topk.inl"
#include "statistics.inl"
#include "statistics_lanes.inl"
#include "selection.inl"
#include "dist_lanes.inl"
#include "dist.inl"
// clang-format on

KdKernels kd_kernels(bool) { return Kd<Vec, Exponential>::kernels(); }

SelectionKernels selection_kernels(bool) { return Selection<Vec, Exponential>::kernels(); }

DistKernels dist_kernels(bool) { return Dist<Vec, Exponential>::kernels(); }

}  // namespace fastscarce::cpu::emulated

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
