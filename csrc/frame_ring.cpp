#include "frame_ring.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace liverelay {
namespace {

constexpr std::size_t kMetaOffset = 64;
constexpr int kLooks = 64;
constexpr std::int64_t kSpinNs = 20000, kNapNs = 50000000;  // a killed peer wakes nobody: look after each nap

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Looking is of use only while the other side can run.
bool can_spin() {
  static const bool several = [] {
    cpu_set_t set;
    return ::sched_getaffinity(0, sizeof set, &set) != 0 || CPU_COUNT(&set) > 1;
  }();
  return several;
}

// false when the time ran out.
bool futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t seen, std::int64_t ns) {
  timespec time{};
  time.tv_sec = static_cast<time_t>(ns / 1000000000);
  time.tv_nsec = static_cast<long>(ns % 1000000000);
  auto* address = reinterpret_cast<std::uint32_t*>(&word);
  return ::syscall(SYS_futex, address, FUTEX_WAIT, seen, &time, nullptr, 0) == 0 || errno != ETIMEDOUT;
}

// After a change that `ready` of the sleeping side depends on.
void wake(std::atomic<std::uint32_t>& word, std::atomic<std::uint32_t>& waiting) {
  if (waiting.load() == 0 || waiting.exchange(0) == 0) return;
  word.fetch_add(1);
  ::syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAKE, 1, nullptr, nullptr, 0);
}

// Until `ready`, or for one nap at most. True when a nap ran out although `ready` held: a lost wake-up.
template <typename Ready>
bool wait_once(std::atomic<std::uint32_t>& word, std::atomic<std::uint32_t>& waiting, std::int64_t deadline,
               const Ready& ready) {
  std::int64_t now = monotonic_ns();
  const std::int64_t spin_end = std::min(deadline, now + (can_spin() ? kSpinNs : 0));
  while (now < spin_end) {
    for (int i = 0; i < 16; ++i) {
      if (ready()) return false;
      pause_cpu();
    }
    now = monotonic_ns();
  }
  const std::uint32_t seen = word.load();
  waiting.store(1);
  const bool slept = !ready() && now < deadline;
  const bool woken = !slept || futex_wait(word, seen, std::min(deadline - now, kNapNs));
  waiting.store(0);
  return !woken && ready();
}

// The bytes as they are now, read once: the compiler may not look again after a check.
RingMeta copy_meta(const std::uint8_t* slot) {
  const auto* from = reinterpret_cast<const volatile std::uint64_t*>(slot + kMetaOffset);
  std::uint64_t words[sizeof(RingMeta) / 8];
  for (std::size_t i = 0; i < sizeof(RingMeta) / 8; ++i) words[i] = from[i];
  RingMeta meta;
  std::memcpy(&meta, words, sizeof meta);
  return meta;
}

bool fits(const RingMeta& meta, const RingStatic& layout) {
  const bool picture = meta.format != kNoFrame;
  const std::uint64_t bytes = picture ? ring_picture_bytes(meta.format, meta.width, meta.height) : 0;
  return meta.frame_bytes == bytes && (bytes != 0) == picture && bytes <= layout.frame_bytes &&
         meta.audio_bytes % 4 == 0 && meta.audio_bytes <= layout.audio_bytes;
}

}  // namespace

RingEnd::RingEnd(std::shared_ptr<RingSegment> segment, RingRole role)
    : segment_(std::move(segment)),
      role_(role),
      other_(role == RingRole::writer ? RingRole::reader : RingRole::writer) {}

RingEnd::~RingEnd() {
  close();
  let_go();
}

std::int64_t RingEnd::peer_silent_ns() const {
  const RingDynamic& shared = segment_->dynamic();
  const std::uint64_t beat = (role_ == RingRole::writer ? shared.reader_beat_ns : shared.writer_beat_ns).load();
  const auto now = static_cast<std::uint64_t>(monotonic_ns());
  return beat == 0 || beat > now ? 0 : static_cast<std::int64_t>(now - beat);
}

std::uint64_t RingEnd::unread() const {
  std::uint64_t count = 0;
  for (std::uint32_t i = 0; i < segment_->layout().slots; ++i) count += (segment_->word(i).load() & 3U) == kFull;
  return count;
}

void RingEnd::close() {
  if (closed_.exchange(true) || !segment_->ours()) return;
  RingDynamic& shared = segment_->dynamic();
  if (role_ == RingRole::writer) {
    shared.closed.store(1);
    wake(shared.data_word, shared.reader_waiting);
  }
  segment_->unlink();
  if (taken_.load() == 0) let_go();
}

void RingEnd::let_go() {
  if (!gone_.exchange(true)) segment_->unclaim(role_);
}

RingStatus RingEnd::usable() const {
  if (closed_.load()) return {RingCode::refused, "this end of the ring is closed"};
  if (!segment_->ours()) return {RingCode::refused, "this ring was opened before a fork; attach to it anew here"};
  return {};
}

void RingEnd::give_back(std::uint32_t slot, std::uint64_t position) {
  if (!segment_->ours()) return;
  segment_->word(slot).store(ring_word(position, kFree));
  RingDynamic& shared = segment_->dynamic();
  if (role_ == RingRole::reader) wake(shared.space_word, shared.writer_waiting);
  if (taken_.fetch_sub(1) == 1 && closed_.load()) let_go();
}

bool RingEnd::peer_died(std::int64_t now) {
  if (now - checked_ns_ < kNapNs) return false;  // looking into /proc costs some microseconds
  if (peer() == RingPeer::dead) return true;
  checked_ns_ = now;
  return false;
}

void RingEnd::beat(std::int64_t now) {
  RingDynamic& shared = segment_->dynamic();
  auto& word = role_ == RingRole::writer ? shared.writer_beat_ns : shared.reader_beat_ns;
  word.store(static_cast<std::uint64_t>(now), std::memory_order_relaxed);
}

std::int64_t RingEnd::deadline_after(std::int64_t timeout_ns) {
  const std::int64_t now = monotonic_ns();
  beat(now);
  return timeout_ns > kRingForever - now ? kRingForever : now + std::max<std::int64_t>(timeout_ns, 0);
}

RingWriter::RingWriter(std::shared_ptr<RingSegment> segment)
    : RingEnd(std::move(segment), RingRole::writer),
      head_(segment_->dynamic().head.load()),
      sequence_(segment_->dynamic().pushed.load()) {}

bool RingWriter::take() {
  const RingStatic& layout = segment_->layout();
  for (std::uint32_t i = 0; i < layout.slots; ++i) {
    position_ = head_ + i;
    slot_ = static_cast<std::uint32_t>(position_ % layout.slots);
    RingWord& word = segment_->word(slot_);
    std::uint64_t seen = word.load();
    while ((seen & 3U) != kHeld) {
      if ((seen & 3U) == kFull && layout.drop_oldest == 0) return false;
      const bool drops = (seen & 3U) == kFull;
      if (word.compare_exchange_strong(seen, ring_word(position_, kWriting))) {
        if (drops) segment_->dynamic().dropped.fetch_add(1);
        return true;
      }
    }  // the reader took it or gave it back meanwhile
  }
  return false;
}

RingStatus RingWriter::reserve(std::int64_t timeout_ns, std::uint32_t& slot) {
  if (RingStatus status = usable(); !status.ok()) return status;
  if (reserved_) return {RingCode::refused, "a slot is reserved already; publish or abandon it first"};
  RingDynamic& shared = segment_->dynamic();
  const std::int64_t deadline = deadline_after(timeout_ns);
  const bool drops = segment_->layout().drop_oldest != 0;
  bool got = take();
  // The reader leaves one slot, but it may have moved on during the look.
  for (int again = 0; drops && !got && again < kLooks; ++again) got = take();
  while (!got) {
    if (drops) {
      shared.dropped.fetch_add(1);
      return {RingCode::timeout, {}};
    }
    const std::int64_t now = monotonic_ns();
    beat(now);
    if (peer_died(now)) return {RingCode::peer_died, "the reader of ring " + segment_->name() + " died"};
    if (now >= deadline) return {RingCode::timeout, {}};
    overslept_ += wait_once(shared.space_word, shared.writer_waiting, deadline, [&] { return got = take(); });
    if (!got) got = take();
  }
  taken_.fetch_add(1);
  reserved_ = true;
  slot = slot_;
  return {};
}

RingStatus RingWriter::publish(RingMeta meta) {
  if (RingStatus status = usable(); !status.ok()) return status;
  if (!reserved_) return {RingCode::refused, "no slot is reserved"};
  meta.frame_bytes = static_cast<std::uint32_t>(ring_picture_bytes(meta.format, meta.width, meta.height));
  if (!fits(meta, segment_->layout()))
    return {RingCode::refused, "the picture or its sound does not fit into the ring's slots"};
  RingDynamic& shared = segment_->dynamic();
  const std::int64_t now = monotonic_ns();
  beat(now);
  meta.sequence = sequence_++;
  meta.pushed_ns = static_cast<std::uint64_t>(now);
  std::memcpy(segment_->slot(slot_) + kMetaOffset, &meta, sizeof meta);
  segment_->word(slot_).store(ring_word(position_, kFull));
  shared.pushed.store(sequence_);
  head_ = position_ + 1;
  shared.head.store(head_);
  wake(shared.data_word, shared.reader_waiting);
  reserved_ = false;
  taken_.fetch_sub(1);
  return {};
}

void RingWriter::abandon() {
  if (!reserved_) return;
  reserved_ = false;
  give_back(slot_, position_);
}

RingReader::RingReader(std::shared_ptr<RingSegment> segment) : RingEnd(std::move(segment), RingRole::reader) {
  const std::uint64_t head = segment_->dynamic().head.load(), slots = segment_->layout().slots;
  next_ = head > slots ? head - slots : 0;
}

RingReader::Found RingReader::take(Frame& frame) {
  const RingStatic& layout = segment_->layout();
  const std::uint64_t head = segment_->dynamic().head.load();
  if (head < next_) return Found::damage;
  if (head - next_ > layout.slots) next_ = head - layout.slots;  // so many were dropped
  while (next_ < head) {
    frame.position = next_++;
    frame.slot = static_cast<std::uint32_t>(frame.position % layout.slots);
    std::uint64_t full = ring_word(frame.position, kFull);
    if (!segment_->word(frame.slot).compare_exchange_strong(full, ring_word(frame.position, kHeld))) continue;
    taken_.fetch_add(1);
    // A writer that waits for this slot passes over it now; beyond it a slot may be free that was held on the last lap.
    if ((segment_->word((frame.slot + 1) % layout.slots).load() & 3U) != kFull)
      wake(segment_->dynamic().space_word, segment_->dynamic().writer_waiting);
    frame.meta = copy_meta(segment_->slot(frame.slot));
    if (fits(frame.meta, layout)) return Found::frame;
    release(frame);
    return Found::damage;
  }
  return Found::nothing;
}

RingStatus RingReader::pop(std::int64_t timeout_ns, Frame& frame) {
  if (RingStatus status = usable(); !status.ok()) return status;
  if (taken_.load() + 1 >= segment_->layout().slots)
    return {RingCode::refused, "all frames but one are held; drop some of them (and arrays made of them) first"};
  RingDynamic& shared = segment_->dynamic();
  const std::int64_t deadline = deadline_after(timeout_ns);
  for (;;) {
    const std::int64_t now = monotonic_ns();
    // Both before the look, so that what a writer left before its end is found.
    const bool closed = shared.closed.load() != 0, died = peer_died(now);
    const Found found = take(frame);
    if (found == Found::frame) return {};
    if (found == Found::damage) return {RingCode::damaged, "ring " + segment_->name() + " holds a damaged frame"};
    if (closed) return {RingCode::closed, "the writer of ring " + segment_->name() + " has ended the stream"};
    if (died) return {RingCode::peer_died, "the writer of ring " + segment_->name() + " died"};
    if (now >= deadline) return {RingCode::timeout, {}};
    beat(now);
    overslept_ += wait_once(shared.data_word, shared.reader_waiting, deadline,
                            [&] { return shared.head.load() != next_ || shared.closed.load() != 0; });
  }
}

}  // namespace liverelay
