// The backward pass of a gradient that the forward pass made: times its upstream. Included inside
// the namespace of an instruction set, after convert.inl and kd_label.inl.

template <class A>
void scale_gradient(Dtype dtype, const void* gradient, void* out, int64_t classes, double factor,
                    const void* row_factor, int64_t begin, int64_t end) {
  const Matrix matrix{gradient, classes, dtype};
  alignas(64) A read[kChunk], scaled[kChunk];
  for (int64_t row = begin; row < end; ++row) {
    const A by = A(row_factor ? factor * double(static_cast<const A*>(row_factor)[row]) : factor);
    for (int64_t from = 0; from < classes; from += kChunk) {
      const int64_t n = std::min(kChunk, classes - from);
      const A* g = read_row<A>(matrix, row, from, n, read);
      char* to = static_cast<char*>(out) + (row * classes + from) * size_of(dtype);
      A* product = dtype == dtype_of<A>() ? reinterpret_cast<A*>(to) : scaled;
      for (int64_t i = 0; i < n; ++i) product[i] = g[i] * by;
      if (product == scaled) write_as(product, to, dtype, n);
    }
  }
}
