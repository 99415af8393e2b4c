// Augmentation: AVX-512, and VBMI for tables where the processor has it.
#if defined(__x86_64__)

#include <immintrin.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "augment.h"

#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 warns of its own _mm512_undefined_epi32.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// math/augment.h: no device here, and a call in a loop over pixels would keep it from vectors.
#define FS_HD __attribute__((always_inline))
#define FS_VECTORS 1
#define FS_WIDE 1
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl")
#endif

namespace fastscarce::cpu::augment_avx512 {

// clang-format off: each needs those before it
#include "../math/augment.h"
#include "augment_pixels.inl"
#include "augment_warp.inl"
#include "augment.inl"
// clang-format on

}  // namespace fastscarce::cpu::augment_avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
