// Rows in chunks of 16 bytes that lie on 16-byte boundaries, whatever the row's own alignment: of a
// row of an odd number of classes only the first and the last chunk are read element by element.
// Included after tensors.cuh, in the namespace of its user.

template <class S>
constexpr int kChunk = 16 / int(sizeof(S));

template <class S>
struct Chunk {
  S values[kChunk<S>];
};

template <class S>
__device__ inline Chunk<S> unpacked(const uint4& bits) {
  Chunk<S> chunk;
  memcpy(&chunk, &bits, sizeof(bits));
  return chunk;
}

// Elements between the 16-byte boundary at or before `row` and `row`.
template <class S>
__device__ inline int shift_of(const S* row) {
  return int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(S));
}

// Logits from..from + kChunk of a row, -inf where they are outside it. aligned: row + from lies on
// a 16-byte boundary.
template <class S, class Index>
__device__ inline uint4 load_chunk(const S* row, Index from, Index classes, bool aligned) {
  constexpr int n = kChunk<S>;
  if (aligned && from >= 0 && from + n <= classes)
    return load_global(reinterpret_cast<const uint4*>(row + from));
  Chunk<S> chunk;
#pragma unroll
  for (int k = 0; k < n; ++k) {
    put(&chunk.values[k], decltype(number(S()))(-INFINITY));
    if (from + k >= 0 && from + k < classes) chunk.values[k] = load_global(row + from + k);
  }
  uint4 bits;
  memcpy(&bits, &chunk, sizeof(bits));
  return bits;
}

template <class S, class A, class Index>
__device__ inline void store_chunk(S* row, Index from, Index classes, bool aligned,
                                   const A (&values)[kChunk<S>]) {
  constexpr int n = kChunk<S>;
  Chunk<S> chunk;
#pragma unroll
  for (int k = 0; k < n; ++k) put(&chunk.values[k], values[k]);
  if (aligned && from >= 0 && from + n <= classes) {
    uint4 bits;
    memcpy(&bits, &chunk, sizeof(bits));
    __stwb(reinterpret_cast<uint4*>(row + from), bits);  // an assignment may come apart
    return;
  }
#pragma unroll
  for (int k = 0; k < n; ++k)
    if (from + k >= 0 && from + k < classes) row[from + k] = chunk.values[k];
}
