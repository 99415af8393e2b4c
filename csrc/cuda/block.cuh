// Sums and maxima over a block of kThreads threads, in every thread, in a fixed order. Included
// after kd_row.h, in the namespace of its user.

constexpr int kThreads = 256;

template <class A, class Op>
__device__ inline A over_block(A value, Op op) {
  __shared__ A part[kThreads / 32];
  for (int by = 16; by > 0; by /= 2) value = op(value, __shfl_xor_sync(0xffffffffu, value, by));
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = value;
  __syncthreads();
  value = part[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) value = op(value, part[warp]);
  __syncthreads();
  return value;
}
template <class A>
__device__ inline A sum_over_block(A value) {
  return over_block(value, [](A a, A b) { return a + b; });
}
template <class A>
__device__ inline A maximum_over_block(A value) {
  return over_block(value, [](A a, A b) { return maximum(a, b); });
}
