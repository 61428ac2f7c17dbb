// The table of all ops, and the one place that tells types and numbers of tokens apart.
#include "../kernels/platform.cuh"

#include "../plugin/cublas.h"
#include "group_shuffle.cuh"
#include "kronecker.cuh"
#include "pivoted.cuh"

#include <type_traits>

namespace procrustes {
namespace {

template <typename T>
constexpr Type kType = sizeof(T) == 4 ? Type::kFloat : std::is_same_v<T, __half> ? Type::kHalf : Type::kBfloat16;

template <typename Kind, typename T>
int64_t workspace_as(Sizes const& sizes, int tokens) {
  int64_t const few = Kind::template few_workspace<T>(sizes, tokens);
  int64_t const many = tokens > kFewTokens ? kCublasWorkspace + Kind::template many_workspace<T>(sizes, tokens) : 0;
  return few > many ? few : many;
}

template <typename Kind, typename T>
cudaError_t run_as(Sizes const& sizes, int tokens, void const* x, void const* const* factors, void const* bias, void* y,
                   void* workspace, bool cublas, cudaStream_t stream) {
  Operands<T> operands{tokens, static_cast<T const*>(x), factors, static_cast<T const*>(bias), static_cast<T*>(y),
                       workspace, stream};
  if (!cublas || tokens <= kFewTokens) return Kind::run_few(sizes, operands);
  operands.workspace = static_cast<char*>(workspace) + kCublasWorkspace;  // the first part is for cuBLAS
  auto const gemm = [&](Gemm<T> const& p) {
    return static_cast<cudaError_t>(multiply({kType<T>, p.weight, p.weight_row, p.weight_step, p.x, p.x_row, p.x_step,
                                              p.y, p.y_row, p.y_step, p.rows, p.columns, p.tokens, p.batches, p.add},
                                             workspace, stream));
  };
  return Kind::run_many(gemm, sizes, operands);
}

template <typename Kind>
int64_t workspace_of(Sizes const& sizes, Type type, int32_t tokens) {
  switch (type) {
    case Type::kFloat: return workspace_as<Kind, float>(sizes, tokens);
    case Type::kHalf: return workspace_as<Kind, __half>(sizes, tokens);
    case Type::kBfloat16: return workspace_as<Kind, __nv_bfloat16>(sizes, tokens);
  }
  return 0;
}

template <typename Kind, typename... Rest>
int32_t run_of(Sizes const& sizes, Type type, Rest... rest) {
  switch (type) {
    case Type::kFloat: return run_as<Kind, float>(sizes, rest...);
    case Type::kHalf: return run_as<Kind, __half>(sizes, rest...);
    case Type::kBfloat16: return run_as<Kind, __nv_bfloat16>(sizes, rest...);
  }
  return cudaErrorInvalidValue;
}

template <typename Kind>
Op row() {
  return {Kind::kName,  Kind::kGrids,       Kind::inputs(), Kind::fields(), Kind::check,
          Kind::shapes, workspace_of<Kind>, run_of<Kind>};
}

}  // namespace

std::vector<Op> const& ops() {
  static std::vector<Op> const table = {
      row<KroneckerIn<false>>(), row<KroneckerOut<false>>(), row<KroneckerIn<true>>(), row<KroneckerOut<true>>(),
      row<Pivoted>(),            row<PivotedIn>(),           row<GroupShuffle>(),
  };
  return table;
}

}  // namespace procrustes
