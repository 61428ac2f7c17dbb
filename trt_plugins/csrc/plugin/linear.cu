#include "linear.h"

#include "../kernels/platform.cuh"

#include "../kernels/ops.cuh"

namespace procrustes {
namespace {

template <typename T>
int64_t bytes_of(Linear const& l, int tokens) {
  switch (l.kind) {
    case Kind::kKroneckerIn: return kronecker_in_workspace<T>(tokens, l.in, l.out, l.terms, l.blocks, l.leading);
    case Kind::kKroneckerOut: return kronecker_out_workspace<T>(tokens, l.in, l.out, l.terms, l.blocks, l.leading);
    case Kind::kGroupShuffle: return group_shuffle_workspace<T>(tokens, l.in, l.out, l.left, l.right, l.rank);
    case Kind::kPivoted: return pivoted_workspace<T>(tokens, l.in, l.out, l.rank);
    case Kind::kPivotedIn: return pivoted_in_workspace<T>(tokens, l.in, l.out, l.rank);
  }
  return 0;
}

template <typename T>
cudaError_t run_as(Linear const& l, int tokens, void const* x_, void const* const* f, void const* bias_, void* y_,
                   void* workspace, cudaStream_t stream) {
  auto const x = static_cast<T const*>(x_), bias = static_cast<T const*>(bias_);
  auto const y = static_cast<T*>(y_);
  auto const factor = [&](int i) { return static_cast<T const*>(f[i]); };
  switch (l.kind) {
    case Kind::kKroneckerIn:
    case Kind::kKroneckerOut: {
      auto const A = l.leading ? nullptr : static_cast<float const*>(f[1]);
      auto const op = l.kind == Kind::kKroneckerIn ? &kronecker_in<T> : &kronecker_out<T>;
      return op(x, factor(0), A, bias, y, tokens, l.in, l.out, l.terms, l.blocks, workspace, stream);
    }
    case Kind::kGroupShuffle:
      return group_shuffle(x, factor(0), factor(1), bias, y, tokens, l.in, l.out, l.left, l.right, l.rank, workspace,
                           stream);
    case Kind::kPivoted:
    case Kind::kPivotedIn: {
      auto const op = l.kind == Kind::kPivoted ? &pivoted<T> : &pivoted_in<T>;
      return op(x, factor(0), factor(1), static_cast<int const*>(f[2]), bias, y, tokens, l.in, l.out, l.rank, workspace,
                stream);
    }
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int64_t workspace_bytes(Linear const& linear, Type type, int32_t tokens) {
  switch (type) {
    case Type::kFloat: return bytes_of<float>(linear, tokens);
    case Type::kHalf: return bytes_of<__half>(linear, tokens);
    case Type::kBfloat16: return bytes_of<__nv_bfloat16>(linear, tokens);
  }
  return 0;
}

int32_t run(Linear const& linear, Type type, int32_t tokens, void const* x, void const* const* factors,
            void const* bias, void* y, void* workspace, CUstream_st* stream) {
  switch (type) {
    case Type::kFloat: return run_as<float>(linear, tokens, x, factors, bias, y, workspace, stream);
    case Type::kHalf: return run_as<__half>(linear, tokens, x, factors, bias, y, workspace, stream);
    case Type::kBfloat16: return run_as<__nv_bfloat16>(linear, tokens, x, factors, bias, y, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace procrustes
