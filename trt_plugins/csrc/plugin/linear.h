// The ops without TensorRT: their sizes, and one function that runs any of them. linear.cu has the kernels behind it, so
// that everything else is plain C++.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace procrustes {

enum class Kind : int32_t { kKroneckerIn, kKroneckerOut, kGroupShuffle, kPivoted, kPivotedIn };
enum class Type : int32_t { kFloat, kHalf, kBfloat16 };

// Of one op; fields that a kind has not are 0.
struct Linear {
  Kind kind;
  bool leading;  // of a Kronecker op: A is rows of the identity, and no input
  int32_t in, out;
  int32_t terms, blocks;
  int32_t left, right;
  int32_t rank;
};

// Bytes of workspace that `run` needs for this many tokens, with cuBLAS or without.
int64_t workspace_bytes(Linear const& linear, Type type, int32_t tokens);

// y (tokens, out) from x (tokens, in), factors in the order of the op's inputs (export/graph/ops.py), bias (out) or null. All are
// device memory. Enqueues on `stream` and returns a cudaError_t. `cublas`: many tokens go through it, and not through the
// kernels for few, which are right for any number and slow.
int32_t run(Linear const& linear, Type type, int32_t tokens, void const* x, void const* const* factors,
            void const* bias, void* y, void* workspace, bool cublas, CUstream_st* stream);

}  // namespace procrustes
