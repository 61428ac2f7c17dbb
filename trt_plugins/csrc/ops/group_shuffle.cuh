// GroupShuffleLinear: L (left, right * rank, in / left), then R (right, out / right, left * rank).
#pragma once

#include "operands.cuh"

namespace procrustes {

struct GroupShuffle {
  static constexpr char const* kName = "GroupShuffleLinear_";
  static constexpr bool kGrids = true;

  static std::vector<Input> inputs() { return {{"L", InputType::kOwn}, {"R", InputType::kOwn}}; }
  static std::vector<char const*> fields() { return {"left_blocks", "right_blocks", "rank"}; }

  static std::string check(Sizes const& s) {
    if (s.left < 1 || s.in % s.left != 0) return number(s.left) + " left blocks do not divide " + number(s.in);
    if (s.right < 1 || s.out % s.right != 0) return number(s.right) + " right blocks do not divide " + number(s.out);
    return s.rank < 1 ? "rank " + number(s.rank) : "";
  }
  static Shapes shapes(Sizes const& s) {
    int64_t const rank = s.rank;
    return {{s.left, s.right * rank, s.in / s.left}, {s.right, s.out / s.right, s.left * rank}};
  }

  template <typename T>
  static int64_t few_workspace(Sizes const& s, int tokens) {
    int64_t const first = partial_bytes<T>(tokens, s.right * s.rank, s.left, 1, s.in / s.left, 0, false);
    int64_t const second = partial_bytes<T>(tokens, s.out / s.right, s.right, 1, s.left * s.rank, 0, false);
    return between_and_partial<T>(int64_t(tokens) * s.left * s.right * s.rank, first, second);
  }
  template <typename T>
  static cudaError_t run_few(Sizes const& s, Operands<T> const& o) {
    int const inner = s.left * s.right * s.rank;
    T* const z = static_cast<T*>(o.workspace);  // (tokens, left, right, rank)
    float* const partial = partial_after<T>(o.workspace, int64_t(o.tokens) * inner);
    int const m = s.in / s.left, rows = s.right * s.rank;
    Product<T> first{o.factor(0), rows, m, s.left, m, int64_t(rows) * m, rows, nullptr, 0, o.tokens, 0, 0};
    cudaError_t const error = product(first, plain(o.x, s.in, m), into<T>(z, inner, nullptr), partial, o.stream);
    if (error != cudaSuccess) return error;
    int const n = s.out / s.right, columns = s.left * s.rank;
    Product<T> second{o.factor(1), n, columns, s.right, s.rank, int64_t(n) * columns, n, nullptr, 0, o.tokens, 0, 0};
    Source<T> const shuffled{z, inner, 1, columns, s.right * s.rank, s.rank, nullptr, nullptr, 0};
    return product(second, shuffled, into(o.y, s.out, o.bias), partial, o.stream);
  }

  template <typename T>
  static int64_t many_workspace(Sizes const& s, int tokens) {
    return aligned(int64_t(tokens) * s.left * s.right * s.rank * sizeof(T));
  }
  // The first products write z as (right, tokens, left, rank), so that the second ones read it as it lies: the shuffle is
  // in where the blocks of L put their results.
  template <typename T, typename Multiply>
  static cudaError_t run_many(Multiply const& gemm, Sizes const& s, Operands<T> const& o) {
    T* const z = static_cast<T*>(o.workspace);
    int const m = s.in / s.left, n = s.out / s.right, columns = s.left * s.rank;
    for (int r = 0; r < s.right; ++r) {
      Gemm<T> const first{o.factor(0) + int64_t(r) * s.rank * m, m, int64_t(s.right) * s.rank * m, o.x, s.in, m,
                          z + int64_t(r) * o.tokens * columns, columns, s.rank, s.rank, m, o.tokens, s.left, false};
      if (cudaError_t const error = gemm(first)) return error;
    }
    Gemm<T> const second{o.factor(1), columns, int64_t(n) * columns, z, columns, int64_t(o.tokens) * columns, o.y, s.out,
                         n, n, columns, o.tokens, s.right, false};
    return onto_bias(gemm, second, o.bias, o.tokens, s.out, o.stream);
  }
};

}  // namespace procrustes
