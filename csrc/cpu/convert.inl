// Rows of any float dtype to the arithmetic's own and back, and memory to keep them in. Included
// after a vec_*.inl (which brings half_to_float and float_to_half), in the same namespace. Plain
// loops here: the compiler vectorises.

// What a thread keeps between calls; from a line's beginning, since a vector that lies on two lines
// costs as much as two.
template <class A>
struct LineMemory {
  std::vector<A> memory;

  A* of(int64_t size) {
    constexpr uintptr_t line = 64;
    const size_t most = size_t(size) + line / sizeof(A);
    if (memory.size() < most) memory.resize(most);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory.data());
    return reinterpret_cast<A*>((begin + line - 1) / line * line);
  }
};

inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

template <class A>
constexpr Dtype dtype_of() {
  return sizeof(A) == 8 ? Dtype::float64 : Dtype::float32;
}

inline void bfloat_to_float(const uint16_t* __restrict from, float* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = uint32_t(from[i]) << 16;
    __builtin_memcpy(to + i, &bits, 4);
  }
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline void float_to_bfloat(const float* __restrict from, uint16_t* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, from + i, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to[i] = (bits & 0x7fffffffu) > 0x7f800000u ? uint16_t(0x7fc0) : uint16_t(rounded);
  }
}

template <class A>
void read_as(const void* from, Dtype dtype, A* to, int64_t n) {
  if (dtype == Dtype::float32) {
    for (int64_t i = 0; i < n; ++i) to[i] = A(static_cast<const float*>(from)[i]);
  } else if (dtype == Dtype::float64) {
    for (int64_t i = 0; i < n; ++i) to[i] = A(static_cast<const double*>(from)[i]);
  } else if constexpr (sizeof(A) == 4) {
    if (dtype == Dtype::bfloat16)
      bfloat_to_float(static_cast<const uint16_t*>(from), to, n);
    else
      half_to_float(static_cast<const uint16_t*>(from), to, n);
  } else {
    float part[64];
    for (int64_t at = 0; at < n; at += 64) {
      const int64_t size = n - at < 64 ? n - at : 64;
      read_as(static_cast<const uint16_t*>(from) + at, dtype, part, size);
      for (int64_t i = 0; i < size; ++i) to[at + i] = A(part[i]);
    }
  }
}

// Elements [first, first + n) of a row: in place where the dtype is the arithmetic's, else in
// `buffer`.
template <class A>
const A* read_row(const Matrix& matrix, int64_t row, int64_t first, int64_t n, A* buffer) {
  const char* at = static_cast<const char*>(matrix.data) +
                   (row * matrix.row_stride + first) * size_of(matrix.dtype);
  if (matrix.dtype == dtype_of<A>()) return reinterpret_cast<const A*>(at);
  read_as(at, matrix.dtype, buffer, n);
  return buffer;
}

template <class A>
void write_as(const A* from, void* to, Dtype dtype, int64_t n) {
  if (dtype == dtype_of<A>()) {
    __builtin_memcpy(to, from, size_t(n) * sizeof(A));
  } else if constexpr (sizeof(A) == 4) {
    if (dtype == Dtype::bfloat16)
      float_to_bfloat(from, static_cast<uint16_t*>(to), n);
    else
      float_to_half(from, static_cast<uint16_t*>(to), n);
  }
}
