// What kernels take from CUDA beyond the language, so that tests can run them on CPU threads with their own definitions.
#pragma once

#include <cuda_runtime.h>

// Dynamic shared memory of a block, as `type name[]`.
#define PROCRUSTES_SHARED(type, name)                                         \
  extern __shared__ __align__(16) unsigned char procrustes_shared_memory[];   \
  type* const name = reinterpret_cast<type*>(procrustes_shared_memory)

#define PROCRUSTES_UNPACK(...) __VA_ARGS__
// PROCRUSTES_LAUNCH((kernel<...>), grid, threads, shared bytes, stream, arguments...)
#define PROCRUSTES_LAUNCH(kernel, grid, threads, shared, stream, ...) \
  PROCRUSTES_UNPACK kernel<<<grid, threads, shared, stream>>>(__VA_ARGS__)
