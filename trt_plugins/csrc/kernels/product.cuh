// One product for few tokens by skinny.cuh: how it is cut into blocks, and the sum over its slices.
//
// All pointers are device memory. Everything is enqueued on `stream`; nothing is allocated and nothing waits.
#pragma once

#include "skinny.cuh"

namespace procrustes {

constexpr int kSharedFloats = 48 * 1024 / sizeof(float);  // what a block has on every device without asking for more
constexpr int kBlocksWanted = 264;                        // two for each multiprocessor of an H100; a constant, so that
                                                          // the order of sums is the same on every device
constexpr int kStepsWithMix = 8;  // a block mixes what it reads itself: shared by 128 rows that takes little of its time

constexpr int64_t kAlign = 256;
inline int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }
inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// How one product is cut into blocks.
struct Cut {
  int tokens_at_once, slice, slices, steps;
  size_t shared;  // bytes
};

// `vector`: columns that a lane reads at once. slices = 0: no cut fits into shared memory.
inline Cut cut_of(int tokens, int rows, int batches, int terms, int width, int blocks, int vector) {
  Cut cut{};
  cut.tokens_at_once = 1;
  while (cut.tokens_at_once < tokens && cut.tokens_at_once < kMostTokens) cut.tokens_at_once *= 2;
  int const rows_of_step = kWarps * kRowsAtOnce;
  for (;; cut.tokens_at_once /= 2) {
    if (cut.tokens_at_once == 0) return Cut{};
    int const most = kSharedFloats / (cut.tokens_at_once * (terms + blocks)) / vector * vector;
    if (most < vector) continue;
    cut.steps = blocks > 0 ? kStepsWithMix : 1;
    while (cut.steps > 1 && rows <= rows_of_step * cut.steps / 2) cut.steps /= 2;
    int const tiles = ceil_div(rows, rows_of_step * cut.steps) * batches * ceil_div(tokens, cut.tokens_at_once);
    int const wanted = ceil_div(kBlocksWanted, tiles);
    int const least = ceil_div(kWarp * vector, terms);  // less would leave lanes without work
    int slice = ceil_div(width, wanted);
    slice = slice < least ? least : slice;
    slice = ceil_div(slice, vector) * vector;
    slice = slice > most ? most : slice;
    cut.slice = slice < width ? slice : ceil_div(width, vector) * vector;
    cut.slices = ceil_div(width, cut.slice);
    cut.shared = sizeof(float) * cut.tokens_at_once * cut.slice * (terms + blocks);
    return cut;
  }
}

template <typename T, int Width, int Tokens>
cudaError_t launch_skinny(Cut const& cut, Product<T> p, Source<T> const& source, Sink<T> const& sink,
                          cudaStream_t stream) {
  p.slice = cut.slice;
  p.steps = cut.steps;
  dim3 const grid(ceil_div(p.rows, kWarps * kRowsAtOnce * cut.steps), cut.slices,
                  p.batches * ceil_div(p.tokens, Tokens));
  PROCRUSTES_LAUNCH((skinny_kernel<T, Width, Tokens>), grid, dim3(kThreads), cut.shared, stream, p, source, sink);
  return cudaGetLastError();
}

template <typename T, int Width>
cudaError_t launch_width(Cut const& cut, Product<T> const& p, Source<T> const& source, Sink<T> const& sink,
                         cudaStream_t stream) {
  switch (cut.tokens_at_once) {
    case 1: return launch_skinny<T, Width, 1>(cut, p, source, sink, stream);
    case 2: return launch_skinny<T, Width, 2>(cut, p, source, sink, stream);
    case 4: return launch_skinny<T, Width, 4>(cut, p, source, sink, stream);
    default: return launch_skinny<T, Width, 8>(cut, p, source, sink, stream);
  }
}

// The vector path needs weights at multiples of 16 bytes, in every row and at the start of every run of columns.
template <typename T>
int vector_of(Product<T> const& p, int width) {
  bool const fits = reinterpret_cast<uintptr_t>(p.weight) % 16 == 0 && width % kVector<T> == 0 &&
                    p.columns % kVector<T> == 0 && p.weight_step % kVector<T> == 0;
  return fits ? kVector<T> : 1;
}

// Bytes of partial sums that a product may need, whatever its alignment turns out to be.
template <typename T>
int64_t partial_bytes(int tokens, int rows, int batches, int terms, int width, int blocks, bool always) {
  int64_t most = 0;
  for (int const vector : {1, kVector<T>}) {
    Cut const cut = cut_of(tokens, rows, batches, terms, width, blocks, vector);
    if (cut.slices > 1 || always) most = most > cut.slices ? most : cut.slices;
  }
  return aligned(most * tokens * rows * batches * sizeof(float));
}

// One product, and the sum over its slices where there are several. `out_mix` (out_terms, out_blocks) mixes the sums
// into y, which then has rows / out_terms * out_blocks columns.
template <typename T>
cudaError_t product(Product<T> const& p, Source<T> const& source, Sink<T> sink, float* partial, cudaStream_t stream,
                    float const* out_mix = nullptr, int out_terms = 0, int out_blocks = 0) {
  int const blocks = source.mix == nullptr ? 0 : source.blocks;
  int const vector = vector_of(p, source.width);
  Cut const cut = cut_of(p.tokens, p.rows, p.batches, source.terms, source.width, blocks, vector);
  if (cut.slices == 0) return cudaErrorInvalidConfiguration;
  bool const finish = cut.slices > 1 || out_mix != nullptr;
  sink.partial = finish ? partial : nullptr;
  sink.partial_rows = int64_t(p.rows) * p.batches;
  cudaError_t const error = vector == 1 ? launch_width<T, 1>(cut, p, source, sink, stream)
                                        : launch_width<T, kVector<T>>(cut, p, source, sink, stream);
  if (error != cudaSuccess || !finish) return error;
  int const all = p.rows * p.batches, rows = out_mix == nullptr ? all : all / out_terms * out_blocks;
  PROCRUSTES_LAUNCH((finish_kernel<T>), dim3(ceil_div(rows, kThreads), p.tokens), dim3(kThreads), 0, stream, sink,
                    cut.slices, p.tokens, rows, out_mix, out_terms, out_blocks);
  return cudaGetLastError();
}

// Ops of two products have what is between them at the start of the workspace, and then the partial sums of either.
template <typename T>
int64_t between_and_partial(int64_t numbers, int64_t first, int64_t second) {
  return aligned(numbers * sizeof(T)) + (first > second ? first : second);
}

template <typename T>
float* partial_after(void* workspace, int64_t numbers) {
  return reinterpret_cast<float*>(static_cast<char*>(workspace) + aligned(numbers * sizeof(T)));
}

template <typename T>
Source<T> plain(T const* x, int64_t stride, int columns) {
  return Source<T>{x, stride, 1, columns, 0, 0, nullptr, nullptr, 0};
}

template <typename T>
Product<T> dense(T const* weight, int rows, int columns, int tokens) {
  return Product<T>{weight, rows, columns, 1, 0, 0, rows, nullptr, 0, tokens, 0, 0};
}

template <typename T>
Sink<T> into(T* y, int64_t stride, T const* bias) {
  return Sink<T>{y, stride, bias, nullptr, 0, nullptr, 0, nullptr, 0};
}

}  // namespace procrustes
