#include "linear.h"

#include "../kernels/platform.cuh"

#include "../kernels/many.cuh"
#include "cublas.h"

namespace procrustes {
namespace {

template <typename T>
constexpr Type kType = sizeof(T) == 4 ? Type::kFloat : std::is_same_v<T, __half> ? Type::kHalf : Type::kBfloat16;

template <typename T>
int64_t few_bytes(Linear const& l, int tokens) {
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
int64_t many_bytes(Linear const& l, int tokens) {
  switch (l.kind) {
    case Kind::kKroneckerIn: return kronecker_many_workspace<T>(tokens, l.in, l.terms, l.blocks, l.leading);
    case Kind::kKroneckerOut: return kronecker_many_workspace<T>(tokens, l.out, l.terms, l.blocks, l.leading);
    case Kind::kGroupShuffle: return group_shuffle_many_workspace<T>(tokens, l.left, l.right, l.rank);
    case Kind::kPivoted: return pivoted_many_workspace<T>(tokens, l.out, l.rank);
    case Kind::kPivotedIn: return pivoted_in_many_workspace<T>(tokens, l.in);
  }
  return 0;
}

template <typename T>
int64_t bytes_of(Linear const& l, int tokens) {
  int64_t const few = few_bytes<T>(l, tokens);
  int64_t const many = tokens > kFewTokens ? kCublasWorkspace + many_bytes<T>(l, tokens) : 0;
  return few > many ? few : many;
}

// The operands of an op, and where its kernels differ by the number of tokens.
template <typename T>
cudaError_t run_as(Linear const& l, int tokens, void const* x_, void const* const* f, void const* bias_, void* y_,
                   void* workspace, bool cublas, cudaStream_t stream) {
  auto const x = static_cast<T const*>(x_), bias = static_cast<T const*>(bias_);
  auto const y = static_cast<T*>(y_);
  auto const factor = [&](int i) { return static_cast<T const*>(f[i]); };
  bool const many = cublas && tokens > kFewTokens;
  auto const gemm = [&](Gemm<T> const& p) {  // the first part of the workspace is for cuBLAS
    return static_cast<cudaError_t>(multiply({kType<T>, p.weight, p.weight_row, p.weight_step, p.x, p.x_row, p.x_step,
                                              p.y, p.y_row, p.y_step, p.rows, p.columns, p.tokens, p.batches, p.add},
                                             workspace, stream));
  };
  void* const rest = many ? static_cast<char*>(workspace) + kCublasWorkspace : workspace;
  switch (l.kind) {
    case Kind::kKroneckerIn:
    case Kind::kKroneckerOut: {
      auto const A = l.leading ? nullptr : static_cast<float const*>(f[1]);
      bool const reads = l.kind == Kind::kKroneckerIn;
      if (many && reads) {
        return kronecker_in_many(gemm, x, factor(0), A, bias, y, tokens, l.in, l.out, l.terms, l.blocks, rest, stream);
      }
      if (many) {
        return kronecker_out_many(gemm, x, factor(0), A, bias, y, tokens, l.in, l.out, l.terms, l.blocks, rest, stream);
      }
      auto const op = reads ? &kronecker_in<T> : &kronecker_out<T>;
      return op(x, factor(0), A, bias, y, tokens, l.in, l.out, l.terms, l.blocks, rest, stream);
    }
    case Kind::kGroupShuffle:
      return many ? group_shuffle_many(gemm, x, factor(0), factor(1), bias, y, tokens, l.in, l.out, l.left, l.right,
                                       l.rank, rest, stream)
                  : group_shuffle(x, factor(0), factor(1), bias, y, tokens, l.in, l.out, l.left, l.right, l.rank, rest,
                                  stream);
    case Kind::kPivoted:
    case Kind::kPivotedIn: {
      auto const order = static_cast<int const*>(f[2]);
      bool const outputs = l.kind == Kind::kPivoted;
      if (many && outputs) {
        return pivoted_many(gemm, x, factor(0), factor(1), order, bias, y, tokens, l.in, l.out, l.rank, rest, stream);
      }
      if (many) {
        return pivoted_in_many(gemm, x, factor(0), factor(1), order, bias, y, tokens, l.in, l.out, l.rank, rest, stream);
      }
      auto const op = outputs ? &pivoted<T> : &pivoted_in<T>;
      return op(x, factor(0), factor(1), order, bias, y, tokens, l.in, l.out, l.rank, rest, stream);
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
            void const* bias, void* y, void* workspace, bool cublas, CUstream_st* stream) {
  switch (type) {
    case Type::kFloat: return run_as<float>(linear, tokens, x, factors, bias, y, workspace, cublas, stream);
    case Type::kHalf: return run_as<__half>(linear, tokens, x, factors, bias, y, workspace, cublas, stream);
    case Type::kBfloat16: return run_as<__nv_bfloat16>(linear, tokens, x, factors, bias, y, workspace, cublas, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace procrustes
