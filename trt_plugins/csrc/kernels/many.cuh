// What ops do with many tokens beside matrix products, which a library computes (`gemm`): mixing, the order of features,
// biases. As in product.cuh: device memory, (tokens, features) row by row.
#pragma once

#include "product.cuh"

namespace procrustes {

constexpr int kFewTokens = 32;  // up to this many the kernels of skinny.cuh read weights once and need no library

// y[b] (tokens, rows) = x[b] (tokens, columns) W[b]^T, or with `add` that added to y, for `batches` of them. Each *_row is
// the distance of two rows, each *_step that of two batches, in elements. W[b] is (rows, columns).
template <typename T>
struct Gemm {
  T const* weight;
  int64_t weight_row, weight_step;
  T const* x;
  int64_t x_row, x_step;
  T* y;
  int64_t y_row, y_step;
  int rows, columns, tokens, batches;
  bool add;
};

// y (tokens, n) = bias (n), or 0 where it is null.
template <typename T>
__global__ void __launch_bounds__(kThreads) fill_kernel(T* y, T const* bias, int n) {
  int const column = blockIdx.x * kThreads + threadIdx.x;
  if (column < n) y[int64_t(blockIdx.y) * n + column] = bias == nullptr ? from_float<T>(0.f) : bias[column];
}

// y (tokens, terms, width) = sum over b of A (terms, blocks) x (tokens, blocks, width); `transposed`: A is (blocks, terms).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    mix_kernel(T const* x, float const* A, T const* bias, T* y, int terms, int blocks, int width, bool transposed) {
  int const column = blockIdx.x * kThreads + threadIdx.x;
  if (column >= terms * width) return;
  int const term = column / width, place = column % width;
  T const* const row = x + int64_t(blockIdx.y) * blocks * width + place;
  float sum = bias == nullptr ? 0.f : to_float(bias[column]);
  for (int b = 0; b < blocks; ++b) {
    sum += (transposed ? A[b * terms + term] : A[term * blocks + b]) * to_float(row[int64_t(b) * width]);
  }
  y[int64_t(blockIdx.y) * terms * width + column] = from_float<T>(sum);
}

// y (tokens, n): entry j is entry order[j] of [first (tokens, split), second (tokens, rest)], plus bias[j] if there is one.
template <typename T>
__global__ void __launch_bounds__(kThreads) gather_kernel(T const* first, int split, T const* second, int rest,
                                                          int const* order, T const* bias, T* y, int n) {
  int const column = blockIdx.x * kThreads + threadIdx.x;
  if (column >= n) return;
  int64_t const token = blockIdx.y;
  int const from = order[column];
  T const value = from < split ? first[token * split + from] : second[token * rest + (from - split)];
  y[token * n + column] = bias == nullptr ? value : from_float<T>(to_float(value) + to_float(bias[column]));
}

constexpr int kMostRows = 65535;  // blocks along y, on every device

// Launches a kernel above on (tokens, columns), in pieces of as many tokens as a grid has room for. `launch(first, count)`.
template <typename Launch>
cudaError_t over_tokens(int tokens, Launch const& launch) {
  for (int first = 0; first < tokens; first += kMostRows) launch(first, tokens - first < kMostRows ? tokens - first : kMostRows);
  return cudaGetLastError();
}

template <typename T>
cudaError_t fill(T* y, T const* bias, int tokens, int n, cudaStream_t stream) {
  return over_tokens(tokens, [&](int first, int count) {
    PROCRUSTES_LAUNCH((fill_kernel<T>), dim3(ceil_div(n, kThreads), count), dim3(kThreads), 0, stream,
                      y + int64_t(first) * n, bias, n);
  });
}

template <typename T>
cudaError_t mix(T const* x, float const* A, T const* bias, T* y, int tokens, int terms, int blocks, int width,
                bool transposed, cudaStream_t stream) {
  return over_tokens(tokens, [&](int first, int count) {
    PROCRUSTES_LAUNCH((mix_kernel<T>), dim3(ceil_div(terms * width, kThreads), count), dim3(kThreads), 0, stream,
                      x + int64_t(first) * blocks * width, A, bias, y + int64_t(first) * terms * width, terms, blocks,
                      width, transposed);
  });
}

template <typename T>
cudaError_t gather(T const* head, int split, T const* tail, int rest, int const* order, T const* bias, T* y, int tokens,
                   int n, cudaStream_t stream) {
  return over_tokens(tokens, [&](int first, int count) {
    PROCRUSTES_LAUNCH((gather_kernel<T>), dim3(ceil_div(n, kThreads), count), dim3(kThreads), 0, stream,
                      head + int64_t(first) * split, split, tail + int64_t(first) * rest, rest, order, bias,
                      y + int64_t(first) * n, n);
  });
}

// The last product of an op, onto the bias where there is one.
template <typename T, typename Multiply>
cudaError_t onto_bias(Multiply const& gemm, Gemm<T> p, T const* bias, int tokens, int out, cudaStream_t stream) {
  if (bias != nullptr) {
    if (cudaError_t const error = fill(p.y, bias, tokens, out, stream)) return error;
    p.add = true;
  }
  return gemm(p);
}

}  // namespace procrustes
