// Every op of csrc/ops on CPU threads against float64, over random shapes and all types. Usage: kernels_test [cases [seed]]
#include "shim/cuda_on_threads.h"

#include "ops/group_shuffle.cuh"
#include "ops/kronecker.cuh"
#include "ops/pivoted.cuh"

#include <cstdio>
#include <numeric>
#include <random>
#include <string>

using namespace procrustes;

namespace {

std::mt19937 generator;

int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

template <typename T>
constexpr double kEpsilon = sizeof(T) == 4 ? 6e-8 : std::is_same_v<T, __half> ? 4.9e-4 : 3.9e-3;

// Numbers of T, `offset` elements away from an address at which 16-byte loads are allowed.
template <typename T>
struct Array {
  std::vector<T> storage;
  int offset;
  std::vector<double> exact;

  explicit Array(size_t size, int away = 0, double scale = 1.0) : storage(size + away), offset(away), exact(size) {
    std::normal_distribution<float> normal(0.f, float(scale));
    for (size_t i = 0; i < size; ++i) {
      T const value = from_float<T>(normal(generator));
      storage[i + offset] = value;
      exact[i] = to_float(value);
    }
  }
  T* data() { return storage.data() + offset; }
};

template <typename T>
struct Output {
  std::vector<T> storage;
  explicit Output(size_t size) : storage(size, from_float<T>(std::nanf(""))) {}
};

// Sums of products and of their absolute values, which is what rounding is measured by.
struct Sums {
  std::vector<double> value, size;
  explicit Sums(size_t count) : value(count), size(count) {}
};

// y (tokens, n) += x (tokens, m) W^T
void multiply(std::vector<double> const& x, std::vector<double> const& w, int tokens, int m, int n, Sums& y) {
  for (int t = 0; t < tokens; ++t)
    for (int r = 0; r < n; ++r)
      for (int c = 0; c < m; ++c) {
        double const product = x[size_t(t) * m + c] * w[size_t(r) * m + c];
        y.value[size_t(t) * n + r] += product;
        y.size[size_t(t) * n + r] += std::abs(product);
      }
}

int failures = 0;

template <typename T>
void compare(std::string const& what, cudaError_t error, Output<T> const& y, Sums const& expected,
             std::vector<double> const& bias, int n) {
  double worst = 0;
  for (size_t i = 0; i < expected.value.size(); ++i) {
    double const shift = bias.empty() ? 0 : bias[i % n];
    double const want = expected.value[i] + shift, got = to_float(y.storage[i]);
    double const allowed = kEpsilon<T> * (1.5 * expected.size[i] + 2 * std::abs(want) + 1e-3) * (sizeof(T) == 4 ? 8 : 1);
    double const ratio = std::abs(got - want) / allowed;
    worst = ratio <= worst ? worst : ratio;  // also where it is NaN
    if (!(ratio <= 1)) worst = std::numeric_limits<double>::infinity();
  }
  bool const good = error == cudaSuccess && worst <= 1;
  if (!good) ++failures;
  std::printf("%s %s: %.3f of the allowed error\n", good ? "ok  " : "FAIL", what.c_str(), worst);
}

template <typename T>
struct Workspace {
  std::vector<unsigned char> bytes;
  explicit Workspace(int64_t size) : bytes(size + 256) { std::ranges::fill(bytes, 0xff); }  // NaNs of every type
  void* data() { return reinterpret_cast<void*>(aligned(reinterpret_cast<int64_t>(bytes.data()))); }
};

// What cuBLAS does, one sum after the other.
template <typename T>
cudaError_t plain_gemm(Gemm<T> const& p) {
  for (int b = 0; b < p.batches; ++b)
    for (int t = 0; t < p.tokens; ++t)
      for (int r = 0; r < p.rows; ++r) {
        T& y = p.y[b * p.y_step + t * p.y_row + r];
        float sum = p.add ? to_float(y) : 0.f;
        for (int c = 0; c < p.columns; ++c) {
          sum += to_float(p.weight[b * p.weight_step + r * p.weight_row + c]) * to_float(p.x[b * p.x_step + t * p.x_row + c]);
        }
        y = from_float<T>(sum);
      }
  return cudaSuccess;
}

bool many = false;  // which kernels are tried

// The op `Kind` on its factors, in a workspace of the bytes that it asks for.
template <typename Kind, typename T>
cudaError_t run(Sizes const& s, int tokens, T const* x, std::vector<void const*> const& factors, T const* bias, T* y) {
  Workspace<T> workspace(many ? Kind::template many_workspace<T>(s, tokens) : Kind::template few_workspace<T>(s, tokens));
  Operands<T> const operands{tokens, x, factors.data(), bias, y, workspace.data(), nullptr};
  return many ? Kind::run_many(&plain_gemm<T>, s, operands) : Kind::run_few(s, operands);
}

std::string sizes(char const* op, int tokens, int in, int out, std::vector<int> const& more, int away, bool bias) {
  std::string text = std::string(op) + " tokens " + std::to_string(tokens) + " " + std::to_string(in) + " -> " +
                     std::to_string(out) + " [";
  for (int value : more) text += std::to_string(value) + " ";
  text.back() = ']';
  return (many ? "many: " : "") + text + (away ? " misaligned" : "") + (bias ? " bias" : "");
}

std::vector<double> leading_or(std::vector<float> const& A, int terms, int blocks) {
  std::vector<double> mix(size_t(terms) * blocks);
  for (int j = 0; j < terms; ++j)
    for (int b = 0; b < blocks; ++b) mix[j * blocks + b] = A.empty() ? j == b : A[j * blocks + b];
  return mix;
}

template <typename T>
void kronecker(char const* type, bool out_side, bool leading, int tokens) {
  int const blocks = between(1, 9), terms = between(1, blocks), width = between(1, 5) * (between(0, 1) ? 8 : 3);
  int const other = between(1, 70), whole = blocks * width, kept = terms * width, away = between(0, 3) == 0;
  int const in = out_side ? other : whole, out = out_side ? whole : other;
  bool const biased = between(0, 1);
  Array<T> x(size_t(tokens) * in), B(size_t(kept) * other, away), bias(out);
  std::vector<float> A;
  std::normal_distribution<float> normal;
  if (!leading)
    for (int i = 0; i < terms * blocks; ++i) A.push_back(normal(generator));
  std::vector<double> const mix = leading_or(A, terms, blocks);
  Sums expected(size_t(tokens) * out);
  if (!out_side) {
    Sums z(size_t(tokens) * kept);
    for (int t = 0; t < tokens; ++t)
      for (int j = 0; j < terms; ++j)
        for (int b = 0; b < blocks; ++b)
          for (int e = 0; e < width; ++e)
            z.value[size_t(t) * kept + j * width + e] += mix[j * blocks + b] * x.exact[size_t(t) * in + b * width + e];
    multiply(z.value, B.exact, tokens, kept, out, expected);
  } else {
    Sums z(size_t(tokens) * kept);
    multiply(x.exact, B.exact, tokens, in, kept, z);
    for (int t = 0; t < tokens; ++t)
      for (int j = 0; j < terms; ++j)
        for (int b = 0; b < blocks; ++b)
          for (int e = 0; e < width; ++e) {
            size_t const to = size_t(t) * out + b * width + e, from = size_t(t) * kept + j * width + e;
            expected.value[to] += mix[j * blocks + b] * z.value[from];
            expected.size[to] += std::abs(mix[j * blocks + b]) * z.size[from];
          }
  }
  Output<T> y(size_t(tokens) * out);
  T const* const shift = biased ? bias.data() : nullptr;
  std::vector<void const*> factors = {B.data()};
  if (!leading) factors.push_back(A.data());
  auto const op = out_side ? (leading ? &run<KroneckerOut<true>, T> : &run<KroneckerOut<false>, T>)
                           : (leading ? &run<KroneckerIn<true>, T> : &run<KroneckerIn<false>, T>);
  Sizes const given{in, out, terms, blocks, 0, 0, 0};
  cudaError_t const error = op(given, tokens, x.data(), factors, shift, y.storage.data());
  std::string const name = std::string(type) + (leading ? " KroneckerLeadingLinear" : " KroneckerLinear") +
                           (out_side ? "Out" : "");
  compare(sizes(name.c_str(), tokens, in, out, {terms, blocks}, away, biased), error, y, expected,
          biased ? bias.exact : std::vector<double>{}, out);
}

template <typename T>
void shuffled(char const* type, int tokens) {
  int const left = between(1, 5), right = between(1, 5), rank = between(1, 2) * (between(0, 1) ? 8 : 1);
  int const m = between(1, 3) * (between(0, 1) ? 8 : 5), n = between(1, 40), in = left * m, out = right * n;
  int const inner = left * right * rank, away = between(0, 3) == 0;
  bool const biased = between(0, 1);
  Array<T> x(size_t(tokens) * in), L(size_t(inner) * m, away), R(size_t(out) * left * rank, away), bias(out);
  Sums expected(size_t(tokens) * out);
  for (int t = 0; t < tokens; ++t)
    for (int r = 0; r < right; ++r)
      for (int o = 0; o < n; ++o)
        for (int l = 0; l < left; ++l)
          for (int i = 0; i < rank; ++i) {
            double z = 0, size = 0;
            for (int c = 0; c < m; ++c) {
              double const product = L.exact[(size_t(l) * right * rank + r * rank + i) * m + c] *
                                     x.exact[size_t(t) * in + l * m + c];
              z += product, size += std::abs(product);
            }
            double const w = R.exact[(size_t(r) * n + o) * left * rank + l * rank + i];
            expected.value[size_t(t) * out + r * n + o] += w * z;
            expected.size[size_t(t) * out + r * n + o] += std::abs(w) * size;
          }
  Output<T> y(size_t(tokens) * out);
  T const* const shift = biased ? bias.data() : nullptr;
  Sizes const given{in, out, 0, 0, left, right, rank};
  cudaError_t const error = run<GroupShuffle, T>(given, tokens, x.data(), {L.data(), R.data()}, shift, y.storage.data());
  compare(sizes((std::string(type) + " GroupShuffleLinear").c_str(), tokens, in, out, {left, right, rank}, away, biased),
          error, y, expected, biased ? bias.exact : std::vector<double>{}, out);
}

template <typename T>
void pivots(char const* type, bool in_side, int tokens) {
  int const unit = between(0, 1) ? 8 : 1, in = between(2, 12) * unit, out = between(2, 12) * unit;
  int const cut = in_side ? in : out, rank = between(1, std::min({in, out, cut - 1})), away = between(0, 3) == 0;
  bool const biased = between(0, 1);
  std::vector<int> order(cut);
  std::iota(order.begin(), order.end(), 0);
  std::ranges::shuffle(order, generator);
  Array<T> x(size_t(tokens) * in), bias(out), C(size_t(rank) * (cut - rank), away);
  Array<T> other(size_t(rank) * (in_side ? out : in), away);  // U (out, rank) or V (rank, in)
  Sums expected(size_t(tokens) * out);
  Output<T> y(size_t(tokens) * out);
  T const* const shift = biased ? bias.data() : nullptr;
  Sizes const given{in, out, 0, 0, 0, 0, rank};
  cudaError_t error;
  if (in_side) {
    Sums sum(size_t(tokens) * rank);
    for (int t = 0; t < tokens; ++t)
      for (int i = 0; i < rank; ++i) {
        double const p = x.exact[size_t(t) * in + order[i]];
        double value = p, size = std::abs(p);
        for (int c = 0; c < in - rank; ++c) {
          double const product = C.exact[size_t(i) * (in - rank) + c] * x.exact[size_t(t) * in + order[rank + c]];
          value += product, size += std::abs(product);
        }
        for (int o = 0; o < out; ++o) {
          double const w = other.exact[size_t(o) * rank + i];
          expected.value[size_t(t) * out + o] += w * value;
          expected.size[size_t(t) * out + o] += std::abs(w) * size;
        }
      }
    std::vector<void const*> const factors = {C.data(), other.data(), order.data()};
    error = run<PivotedIn, T>(given, tokens, x.data(), factors, shift, y.storage.data());
  } else {
    Sums z(size_t(tokens) * rank);
    multiply(x.exact, other.exact, tokens, in, rank, z);
    for (int t = 0; t < tokens; ++t)
      for (int o = 0; o < out; ++o) {
        double& value = expected.value[size_t(t) * out + o];
        double& size = expected.size[size_t(t) * out + o];
        for (int i = 0; i < rank; ++i) {
          double const w = order[o] < rank ? order[o] == i : C.exact[size_t(order[o] - rank) * rank + i];
          value += w * z.value[size_t(t) * rank + i];
          size += std::abs(w) * z.size[size_t(t) * rank + i];
        }
      }
    std::vector<void const*> const factors = {other.data(), C.data(), order.data()};
    error = run<Pivoted, T>(given, tokens, x.data(), factors, shift, y.storage.data());
  }
  std::string const op = std::string(type) + (in_side ? " PivotedLinearIn" : " PivotedLinear");
  compare(sizes(op.c_str(), tokens, in, out, {rank}, away, biased), error, y, expected,
          biased ? bias.exact : std::vector<double>{}, out);
}

template <typename T>
void every(char const* type, int tokens) {
  for (bool const out_side : {false, true})
    for (bool const leading : {false, true}) kronecker<T>(type, out_side, leading, tokens);
  shuffled<T>(type, tokens);
  for (bool const in_side : {false, true}) pivots<T>(type, in_side, tokens);
}

}  // namespace

int main(int argc, char** argv) {
  int const cases = argc > 1 ? std::atoi(argv[1]) : 4;
  generator.seed(argc > 2 ? std::atoi(argv[2]) : 0);
  for (int i = 0; i < cases; ++i) {
    int const tokens = i == 0 ? 1 : i == 1 ? 33 : between(1, 33);
    for (bool const which : {false, true}) {
      many = which;
      every<float>("float32", tokens);
      every<__half>("float16", tokens);
      every<__nv_bfloat16>("bfloat16", tokens);
    }
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
