// The way from one stage to the next within a process: a few static buffers that change hands. No copy of a block is
// waited for on a GPU: events order the streams of both sides.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda_api.h"

namespace liverelay {

constexpr int kHost = -1;        // instead of a GPU's number
constexpr int kLinkClosed = -1, kLinkWaits = -2;  // instead of a buffer's number
constexpr std::int64_t kForever = -1;

// A piece of a block: where it is in a buffer of the link, and in the stage's own memory.
struct Part {
  std::size_t offset = 0;
  std::uint8_t* memory = nullptr;
  std::size_t bytes = 0;
};

// memcpy on the host; on a GPU a copy behind what `stream` has to do.
void copy_bytes(void* target, const void* source, std::size_t bytes, bool gpu, CudaStream stream);

class StageLink {
 public:
  // Memory of the buffers belongs to the caller, who keeps it as long as the link.
  StageLink(std::vector<std::uint8_t*> buffers, std::size_t bytes, int device);
  StageLink(const StageLink&) = delete;
  StageLink& operator=(const StageLink&) = delete;

  // A buffer to fill, or the oldest full one. Once closed, what is there still comes, then kLinkClosed; kLinkWaits when
  // the time ran out. What `stream` is given from now on is behind the other side's use of the buffer.
  int take_free(CudaStream stream, std::int64_t ns = kForever) { return take(free_, stream, ns); }
  int take_full(CudaStream stream, std::int64_t ns = kForever) { return take(full_, stream, ns); }
  // Hands it to the other side, who may use it behind what `stream` has been given.
  void give_free(int buffer, CudaStream stream) { give(free_, buffer, stream); }
  void give_full(int buffer, CudaStream stream) { give(full_, buffer, stream); }
  // Both of it with the copies between; false once closed.
  bool send(const std::vector<Part>& parts, CudaStream stream);
  bool receive(const std::vector<Part>& parts, CudaStream stream);
  void close();

  std::size_t bytes() const { return bytes_; }

 private:
  int take(std::deque<int>& from, CudaStream stream, std::int64_t ns);
  void give(std::deque<int>& to, int buffer, CudaStream stream);

  const std::vector<std::uint8_t*> buffers_;
  const std::size_t bytes_;
  const bool gpu_;
  std::vector<std::unique_ptr<Event>> ready_;  // of each buffer, for whoever takes it next
  std::vector<bool> marked_;                   // whether that event was ever recorded
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<int> free_, full_;
  bool closed_ = false;
};

}  // namespace liverelay
