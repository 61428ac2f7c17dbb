// KroneckerLinear, KroneckerLinearOut and their Leading twins, whose A is rows of the identity and no input.
#pragma once

#include "operands.cuh"

namespace procrustes {

// What both sides share; `whole` is the number of features that the blocks cut.
template <bool Leading>
struct Kronecker {
  static constexpr bool kGrids = false;

  static std::vector<Input> inputs() {
    if (Leading) return {{"B", InputType::kOwn}};
    return {{"B", InputType::kOwn}, {"A", InputType::kFloat}};
  }
  static std::vector<char const*> fields() { return {"terms", "blocks"}; }

  static std::string check_blocks(Sizes const& s, int32_t whole) {
    if (s.blocks < 1 || whole % s.blocks != 0) return number(s.blocks) + " blocks do not divide " + number(whole);
    if (s.terms < 1 || (Leading && s.terms > s.blocks)) return number(s.terms) + " terms of " + number(s.blocks);
    return "";
  }
  static Shapes with_mix(Sizes const& s, std::vector<int64_t> const& B) {
    if (Leading) return {B};
    return {B, {s.terms, s.blocks}};
  }
  template <typename T>
  static int64_t mixed_bytes(Sizes const& s, int tokens, int32_t whole) {
    return Leading ? 0 : aligned(int64_t(tokens) * s.terms * (whole / s.blocks) * sizeof(T));
  }
  template <typename T>
  static float const* mix_of(Operands<T> const& o) { return Leading ? nullptr : o.template factor_as<float>(1); }
};

// x mixed from `blocks` blocks into `terms` terms by A (terms, blocks), or cut to its leading columns; then
// B (out, terms * in / blocks).
template <bool Leading>
struct KroneckerIn : Kronecker<Leading> {
  static constexpr char const* kName = Leading ? "KroneckerLeadingLinear" : "KroneckerLinear";

  static std::string check(Sizes const& s) { return KroneckerIn::check_blocks(s, s.in); }
  static Shapes shapes(Sizes const& s) { return KroneckerIn::with_mix(s, {s.out, int64_t(s.terms) * (s.in / s.blocks)}); }

  template <typename T>
  static int64_t few_workspace(Sizes const& s, int tokens) {
    int const width = s.in / s.blocks;
    return Leading ? partial_bytes<T>(tokens, s.out, 1, 1, s.terms * width, 0, false)
                   : partial_bytes<T>(tokens, s.out, 1, s.terms, width, s.blocks, false);
  }
  template <typename T>
  static cudaError_t run_few(Sizes const& s, Operands<T> const& o) {
    int const width = s.in / s.blocks;
    Source<T> source = plain(o.x, s.in, s.terms * width);
    if (!Leading) source = Source<T>{o.x, s.in, s.terms, width, 0, 0, nullptr, KroneckerIn::mix_of(o), s.blocks};
    return product(dense(o.factor(0), s.out, s.terms * width, o.tokens), source, into(o.y, s.out, o.bias),
                   static_cast<float*>(o.workspace), o.stream);
  }

  template <typename T>
  static int64_t many_workspace(Sizes const& s, int tokens) {
    return KroneckerIn::template mixed_bytes<T>(s, tokens, s.in);
  }
  template <typename T, typename Multiply>
  static cudaError_t run_many(Multiply const& gemm, Sizes const& s, Operands<T> const& o) {
    int const width = s.in / s.blocks, kept = s.terms * width;
    Gemm<T> p{o.factor(0), kept, 0, o.x, s.in, 0, o.y, s.out, 0, s.out, kept, o.tokens, 1, false};
    if (!Leading) {
      T* const mixed = static_cast<T*>(o.workspace);
      if (cudaError_t const error = mix<T>(o.x, KroneckerIn::mix_of(o), nullptr, mixed, o.tokens, s.terms, s.blocks, width,
                                           false, o.stream)) {
        return error;
      }
      p.x = mixed, p.x_row = kept;
    }
    return onto_bias(gemm, p, o.bias, o.tokens, s.out, o.stream);
  }
};

// B (terms * out / blocks, in), then A (terms, blocks) or a padding with zeros.
template <bool Leading>
struct KroneckerOut : Kronecker<Leading> {
  static constexpr char const* kName = Leading ? "KroneckerLeadingLinearOut" : "KroneckerLinearOut";

  static std::string check(Sizes const& s) { return KroneckerOut::check_blocks(s, s.out); }
  static Shapes shapes(Sizes const& s) { return KroneckerOut::with_mix(s, {int64_t(s.terms) * (s.out / s.blocks), s.in}); }

  template <typename T>
  static int64_t few_workspace(Sizes const& s, int tokens) {
    return Leading ? partial_bytes<T>(tokens, s.out, 1, 1, s.in, 0, false)
                   : partial_bytes<T>(tokens, s.terms * (s.out / s.blocks), 1, 1, s.in, 0, true);
  }
  template <typename T>
  static cudaError_t run_few(Sizes const& s, Operands<T> const& o) {
    Product<T> p = dense(o.factor(0), s.terms * (s.out / s.blocks), s.in, o.tokens);
    if (Leading) p.rows = s.out;  // those beyond what B has are zeros
    return product(p, plain(o.x, s.in, s.in), into(o.y, s.out, o.bias), static_cast<float*>(o.workspace), o.stream,
                   KroneckerOut::mix_of(o), s.terms, s.blocks);
  }

  template <typename T>
  static int64_t many_workspace(Sizes const& s, int tokens) {
    return KroneckerOut::template mixed_bytes<T>(s, tokens, s.out);
  }
  template <typename T, typename Multiply>
  static cudaError_t run_many(Multiply const& gemm, Sizes const& s, Operands<T> const& o) {
    int const width = s.out / s.blocks, kept = s.terms * width;
    if (Leading) {  // the columns beyond `kept` are bias or zeros
      if (cudaError_t const error = fill(o.y, o.bias, o.tokens, s.out, o.stream)) return error;
      return gemm(Gemm<T>{o.factor(0), s.in, 0, o.x, s.in, 0, o.y, s.out, 0, kept, s.in, o.tokens, 1, true});
    }
    T* const z = static_cast<T*>(o.workspace);
    cudaError_t const error =
        gemm(Gemm<T>{o.factor(0), s.in, 0, o.x, s.in, 0, z, kept, 0, kept, s.in, o.tokens, 1, false});
    return error ? error
                 : mix(z, KroneckerOut::mix_of(o), o.bias, o.y, o.tokens, s.blocks, s.terms, width, true, o.stream);
  }
};

}  // namespace procrustes
