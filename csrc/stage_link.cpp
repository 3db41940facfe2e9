#include "stage_link.h"

#include <chrono>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace liverelay {

void copy_bytes(void* target, const void* source, std::size_t bytes, bool gpu, CudaStream stream) {
  if (!gpu) std::memcpy(target, source, bytes);
  else cuda_check(cuda().memcpy_async(target, source, bytes, kCudaCopyAny, stream), "cudaMemcpyAsync");
}

StageLink::StageLink(std::vector<std::uint8_t*> buffers, std::size_t bytes, int device)
    : buffers_(std::move(buffers)), bytes_(bytes), gpu_(device != kHost), marked_(buffers_.size()) {
  for (std::size_t i = 0; i < buffers_.size(); ++i) {
    free_.push_back(static_cast<int>(i));
    ready_.push_back(gpu_ ? std::make_unique<Event>(device, kCudaEventNoTiming) : nullptr);
  }
}

int StageLink::take(std::deque<int>& from, CudaStream stream, std::int64_t ns) {
  int buffer = kLinkClosed;
  bool marked = false;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto due = [&] { return !from.empty() || closed_; };
    if (ns == kForever) changed_.wait(lock, due);
    else if (!changed_.wait_for(lock, std::chrono::nanoseconds(ns), due)) return kLinkWaits;
    if (from.empty()) return kLinkClosed;
    buffer = from.front();
    from.pop_front();
    marked = marked_[static_cast<std::size_t>(buffer)];
  }
  if (marked) {
    const Event& event = *ready_[static_cast<std::size_t>(buffer)];
    cuda_check(cuda().stream_wait_event(stream, event.get(), 0), "cudaStreamWaitEvent");
  }
  return buffer;
}

void StageLink::give(std::deque<int>& to, int buffer, CudaStream stream) {
  const auto index = static_cast<std::size_t>(buffer);
  if (index >= buffers_.size()) throw std::invalid_argument("the link has no such buffer");
  if (gpu_) ready_[index]->record(stream);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    marked_[index] = gpu_;
    to.push_back(buffer);
  }
  changed_.notify_all();
}

bool StageLink::send(const std::vector<Part>& parts, CudaStream stream) {
  const int buffer = take_free(stream);
  if (buffer == kLinkClosed) return false;
  std::uint8_t* memory = buffers_[static_cast<std::size_t>(buffer)];
  for (const Part& part : parts) copy_bytes(memory + part.offset, part.memory, part.bytes, gpu_, stream);
  give_full(buffer, stream);
  return true;
}

bool StageLink::receive(const std::vector<Part>& parts, CudaStream stream) {
  const int buffer = take_full(stream);
  if (buffer == kLinkClosed) return false;
  const std::uint8_t* memory = buffers_[static_cast<std::size_t>(buffer)];
  for (const Part& part : parts) copy_bytes(part.memory, memory + part.offset, part.bytes, gpu_, stream);
  give_free(buffer, stream);
  return true;
}

void StageLink::close() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
  }
  changed_.notify_all();
}

}  // namespace liverelay
