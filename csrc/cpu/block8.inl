// Moving 8 x 8 blocks of floats between rows and lanes, and 16-bit numbers to floats and back.
// Included inside a namespace compiled for avx2 and f16c (AVX-512 uses it as well, twice a block).

inline void transpose8(__m256 r[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

inline __m256i first8(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// lanes[c * stride + i] = rows[i * step + c] for 8 rows. Columns past the last full block of 8 are
// reached by a block that ends at the last column (and repeats some), so that no load leaves a row.
inline void rows_to_lanes8(const float* rows, int64_t step, int64_t columns, float* lanes,
                           int64_t stride) {
  __m256 r[8];
  if (columns < 8) {
    for (int i = 0; i < 8; ++i) r[i] = _mm256_maskload_ps(rows + i * step, first8(columns));
    transpose8(r);
    for (int64_t c = 0; c < columns; ++c) _mm256_storeu_ps(lanes + c * stride, r[c]);
    return;
  }
  for (int64_t at = 0; at < columns; at += 8) {
    const int64_t from = at + 8 <= columns ? at : columns - 8;
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(rows + i * step + from);
    transpose8(r);
    for (int c = 0; c < 8; ++c) _mm256_storeu_ps(lanes + (from + c) * stride, r[c]);
  }
}

// The way back.
inline void lanes_to_rows8(const float* lanes, int64_t stride, int64_t columns, float* rows,
                           int64_t step) {
  __m256 r[8];
  if (columns < 8) {
    for (int64_t c = 0; c < 8; ++c)
      r[c] = c < columns ? _mm256_loadu_ps(lanes + c * stride) : _mm256_setzero_ps();
    transpose8(r);
    for (int i = 0; i < 8; ++i) _mm256_maskstore_ps(rows + i * step, first8(columns), r[i]);
    return;
  }
  for (int64_t at = 0; at < columns; at += 8) {
    const int64_t from = at + 8 <= columns ? at : columns - 8;
    for (int c = 0; c < 8; ++c) r[c] = _mm256_loadu_ps(lanes + (from + c) * stride);
    transpose8(r);
    for (int i = 0; i < 8; ++i) _mm256_storeu_ps(rows + i * step + from, r[i]);
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
