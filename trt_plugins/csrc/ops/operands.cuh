// What `run_few` and `run_many` of every op take. All is device memory: x is (tokens, in) and y (tokens, out), row by row,
// and `workspace` has the bytes that the op's `few_workspace` or `many_workspace` says.
#pragma once

#include "../kernels/many.cuh"
#include "op.h"

namespace procrustes {

template <typename T>
struct Operands {
  int tokens;
  T const* x;
  void const* const* factors;  // in the order of the op's inputs
  T const* bias;               // (out,), or null
  T* y;
  void* workspace;
  cudaStream_t stream;

  T const* factor(int i) const { return static_cast<T const*>(factors[i]); }
  template <typename U>
  U const* factor_as(int i) const { return static_cast<U const*>(factors[i]); }
};

inline std::string number(int32_t value) { return std::to_string(value); }

}  // namespace procrustes
