// The few functions of the CUDA runtime that a stage's loop calls, opened at run time: nothing here needs CUDA to build
// or to start, and whoever brought the runtime into the process (PyTorch) shares it. Handles are those of the runtime.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

namespace liverelay {

using CudaStream = void*;
using CudaEvent = void*;
using CudaGraphExec = void*;

constexpr int kCudaNotReady = 600;
constexpr int kCudaCopyAny = 4;            // cudaMemcpyDefault: the addresses say which way
constexpr unsigned kCudaEventNoTiming = 2;

struct CudaApi {
  int (*set_device)(int) = nullptr;
  int (*get_device)(int*) = nullptr;
  int (*memcpy_async)(void*, const void*, std::size_t, int, CudaStream) = nullptr;
  int (*graph_launch)(CudaGraphExec, CudaStream) = nullptr;
  int (*event_create)(CudaEvent*, unsigned) = nullptr;
  int (*event_destroy)(CudaEvent) = nullptr;
  int (*event_record)(CudaEvent, CudaStream) = nullptr;
  int (*event_query)(CudaEvent) = nullptr;
  int (*event_synchronize)(CudaEvent) = nullptr;
  int (*event_elapsed)(float*, CudaEvent, CudaEvent) = nullptr;
  int (*stream_wait_event)(CudaStream, CudaEvent, unsigned) = nullptr;
  const char* (*error_string)(int) = nullptr;
};

class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Opens the runtime, once for the process; path: a library, or nothing for the one that is loaded or installed. What
// is wrong, or an empty text. Call it before any loop or link of a GPU is made.
std::string cuda_open(const std::string& path);

const CudaApi& cuda();                          // CudaError when it is not open
void cuda_check(int status, const char* what);  // CudaError with the runtime's own words

// An event of a device, whatever device the calling thread is on.
class Event {
 public:
  Event(int device, unsigned flags);
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  CudaEvent get() const { return event_; }
  void record(CudaStream stream) const { cuda_check(cuda().event_record(event_, stream), "cudaEventRecord"); }

 private:
  CudaEvent event_ = nullptr;
};

}  // namespace liverelay
