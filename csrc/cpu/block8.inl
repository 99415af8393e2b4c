// Moving 8 x 8 blocks of floats between rows and lanes, and 16-bit numbers to floats and back.
// Included inside a namespace compiled for avx2 and f16c (AVX-512 uses it as well, twice a block).

// Both 128-bit halves as 4 x 4 blocks of their own.
inline void transpose4(__m256 r[4]) {
  const __m256 a = _mm256_unpacklo_ps(r[0], r[1]), b = _mm256_unpackhi_ps(r[0], r[1]);
  const __m256 c = _mm256_unpacklo_ps(r[2], r[3]), d = _mm256_unpackhi_ps(r[2], r[3]);
  r[0] = _mm256_shuffle_ps(a, c, 0x44);
  r[1] = _mm256_shuffle_ps(a, c, 0xee);
  r[2] = _mm256_shuffle_ps(b, d, 0x44);
  r[3] = _mm256_shuffle_ps(b, d, 0xee);
}

inline __m128i first4(int64_t n) {
  return _mm_cmpgt_epi32(_mm_set1_epi32(int(n)), _mm_setr_epi32(0, 1, 2, 3));
}

// lanes[c * stride + i] = rows[i * step + c] for 8 rows, four columns at a time: a register holds
// those of rows i and i + 4. Columns past the last full four are reached by a block that ends at
// the last column (and repeats some), so that no load leaves a row. top[i] becomes the row's
// maximum.
inline void rows_to_lanes8(const float* rows, int64_t step, int64_t columns, float* lanes,
                           int64_t stride, float* top) {
  __m256 r[4], largest = _mm256_set1_ps(-INFINITY);
  if (columns < 4) {
    const __m128i mask = first4(columns);
    for (int i = 0; i < 4; ++i)
      r[i] = _mm256_set_m128(_mm_maskload_ps(rows + (i + 4) * step, mask),
                             _mm_maskload_ps(rows + i * step, mask));
    transpose4(r);
    for (int64_t c = 0; c < columns; ++c) {
      _mm256_storeu_ps(lanes + c * stride, r[c]);
      largest = _mm256_max_ps(largest, r[c]);
    }
    _mm256_storeu_ps(top, largest);
    return;
  }
  for (int64_t at = 0; at < columns; at += 4) {
    const int64_t from = at + 4 <= columns ? at : columns - 4;
    for (int i = 0; i < 4; ++i)
      r[i] = _mm256_set_m128(_mm_loadu_ps(rows + (i + 4) * step + from),
                             _mm_loadu_ps(rows + i * step + from));
    transpose4(r);
    for (int c = 0; c < 4; ++c) _mm256_storeu_ps(lanes + (from + c) * stride, r[c]);
    largest =
        _mm256_max_ps(largest, _mm256_max_ps(_mm256_max_ps(r[0], r[1]), _mm256_max_ps(r[2], r[3])));
  }
  _mm256_storeu_ps(top, largest);
}

// The way back.
inline void lanes_to_rows8(const float* lanes, int64_t stride, int64_t columns, float* rows,
                           int64_t step) {
  __m256 r[4];
  if (columns < 4) {
    const __m128i mask = first4(columns);
    for (int64_t c = 0; c < 4; ++c)
      r[c] = c < columns ? _mm256_loadu_ps(lanes + c * stride) : _mm256_setzero_ps();
    transpose4(r);
    for (int i = 0; i < 4; ++i) {
      _mm_maskstore_ps(rows + i * step, mask, _mm256_castps256_ps128(r[i]));
      _mm_maskstore_ps(rows + (i + 4) * step, mask, _mm256_extractf128_ps(r[i], 1));
    }
    return;
  }
  for (int64_t at = 0; at < columns; at += 4) {
    const int64_t from = at + 4 <= columns ? at : columns - 4;
    for (int c = 0; c < 4; ++c) r[c] = _mm256_loadu_ps(lanes + (from + c) * stride);
    transpose4(r);
    for (int i = 0; i < 4; ++i) {
      _mm_storeu_ps(rows + i * step + from, _mm256_castps256_ps128(r[i]));
      _mm_storeu_ps(rows + (i + 4) * step + from, _mm256_extractf128_ps(r[i], 1));
    }
  }
}

inline void half_to_float(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
  for (; i < n; ++i) to[i] = _cvtsh_ss(from[i]);
}

inline void float_to_half(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128((__m128i*)(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; ++i) to[i] = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
}
