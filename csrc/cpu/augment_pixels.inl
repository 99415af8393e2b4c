// Interleaved levels to planes of floats and back, tables of levels, and what is written at the
// end. Included after math/augment.h, in the namespace of its user. The loops are plain where the
// compiler vectorises them.

constexpr int kBlock = 16;  // pixels that are worked on side by side

#if FS_VECTORS
// Sixteen pixels, by channel: of three channels each one's bytes are shuffled out of 48.
template <int C>
inline void part_block(const uint8_t* from, __m128i (&parts)[3]) {
  const __m128i* const at = reinterpret_cast<const __m128i*>(from);
  const __m128i a = _mm_loadu_si128(at);
  if constexpr (C == 1) {
    parts[0] = a;
  } else {
    const __m128i of[3][3] = {
        {_mm_setr_epi8(0, 3, 6, 9, 12, 15, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1),
         _mm_setr_epi8(-1, -1, -1, -1, -1, -1, 2, 5, 8, 11, 14, -1, -1, -1, -1, -1),
         _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 1, 4, 7, 10, 13)},
        {_mm_setr_epi8(1, 4, 7, 10, 13, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1),
         _mm_setr_epi8(-1, -1, -1, -1, -1, 0, 3, 6, 9, 12, 15, -1, -1, -1, -1, -1),
         _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 2, 5, 8, 11, 14)},
        {_mm_setr_epi8(2, 5, 8, 11, 14, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1),
         _mm_setr_epi8(-1, -1, -1, -1, -1, 1, 4, 7, 10, 13, -1, -1, -1, -1, -1, -1),
         _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 3, 6, 9, 12, 15)}};
    const __m128i b = _mm_loadu_si128(at + 1), d = _mm_loadu_si128(at + 2);
    for (int c = 0; c < 3; ++c)
      parts[c] =
          _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(a, of[c][0]), _mm_shuffle_epi8(b, of[c][1])),
                       _mm_shuffle_epi8(d, of[c][2]));
  }
}

inline void float_block(__m128i bytes, __m256& low, __m256& high) {
  low = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
  high = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(bytes, bytes)));
}
#endif

// One plane a channel, `pixels` of them. `planes` is channels x `stride`.
template <int C>
void to_planes(const uint8_t* __restrict line, int pixels, float* __restrict planes, int stride) {
  int x = 0;
#if FS_VECTORS
  for (; x + kBlock <= pixels; x += kBlock) {
    __m128i parts[3];
    part_block<C>(line + C * x, parts);
    for (int c = 0; c < C; ++c) {
      __m256 low, high;
      float_block(parts[c], low, high);
      _mm256_storeu_ps(planes + c * stride + x, low);
      _mm256_storeu_ps(planes + c * stride + x + 8, high);
    }
  }
#endif
  for (; x < pixels; ++x)
    for (int c = 0; c < C; ++c) planes[c * stride + x] = float(line[C * x + c]);
}

// Sixteen pixels of one plane a channel, interleaved.
template <int C>
FS_HD inline void interleave_block(const uint8_t (&part)[3][kBlock], uint8_t* to) {
#if FS_VECTORS
  if constexpr (C == 3) {
    // Byte k of the 48 is of channel k % 3 and pixel k / 3.
    const __m128i of[3][3] = {
        {_mm_setr_epi8(0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1, -1, 5),
         _mm_setr_epi8(-1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1, 10, -1),
         _mm_setr_epi8(-1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15, -1, -1)},
        {_mm_setr_epi8(-1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1, -1),
         _mm_setr_epi8(5, -1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1, 10),
         _mm_setr_epi8(-1, -1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15, -1)},
        {_mm_setr_epi8(-1, -1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1),
         _mm_setr_epi8(-1, 5, -1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1),
         _mm_setr_epi8(10, -1, -1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15)}};
    __m128i planes[3];
    for (int c = 0; c < 3; ++c)
      planes[c] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(part[c]));
    for (int k = 0; k < 3; ++k) {
      const __m128i third = _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(planes[0], of[0][k]),
                                                      _mm_shuffle_epi8(planes[1], of[1][k])),
                                         _mm_shuffle_epi8(planes[2], of[2][k]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to) + k, third);
    }
    return;
  }
#endif
  for (int i = 0; i < kBlock; ++i)
    for (int c = 0; c < C; ++c) to[C * i + c] = part[c][i];
}

// `level` of sixteen numbers.
inline void level_block(const float* __restrict from, uint8_t* __restrict to) {
#if FS_WIDE
  // Saturation cuts off above; a number that no int holds becomes a large unsigned one.
  const __m512i whole_ones =
      _mm512_cvttps_epi32(_mm512_max_ps(_mm512_loadu_ps(from), _mm512_setzero_ps()));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8(whole_ones));
#elif FS_VECTORS
  const __m256 most = _mm256_set1_ps(255.0f);
  const __m256i low = _mm256_cvttps_epi32(_mm256_min_ps(_mm256_loadu_ps(from), most));
  const __m256i high = _mm256_cvttps_epi32(_mm256_min_ps(_mm256_loadu_ps(from + 8), most));
  // Packing goes by halves of a register: what ends in the middle is put right in between.
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xD8);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(to),
      _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
#else
  for (int i = 0; i < kBlock; ++i) to[i] = level(from[i]);
#endif
}

// Levels between 0 and 255 are cut off to whole ones.
template <int C>
void from_planes(const float* __restrict planes, int stride, int pixels, uint8_t* __restrict line) {
  uint8_t part[3][kBlock];
  int x = 0;
  for (; x + kBlock <= pixels; x += kBlock) {
    for (int c = 0; c < C; ++c) level_block(planes + c * stride + x, part[c]);
    interleave_block<C>(part, line + C * x);
  }
  for (; x < pixels; ++x)
    for (int c = 0; c < C; ++c) line[C * x + c] = level(planes[c * stride + x]);
}

// ---- tables

struct Table {
  uint8_t of[3][kLevels];
  bool same;  // for all channels: the first one counts
};

template <int C>
void look_up_plainly(const Table& table, const uint8_t* from, uint8_t* to, int64_t bytes) {
  if (C == 1 || table.same) {
    const uint8_t* const of = table.of[0];
    for (int64_t i = 0; i < bytes; ++i) to[i] = of[from[i]];
  } else {
    for (int64_t i = 0; i < bytes; i += C)
      for (int c = 0; c < C; ++c) to[i + c] = table.of[c][from[i + c]];
  }
}

#if FS_WIDE
// Sixty-four look-ups at a time: a table is four registers.
template <int C>
__attribute__((target("avx512vbmi"))) void look_up_by_permuting(const Table& table,
                                                                const uint8_t* from, uint8_t* to,
                                                                int64_t bytes) {
  constexpr int64_t kWide = 64;
  const int tables = C == 1 || table.same ? 1 : C;
  __m512i of[3][4];
  for (int c = 0; c < tables; ++c)
    for (int k = 0; k < 4; ++k) of[c][k] = _mm512_loadu_si512(table.of[c] + 64 * k);
  // Which bytes are of channel c, where the first byte is of channel 0: a third of 192 bits.
  const __mmask64 every_third = 0x9249249249249249ull;
  int64_t at = 0;
  for (int64_t first = 0; at < bytes; at += kWide, first = (first + 1) % 3) {
    const int64_t left = bytes - at;
    const __mmask64 inside = left >= kWide ? ~0ull : (1ull << left) - 1;
    const __m512i index = _mm512_maskz_loadu_epi8(inside, from + at);
    const __mmask64 upper = _mm512_movepi8_mask(index);
    __m512i result = _mm512_setzero_si512();
    for (int c = 0; c < tables; ++c) {
      const __m512i low = _mm512_permutex2var_epi8(of[c][0], index, of[c][1]);
      const __m512i high = _mm512_permutex2var_epi8(of[c][2], index, of[c][3]);
      const __m512i found = _mm512_mask_blend_epi8(upper, low, high);
      // Byte `at` is of channel `first`, as 64 is one more than a multiple of 3.
      const __mmask64 own = tables == 1 ? ~0ull : every_third << ((c + 3 - first) % 3);
      result = _mm512_mask_mov_epi8(result, own, found);
    }
    _mm512_mask_storeu_epi8(to + at, inside, result);
  }
}
#endif

template <int C>
void look_up(const Table& table, const uint8_t* from, uint8_t* to, int64_t bytes) {
#if FS_WIDE
  static const bool permutes = __builtin_cpu_supports("avx512vbmi");
  if (permutes) return look_up_by_permuting<C>(table, from, to, bytes);
#endif
  look_up_plainly<C>(table, from, to, bytes);
}

// ---- what is stored

inline void store_floats(const float* __restrict from, void* to, int64_t first, int n, Pixels dtype,
                         [[maybe_unused]] bool stream) {
  if (dtype == Pixels::float32) {
    float* const at = static_cast<float*>(to) + first;
#if FS_VECTORS
    if (stream && reinterpret_cast<uintptr_t>(at) % 32 == 0) {
      int i = 0;
      for (; i + 8 <= n; i += 8) _mm256_stream_ps(at + i, _mm256_loadu_ps(from + i));
      for (; i < n; ++i) at[i] = from[i];
      return;
    }
#endif
    std::memcpy(at, from, size_t(n) * sizeof(float));
  } else if (dtype == Pixels::bfloat16) {
    uint16_t* const at = static_cast<uint16_t*>(to) + first;
    for (int i = 0; i < n; ++i) {  // to nearest, ties to even; there is no NaN here
      uint32_t bits;
      std::memcpy(&bits, from + i, 4);
      at[i] = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
  } else {
    uint16_t* const at = static_cast<uint16_t*>(to) + first;
    int i = 0;
#if FS_VECTORS
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; ++i) at[i] = torch::headeronly::Half(from[i]).x;
  }
}

template <Pixels D>
void put_one(float value, void* to, int64_t at) {
  if constexpr (D == Pixels::float32) {
    static_cast<float*>(to)[at] = value;
  } else if constexpr (D == Pixels::bfloat16) {  // to nearest, ties to even; there is no NaN here
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    static_cast<uint16_t*>(to)[at] = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  } else {
    static_cast<uint16_t*>(to)[at] = torch::headeronly::Half(value).x;
  }
}

#if FS_VECTORS
template <Pixels D>
void put_eight(__m256 values, void* to, int64_t at, bool stream) {
  if constexpr (D == Pixels::float32) {
    float* const there = static_cast<float*>(to) + at;
    stream ? _mm256_stream_ps(there, values) : _mm256_storeu_ps(there, values);
  } else {
    __m128i halves;
    if constexpr (D == Pixels::bfloat16) {
      const __m256i bits = _mm256_castps_si256(values);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
      const __m256i kept = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
      halves = _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
    } else {
      halves = _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(to) + at), halves);
  }
}
#endif

// Pixels as normalised numbers from the `at`-th one on, a plane a channel, `area` numbers apart:
// levels are read and results written once, with nothing in between.
template <int C, Pixels D>
void store_planes(const uint8_t* __restrict from, int64_t pixels, const float* scale,
                  const float* shift, void* __restrict to, int64_t at, int64_t area,
                  [[maybe_unused]] bool stream) {
  int64_t x = 0;
#if FS_VECTORS
  for (; x + kBlock <= pixels; x += kBlock) {
    __m128i parts[3];
    part_block<C>(from + C * x, parts);
    for (int c = 0; c < C; ++c) {
      const __m256 by = _mm256_set1_ps(scale[c]), shifted = _mm256_set1_ps(shift[c]);
      __m256 low, high;
      float_block(parts[c], low, high);
      const int64_t there = at + c * area + x;
      put_eight<D>(_mm256_fmadd_ps(low, by, shifted), to, there, stream);
      put_eight<D>(_mm256_fmadd_ps(high, by, shifted), to, there + 8, stream);
    }
  }
#endif
  for (; x < pixels; ++x)
    for (int c = 0; c < C; ++c)
      put_one<D>(normalised(float(from[C * x + c]), scale[c], shift[c]), to, at + c * area + x);
}

// The same interleaved.
template <int C, Pixels D>
void store_interleaved(const uint8_t* __restrict from, int64_t pixels, const float* scale,
                       const float* shift, void* __restrict to, int64_t at,
                       [[maybe_unused]] bool stream) {
  const int64_t numbers = C * pixels;
  int64_t i = 0;
#if FS_VECTORS
  __m256 by[C], shifted[C];  // after 8 C numbers the channels are in step again
  for (int k = 0; k < C; ++k) {
    float scales[8], shifts[8];
    for (int j = 0; j < 8; ++j) {
      scales[j] = scale[(8 * k + j) % C];
      shifts[j] = shift[(8 * k + j) % C];
    }
    by[k] = _mm256_loadu_ps(scales), shifted[k] = _mm256_loadu_ps(shifts);
  }
  for (; i + 8 * C <= numbers; i += 8 * C)
    for (int k = 0; k < C; ++k) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i + 8 * k));
      const __m256 values = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
      put_eight<D>(_mm256_fmadd_ps(values, by[k], shifted[k]), to, at + i + 8 * k, stream);
    }
#endif
  for (; i < numbers; ++i)
    put_one<D>(normalised(float(from[i]), scale[i % C], shift[i % C]), to, at + i);
}

inline void store_levels(const float* __restrict from, uint8_t* __restrict to, int n) {
  for (int i = 0; i < n; ++i) to[i] = level(whole(from[i]));
}
