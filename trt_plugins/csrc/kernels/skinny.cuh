// y = x W^T for few tokens: the time is that of reading W once, so W is read in pieces of 16 bytes, by enough blocks to
// fill the device. Sums are float32 and always in the same order: the same inputs give the same bits.
//
// One kernel serves every op. What differs is how it finds the columns of x (`Source`: plain, shuffled, through an index,
// or mixed out of blocks on the way into shared memory) and what it does with a sum (`Sink`).
#pragma once

#include "element.cuh"

namespace procrustes {

constexpr int kWarp = 32;
constexpr int kWarps = 4;
constexpr int kThreads = kWarp * kWarps;
constexpr int kRowsAtOnce = 4;  // rows of W that a warp has in flight: 64 bytes a lane
constexpr int kMostTokens = 8;  // tokens that share one read of W

// Columns of x that one product reads. Column c of token t is x[t * stride + place(c)], or with a mix
// sum_b mix[j * blocks + b] x[t * stride + b * width + e], c = j * width + e.
template <typename T>
struct Source {
  T const* x;
  int64_t stride;          // between tokens
  int terms, width;        // the product has terms * width columns
  int outer, inner;        // place(c) = c / inner * outer + c % inner; inner = 0: place(c) = c
  int const* index;        // or place(c) = index[c]
  float const* mix;        // (terms, blocks), or null
  int blocks;

  __device__ int64_t place(int column) const {
    if (index != nullptr) return index[column];
    return inner == 0 ? column : int64_t(column / inner) * outer + column % inner;
  }
};

// Where sums go. With `partial` they are kept per slice for `finish_kernel`, else they become y.
template <typename T>
struct Sink {
  T* y;
  int64_t stride;          // between tokens
  T const* bias;           // (rows,), or null
  T const* added;          // token t, row r: + added[t * added_stride + i], i = added_index[r] below added_below; or null
  int64_t added_stride;
  int const* added_index;
  int added_below;
  float* partial;          // (slices, tokens, all rows of all batches)
  int64_t partial_rows;

  __device__ float shift(int token, int row) const {
    float value = bias == nullptr ? 0.f : to_float(bias[row]);
    if (added != nullptr && added_index[row] < added_below) {
      value += to_float(added[token * added_stride + added_index[row]]);
    }
    return value;
  }
};

// A batch of independent products: batch b reads x + b * x_step, W + b * weight_step, writes rows b * rows and on.
template <typename T>
struct Product {
  T const* weight;         // (rows, columns) of each batch, rows one after the other
  int rows, columns;
  int batches;
  int64_t x_step, weight_step;
  int present;             // rows that W has; those of y beyond them are sums of nothing
  int const* row_index;    // row r of y is made by row row_index[r] - skipped of W, below 0 by none; null: by row r
  int skipped;
  int tokens;
  int slice;               // columns of each of the `terms` that one block reads
  int steps;               // times that a block's warps take kRowsAtOnce rows
};

// The sum over all lanes of one of the `Count` values: of value lane / (32 / Count). Each exchange hands half of what a lane
// still holds to the lane that will finish it: Count - 1 exchanges and one for each halving that is left, in place of
// 5 Count.
// Recursive, and not a loop: an index that is not known when it is compiled would put `values` into memory.
template <int Held, int Distance, int Count>
__device__ void fold(float (&values)[Count], int lane) {
  if constexpr (Held > 0) {
    bool const upper = lane & Distance;
#pragma unroll
    for (int i = 0; i < Held; ++i) {
      float const kept = upper ? values[i + Held] : values[i], given = upper ? values[i] : values[i + Held];
      values[i] = kept + __shfl_xor_sync(0xffffffffu, given, Distance);
    }
    fold<Held / 2, Distance / 2>(values, lane);
  } else if constexpr (Distance > 0) {
    values[0] += __shfl_xor_sync(0xffffffffu, values[0], Distance);
    fold<0, Distance / 2>(values, lane);
  }
}

template <int Count>
__device__ float sum_of_lane(float (&values)[Count], int lane) {
  static_assert(Count <= kWarp && (Count & (Count - 1)) == 0);
  fold<Count / 2, kWarp / 2>(values, lane);
  return values[0];
}

// Blocks that a multiprocessor has to hold: with fewer registers a thread some variants spill on some GPUs, and so many
// blocks have 32 KiB of W in flight (computed: an H100 needs about 15 KiB of each multiprocessor to keep its memory busy).
template <int Tokens>
constexpr int kResident = Tokens == 8 ? 4 : 5;

template <typename T, int Width, int Tokens>
__global__ void __launch_bounds__(kThreads, kResident<Tokens>)
skinny_kernel(Product<T> p, Source<T> source, Sink<T> sink) {
  PROCRUSTES_SHARED(float, z);  // (Tokens, columns of the slice), then with a mix (Tokens, blocks, width of the slice)
  int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int const groups = (p.tokens + Tokens - 1) / Tokens;
  int const batch = blockIdx.z / groups, first = int(blockIdx.z) % groups * Tokens;
  int const count = min(Tokens, p.tokens - first);
  int const begin = int(blockIdx.y) * p.slice, size = min(p.slice, source.width - begin);
  int const columns = source.terms * size;
  T const* x = source.x + batch * p.x_step + first * source.stride;

  if (source.mix != nullptr) {
    float* const staged = z + Tokens * source.terms * p.slice;
    int const whole = source.blocks * size;
    for (int i = threadIdx.x; i < Tokens * whole; i += kThreads) {
      int const token = i / whole, place = i % whole;
      int64_t const from = token * source.stride + int64_t(place / size) * source.width + begin + place % size;
      staged[i] = token < count ? to_float(x[from]) : 0.f;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < Tokens * columns; i += kThreads) {
      int const token = i / columns, column = i % columns, term = column / size;
      float const* const block = staged + token * whole + column % size;
      float sum = 0.f;
      for (int b = 0; b < source.blocks; ++b) sum += source.mix[term * source.blocks + b] * block[b * size];
      z[i] = sum;
    }
  } else {
    for (int i = threadIdx.x; i < Tokens * columns; i += kThreads) {
      int const token = i / columns, column = begin + i % columns;  // without a mix there is one term
      z[i] = token < count ? to_float(x[token * source.stride + source.place(column)]) : 0.f;
    }
  }
  __syncthreads();

  T const* const weight = p.weight + batch * p.weight_step;
  for (int step = 0; step < p.steps; ++step) {
    int const row = ((int(blockIdx.x) * p.steps + step) * kWarps + warp) * kRowsAtOnce;
    T const* rows[kRowsAtOnce];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      int const mine = row + r;
      int const from = mine >= p.rows ? -1 : p.row_index == nullptr ? mine : p.row_index[mine] - p.skipped;
      rows[r] = from < 0 || from >= p.present ? nullptr : weight + int64_t(from) * p.columns;
    }
    float sums[kRowsAtOnce * Tokens] = {};
    for (int c = lane * Width; c < columns; c += kWarp * Width) {
      int const column = c / size * source.width + begin + c % size;
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        if (rows[r] == nullptr) continue;
        Pack<T, Width> const w(rows[r] + column);
#pragma unroll
        for (int t = 0; t < Tokens; ++t) {
#pragma unroll
          for (int i = 0; i < Width; ++i) sums[r * Tokens + t] += w.value[i] * z[t * columns + c + i];
        }
      }
    }
    float const sum = sum_of_lane(sums, lane);
    int const which = lane / (kWarp / (kRowsAtOnce * Tokens)), t = which % Tokens, out = row + which / Tokens;
    if (lane % (kWarp / (kRowsAtOnce * Tokens)) != 0 || t >= count || out >= p.rows) continue;
    int const token = first + t, place = batch * p.rows + out;
    if (sink.partial != nullptr) {
      sink.partial[(int64_t(blockIdx.y) * p.tokens + token) * sink.partial_rows + place] = sum;
    } else {
      sink.y[token * sink.stride + place] = from_float<T>(sum + sink.shift(token, place));
    }
  }
}

// y from the partial sums of all slices: row r, or with a mix (terms, blocks) row b * width + e of
// sum_j mix[j * blocks + b] sum_s partial[s, t, j * width + e].
template <typename T>
__global__ void __launch_bounds__(kThreads)
finish_kernel(Sink<T> sink, int slices, int tokens, int rows, float const* mix, int terms, int blocks) {
  int const row = int(blockIdx.x) * kThreads + int(threadIdx.x), token = blockIdx.y;
  if (row >= rows) return;
  float sum = 0.f;
  int const width = mix == nullptr ? rows : rows / blocks;
  for (int j = 0; j < (mix == nullptr ? 1 : terms); ++j) {
    float const factor = mix == nullptr ? 1.f : mix[j * blocks + row / width];
    float part = 0.f;
    for (int s = 0; s < slices; ++s) {
      part += sink.partial[(int64_t(s) * tokens + token) * sink.partial_rows + j * width + row % width];
    }
    sum += factor * part;
  }
  sink.y[token * sink.stride + row] = from_float<T>(sum + sink.shift(token, row));
}

}  // namespace procrustes
