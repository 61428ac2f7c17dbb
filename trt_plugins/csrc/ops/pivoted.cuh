// PivotedLinear and PivotedLinearIn: low rank whose pivots, rows or columns of the matrix, are not multiplied.
#pragma once

#include "operands.cuh"

namespace procrustes {

// z = x V^T, V (rank, in); y = entries `order` of [z, z C^T], C (out - rank, rank).
struct Pivoted {
  static constexpr char const* kName = "PivotedLinear";
  static constexpr bool kGrids = false;

  static std::vector<Input> inputs() {
    return {{"V", InputType::kOwn}, {"C", InputType::kOwn}, {"order", InputType::kInt32}};
  }
  static std::vector<char const*> fields() { return {"rank"}; }

  static std::string check(Sizes const& s) {
    return s.rank < 1 || s.rank >= s.out ? "rank " + number(s.rank) + " of out_features" : "";
  }
  static Shapes shapes(Sizes const& s) { return {{s.rank, s.in}, {s.out - s.rank, s.rank}, {s.out}}; }

  template <typename T>
  static int64_t few_workspace(Sizes const& s, int tokens) {
    int64_t const first = partial_bytes<T>(tokens, s.rank, 1, 1, s.in, 0, false);
    int64_t const second = partial_bytes<T>(tokens, s.out, 1, 1, s.rank, 0, false);
    return between_and_partial<T>(int64_t(tokens) * s.rank, first, second);
  }
  template <typename T>
  static cudaError_t run_few(Sizes const& s, Operands<T> const& o) {
    int const* const order = o.template factor_as<int>(2);
    T* const z = static_cast<T*>(o.workspace);
    float* const partial = partial_after<T>(o.workspace, int64_t(o.tokens) * s.rank);
    cudaError_t const error = product(dense(o.factor(0), s.rank, s.in, o.tokens), plain(o.x, s.in, s.in),
                                      into<T>(z, s.rank, nullptr), partial, o.stream);
    if (error != cudaSuccess) return error;
    Product<T> second{o.factor(1), s.out, s.rank, 1, 0, 0, s.out - s.rank, order, s.rank, o.tokens, 0, 0};
    Sink<T> const sink{o.y, s.out, o.bias, z, s.rank, order, s.rank, nullptr, 0};
    return product(second, plain<T>(z, s.rank, s.rank), sink, partial, o.stream);
  }

  template <typename T>
  static int64_t many_workspace(Sizes const& s, int tokens) {
    return aligned(int64_t(tokens) * s.rank * sizeof(T)) + aligned(int64_t(tokens) * (s.out - s.rank) * sizeof(T));
  }
  template <typename T, typename Multiply>
  static cudaError_t run_many(Multiply const& gemm, Sizes const& s, Operands<T> const& o) {
    int const rest = s.out - s.rank;
    T* const z = static_cast<T*>(o.workspace);
    T* const others = z + aligned(int64_t(o.tokens) * s.rank * sizeof(T)) / sizeof(T);
    if (cudaError_t const error =
            gemm(Gemm<T>{o.factor(0), s.in, 0, o.x, s.in, 0, z, s.rank, 0, s.rank, s.in, o.tokens, 1, false})) {
      return error;
    }
    if (cudaError_t const error =
            gemm(Gemm<T>{o.factor(1), s.rank, 0, z, s.rank, 0, others, rest, 0, rest, s.rank, o.tokens, 1, false})) {
      return error;
    }
    return gather<T>(z, s.rank, others, rest, o.template factor_as<int>(2), o.bias, o.y, o.tokens, s.out, o.stream);
  }
};

// [p, q] = entries `order` of x, C (rank, in - rank); y = (p + q C^T) U^T, U (out, rank).
struct PivotedIn {
  static constexpr char const* kName = "PivotedLinearIn";
  static constexpr bool kGrids = false;

  static std::vector<Input> inputs() {
    return {{"C", InputType::kOwn}, {"U", InputType::kOwn}, {"order", InputType::kInt32}};
  }
  static std::vector<char const*> fields() { return {"rank"}; }

  static std::string check(Sizes const& s) {
    return s.rank < 1 || s.rank >= s.in ? "rank " + number(s.rank) + " of in_features" : "";
  }
  static Shapes shapes(Sizes const& s) { return {{s.rank, s.in - s.rank}, {s.out, s.rank}, {s.in}}; }

  template <typename T>
  static int64_t few_workspace(Sizes const& s, int tokens) {
    int64_t const first = partial_bytes<T>(tokens, s.rank, 1, 1, s.in - s.rank, 0, false);
    int64_t const second = partial_bytes<T>(tokens, s.out, 1, 1, s.rank, 0, false);
    return between_and_partial<T>(int64_t(tokens) * s.rank, first, second);
  }
  template <typename T>
  static cudaError_t run_few(Sizes const& s, Operands<T> const& o) {
    int const* const order = o.template factor_as<int>(2);
    T* const sum = static_cast<T*>(o.workspace);
    float* const partial = partial_after<T>(o.workspace, int64_t(o.tokens) * s.rank);
    Source<T> const rest{o.x, s.in, 1, s.in - s.rank, 0, 0, order + s.rank, nullptr, 0};
    Sink<T> const sink{sum, s.rank, nullptr, o.x, s.in, order, s.in, nullptr, 0};
    cudaError_t const error =
        product(dense(o.factor(0), s.rank, s.in - s.rank, o.tokens), rest, sink, partial, o.stream);
    if (error != cudaSuccess) return error;
    return product(dense(o.factor(1), s.out, s.rank, o.tokens), plain<T>(sum, s.rank, s.rank), into(o.y, s.out, o.bias),
                   partial, o.stream);
  }

  template <typename T>
  static int64_t many_workspace(Sizes const& s, int tokens) { return aligned(int64_t(tokens) * s.in * sizeof(T)); }
  template <typename T, typename Multiply>
  static cudaError_t run_many(Multiply const& gemm, Sizes const& s, Operands<T> const& o) {
    int const* const order = o.template factor_as<int>(2);
    int const rest = s.in - s.rank;
    T* const sorted = static_cast<T*>(o.workspace);  // (tokens, in): pivots, to which what the others make is added, and those
    if (cudaError_t const error = gather<T>(o.x, s.in, o.x, 0, order, nullptr, sorted, o.tokens, s.in, o.stream)) {
      return error;
    }
    if (cudaError_t const error = gemm(Gemm<T>{o.factor(0), rest, 0, sorted + s.rank, s.in, 0, sorted, s.in, 0, s.rank,
                                               rest, o.tokens, 1, true})) {
      return error;
    }
    return onto_bias(gemm, Gemm<T>{o.factor(1), s.rank, 0, sorted, s.in, 0, o.y, s.out, 0, s.out, s.rank, o.tokens, 1,
                                   false},
                     o.bias, o.tokens, s.out, o.stream);
  }
};

}  // namespace procrustes
