// The ops of the contract (export/graph/ops.py) for many tokens: matrix products by a library, which is given as `gemm`, and what
// goes before, between and after them: mixing, the order of features, biases.
//
// As in ops.cuh: device memory, (tokens, features) row by row, a workspace of the bytes that `*_many_workspace` says.
#pragma once

#include "ops.cuh"

namespace procrustes {

constexpr int kFewTokens = 32;  // up to this many the kernels of ops.cuh read weights once and need no library

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

template <typename T>
int64_t kronecker_many_workspace(int tokens, int whole, int terms, int blocks, bool leading) {
  return leading ? 0 : aligned(int64_t(tokens) * terms * (whole / blocks) * sizeof(T));
}

template <typename T, typename Multiply>
cudaError_t kronecker_in_many(Multiply const& gemm, T const* x, T const* B, float const* A, T const* bias, T* y,
                              int tokens, int in, int out, int terms, int blocks, void* workspace,
                              cudaStream_t stream) {
  int const width = in / blocks, kept = terms * width;
  Gemm<T> p{B, kept, 0, x, in, 0, y, out, 0, out, kept, tokens, 1, false};
  if (A != nullptr) {
    T* const mixed = static_cast<T*>(workspace);
    if (cudaError_t const error = mix<T>(x, A, nullptr, mixed, tokens, terms, blocks, width, false, stream)) return error;
    p.x = mixed, p.x_row = kept;
  }
  return onto_bias(gemm, p, bias, tokens, out, stream);
}

template <typename T, typename Multiply>
cudaError_t kronecker_out_many(Multiply const& gemm, T const* x, T const* B, float const* A, T const* bias, T* y,
                               int tokens, int in, int out, int terms, int blocks, void* workspace,
                               cudaStream_t stream) {
  int const width = out / blocks, kept = terms * width;
  if (A == nullptr) {  // the columns beyond `kept` are bias or zeros
    if (cudaError_t const error = fill(y, bias, tokens, out, stream)) return error;
    return gemm(Gemm<T>{B, in, 0, x, in, 0, y, out, 0, kept, in, tokens, 1, true});
  }
  T* const z = static_cast<T*>(workspace);
  cudaError_t const error = gemm(Gemm<T>{B, in, 0, x, in, 0, z, kept, 0, kept, in, tokens, 1, false});
  return error ? error : mix(z, A, bias, y, tokens, blocks, terms, width, true, stream);
}

template <typename T>
int64_t group_shuffle_many_workspace(int tokens, int left, int right, int rank) {
  return aligned(int64_t(tokens) * left * right * rank * sizeof(T));
}

// The first products write z as (right, tokens, left, rank), so that the second ones read it as it lies: the shuffle is in
// where the blocks of L put their results.
template <typename T, typename Multiply>
cudaError_t group_shuffle_many(Multiply const& gemm, T const* x, T const* L, T const* R, T const* bias, T* y,
                               int tokens, int in, int out, int left, int right, int rank, void* workspace,
                               cudaStream_t stream) {
  T* const z = static_cast<T*>(workspace);
  int const m = in / left, n = out / right, columns = left * rank;
  for (int r = 0; r < right; ++r) {
    Gemm<T> const first{L + int64_t(r) * rank * m, m, int64_t(right) * rank * m, x, in, m,
                        z + int64_t(r) * tokens * columns, columns, rank, rank, m, tokens, left, false};
    if (cudaError_t const error = gemm(first)) return error;
  }
  Gemm<T> const second{R, columns, int64_t(n) * columns, z, columns, int64_t(tokens) * columns, y, out, n, n, columns,
                       tokens, right, false};
  return onto_bias(gemm, second, bias, tokens, out, stream);
}

template <typename T>
int64_t pivoted_many_workspace(int tokens, int out, int rank) {
  return aligned(int64_t(tokens) * rank * sizeof(T)) + aligned(int64_t(tokens) * (out - rank) * sizeof(T));
}

template <typename T, typename Multiply>
cudaError_t pivoted_many(Multiply const& gemm, T const* x, T const* V, T const* C, int const* order, T const* bias, T* y,
                         int tokens, int in, int out, int rank, void* workspace, cudaStream_t stream) {
  int const rest = out - rank;
  T* const z = static_cast<T*>(workspace);
  T* const others = reinterpret_cast<T*>(static_cast<char*>(workspace) + aligned(int64_t(tokens) * rank * sizeof(T)));
  if (cudaError_t const error = gemm(Gemm<T>{V, in, 0, x, in, 0, z, rank, 0, rank, in, tokens, 1, false})) return error;
  if (cudaError_t const error = gemm(Gemm<T>{C, rank, 0, z, rank, 0, others, rest, 0, rest, rank, tokens, 1, false})) {
    return error;
  }
  return gather<T>(z, rank, others, rest, order, bias, y, tokens, out, stream);
}

template <typename T>
int64_t pivoted_in_many_workspace(int tokens, int in) {
  return aligned(int64_t(tokens) * in * sizeof(T));
}

template <typename T, typename Multiply>
cudaError_t pivoted_in_many(Multiply const& gemm, T const* x, T const* C, T const* U, int const* order, T const* bias,
                            T* y, int tokens, int in, int out, int rank, void* workspace, cudaStream_t stream) {
  int const rest = in - rank;
  T* const sorted = static_cast<T*>(workspace);  // (tokens, in): pivots, to which what the others make is added, and those
  if (cudaError_t const error = gather<T>(x, in, x, 0, order, nullptr, sorted, tokens, in, stream)) return error;
  if (cudaError_t const error =
          gemm(Gemm<T>{C, rest, 0, sorted + rank, in, 0, sorted, in, 0, rank, rest, tokens, 1, true})) {
    return error;
  }
  return onto_bias(gemm, Gemm<T>{U, rank, 0, sorted, in, 0, y, out, 0, out, rank, tokens, 1, false}, bias, tokens, out,
                   stream);
}

}  // namespace procrustes
