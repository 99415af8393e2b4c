// Rows between the sweeps of a kernel: read from DRAM once, 16 bytes at a time at any alignment.
// Included after kd_row.h and chunks.cuh, in the namespace of its user.
//
// HeldRows is what every kernel over rows is written for. Chunks > 0: a row a group of Width
// threads (4 to 256), each with that many chunks of it in registers. Chunks = 0: longer rows, a
// cluster each (a block, where the GPU has no clusters); each block has a run of the row's chunks
// in shared memory, and where they do not fit reads them again, from L2. Sums go through a fixed
// tree: the result is the same each time.
//
// Two: there is a row beside it, a teacher's. Two dtypes meet in the wider of them: rows that are
// split are converted as they are read, element by element, and the result as it is written.

// The value of another lane, of any type made of whole words.
template <class T>
__device__ inline T from_lane(const T& value, int by, unsigned mask) {
  static_assert(sizeof(T) % 4 == 0);
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_xor_sync(mask, word, by);
  T out;
  memcpy(&out, words, sizeof(T));
  return out;
}

// What a warp tells its block, and a block its cluster, in one reduction. There are two of each,
// in turn: who writes one again has met all others at the barrier of the other.
constexpr int kToldBytes = 128;

template <class T>
__device__ inline T* told_by_warp(int turn, int warp) {
  static_assert(sizeof(T) <= kToldBytes);
  __shared__ uint4 memory[2][kThreads / 32][kToldBytes / 16];
  return reinterpret_cast<T*>(memory[turn][warp]);
}

// The threads of a row: a group of Width of a block, and, Split, of all blocks of a cluster. All of
// them take part in every reduction, and all get its result.
template <int Width, bool Split>
struct RowThreads {
  int lane;  // in the block's part of the group
  unsigned mask;
  int rank, blocks;  // of the cluster
  int turn;

  __device__ RowThreads()
      : lane(int(threadIdx.x) % Width),
        mask(Width >= 32 ? 0xffffffffu
                         : ((1u << (Width % 32)) - 1u) << (int(threadIdx.x) % 32 / Width * Width)),
        rank(Split ? int(cluster_rank()) : 0),
        blocks(Split ? int(cluster_size()) : 1),
        turn(0) {}

  __device__ int thread() const { return rank * Width + lane; }
  __device__ int threads() const { return blocks * Width; }
  __device__ bool leads() const { return thread() == 0; }

  // Of the row's threads in this block.
  __device__ void barrier() const {
    if constexpr (Width > 32)
      __syncthreads();
    else
      __syncwarp(mask);
  }

  // `value` is the same in the lanes of a warp.
  template <class T, class Op>
  __device__ T over_warps(T value, Op op) {
    if constexpr (Width > 32) {
      turn ^= 1;
      if (threadIdx.x % 32 == 0) *told_by_warp<T>(turn, int(threadIdx.x) / 32) = value;
      __syncthreads();
      value = *told_by_warp<T>(turn, 0);
      for (int warp = 1; warp < Width / 32; ++warp) value = op(value, *told_by_warp<T>(turn, warp));
    }
    if constexpr (Split) {
      if (blocks == 1) return value;
      T* const mine = reinterpret_cast<T*>(dynamic_shared<unsigned char>() + turn * kToldBytes);
      if (lane == 0) *mine = value;
      cluster_barrier();
      value = *cluster_shared(mine, 0);
      for (int k = 1; k < blocks; ++k) value = op(value, *cluster_shared(mine, unsigned(k)));
    }
    return value;
  }

  template <class T, class Op>
  __device__ T reduce(T value, Op op) {
    for (int by = (Width < 32 ? Width : 32) / 2; by > 0; by /= 2)
      value = op(value, from_lane(value, by, mask));
    return over_warps(value, op);
  }

  // Sums of those values whose bit is set in `wanted`, which is the same for all; 0 of the others.
  template <class A, int N>
  __device__ void sum(A (&values)[N], unsigned wanted) {
    struct All {
      A values[N];
    } all;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      A value = values[i];
      if (wanted >> i & 1u)
        for (int by = (Width < 32 ? Width : 32) / 2; by > 0; by /= 2)
          value += __shfl_xor_sync(mask, value, by);
      all.values[i] = wanted >> i & 1u ? value : A(0);
    }
    all = over_warps(all, [](All a, const All& b) {
#pragma unroll
      for (int i = 0; i < N; ++i) a.values[i] += b.values[i];
      return a;
    });
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = all.values[i];
  }
  template <class A, int N>
  __device__ void sum(A (&values)[N]) {
    sum(values, (1u << N) - 1u);
  }

  // Nobody leaves while its memory is read.
  __device__ void leave() const {
    if constexpr (Split)
      if (blocks > 1) cluster_barrier();
  }
};

template <class S_, class A_, bool Two, int Width, int Chunks>
struct HeldRows {
  using S = S_;
  using A = A_;
  static constexpr int n = kChunk<S>;
  static constexpr bool split = Chunks == 0;
  static constexpr bool converts = split && Two && sizeof(S) > 2;
  static constexpr int width = Width, rows_a_block = split ? 1 : kThreads / Width;
  // Bytes of a chunk in shared memory.
  static constexpr int64_t chunk_bytes = Two ? 32 : 16;
  static constexpr int capacity = Width * Chunks;
  // A multiprocessor has registers for two: one loads while the other computes. Without that bound
  // the compiler keeps 16-bit logits as floats, and registers for one.
  static constexpr int blocks = sizeof(A) == 4 ? 2 : 1;

  RowThreads<Width, split> group;
  Matrix first_matrix, second_matrix;
  void* written;  // (rows, classes) without gaps, of the first row's dtype; or null
  int classes;
  int room;  // chunks of a row that a block keeps, of those that are split
  int64_t row;
  const S *first, *second;
  S* out;
  int shift, chunks, begin, end;  // begin, end: the chunks of this block
  bool second_aligned, out_aligned;
  uint4 first_bits[split ? 1 : Chunks], second_bits[Two && !split ? Chunks : 1];

  __device__ HeldRows(const Matrix& first_, const Matrix& second_, void* written_, int64_t classes_,
                      int room_)
      : first_matrix(first_),
        second_matrix(second_),
        written(written_),
        classes(int(classes_)),
        room(room_) {}

  // Rows of this group: from, and how far to the next.
  __device__ int64_t from_row() const {
    return split ? int64_t(blockIdx.x) / group.blocks
                 : int64_t(blockIdx.x) * rows_a_block + threadIdx.x / Width;
  }
  __device__ int64_t row_step() const {
    return split ? int64_t(gridDim.x) / group.blocks : int64_t(gridDim.x) * rows_a_block;
  }

  __device__ void place(int64_t row_) {
    row = row_;
    first = static_cast<const S*>(first_matrix.data) + row * first_matrix.row_stride;
    second = first;
    if (Two && second_matrix.data)
      second = static_cast<const S*>(second_matrix.data) + row * second_matrix.row_stride;
    out = written ? static_cast<S*>(written) + row * classes : nullptr;
    shift = shift_of(first);
    // Their place among the chunks, where they are of S.
    if (converts && first_matrix.dtype != dtype_of<S>()) shift = 0;
    second_aligned = shift_of(second) == shift;
    out_aligned = shift_of(out) == shift;
    chunks = (classes + shift + n - 1) / n;
    const int part = split ? (chunks + group.blocks - 1) / group.blocks : chunks;
    begin = group.rank * part;
    end = begin + part < chunks ? begin + part : chunks;
  }

  // Whether an element is among the chunks of this block, and which of theirs it is.
  __device__ bool owns(int i) const { return !split || (place_of(i) >= 0 && i < limit()); }
  __device__ int place_of(int i) const { return i + shift - begin * n; }
  __device__ int limit() const { return end * n - shift; }

  // f(from, a, b) of each chunk of this thread: its elements begin at `from`, and are -inf where
  // they are outside the row; b is the row beside it, 0 where there is none. The first sweep reads.
  template <class F>
  __device__ void first_sweep(F f) {
    if constexpr (split) {
      sweep_part<true>(f);
    } else {
#pragma unroll
      for (int k = 0; k < Chunks; ++k) {
        if (k * Width >= chunks) continue;
        first_bits[k] = load_first(group.lane + k * Width);
        if (Two) second_bits[k] = load_second(group.lane + k * Width);
      }
      sweep(f);
    }
  }

  template <class F>
  __device__ void sweep(F f) {
    if constexpr (split) {
      sweep_part<false>(f);
    } else {
#pragma unroll
      for (int k = 0; k < Chunks; ++k)
        if (k * Width < chunks)
          visit(group.lane + k * Width, first_bits[k], second_bits[Two ? k : 0], f);
    }
  }

  // One element, which a sweep has brought near or will need.
  __device__ A first_at(int i) const { return at(first_matrix, i); }
  __device__ A second_at(int i) const { return at(second_matrix, i); }

  __device__ void store(int from, const A (&values)[n]) const {
    // float64 is the wider of any two.
    if constexpr (converts && sizeof(S) == 4) {
      if (first_matrix.dtype == Dtype::bfloat16) return put_all<__nv_bfloat16>(from, values);
      if (first_matrix.dtype == Dtype::float16) return put_all<__half>(from, values);
    }
    store_chunk(out, from, classes, out_aligned, values);
  }
  __device__ void clear() {
    if (!out) return;
    A nothing[n];
#pragma unroll
    for (int j = 0; j < n; ++j) nothing[j] = A(0);
    for (int c = begin + group.lane; c < end; c += Width) store(c * n - shift, nothing);
  }

 private:
  __device__ A at(const Matrix& matrix, int i) const {
    if constexpr (!converts)
      return A(number(static_cast<const S*>(matrix.data)[row * matrix.row_stride + i]));
    A out;
    with_row(matrix, row, [&](const auto* data) { out = A(number(data[i])); });
    return out;
  }

  template <class T>
  __device__ void put_all(int from, const A (&values)[n]) const {
    T* const to = static_cast<T*>(written) + row * classes;
#pragma unroll
    for (int j = 0; j < n; ++j)
      if (from + j >= 0 && from + j < classes) put(to + from + j, values[j]);
  }

  __device__ uint4 load_first(int chunk) const {
    if constexpr (converts)
      if (first_matrix.dtype != dtype_of<S>()) return converted(first_matrix, chunk);
    return load_chunk(first, chunk * n - shift, classes, true);
  }
  __device__ uint4 load_second(int chunk) const {
    if (!second_matrix.data) return {};
    if constexpr (converts)
      if (second_matrix.dtype != dtype_of<S>()) return converted(second_matrix, chunk);
    return load_chunk(second, chunk * n - shift, classes, second_aligned);
  }
  __device__ uint4 converted(const Matrix& matrix, int chunk) const {
    S values[n];
    elements(matrix, row, chunk * n - shift, classes, S(-INFINITY), values);
    uint4 bits;
    memcpy(&bits, values, sizeof(bits));
    return bits;
  }

  template <class F>
  __device__ void visit(int chunk, const uint4& bits, const uint4& beside, F& f) {
    const int from = chunk * n - shift;
    const Chunk<S> x = unpacked<S>(bits), y = unpacked<S>(beside);
    A a[n], b[n];
#pragma unroll
    for (int j = 0; j < n; ++j) {
      a[j] = A(number(x.values[j]));
      b[j] = Two ? A(number(y.values[j])) : A(0);
    }
    f(from, a, b);
  }

  template <bool Fresh, class F>
  __device__ void sweep_part(F& f) {
    uint4* const kept_first =
        reinterpret_cast<uint4*>(dynamic_shared<unsigned char>() + 2 * kToldBytes);
    uint4* const kept_second = kept_first + room;
    const bool kept = room != 0;
    // Many loads at once where they are of DRAM. A thread reads what it kept itself.
#pragma unroll(Fresh ? 4 : 1)
    for (int c = begin + group.lane; c < end; c += Width) {
      uint4 bits, beside = {};
      if (Fresh || !kept) {
        bits = load_first(c);
        if (Two) beside = load_second(c);
        if (Fresh && kept) {
          kept_first[c - begin] = bits;
          if (Two) kept_second[c - begin] = beside;
        }
      } else {
        bits = kept_first[c - begin];
        if (Two) beside = kept_second[c - begin];
      }
      visit(c, bits, beside, f);
    }
  }
};

// ---- on the host
constexpr int kBlocksAProcessor = 8;

// What a kernel of HeldRows is launched with. `room` goes to its constructor; `memory`: where the
// bytes that the kernel asked for begin in dynamic shared memory.
struct RowsLaunch {
  Grid grid;
  int room;
  int memory;
};

// Beside its row a block (a group, of rows in registers) has `chunk_bits` bits a chunk and `more`
// bytes; most_blocks: of the grid.
//
// Of rows that are split a block keeps up to kKeptBytes, so that several share a multiprocessor and
// one loads while another computes; with clusters of the most blocks it keeps what a block can.
// Rows that are not kept are few enough at a time for half the L2, as long as every multiprocessor
// has one.
template <class Rows>
RowsLaunch launch_of(int64_t rows, int64_t classes, const Device& device, int64_t most_blocks,
                     int64_t chunk_bits = 0, int64_t more = 0) {
  const int64_t processors = device.multiprocessors;
  most_blocks = std::min(most_blocks, processors * kBlocksAProcessor);
  if constexpr (!Rows::split) {
    const int64_t wanted = (rows + Rows::rows_a_block - 1) / Rows::rows_a_block;
    const int64_t bytes = Rows::rows_a_block * ((Rows::capacity * chunk_bits + 7) / 8 + more);
    return {{unsigned(std::clamp<int64_t>(wanted, 1, most_blocks)), kThreads, size_t(bytes)}, 0, 0};
  } else {
    constexpr int64_t kKeptBytes = int64_t(56) << 10;
    constexpr int kMostClusterBlocks = 8;  // that every GPU with clusters has
    // Of a row that begins where it costs most.
    const int64_t chunks = (classes + 2 * Rows::n - 2) / Rows::n;
    int64_t blocks = 1;
    const auto part = [&] { return (chunks + blocks - 1) / blocks; };
    const auto bytes = [&](int64_t chunk_bytes) {
      return 2 * kToldBytes + part() * chunk_bytes + (part() * chunk_bits + 7) / 8 + more;
    };
    while (device.clusters && blocks < kMostClusterBlocks && bytes(Rows::chunk_bytes) > kKeptBytes)
      blocks *= 2;
    const bool kept =
        bytes(Rows::chunk_bytes) <= (device.clusters ? device.shared_bytes : kKeptBytes);
    int64_t together = processors * kBlocksAProcessor;
    if (kept)
      together =
          processors * std::clamp<int64_t>(device.shared_bytes / bytes(Rows::chunk_bytes), 1, 8);
    else
      together =
          std::clamp<int64_t>(device.l2_bytes / 2 / (chunks * 32) * blocks, processors, together);
    together = std::min(together, most_blocks);
    const int64_t clusters = std::clamp<int64_t>(together / blocks, 1, std::max<int64_t>(rows, 1));
    const int room = kept ? int(part()) : 0;
    return {{unsigned(clusters * blocks), kThreads, size_t(bytes(kept ? Rows::chunk_bytes : 0)),
             unsigned(blocks)},
            room,
            int(2 * kToldBytes + room * Rows::chunk_bytes)};
  }
}

template <class T>
struct Type {
  using type = T;
};

// f(Type<S>, Type<A>): A is what is computed in.
template <class F>
void with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32:
      return f(Type<float>(), Type<float>());
    case Dtype::float64:
      return f(Type<double>(), Type<double>());
    case Dtype::bfloat16:
      return f(Type<__nv_bfloat16>(), Type<float>());
    default:
      return f(Type<__half>(), Type<float>());
  }
}

// f(Type<HeldRows<...>>) with the rows that hold `classes` logits of S. Each kind is a kernel more:
// `every` has one for every size, `few` and `split` leave more to shared memory.
enum class Kinds { split, few, every };

template <class S, class A, bool Two, Kinds K, class F>
void with_rows(int64_t classes, F f) {
  const int64_t chunks = (classes + 2 * kChunk<S> - 2) / kChunk<S>;
  if constexpr (sizeof(A) == 4 && K != Kinds::split) {  // float64 is for checks
    if constexpr (Two)
      if (chunks <= 4) return f(Type<HeldRows<S, A, Two, 4, 1>>());
    if constexpr (K == Kinds::every) {
      if (chunks <= 8) return f(Type<HeldRows<S, A, Two, 8, 1>>());
      if (chunks <= 32) return f(Type<HeldRows<S, A, Two, 32, 1>>());
    }
    if (chunks <= 128) return f(Type<HeldRows<S, A, Two, 32, 4>>());
    if constexpr (K == Kinds::every) {
      // Of 16 bits these take the registers of two blocks, and long to compile.
      if constexpr (sizeof(S) == 4)
        if (chunks <= 256) return f(Type<HeldRows<S, A, Two, 32, 8>>());
      if (chunks <= 1024) return f(Type<HeldRows<S, A, Two, kThreads, 4>>());
    }
  }
  f(Type<HeldRows<S, A, Two, kThreads, 0>>());
}

// The same for a matrix, and the one beside it where there is one.
template <Kinds K, class F>
void with_two_rows(const Matrix& first, const Matrix& second, int64_t classes, F f) {
  if (!second.data || second.dtype == first.dtype)
    return with_dtype(first.dtype, [&](auto s, auto a) {
      with_rows<typename decltype(s)::type, typename decltype(a)::type, true, K>(classes, f);
    });
  if (first.dtype == Dtype::float64) return f(Type<HeldRows<double, double, true, kThreads, 0>>());
  f(Type<HeldRows<float, float, true, kThreads, 0>>());
}

// And for a matrix alone.
template <Kinds K, class F>
void with_one_row(const Matrix& matrix, int64_t classes, F f) {
  with_dtype(matrix.dtype, [&](auto s, auto a) {
    with_rows<typename decltype(s)::type, typename decltype(a)::type, false, K>(classes, f);
  });
}
