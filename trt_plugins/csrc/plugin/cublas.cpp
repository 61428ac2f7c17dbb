// cuBLAS by its documented C interface, whose header no package of ours brings: the functions are looked up by name, and
// types and constants are those of cublas_api.h and library_types.h (held against cuBLAS 13.10 by hand; versions 12 and 13
// have the same).
#include "cublas.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <array>
#include <map>
#include <mutex>
#include <string>

namespace procrustes {
namespace {

using Handle = void*;

constexpr int kOperationNone = 0, kOperationTranspose = 1;  // cublasOperation_t
constexpr int kReal32 = 0, kReal16 = 2, kReal16Brain = 14;  // cudaDataType_t
constexpr int kComputeFloat = 68;                           // cublasComputeType_t: sums in float32
constexpr int kDefaultAlgorithm = -1;                       // cublasGemmAlgo_t

struct Library {
  int (*create)(Handle*) = nullptr;
  int (*set_stream)(Handle, cudaStream_t) = nullptr;
  int (*set_workspace)(Handle, void*, size_t) = nullptr;
  int (*gemm)(Handle, int, int, int, int, int, void const*, void const*, int, int, long long, void const*, int, int,
              long long, void const*, void*, int, int, long long, int, int, int) = nullptr;
  std::string missing;

  Library() {
    void* library = nullptr;
    // One that the process has already comes first: a second would take memory of its own.
    for (int const flags : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW}) {
      for (char const* const name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"}) {
        if (library == nullptr) library = dlopen(name, flags);
      }
    }
    if (library == nullptr) {
      missing = "libcublas.so.13 and libcublas.so.12 cannot be loaded";
      return;
    }
    find(library, "cublasCreate_v2", create);
    find(library, "cublasSetStream_v2", set_stream);
    find(library, "cublasSetWorkspace_v2", set_workspace);
    find(library, "cublasGemmStridedBatchedEx", gemm);
  }

  template <typename Function>
  void find(void* library, char const* name, Function*& function) {
    function = reinterpret_cast<Function*>(dlsym(library, name));
    if (function == nullptr) missing = std::string("libcublas has no ") + name;
  }
};

Library const& library() {
  static Library const loaded;
  return loaded;
}

// A handle may serve one thread at a time, and belongs to the device that is current when it is made. Handles live as
// long as the process: the driver may be gone when threads end.
Handle handle_of_this_thread() {
  thread_local std::map<int, Handle> handles;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return nullptr;
  Handle& handle = handles[device];
  if (handle == nullptr && library().create(&handle) != 0) handle = nullptr;
  return handle;
}

}  // namespace

bool cublas_available(void (*report)(char const* reason)) {
  static std::once_flag told;
  bool const good = library().missing.empty();
  if (!good) std::call_once(told, [&] { report(library().missing.c_str()); });
  return good;
}

int32_t multiply(Multiplication const& p, void* workspace, CUstream_st* stream) {
  Handle const handle = handle_of_this_thread();
  if (handle == nullptr) return cudaErrorInitializationError;
  // The workspace after the stream, which resets it.
  if (library().set_stream(handle, stream) != 0) return cudaErrorUnknown;
  if (library().set_workspace(handle, workspace, size_t(kCublasWorkspace)) != 0) return cudaErrorUnknown;
  constexpr std::array<int, 3> types = {kReal32, kReal16, kReal16Brain};
  int const type = types[size_t(p.type)];
  float const one = 1.f, beta = p.add ? 1.f : 0.f;
  // Row by row is column by column of the transpose: y^T = W x^T, W being stored as the transpose of (columns, rows).
  int const status = library().gemm(handle, kOperationTranspose, kOperationNone, p.rows, p.tokens, p.columns, &one,
                                    p.weight, type, int(p.weight_row), p.weight_step, p.x, type, int(p.x_row), p.x_step,
                                    &beta, p.y, type, int(p.y_row), p.y_step, p.batches, kComputeFloat,
                                    kDefaultAlgorithm);
  return status == 0 ? cudaSuccess : cudaErrorUnknown;
}

}  // namespace procrustes
