// CUDA's execution model on CPU threads: one std::thread for each thread of a block, blocks one after the other.
// __syncthreads is a barrier of the block; a shuffle is an exchange between two barriers of its warp. Shared memory is an
// allocation of exactly the size asked for, filled with NaN before each block, so that sanitizers and NaNs show every access
// outside of it and every read before a write.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

using std::min;

#ifndef __global__
#define __global__
#endif
#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif

namespace shim {

struct Block {
  explicit Block(int threads, size_t bytes) : all(threads), exchange{std::vector<float>(threads), std::vector<float>(threads)}, shared(bytes / sizeof(float)) {
    for (int first = 0; first < threads; first += 32) {
      warps.push_back(std::make_unique<std::barrier<>>(std::min(32, threads - first)));
    }
  }
  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<float> exchange[2];
  std::vector<float> shared;
};

inline thread_local Block* block = nullptr;
inline thread_local int turn = 0;
inline thread_local uint3 thread_index{}, block_index{};

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, dim3 grid, dim3 threads, size_t shared, cudaStream_t, Arguments... arguments) {
  int const count = threads.x;
  Block state(count, shared);
  auto const run = [&](int index) {
    block = &state;
    thread_index = {unsigned(index), 0, 0};
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          if (index == 0) std::ranges::fill(state.shared, std::numeric_limits<float>::quiet_NaN());
          state.all.arrive_and_wait();
          block_index = {x, y, z};
          kernel(arguments...);
          state.all.arrive_and_wait();
        }
      }
    }
  };
  std::vector<std::thread> running;
  for (int index = 0; index < count; ++index) running.emplace_back(run, index);
  for (auto& thread : running) thread.join();
}

}  // namespace shim

#define threadIdx shim::thread_index
#define blockIdx shim::block_index

inline void __syncthreads() { shim::block->all.arrive_and_wait(); }

inline float __shfl_xor_sync(unsigned, float value, int distance) {
  // Two places in turn: who writes the first again has seen everyone at the barrier of the second, and so past the first.
  int const mine = shim::thread_index.x;
  auto& place = shim::block->exchange[shim::turn ^= 1];
  place[mine] = value;
  shim::block->warps[mine / 32]->arrive_and_wait();
  return place[mine ^ distance];
}

template <typename T>
T __ldg(T const* address) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) std::abort();  // a GPU would fault
  return *address;
}

#define PROCRUSTES_SHARED(type, name) type* const name = reinterpret_cast<type*>(shim::block->shared.data())
#define PROCRUSTES_UNPACK(...) __VA_ARGS__
#define PROCRUSTES_LAUNCH(kernel, grid, threads, shared, stream, ...) \
  shim::launch(PROCRUSTES_UNPACK kernel, grid, threads, shared, stream, __VA_ARGS__)

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
