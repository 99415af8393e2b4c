// How a gradient that no cache is to keep gets to memory. Included inside the namespace of an
// instruction set, after a vec_*.inl and convert.inl.

// A chunk of the gradient that is finished in L1 and leaves past the caches while the
// exponentials of the next row's chunk are made, a line a vector: streamed in a crowd, lines are
// waited for.
template <class V>
struct Pending {
  using A = typename V::Scalar;
  static constexpr int64_t L = V::lanes;

  static constexpr uintptr_t kPage = 4096;
  alignas(64) A chunk[kChunk + (kPage + 64) / sizeof(A)];
  const A* from = nullptr;
  A* to = nullptr;
  int64_t at = 0, end = 0;

  ~Pending() { rest(); }
  // Where to make the chunk, so that its lines lie as they do at `out`; half a page, modulo pages,
  // from the exponentials that it is made of: a load at the place in its page that was just stored
  // to in another waits for that store.
  A* place(const A* out, const A* made_of) {
    const uintptr_t apart =
        reinterpret_cast<uintptr_t>(made_of) + kPage / 2 - reinterpret_cast<uintptr_t>(chunk);
    const uintptr_t in_line = reinterpret_cast<uintptr_t>(out) % 64;
    return chunk + (apart % kPage / 64 * 64 + in_line) / sizeof(A);
  }
  // What shares a line with a neighbour is stored: such a line is not made in one go.
  void give(const A* made, A* out, int64_t n) {
    constexpr int64_t line = 64 / int64_t(sizeof(A));
    const int64_t head = std::min((line - (made - chunk) % line) % line, n);
    from = made, to = out, at = head, end = head + (n - head) / line * line;
    std::copy_n(made, head, out);
    std::copy_n(made + end, n - end, out + end);
  }
  void rest() {
    for (; at < end; at += L) V::load(from + at).stream(to + at);
  }
};

// A finished chunk of the gradient, past the caches where that is asked for.
template <class V>
void put(const typename V::Scalar* from, char* to, Dtype dtype, int64_t n, bool stream) {
  using A = typename V::Scalar;
  constexpr int64_t L = V::lanes;
  constexpr int64_t bytes = L * int64_t(sizeof(A));
  const int64_t past = int64_t(reinterpret_cast<uintptr_t>(to) % bytes);
  const int64_t head = past ? (bytes - past) / int64_t(sizeof(A)) : 0;
  if (!stream || dtype != dtype_of<A>() || n < head + L) return write_as(from, to, dtype, n);
  A* const out = reinterpret_cast<A*>(to);
  write_as(from, to, dtype, head);
  int64_t i = head;
  for (; i + L <= n; i += L) V::load(from + i).stream(out + i);
  write_as(from + i, out + i, dtype, n - i);
}
