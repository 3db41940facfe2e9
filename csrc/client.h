// Clients and sessions behind the C interface (include/liverelay.h): plain C++17 over the control socket and two rings.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "control.h"
#include "frame_ring.h"
#include "include/liverelay.h"

namespace liverelay {

// Samples as the caller has them.
struct Sound {
  const void* samples;
  std::uint64_t frames;
  std::uint32_t format, channels, rate;
};

class Session {
 public:
  static Result open(const std::string& path, Kind kind, const Message& request, std::int64_t deadline,
                     std::shared_ptr<Session>& out);

  const liverelay_info& info() const { return info_; }
  Result push(const Sound& sound, std::int64_t deadline, std::uint64_t& taken);
  Result end_sound();
  Result pop(std::int64_t deadline, liverelay_frame& out);
  Result release(std::uint64_t position);
  Result interrupt(std::int64_t deadline, std::uint64_t& next_frame);
  Result snapshot(std::int64_t deadline, std::string& token, std::uint64_t& next_frame);
  Result health(std::int64_t deadline, liverelay_health& out);
  void close();
  bool closing() const { return closing_.load(); }
  bool done() const;  // closed, and no frame is held

 private:
  Result join(const Fields& reply);
  Result push_piece(const Sound& sound, std::uint64_t epoch, std::int64_t deadline, std::uint64_t& taken);
  Result urgent(Kind kind, std::int64_t deadline, Fields& out);
  Result why_ended();
  bool stream_ended() const { return frames_->segment().dynamic().closed.load() != 0; }

  Channel channel_;
  liverelay_info info_{};
  std::unique_ptr<RingWriter> sound_;
  std::unique_ptr<RingReader> frames_;
  std::atomic<bool> closing_{false};

  std::mutex sound_mutex_;  // one piece at a time; also held by what must not be overtaken by sound
  std::atomic<int> urgent_{0};  // those who wait for it before more sound is pushed
  std::atomic<std::uint64_t> epoch_{0};  // counts interrupts
  std::uint32_t rate_ = 0;
  bool sound_ended_ = false;

  std::mutex pop_mutex_;
  bool ended_ = false;
  Result end_;

  mutable std::mutex held_mutex_;
  std::map<std::uint64_t, RingReader::Frame> held_;  // by position
};

class Client {
 public:
  static Result connect(const std::string& path, std::int64_t deadline, std::shared_ptr<Client>& out);
  const std::string& path() const { return path_; }
  Result health(std::int64_t deadline, liverelay_health& out);
  Result forget(const std::string& token, std::int64_t deadline);
  void close() {
    closing_.store(true);
    channel_.end(0);
  }
  bool closing() const { return closing_.load(); }

 private:
  std::string path_;
  std::atomic<bool> closing_{false};
  Channel channel_;
};

}  // namespace liverelay
