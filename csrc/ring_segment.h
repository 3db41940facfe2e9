// The frame ring's segment of POSIX shared memory: its layout, how it is made, how it is opened without trust, and who
// holds it. Plain C++17: no Python, and errors are return values. engine/frame_ring_twin.py has the same layout in Python.
//
//   0     RingStatic   never changes; checked once, from a private copy, when the segment is opened
//   128   RingDynamic  counters, claims and futex words, each side's on cache lines of its own
//   4096  slots        RingStatic::slot_stride apart: RingWord, RingMeta, pixels (offset 128), sound (audio_offset)
//
// Everything is little-endian. Slots start on pages, pixels and sound on 64 bytes.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace liverelay {

enum class RingCode : int { ok = 0, timeout, closed, peer_died, refused, damaged, system };

struct RingStatus {
  RingCode code = RingCode::ok;
  std::string text;  // one line: what is wrong and what to do
  bool ok() const { return code == RingCode::ok; }
};

enum class RingRole { writer, reader };
enum class RingPeer : int { none = 0, alive, dead };

constexpr std::uint64_t kRingMagic = 0x474E4952594C524CULL;  // the letters LRLYRING
constexpr std::uint32_t kRingAbi = 1;
constexpr std::uint64_t kRingHeaderBytes = 4096, kRingSlotHeaderBytes = 128;
constexpr std::uint32_t kRingMinSlots = 2, kRingMaxSlots = 1024, kRingMaxSide = 16384;
constexpr std::uint64_t kRingMaxFrameBytes = 1ULL << 28, kRingMaxAudioBytes = 1ULL << 24, kRingMaxBytes = 1ULL << 33;
constexpr char kRingPrefix[] = "liverelay-ring-";  // and 16 hexadecimal digits

struct RingStatic {
  std::uint64_t magic;
  std::uint32_t abi;
  std::uint32_t file_lock;  // 0: atomic words and futexes (this code); 1: the Python twin's file lock. They do not mix.
  std::uint64_t total_bytes;
  std::uint32_t slots;
  std::uint32_t drop_oldest;
  std::uint64_t slots_offset, slot_stride;
  std::uint64_t frame_offset, frame_bytes;  // from the slot's start; room for pixels
  std::uint64_t audio_offset, audio_bytes;
  std::uint64_t created_ns;     // since 1970
  std::uint64_t creator;        // process_identity
  std::uint64_t pid_namespace;  // claims mean nothing in another one
  std::uint64_t reserved[2];
  std::uint64_t checksum;  // FNV-1a over the bytes before it
};
static_assert(sizeof(RingStatic) == 128 && offsetof(RingStatic, checksum) == 120);

struct RingDynamic {
  // The writer's line. head: positions given out so far; what lies below it may be read.
  alignas(64) std::atomic<std::uint64_t> writer_claim;
  std::atomic<std::uint64_t> writer_beat_ns, head, pushed, dropped;
  std::atomic<std::uint32_t> closed;
  alignas(64) std::atomic<std::uint32_t> data_word;  // futex: the reader sleeps on it
  std::atomic<std::uint32_t> reader_waiting;
  alignas(64) std::atomic<std::uint64_t> reader_claim;
  std::atomic<std::uint64_t> reader_beat_ns;
  alignas(64) std::atomic<std::uint32_t> space_word;  // futex: the writer sleeps on it
  std::atomic<std::uint32_t> writer_waiting;
};
static_assert(sizeof(RingDynamic) == 256 && std::atomic<std::uint64_t>::is_always_lock_free);
static_assert(std::atomic<std::uint32_t>::is_always_lock_free && sizeof(std::atomic<std::uint32_t>) == 4);

// A slot's word is position * 4 + state. Whoever moves it by compare-and-swap owns the slot's bytes.
using RingWord = std::atomic<std::uint64_t>;
enum RingState : std::uint64_t { kFree = 0, kWriting = 1, kFull = 2, kHeld = 3 };
constexpr std::uint64_t ring_word(std::uint64_t position, RingState state) { return position << 2U | state; }

enum RingFormat : std::uint32_t { kNoFrame = 0, kRgb24 = 1, kNv12 = 2 };  // NV12: BT.709, limited range

struct RingMeta {            // at offset 64 of a slot
  std::uint64_t sequence;    // counts pushes; a gap is what was dropped
  std::uint64_t index;       // of the video frame in its stream
  std::int64_t pts_ns;       // when to show it, from the stream's start
  std::uint64_t pushed_ns;   // CLOCK_MONOTONIC when it was published
  std::uint32_t width, height, format, frame_bytes;
  std::uint32_t audio_bytes, sample_rate;  // float32, one channel
  std::uint32_t reserved[2];
};
static_assert(sizeof(RingMeta) == 64);

// Bytes of a picture; 0 where format and sides do not fit together or exceed kRingMaxSide.
std::uint64_t ring_picture_bytes(std::uint32_t format, std::uint32_t width, std::uint32_t height);

std::int64_t monotonic_ns();
std::uint64_t process_identity();  // of this process: pid (22 bits) and start time (42 bits); 0 without /proc
bool process_alive(std::uint64_t identity);  // false for a dead, ended or other process of the same pid
bool ring_name_is_valid(const std::string& name);

struct RingRequest {
  std::uint32_t slots = 8;
  std::uint64_t frame_bytes = 0, audio_bytes = 0;
  bool drop_oldest = false;
};

class RingSegment {
 public:
  // A new segment (mode 0600, random name, memory reserved) with `role` taken by this process.
  static RingStatus create(const RingRequest& request, RingRole role, std::shared_ptr<RingSegment>& out);
  // An existing one, all of it checked; refused when it is not ours, damaged, or `role` is taken by a live process.
  static RingStatus open(const std::string& name, RingRole role, std::shared_ptr<RingSegment>& out);
  ~RingSegment();
  RingSegment(const RingSegment&) = delete;
  RingSegment& operator=(const RingSegment&) = delete;

  const std::string& name() const { return name_; }
  const RingStatic& layout() const { return layout_; }  // the private, checked copy
  RingDynamic& dynamic() const { return *reinterpret_cast<RingDynamic*>(base_ + sizeof(RingStatic)); }
  std::uint8_t* slot(std::uint32_t index) const {
    return base_ + layout_.slots_offset + layout_.slot_stride * index;
  }
  RingWord& word(std::uint32_t index) const { return *reinterpret_cast<RingWord*>(slot(index)); }
  std::uint8_t* frame(std::uint32_t index) const { return slot(index) + layout_.frame_offset; }
  std::uint8_t* audio(std::uint32_t index) const { return slot(index) + layout_.audio_offset; }

  RingStatus claim(RingRole role);  // also repairs what a dead holder of the role left
  void unclaim(RingRole role);
  RingPeer holder(RingRole role) const;
  bool ours() const;  // false in a process forked off the one that opened it
  void unlink();      // by the maker; mappings live on

 private:
  RingSegment() = default;
  RingStatus map(int descriptor);
  void repair(RingRole role);

  std::string name_;
  RingStatic layout_{};
  std::uint8_t* base_ = nullptr;
  std::uint64_t identity_ = 0;
  pid_t pid_ = 0;
  std::atomic<bool> maker_{false};
};

}  // namespace liverelay
