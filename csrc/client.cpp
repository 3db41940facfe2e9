#include "client.h"

#include <time.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace liverelay {
namespace {

constexpr std::int64_t kSliceNs = 20000000;  // whoever waits looks so often whether the session was closed
constexpr std::int64_t kFarewellMs = 2000;
constexpr std::uint32_t kLowestRate = 1000, kHighestRate = 384000;

Result from(const RingStatus& status) {
  switch (status.code) {
    case RingCode::ok: return {};
    case RingCode::timeout: return {LIVERELAY_TIMEOUT, "nothing came, or there was no room, in time"};
    case RingCode::closed: return {LIVERELAY_END, "the stream has ended"};
    case RingCode::peer_died: return {LIVERELAY_E_LOST, "the server died"};
    case RingCode::damaged: return {LIVERELAY_E_PROTOCOL, status.text};
    case RingCode::system: return {LIVERELAY_E_SYSTEM, status.text};
    default: return {LIVERELAY_E_STATE, status.text};
  }
}

std::int64_t slice(std::int64_t deadline) {
  return std::max<std::int64_t>(0, std::min(kSliceNs, deadline - monotonic_ns()));
}

// The mean of the channels, in [-1, 1].
void convert(const Sound& sound, std::uint64_t first, std::uint64_t count, float* out) {
  const auto* whole = static_cast<const std::int16_t*>(sound.samples) + first * sound.channels;
  const auto* real = static_cast<const float*>(sound.samples) + first * sound.channels;
  const bool is_whole = sound.format == LIVERELAY_S16;
  const float scale = (is_whole ? 1.0F / 32768.0F : 1.0F) / static_cast<float>(sound.channels);
  for (std::uint64_t i = 0; i < count; ++i) {
    float sum = 0;
    for (std::uint32_t c = 0; c < sound.channels; ++c) {
      const std::uint64_t at = i * sound.channels + c;
      sum += is_whole ? static_cast<float>(whole[at]) : real[at];
    }
    out[i] = sum * scale;
  }
}

Result check(const Sound& sound) {
  const auto refuse = [](const char* text) { return Result{LIVERELAY_E_ARGUMENT, text}; };
  if (sound.format != LIVERELAY_S16 && sound.format != LIVERELAY_F32) return refuse("no such format of samples");
  if (sound.channels < 1 || sound.channels > 2) return refuse("give one channel, or two interleaved");
  if (sound.rate < kLowestRate || sound.rate > kHighestRate) return refuse("a sample rate is 1000 to 384000");
  if (sound.frames != 0 && sound.samples == nullptr) return refuse("no samples were given");
  if (sound.frames > 1ULL << 40U) return refuse("so many samples cannot be");
  const auto* real = static_cast<const float*>(sound.samples);
  for (std::uint64_t i = 0; sound.format == LIVERELAY_F32 && i < sound.frames * sound.channels; ++i)
    if (!std::isfinite(real[i])) return refuse("a sample is not a finite number");
  return {};
}

void fill(const Fields& reply, liverelay_health& out) {
  const auto number = [&](Tag tag) { return static_cast<std::uint64_t>(reply.number(tag)); };
  out.state = reply.count(Tag::state);
  out.sessions = number(Tag::sessions);
  out.places = number(Tag::places);
  out.frames_made = number(Tag::made);
  out.frames_dropped = number(Tag::dropped);
  out.samples_heard = number(Tag::heard);
  out.busy_ms = number(Tag::busy_ms);
  out.uptime_ms = number(Tag::uptime_ms);
}

Result closed() { return {LIVERELAY_E_HANDLE, "the session was closed"}; }

}  // namespace

Result Session::open(const std::string& path, Kind kind, const Message& request, std::int64_t deadline,
                     std::shared_ptr<Session>& out) {
  auto session = std::make_shared<Session>();
  Result result = session->channel_.connect(path, deadline);
  Fields reply;
  if (result.ok()) result = session->channel_.ask(kind, request, deadline, reply);
  if (result.ok()) result = session->join(reply);
  if (result.ok()) out = std::move(session);
  return result;
}

Result Session::join(const Fields& reply) {
  std::shared_ptr<RingSegment> sound, frames;
  if (RingStatus status = RingSegment::open(reply.text(Tag::sound), RingRole::writer, sound); !status.ok())
    return from(status);
  sound_ = std::make_unique<RingWriter>(sound);
  if (RingStatus status = RingSegment::open(reply.text(Tag::frames), RingRole::reader, frames); !status.ok())
    return from(status);
  frames_ = std::make_unique<RingReader>(frames);
  if (sound->layout().audio_bytes < 4) return {LIVERELAY_E_PROTOCOL, "the server's ring has no room for sound"};
  info_.struct_bytes = sizeof info_;
  info_.width = reply.count(Tag::width);
  info_.height = reply.count(Tag::height);
  info_.pixel_format = reply.count(Tag::pixels);
  info_.frames_per_second = reply.count(Tag::fps);
  info_.sample_rate = reply.count(Tag::sample_rate);
  info_.next_frame = static_cast<std::uint64_t>(reply.number(Tag::next_frame));
  rate_ = reply.count(Tag::sound_rate);
  return {};
}

Result Session::push_piece(const Sound& sound, std::uint64_t epoch, std::int64_t deadline, std::uint64_t& taken) {
  const Turn turn(sound_mutex_, std::min(deadline, monotonic_ns() + kSliceNs));
  if (epoch_.load() != epoch) {  // an interrupt: what is left goes the way of what was pushed before
    taken = sound.frames;
    return {};
  }
  if (!turn.got()) return {LIVERELAY_TIMEOUT, "other calls give this session sound"};
  if (closing_.load()) return closed();
  if (sound_ended_) return {LIVERELAY_E_STATE, "the sound of this session was ended"};
  if (stream_ended()) return {LIVERELAY_E_STATE, "the stream has ended; liverelay_pop says why"};
  if (sound_->peer() == RingPeer::dead) return {LIVERELAY_E_LOST, "the server died"};
  if (rate_ != 0 && rate_ != sound.rate)
    return {LIVERELAY_E_ARGUMENT, "the sample rate of this session is " + std::to_string(rate_)};
  std::uint32_t slot = 0;
  if (RingStatus status = sound_->reserve(slice(deadline), slot); !status.ok()) return from(status);
  const std::uint64_t room = sound_->segment().layout().audio_bytes / 4;
  const std::uint64_t count = std::min(room, sound.frames - taken);
  convert(sound, taken, count, reinterpret_cast<float*>(sound_->segment().audio(slot)));
  RingMeta meta{};
  meta.index = sound_->segment().dynamic().pushed.load();
  meta.audio_bytes = static_cast<std::uint32_t>(count * 4);
  meta.sample_rate = sound.rate;
  if (RingStatus status = sound_->publish(meta); !status.ok()) return from(status);
  rate_ = sound.rate;
  taken += count;
  return {};
}

Result Session::push(const Sound& sound, std::int64_t deadline, std::uint64_t& taken) {
  taken = 0;
  if (Result result = check(sound); !result.ok()) return result;
  const std::uint64_t epoch = epoch_.load();
  while (taken < sound.frames) {
    while (urgent_.load() != 0 && monotonic_ns() < deadline) {
      const timespec time{0, 500000};
      ::nanosleep(&time, nullptr);
    }
    Result result = push_piece(sound, epoch, deadline, taken);
    const bool again = result.code == LIVERELAY_TIMEOUT && monotonic_ns() < deadline;
    if (!result.ok() && !again) return result;
  }
  return {};
}

Result Session::end_sound() {
  urgent_.fetch_add(1);
  const std::lock_guard<std::mutex> turn(sound_mutex_);
  urgent_.fetch_sub(1);
  if (closing_.load()) return closed();
  sound_ended_ = true;
  sound_->close();
  return {};
}

Result Session::why_ended() {
  if (ended_) return end_;
  liverelay_health now{};
  Fields reply;
  const Result result = channel_.ask(Kind::health, Message(), deadline_in(kFarewellMs), reply);
  ended_ = true;
  end_ = {LIVERELAY_END, "the stream has ended"};
  if (!result.ok()) {
    end_ = {LIVERELAY_E_LOST, "the server ended the session: " + result.text};
  } else if (fill(reply, now); now.state == LIVERELAY_FAILED) {
    end_ = {LIVERELAY_E_ENGINE, "the session failed"};
    if (reply.has(Tag::code) && reply.has(Tag::text))
      end_ = {static_cast<int>(reply.number(Tag::code)), reply.text(Tag::text)};
  }
  return end_;
}

Result Session::pop(std::int64_t deadline, liverelay_frame& out) {
  const Turn turn(pop_mutex_, deadline);
  if (!turn.got()) return {LIVERELAY_TIMEOUT, "another thread waits for a frame"};
  RingReader::Frame frame;
  for (;;) {
    if (closing_.load()) return closed();
    const RingStatus status = frames_->pop(slice(deadline), frame);
    if (status.ok()) break;
    if (status.code == RingCode::closed) return why_ended();
    if (status.code == RingCode::refused && frames_->segment().ours())
      return {LIVERELAY_E_STATE, "all frames but one are held; release some of them first"};
    if (status.code != RingCode::timeout || monotonic_ns() >= deadline) return from(status);
  }
  const RingSegment& segment = frames_->segment();
  out.pixel_format = frame.meta.format;
  out.width = frame.meta.width;
  out.height = frame.meta.height;
  out.pixels = segment.frame(frame.slot);
  out.pixel_bytes = frame.meta.frame_bytes;
  out.audio = reinterpret_cast<const float*>(segment.audio(frame.slot));
  out.audio_samples = frame.meta.audio_bytes / 4;
  out.sample_rate = frame.meta.sample_rate;
  out.index = frame.meta.index;
  out.pts_ns = frame.meta.pts_ns;
  out.made_ns = frame.meta.pushed_ns;
  out.position = frame.position;
  const std::lock_guard<std::mutex> lock(held_mutex_);
  held_[frame.position] = frame;
  return {};
}

Result Session::release(std::uint64_t position) {
  const std::lock_guard<std::mutex> lock(held_mutex_);
  const auto found = held_.find(position);
  if (found == held_.end()) return {LIVERELAY_E_ARGUMENT, "this frame was released already, or is another session's"};
  frames_->release(found->second);
  held_.erase(found);
  return {};
}

// A request that no sound overtakes: what was pushed before is in the ring, what comes after is not.
Result Session::urgent(Kind kind, std::int64_t deadline, Fields& out) {
  urgent_.fetch_add(1);
  const Turn turn(sound_mutex_, deadline);
  urgent_.fetch_sub(1);
  if (!turn.got()) return {LIVERELAY_TIMEOUT, "another request of this session is under way"};
  if (closing_.load()) return closed();
  Result result = channel_.ask(kind, Message(), deadline, out);
  if (result.ok() && kind == Kind::interrupt) epoch_.fetch_add(1);
  return result;
}

Result Session::interrupt(std::int64_t deadline, std::uint64_t& next_frame) {
  Fields reply;
  Result result = urgent(Kind::interrupt, deadline, reply);
  if (result.ok()) next_frame = static_cast<std::uint64_t>(reply.number(Tag::next_frame));
  return result;
}

Result Session::snapshot(std::int64_t deadline, std::string& token, std::uint64_t& next_frame) {
  Fields reply;
  Result result = urgent(Kind::snapshot, deadline, reply);
  if (!result.ok()) return result;
  token = reply.text(Tag::token);
  next_frame = static_cast<std::uint64_t>(reply.number(Tag::next_frame));
  return result;
}

Result Session::health(std::int64_t deadline, liverelay_health& out) {
  if (closing_.load()) return closed();
  Fields reply;
  Result result = channel_.ask(Kind::health, Message(), deadline, reply);
  if (result.ok()) fill(reply, out);
  return result;
}

void Session::close() {
  if (closing_.exchange(true)) return;
  channel_.end(deadline_in(kFarewellMs));
  const std::lock_guard<std::mutex> sound(sound_mutex_);
  sound_->close();
  const std::lock_guard<std::mutex> pop(pop_mutex_);
  frames_->close();
}

bool Session::done() const {
  const std::lock_guard<std::mutex> lock(held_mutex_);
  return closing_.load() && held_.empty();
}

Result Client::connect(const std::string& path, std::int64_t deadline, std::shared_ptr<Client>& out) {
  auto client = std::make_shared<Client>();
  client->path_ = path;
  liverelay_health now{};
  Result result = client->channel_.connect(path, deadline);
  if (result.ok()) result = client->health(deadline, now);
  if (result.ok()) out = std::move(client);
  return result;
}

Result Client::health(std::int64_t deadline, liverelay_health& out) {
  Fields reply;
  Result result = channel_.ask(Kind::health, Message(), deadline, reply);
  if (result.ok()) fill(reply, out);
  return result;
}

Result Client::forget(const std::string& token, std::int64_t deadline) {
  Message request;
  request.add(Tag::token, token);
  Fields none;
  return channel_.ask(Kind::forget, request, deadline, none);
}

}  // namespace liverelay
