#include "control.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "include/liverelay.h"
#include "ring_segment.h"

namespace liverelay {
namespace {

constexpr std::int64_t kMilli = 1000000, kForever = INT64_MAX, kMost = INT64_MAX;

struct Limit {
  Tag tag;
  bool text;
  std::int64_t low, high;  // of the number, or of the text's bytes
};

constexpr Limit kLimits[] = {
    {Tag::text, true, 0, 4096},         {Tag::token, true, 32, 32},          {Tag::frames, true, 1, 64},
    {Tag::sound, true, 1, 64},          {Tag::code, false, LIVERELAY_E_SYSTEM, -1}, {Tag::width, false, 1, 16384},
    {Tag::height, false, 1, 16384},     {Tag::pixels, false, 1, 2},          {Tag::policy, false, 0, 1},
    {Tag::slots, false, 2, 256},        {Tag::fps, false, 1, 1000},          {Tag::sample_rate, false, 1000, 384000},
    {Tag::sound_rate, false, 0, 384000}, {Tag::next_frame, false, 0, kMost}, {Tag::state, false, 0, 3},
    {Tag::sessions, false, 0, kMost},   {Tag::places, false, 0, kMost},      {Tag::made, false, 0, kMost},
    {Tag::dropped, false, 0, kMost},    {Tag::heard, false, 0, kMost},       {Tag::busy_ms, false, 0, kMost},
    {Tag::uptime_ms, false, 0, kMost},
};

const std::vector<Tag>& tags_of(Kind kind) {
  static const std::vector<Tag> none, frame{Tag::next_frame}, snapshot{Tag::token, Tag::next_frame},
      error{Tag::code, Tag::text},
      opened{Tag::frames, Tag::sound, Tag::width, Tag::height, Tag::fps, Tag::sample_rate, Tag::sound_rate,
             Tag::next_frame, Tag::pixels, Tag::policy, Tag::slots},
      health{Tag::state, Tag::sessions, Tag::places, Tag::made, Tag::dropped, Tag::heard, Tag::busy_ms, Tag::uptime_ms,
             Tag::code, Tag::text};
  switch (kind) {
    case Kind::health: return health;
    case Kind::open:
    case Kind::resume: return opened;
    case Kind::interrupt: return frame;
    case Kind::snapshot: return snapshot;
    case Kind::error: return error;
    default: return none;
  }
}

Result wrong(const std::string& what) { return {LIVERELAY_E_PROTOCOL, "the server's answer is wrong: " + what}; }

// Bytes of an integer, the lowest first, on any machine.
template <typename T>
T load(const std::uint8_t* bytes) {
  std::uint64_t value = 0;
  for (std::size_t i = sizeof(T); i-- > 0;) value = value << 8U | bytes[i];
  return static_cast<T>(value);
}

template <typename T>
void store(std::vector<std::uint8_t>& out, T value) {
  auto left = static_cast<std::uint64_t>(value);
  for (std::size_t i = 0; i < sizeof(T); ++i, left >>= 8U) out.push_back(static_cast<std::uint8_t>(left & 255U));
}

// Until the socket is ready. false: the time ran out.
bool wait_for(int socket, short events, std::int64_t deadline) {
  for (;;) {
    const std::int64_t left = deadline == kForever ? -1 : deadline - monotonic_ns();
    if (left < 0 && deadline != kForever) return false;
    pollfd entry{socket, events, 0};
    const int most = left < 0 ? -1 : static_cast<int>(std::min<std::int64_t>(left / kMilli + 1, 1000000));
    const int ready = ::poll(&entry, 1, most);
    if (ready > 0) return true;
    if (ready < 0 && errno != EINTR) return true;  // the read or write that follows says why
  }
}

void nap() {
  timespec time{0, kMilli};
  ::nanosleep(&time, nullptr);
}

}  // namespace

std::int64_t deadline_in(std::int64_t timeout_ms) {
  const std::int64_t now = monotonic_ns();
  return timeout_ms < 0 || timeout_ms > (kForever - now) / kMilli ? kForever : now + timeout_ms * kMilli;
}

Turn::Turn(std::mutex& mutex, std::int64_t deadline) : mutex_(mutex), got_(mutex.try_lock()) {
  while (!got_ && monotonic_ns() < deadline) {
    nap();
    got_ = mutex_.try_lock();
  }
}

void Message::add(Tag tag, std::int64_t number) {
  std::vector<std::uint8_t> bytes;
  store(bytes, number);
  add(tag, bytes.data(), bytes.size());
}

void Message::add(Tag tag, const void* bytes, std::size_t size) {
  store(payload_, static_cast<std::uint16_t>(tag));
  store(payload_, std::uint16_t{0});
  store(payload_, static_cast<std::uint32_t>(size));
  const auto* first = static_cast<const std::uint8_t*>(bytes);
  payload_.insert(payload_.end(), first, first + size);
}

std::vector<std::uint8_t> Message::whole(Kind kind, std::uint32_t serial) const {
  std::vector<std::uint8_t> out;
  out.reserve(kControlHeaderBytes + payload_.size());
  store(out, kControlMagic);
  store(out, kControlVersion);
  store(out, static_cast<std::uint16_t>(kind));
  store(out, serial);
  store(out, static_cast<std::uint32_t>(payload_.size()));
  out.insert(out.end(), payload_.begin(), payload_.end());
  return out;
}

Result Fields::add(Tag tag, const std::uint8_t* value, std::size_t size) {
  const std::string name = "field " + std::to_string(static_cast<int>(tag));
  for (const Limit& limit : kLimits) {
    if (limit.tag != tag) continue;
    if (!limit.text && size != 8) return wrong(name + " is no integer");
    const auto number = limit.text ? static_cast<std::int64_t>(size) : load<std::int64_t>(value);
    if (number < limit.low || number > limit.high) return wrong(name + " is out of bounds");
    if (!limit.text) {
      numbers_[tag] = number;
      return {};
    }
    std::string text(reinterpret_cast<const char*>(value), size);
    std::replace_if(text.begin(), text.end(), [](char c) { return c == '\n' || c == '\0'; }, ' ');
    texts_[tag] = std::move(text);
    return {};
  }
  return wrong(name + " is unknown");
}

Result Fields::parse(Kind kind, const std::uint8_t* payload, std::size_t size, Fields& out) {
  const std::vector<Tag>& expected = tags_of(kind);
  for (std::size_t at = 0; at < size;) {
    if (size - at < kControlFieldBytes) return wrong("it ends within a field");
    const auto tag = static_cast<Tag>(load<std::uint16_t>(payload + at));
    const auto zero = load<std::uint16_t>(payload + at + 2);
    const std::size_t bytes = load<std::uint32_t>(payload + at + 4);
    at += kControlFieldBytes;
    if (zero != 0 || out.has(tag) || std::find(expected.begin(), expected.end(), tag) == expected.end())
      return wrong("a field is unknown, doubled or misplaced");
    if (bytes > size - at) return wrong("it ends within a field");
    if (Result result = out.add(tag, payload + at, bytes); !result.ok()) return result;
    at += bytes;
  }
  for (const Tag tag : expected) {
    const bool optional = kind == Kind::health && (tag == Tag::code || tag == Tag::text);
    if (!out.has(tag) && !optional) return wrong("a field is missing");
  }
  return {};
}

Channel::~Channel() {
  if (socket_ >= 0) ::close(socket_);
}

Result Channel::broken(int code, const std::string& text) {
  broken_ = {code, text};
  return broken_;
}

Result Channel::connect(const std::string& path, std::int64_t deadline) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path)
    return {LIVERELAY_E_ARGUMENT, "the path of a socket has 1 to 107 bytes"};
  std::memcpy(address.sun_path, path.data(), path.size());
  socket_ = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (socket_ < 0) return {LIVERELAY_E_SYSTEM, std::string("no socket: ") + std::strerror(errno)};
  while (::connect(socket_, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    if (errno != EAGAIN && errno != EINTR)
      return {LIVERELAY_E_CONNECT, "nobody serves on " + path + ": " + std::strerror(errno)};
    if (monotonic_ns() >= deadline) return {LIVERELAY_TIMEOUT, "the server on " + path + " takes no connection"};
    nap();  // its queue is full
  }
  ucred peer{};
  socklen_t size = sizeof peer;
  if (::getsockopt(socket_, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0 || peer.uid != ::geteuid())
    return {LIVERELAY_E_CONNECT, "the server on " + path + " is another user's"};
  return {};
}

Result Channel::send(const std::vector<std::uint8_t>& bytes, std::int64_t deadline) {
  for (std::size_t sent = 0; sent < bytes.size();) {
    const ssize_t now = ::send(socket_, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
    if (now >= 0) {
      sent += static_cast<std::size_t>(now);
    } else if (errno == EAGAIN) {
      if (wait_for(socket_, POLLOUT, deadline)) continue;
      if (sent == 0) return {LIVERELAY_TIMEOUT, "the server took no request in time"};
      return broken(LIVERELAY_E_LOST, "the server took half of a request only; open a new session");
    } else if (errno != EINTR) {
      return {};  // it has closed; what it said before may be read yet
    }
  }
  return {};
}

// Until so many bytes of the message are there.
Result Channel::receive(std::size_t size, std::int64_t deadline) {
  while (input_.size() < size) {
    std::uint8_t piece[4096];
    const ssize_t got = ::recv(socket_, piece, std::min(sizeof piece, size - input_.size()), 0);
    if (got > 0) {
      input_.insert(input_.end(), piece, piece + got);
    } else if (got < 0 && errno == EAGAIN) {
      if (!wait_for(socket_, POLLIN, deadline)) return {LIVERELAY_TIMEOUT, "the server did not answer in time"};
    } else if (got == 0 || errno != EINTR) {
      return broken(LIVERELAY_E_LOST, "the connection to the server is lost");
    }
  }
  return {};
}

// One message. ours: it answers the request of this serial number, or ends the connection.
Result Channel::answer(Kind kind, std::uint32_t serial, std::int64_t deadline, Fields& out, bool& ours) {
  if (Result result = receive(kControlHeaderBytes, deadline); !result.ok()) return result;
  const auto version = load<std::uint16_t>(&input_[4]), got = load<std::uint16_t>(&input_[6]);
  const auto number = load<std::uint32_t>(&input_[8]), length = load<std::uint32_t>(&input_[12]);
  if (load<std::uint32_t>(&input_[0]) != kControlMagic)
    return broken(LIVERELAY_E_PROTOCOL, "that is no server of liverelay");
  if (version != kControlVersion)
    return broken(LIVERELAY_E_VERSION, "the server speaks version " + std::to_string(version) + " of the protocol, " +
                                           "this library " + std::to_string(kControlVersion));
  if ((got & kControlReply) == 0 || length > kControlLongestReply)
    return broken(LIVERELAY_E_PROTOCOL, "the server's answer is wrong: its kind or length");
  if (Result result = receive(kControlHeaderBytes + length, deadline); !result.ok()) return result;
  const std::vector<std::uint8_t> message = std::move(input_);
  input_.clear();
  const auto answered = static_cast<Kind>(got & ~kControlReply);
  ours = number == serial || number == 0;
  if (!ours) return {};  // of a request that ran out of time
  if (answered != kind && answered != Kind::error) return broken(LIVERELAY_E_PROTOCOL, wrong("its kind").text);
  Fields fields;
  Result result = Fields::parse(answered, message.data() + kControlHeaderBytes, length, fields);
  if (!result.ok()) return broken(result.code, result.text);
  if (answered == Kind::error) {
    result = {static_cast<int>(fields.number(Tag::code)), fields.text(Tag::text)};
    return number == 0 ? broken(result.code, result.text) : result;
  }
  if (number == 0) return broken(LIVERELAY_E_PROTOCOL, wrong("its number").text);
  out = std::move(fields);
  return {};
}

Result Channel::exchange(Kind kind, const Message& message, std::int64_t deadline, Fields& out) {
  if (!broken_.ok()) return broken_;
  serial_ = serial_ == UINT32_MAX ? 1 : serial_ + 1;
  if (Result result = send(message.whole(kind, serial_), deadline); !result.ok()) return result;
  for (bool ours = false;;) {
    Result result = answer(kind, serial_, deadline, out, ours);
    if (!result.ok() || ours) return result;
  }
}

Result Channel::ask(Kind kind, const Message& message, std::int64_t deadline, Fields& out) {
  const Turn turn(mutex_, deadline);
  if (!turn.got()) return {LIVERELAY_TIMEOUT, "another request of this connection is under way"};
  return exchange(kind, message, deadline, out);
}

void Channel::end(std::int64_t deadline) {
  if (mutex_.try_lock()) {
    Fields none;
    exchange(Kind::close, Message(), deadline, none);
    mutex_.unlock();
  }
  ::shutdown(socket_, SHUT_RDWR);
}

}  // namespace liverelay
