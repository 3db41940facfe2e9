// Lock-free ring of video frames with their sound, one writer and one reader, in two processes or two threads.
//
// Positions count 0, 1, 2, ... and position p lies in slot p % slots. Each slot has one atomic word (position, state):
//
//   writer   free -> writing -> full;  drop-oldest: also full -> writing, which drops what the slot held
//   reader   full -> held -> free
//
// Both sides move a word by compare-and-swap only, so a slot has one owner at any time: what the reader holds is never
// overwritten, however long it is held. The writer passes over held slots (their positions stay unused), and the reader
// passes over every position that is not full under its own number. So one slow frame does not stop the ring. The
// reader may hold all slots but one.
//
// Waiting: some microseconds of looking, then a futex, in naps after which the other side's life is checked. A side that
// sleeps says so first; both sides use sequentially consistent operations there, so no wake-up is lost.
//
// Each object is for one thread at a time; only RingReader::release may be called from any thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "ring_segment.h"

namespace liverelay {

constexpr std::int64_t kRingForever = INT64_MAX;

// What both sides share: the segment, the role, the end.
class RingEnd {
 public:
  RingEnd(std::shared_ptr<RingSegment> segment, RingRole role);
  virtual ~RingEnd();
  RingEnd(const RingEnd&) = delete;
  RingEnd& operator=(const RingEnd&) = delete;

  const RingSegment& segment() const { return *segment_; }
  RingPeer peer() const { return segment_->holder(other_); }
  std::int64_t peer_silent_ns() const;  // since the peer last used the ring; tells a hung peer from a busy one
  std::uint64_t unread() const;         // frames that wait to be read
  std::uint64_t overslept() const { return overslept_; }  // naps that ran out beside work: lost wake-ups, for tests
  // No further use. The role is given back when the last slot is; the maker's close also removes the name.
  void close();

 protected:
  RingStatus usable() const;
  void give_back(std::uint32_t slot, std::uint64_t position);
  void let_go();
  bool peer_died(std::int64_t now);
  void beat(std::int64_t now);
  std::int64_t deadline_after(std::int64_t timeout_ns);

  std::shared_ptr<RingSegment> segment_;
  RingRole role_, other_;
  std::atomic<std::uint32_t> taken_{0};  // slots now with this side
  std::atomic<bool> closed_{false};
  std::uint64_t overslept_ = 0;

 private:
  std::atomic<bool> gone_{false};
  std::int64_t checked_ns_ = 0;
};

class RingWriter : public RingEnd {
 public:
  explicit RingWriter(std::shared_ptr<RingSegment> segment);
  // A free slot to fill; one at a time. Back-pressure: waits while the reader is behind (timeout; peer_died when a dead
  // reader will not come back by itself). Drop-oldest never waits: timeout only when the reader holds every slot.
  RingStatus reserve(std::int64_t timeout_ns, std::uint32_t& slot);
  // Publish the reserved slot. Of `meta` the caller sets index, pts_ns, sides, format, audio_bytes, sample_rate; what
  // does not fit is refused and the slot stays reserved.
  RingStatus publish(RingMeta meta);
  void abandon();

 private:
  bool take();

  std::uint64_t head_, sequence_, position_ = 0;
  std::uint32_t slot_ = 0;
  bool reserved_ = false;
};

class RingReader : public RingEnd {
 public:
  struct Frame {
    std::uint32_t slot = 0;
    std::uint64_t position = 0;
    RingMeta meta{};  // a checked copy
  };

  explicit RingReader(std::shared_ptr<RingSegment> segment);
  // The oldest unread frame, which stays this side's until release. closed: the writer ended the stream and everything
  // was read; peer_died: it died and everything was read; damaged: this frame cannot be trusted and is passed over.
  RingStatus pop(std::int64_t timeout_ns, Frame& frame);
  void release(const Frame& frame) { give_back(frame.slot, frame.position); }

 private:
  enum class Found { nothing, frame, damage };
  Found take(Frame& frame);

  std::uint64_t next_;
};

}  // namespace liverelay
