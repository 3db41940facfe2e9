#include "cuda_api.h"

#include <dlfcn.h>

#include <memory>
#include <mutex>

namespace liverelay {
namespace {

constexpr const char* kNames[] = {"libcudart.so.13", "libcudart.so.12"};

std::mutex opening;
const CudaApi* opened = nullptr;  // never closed: handles of it live as long as the process

template <typename Function>
bool find(void* library, const char* name, Function& out) {
  out = reinterpret_cast<Function>(::dlsym(library, name));
  return out != nullptr;
}

void* load(const std::string& path) {
  if (!path.empty()) return ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  for (const int flags : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW | RTLD_LOCAL}) {  // first the one that is in use already
    for (const char* name : kNames) {
      if (void* library = ::dlopen(name, flags)) return library;
    }
  }
  return nullptr;
}

bool fill(void* library, CudaApi& api) {
  return find(library, "cudaSetDevice", api.set_device) && find(library, "cudaGetDevice", api.get_device) &&
         find(library, "cudaMemcpyAsync", api.memcpy_async) && find(library, "cudaGraphLaunch", api.graph_launch) &&
         find(library, "cudaEventCreateWithFlags", api.event_create) &&
         find(library, "cudaEventDestroy", api.event_destroy) &&
         find(library, "cudaEventRecord", api.event_record) && find(library, "cudaEventQuery", api.event_query) &&
         find(library, "cudaEventSynchronize", api.event_synchronize) &&
         find(library, "cudaEventElapsedTime", api.event_elapsed) &&
         find(library, "cudaStreamWaitEvent", api.stream_wait_event) &&
         find(library, "cudaGetErrorString", api.error_string);
}

}  // namespace

std::string cuda_open(const std::string& path) {
  const std::lock_guard<std::mutex> lock(opening);
  if (opened != nullptr) return {};
  void* library = load(path);
  if (library == nullptr) {
    const char* reason = ::dlerror();
    return reason != nullptr ? reason : "no CUDA runtime";
  }
  auto api = std::make_unique<CudaApi>();
  if (!fill(library, *api)) return std::string("this CUDA runtime lacks a function: ") + ::dlerror();
  opened = api.release();
  return {};
}

const CudaApi& cuda() {
  if (opened == nullptr) throw CudaError("the CUDA runtime is not open");
  return *opened;
}

void cuda_check(int status, const char* what) {
  if (status != 0) throw CudaError(std::string(what) + ": " + cuda().error_string(status));
}

Event::Event(int device, unsigned flags) {
  int before = 0;
  cuda_check(cuda().get_device(&before), "cudaGetDevice");
  if (before != device) cuda_check(cuda().set_device(device), "cudaSetDevice");
  const int status = cuda().event_create(&event_, flags);
  if (before != device) cuda().set_device(before);
  cuda_check(status, "cudaEventCreate");
}

Event::~Event() {
  if (event_ != nullptr) cuda().event_destroy(event_);
}

}  // namespace liverelay
