// The client's side of the control socket; engine/serving/protocol.py describes the protocol and is the other side.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace liverelay {

// A liverelay_code, and one line when it is an error.
struct Result {
  int code = 0;
  std::string text;
  bool ok() const { return code == 0; }
};

constexpr std::uint32_t kControlMagic = 0x434C524CU;  // the letters LRLC
constexpr std::uint16_t kControlVersion = 1, kControlReply = 0x8000;
constexpr std::size_t kControlHeaderBytes = 16, kControlFieldBytes = 8, kControlLongestReply = 16384;
constexpr std::uint64_t kImageBytes = 32U << 20U, kPromptBytes = 64U << 10U;

enum class Kind : std::uint16_t {
  health = 1, open, resume, interrupt, snapshot, forget, close,
  error = 0x7FFF,
};

enum class Tag : std::uint16_t {
  text = 1, code, image, prompt, width, height, max_area, seed, stream, pixels, policy, slots, idle, token, frames,
  sound, fps, sample_rate, sound_rate, next_frame, state, sessions, places, made, dropped, heard, busy_ms, uptime_ms,
};

// Fields of a request.
class Message {
 public:
  void add(Tag tag, std::int64_t number);
  void add(Tag tag, const void* bytes, std::size_t size);
  void add(Tag tag, const std::string& text) { add(tag, text.data(), text.size()); }
  std::vector<std::uint8_t> whole(Kind kind, std::uint32_t serial) const;

 private:
  std::vector<std::uint8_t> payload_;
};

// Fields of a reply: all that its kind has, each within its limits.
class Fields {
 public:
  static Result parse(Kind kind, const std::uint8_t* payload, std::size_t size, Fields& out);
  bool has(Tag tag) const { return numbers_.count(tag) != 0 || texts_.count(tag) != 0; }
  std::int64_t number(Tag tag) const { return numbers_.at(tag); }
  std::uint32_t count(Tag tag) const { return static_cast<std::uint32_t>(numbers_.at(tag)); }
  const std::string& text(Tag tag) const { return texts_.at(tag); }

 private:
  Result add(Tag tag, const std::uint8_t* value, std::size_t size);

  std::map<Tag, std::int64_t> numbers_;
  std::map<Tag, std::string> texts_;
};

std::int64_t deadline_in(std::int64_t timeout_ms);  // on monotonic_ns; a negative timeout never ends

// A lock that is waited for until a deadline. (ThreadSanitizer of gcc 12 does not know timed mutexes.)
class Turn {
 public:
  Turn(std::mutex& mutex, std::int64_t deadline);
  ~Turn() {
    if (got_) mutex_.unlock();
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  bool got() const { return got_; }

 private:
  std::mutex& mutex_;
  bool got_;
};

// A connection. Requests of several threads take turns; one that ran out of time leaves it usable.
class Channel {
 public:
  Channel() = default;
  ~Channel();
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  Result connect(const std::string& path, std::int64_t deadline);
  Result ask(Kind kind, const Message& message, std::int64_t deadline, Fields& out);
  // Say farewell, unless a request is under way, and wake whoever waits.
  void end(std::int64_t deadline);

 private:
  Result exchange(Kind kind, const Message& message, std::int64_t deadline, Fields& out);
  Result send(const std::vector<std::uint8_t>& bytes, std::int64_t deadline);
  Result receive(std::size_t size, std::int64_t deadline);
  Result answer(Kind kind, std::uint32_t serial, std::int64_t deadline, Fields& out, bool& ours);
  Result broken(int code, const std::string& text);

  std::mutex mutex_;
  int socket_ = -1;
  std::uint32_t serial_ = 0;
  std::vector<std::uint8_t> input_;  // of the message that is coming
  Result broken_;
};

}  // namespace liverelay
