// Puts libprocrustes_plugins.so, which must lie beside this library, into the plugin registry of the TensorRT that the
// process has loaded already: for programs that only dlopen what they are told to (Triton's backend, trtexec --plugins,
// polygraphy). It has no TensorRT of its own, and no symbol that a registry would look for. Unlike plugins, whose
// interfaces carry versions, the registry's own changes between major versions: it must be compiled with the headers of
// the TensorRT that it is to serve.
#include <NvInferRuntime.h>

#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstring>
#include <string>

namespace {

using GetRegistry = nvinfer1::IPluginRegistry*();
using GetVersion = int32_t();

// libnvinfer may have been loaded with local visibility, so that the process's own scope does not have its symbols.
struct Found {
  void* registry = nullptr;
  void* version = nullptr;
};

int find_registry(dl_phdr_info* info, size_t, void* result) {
  char const* const name = info->dlpi_name == nullptr ? "" : std::strrchr(info->dlpi_name, '/');
  if (name == nullptr || (std::strncmp(name, "/libnvinfer.so", 14) != 0 &&
                          std::strncmp(name, "/libnvinfer_lean.so", 19) != 0 &&
                          std::strncmp(name, "/libtensorrt_rtx.so", 19) != 0)) {
    return 0;
  }
  void* const library = dlopen(info->dlpi_name, RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) return 0;
  Found& found = *static_cast<Found*>(result);
  found = {dlsym(library, "getPluginRegistry"), dlsym(library, "getInferLibVersion")};
  dlclose(library);  // it stays loaded, as it was before
  return found.registry != nullptr;
}

__attribute__((constructor)) void load() {
  Found found{dlsym(RTLD_DEFAULT, "getPluginRegistry"), dlsym(RTLD_DEFAULT, "getInferLibVersion")};
  if (found.registry == nullptr) dl_iterate_phdr(find_registry, &found);
  if (found.registry == nullptr || found.version == nullptr) {
    std::fprintf(stderr, "[procrustes] no TensorRT is loaded in this process, so there is no plugin registry\n");
    return;
  }
  int32_t const version = reinterpret_cast<GetVersion*>(found.version)();
  int32_t const major = version / (version >= 10000 ? 10000 : 1000);  // 8.6.1 is 8601, 10.1.0 is 100100
  if (major != NV_TENSORRT_MAJOR) {
    std::fprintf(stderr,
                 "[procrustes] this library was compiled for TensorRT %d and the process has version %d of its "
                 "library: build it again with TENSORRT_INCLUDE_DIR naming the headers of that one\n",
                 NV_TENSORRT_MAJOR, version);
    return;
  }
  Dl_info here{};
  if (dladdr(reinterpret_cast<void*>(&find_registry), &here) == 0 || here.dli_fname == nullptr) return;
  std::string path = here.dli_fname;
  path.erase(path.rfind('/') + 1);
  path += "libprocrustes_plugins.so";
  nvinfer1::IPluginRegistry* const registry = reinterpret_cast<GetRegistry*>(found.registry)();
  if (registry == nullptr || registry->loadLibrary(path.c_str()) == nullptr) {
    std::fprintf(stderr, "[procrustes] TensorRT's plugin registry did not take %s\n", path.c_str());
  }
}

}  // namespace
