// Matrix products by cuBLAS, which is loaded when the first of them is asked for: the plugin library links nothing of it.
#pragma once

#include "../ops/op.h"

namespace procrustes {

constexpr int64_t kCublasWorkspace = int64_t(32) << 20;  // bytes; what cuBLAS recommends for Hopper, and enough elsewhere

// See Gemm in kernels/many.cuh.
struct Multiplication {
  Type type;
  void const* weight;
  int64_t weight_row, weight_step;
  void const* x;
  int64_t x_row, x_step;
  void* y;
  int64_t y_row, y_step;
  int32_t rows, columns, tokens, batches;
  bool add;
};

// Whether libcublas can be loaded; the reason why not is logged once, by `report`.
bool cublas_available(void (*report)(char const* reason));

// Enqueues on `stream`. Returns a cudaError_t.
int32_t multiply(Multiplication const& p, void* workspace, CUstream_st* stream);

}  // namespace procrustes
