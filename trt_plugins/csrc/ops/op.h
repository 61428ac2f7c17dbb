// What an op of the contract (export/graph/ops) is, without CUDA and without TensorRT: a row of the table of all ops.
// table.cu makes the rows of the types in kronecker.cuh, group_shuffle.cuh and pivoted.cuh, so that everything else is
// plain C++.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct CUstream_st;

namespace procrustes {

enum class Type : int32_t { kFloat, kHalf, kBfloat16 };
enum class InputType : int32_t { kOwn, kFloat, kInt32 };  // kOwn: that of x

// Of one linear; those that an op does not have are 0.
struct Sizes {
  int32_t in, out;
  int32_t terms, blocks;
  int32_t left, right;
  int32_t rank;
};

struct Input {
  char const* name;
  InputType type;
};

using Shapes = std::vector<std::vector<int64_t>>;

struct Op {
  std::string name;
  bool grids;                       // one op_type for each grid of blocks: the name is followed by "{left}x{right}"
  std::vector<Input> inputs;        // the factors, after x and before the bias
  std::vector<char const*> fields;  // sizes that a node gives beside in_features and out_features

  // Why these sizes are none, or an empty string; in and out are at least 1.
  std::string (*check)(Sizes const& sizes);

  // Shapes of the factors, in the order of `inputs`.
  Shapes (*shapes)(Sizes const& sizes);

  // Bytes of workspace that `run` needs for this many tokens, with cuBLAS or without.
  int64_t (*workspace)(Sizes const& sizes, Type type, int32_t tokens);

  // y (tokens, out) from x (tokens, in), factors in the order of `inputs`, bias (out) or null. All are device memory.
  // Enqueues on `stream` and returns a cudaError_t. `cublas`: many tokens go through it, and not through the kernels for
  // few, which are right for any number and slow.
  int32_t (*run)(Sizes const& sizes, Type type, int32_t tokens, void const* x, void const* const* factors,
                 void const* bias, void* y, void* workspace, bool cublas, CUstream_st* stream);
};

// Every op that has a plugin. KroneckerLinearGeneral and its twin have none: their bodies run.
std::vector<Op> const& ops();

}  // namespace procrustes
