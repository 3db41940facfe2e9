// frame_ring_test stress OPERATIONS SEED block|drop    two threads, one ring, random stalls; every byte is checked
// frame_ring_test fuzz ROUNDS SEED                     damaged headers, counters, slots: refused or survived
//
// Built with LIVERELAY_SANITIZE=address or thread; tests/test_frame_ring_native.py runs it. Both threads use the one
// mapping, or ThreadSanitizer would not see that they touch the same bytes.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <thread>

#include "frame_ring.h"

using namespace liverelay;

namespace {

using Random = std::mt19937_64;

#define REQUIRE(condition)                                                        \
  do {                                                                            \
    if (!(condition)) {                                                           \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);        \
      std::exit(1);                                                               \
    }                                                                             \
  } while (false)

constexpr std::uint64_t kOverslept = 5;  // a wake-up may come just as a nap runs out; a lost one shows many times
std::uint64_t bytes_seen = 0;  // a sum, so that reading them is not optimised away

std::uint64_t below(Random& random, std::uint64_t limit) { return random() % limit; }

void stall(Random& random) {
  const std::uint64_t kind = below(random, 4096);
  if (kind == 0) std::this_thread::sleep_for(std::chrono::microseconds(below(random, 300)));
  else if (kind < 64) std::this_thread::yield();
}

void stamp(std::uint8_t* bytes, std::uint64_t size, std::uint64_t sequence) {
  for (std::uint64_t i = 0; i < size; i += 8) {
    const std::uint64_t value = sequence * 0x9E3779B97F4A7C15ULL + i;
    std::memcpy(bytes + i, &value, 8);
  }
}

bool stamped(const std::uint8_t* bytes, std::uint64_t size, std::uint64_t sequence) {
  for (std::uint64_t i = 0; i < size; i += 8) {
    std::uint64_t value = 0;
    std::memcpy(&value, bytes + i, 8);
    if (value != sequence * 0x9E3779B97F4A7C15ULL + i) return false;
  }
  return true;
}

void write_all(const std::shared_ptr<RingSegment>& segment, std::uint64_t operations, std::uint64_t seed) {
  RingWriter writer(segment);
  Random random(seed);
  for (std::uint64_t i = 0; i < operations; ++i) {
    stall(random);
    std::uint32_t slot = 0;
    RingStatus status = writer.reserve(kRingForever, slot);
    REQUIRE(status.ok());
    if (below(random, 100) == 0) {  // an abandoned slot leaves no gap
      writer.abandon();
      status = writer.reserve(kRingForever, slot);
      REQUIRE(status.ok());
    }
    RingMeta meta{};
    meta.index = i;
    meta.format = kRgb24;
    meta.width = 8;
    meta.height = 1 + static_cast<std::uint32_t>(below(random, 8));
    meta.audio_bytes = 8 * static_cast<std::uint32_t>(below(random, 9));
    stamp(segment->frame(slot), std::uint64_t{meta.height} * 24, i);
    stamp(segment->audio(slot), meta.audio_bytes, i);
    REQUIRE(writer.publish(meta).ok());
  }
  REQUIRE(writer.overslept() <= kOverslept);
}

std::uint64_t read_all(const std::shared_ptr<RingSegment>& segment, std::uint64_t seed) {
  RingReader reader(segment);
  Random random(seed + 1);
  std::deque<RingReader::Frame> held;
  std::uint64_t count = 0, expected = 0;
  const bool drops = segment->layout().drop_oldest != 0;
  const auto check = [&](const RingReader::Frame& frame) {
    REQUIRE(stamped(segment->frame(frame.slot), frame.meta.frame_bytes, frame.meta.index));
    REQUIRE(stamped(segment->audio(frame.slot), frame.meta.audio_bytes, frame.meta.index));
  };
  for (;;) {
    stall(random);
    while (!held.empty() && (held.size() + 2 > segment->layout().slots || below(random, 2) == 0)) {
      const std::size_t pick = below(random, held.size());  // in any order
      check(held[pick]);                                    // not overwritten while it was held
      reader.release(held[pick]);
      held.erase(held.begin() + static_cast<std::ptrdiff_t>(pick));
    }
    RingReader::Frame frame;
    const RingStatus status = reader.pop(kRingForever, frame);
    if (status.code == RingCode::closed) break;
    REQUIRE(status.ok());
    REQUIRE(frame.meta.index == frame.meta.sequence);
    REQUIRE(drops ? frame.meta.sequence >= expected : frame.meta.sequence == expected);
    expected = frame.meta.sequence + 1;
    check(frame);
    held.push_back(frame);
    ++count;
  }
  for (const auto& frame : held) reader.release(frame);
  REQUIRE(reader.overslept() <= kOverslept);
  return count;
}

void stress(std::uint64_t operations, std::uint64_t seed, bool drop) {
  Random random(seed);
  RingRequest request;
  request.slots = 2 + static_cast<std::uint32_t>(below(random, 7));
  request.frame_bytes = 192;
  request.audio_bytes = 64;
  request.drop_oldest = drop;
  std::shared_ptr<RingSegment> segment;
  REQUIRE(RingSegment::create(request, RingRole::writer, segment).ok());
  REQUIRE(segment->claim(RingRole::reader).ok());
  REQUIRE(segment->claim(RingRole::reader).code == RingCode::refused);
  std::uint64_t read = 0;
  std::thread reader([&] { read = read_all(segment, seed); });
  std::thread writer([&] { write_all(segment, operations, seed); });
  writer.join();
  reader.join();
  const std::uint64_t dropped = segment->dynamic().dropped.load();
  std::printf("%llu pushed, %llu read, %llu dropped, %u slots\n", static_cast<unsigned long long>(operations),
              static_cast<unsigned long long>(read), static_cast<unsigned long long>(dropped), request.slots);
  REQUIRE(read + dropped == operations && (drop || dropped == 0));
  REQUIRE(segment->holder(RingRole::reader) == RingPeer::none);
}

std::uint64_t odd_value(Random& random) {
  const std::uint64_t values[] = {0, 1, 2, 3, 64, 128, 4095, 4096, 0x7FFFFFFF, 0xFFFFFFFF, 1ULL << 33U, 1ULL << 62U,
                                  UINT64_MAX, UINT64_MAX - 4095, random(), below(random, 1U << 20U)};
  return values[below(random, sizeof values / sizeof values[0])];
}

void fix_checksum(std::uint8_t* header) {
  std::uint64_t sum = 0xCBF29CE484222325ULL;
  for (int i = 0; i < 120; ++i) sum = (sum ^ header[i]) * 0x100000001B3ULL;
  std::memcpy(header + 120, &sum, 8);
}

// Use both ends as a program would; anything may come back but a byte outside of the slot.
void use(RingWriter& writer, RingReader& reader, Random& random) {
  const RingStatic& layout = reader.segment().layout();
  for (int i = 0; i < 12; ++i) {
    std::uint32_t slot = 0;
    if (writer.reserve(0, slot).ok()) {
      std::memset(writer.segment().frame(slot), i, layout.frame_bytes);
      std::memset(writer.segment().audio(slot), i, layout.audio_bytes);
      RingMeta meta{};
      meta.format = static_cast<std::uint32_t>(below(random, 4));
      meta.width = static_cast<std::uint32_t>(odd_value(random));
      meta.height = static_cast<std::uint32_t>(odd_value(random));
      meta.audio_bytes = static_cast<std::uint32_t>(odd_value(random));
      if (!writer.publish(meta).ok()) writer.abandon();
    }
    RingReader::Frame frame;
    if (!reader.pop(0, frame).ok()) continue;
    REQUIRE(frame.slot < layout.slots && frame.meta.frame_bytes <= layout.frame_bytes);
    REQUIRE(frame.meta.audio_bytes <= layout.audio_bytes);
    for (std::uint64_t k = 0; k < frame.meta.frame_bytes; ++k) bytes_seen += reader.segment().frame(frame.slot)[k];
    for (std::uint64_t k = 0; k < frame.meta.audio_bytes; ++k) bytes_seen += reader.segment().audio(frame.slot)[k];
    reader.release(frame);
  }
  (void)writer.unread();
  (void)reader.peer_silent_ns();
  (void)reader.peer();
}

// Opens what may be damaged. Both roles are free or held by this process, so only the header can be the reason to refuse.
bool try_open(const std::string& name, std::uint64_t file_bytes, Random& random) {
  std::shared_ptr<RingSegment> in, out;
  if (!RingSegment::open(name, RingRole::writer, out).ok()) return false;
  REQUIRE(RingSegment::open(name, RingRole::reader, in).ok());
  const RingStatic& layout = in->layout();
  REQUIRE(layout.slots_offset + layout.slot_stride * layout.slots <= file_bytes);
  REQUIRE(layout.frame_offset + layout.frame_bytes <= layout.audio_offset);
  REQUIRE(layout.audio_offset + layout.audio_bytes <= layout.slot_stride);
  RingWriter writer(out);
  RingReader reader(in);
  use(writer, reader, random);
  return true;
}

void fuzz_round(Random& random, int counts[2]) {
  RingRequest request;
  request.slots = 2 + static_cast<std::uint32_t>(below(random, 4));
  request.frame_bytes = below(random, 9000);
  request.audio_bytes = 4 * (1 + below(random, 500));
  request.drop_oldest = below(random, 2) == 0;
  std::shared_ptr<RingSegment> segment;
  REQUIRE(RingSegment::create(request, RingRole::writer, segment).ok());
  const std::string name = segment->name();
  const std::uint64_t total = segment->layout().total_bytes;
  const int file = ::shm_open(("/" + name).c_str(), O_RDWR, 0);
  REQUIRE(file >= 0);
  auto* bytes = static_cast<std::uint8_t*>(::mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
  REQUIRE(bytes != MAP_FAILED);
  const auto damage = [&](std::uint64_t from, std::uint64_t size) {  // an aligned word, or some bits
    std::uint64_t value = odd_value(random);
    if (below(random, 2) == 0) std::memcpy(bytes + from + below(random, size / 8) * 8, &value, 8);
    else bytes[from + below(random, size)] ^= static_cast<std::uint8_t>(1U << below(random, 8));
  };
  const std::uint64_t kind = below(random, 4);
  std::uint8_t before[128];
  std::memcpy(before, bytes, sizeof before);
  bool may_open = true;
  if (kind == 3) {  // a live ring whose counters, words and metadata go bad under both ends
    REQUIRE(segment->claim(RingRole::reader).ok());
    RingWriter writer(segment);
    RingReader reader(segment);
    for (int i = 0; i < 8; ++i) {
      use(writer, reader, random);
      if (below(random, 2) == 0) damage(128, 256);
      damage(kRingHeaderBytes + segment->layout().slot_stride * below(random, request.slots), 128);
    }
  } else {
    segment->unclaim(RingRole::writer);
    if (kind == 2) {
      const std::uint64_t size = below(random, 2) == 0 ? below(random, total) : total + 1 + below(random, 9000);
      REQUIRE(::ftruncate(file, static_cast<off_t>(size)) == 0);
      may_open = false;
    } else {
      for (std::uint64_t i = 0; i <= below(random, 3); ++i) damage(0, 128);
      if (kind == 1) fix_checksum(bytes);
      else may_open = std::memcmp(before, bytes, sizeof before) == 0;
    }
    const bool opened = try_open(name, total, random);
    REQUIRE(may_open || !opened);
    ++counts[opened ? 1 : 0];
  }
  ::munmap(bytes, total);
  ::close(file);
  segment->unlink();
}

void fuzz(std::uint64_t rounds, std::uint64_t seed) {
  Random random(seed);
  int counts[2] = {0, 0};
  for (std::uint64_t i = 0; i < rounds; ++i) fuzz_round(random, counts);
  for (const char* name : {"", "/etc/passwd", "../liverelay-ring-0123456789abcdef", "liverelay-ring-0123456789ABCDEF",
                           "liverelay-ring-0123456789abcde/", "liverelay-ring-0123456789abcdef0"}) {
    std::shared_ptr<RingSegment> out;
    REQUIRE(RingSegment::open(name, RingRole::reader, out).code == RingCode::refused);
  }
  std::printf("%d refused, %d opened, sum %llu\n", counts[0], counts[1], static_cast<unsigned long long>(bytes_seen));
  REQUIRE(counts[0] > 0);
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) return 2;
  const std::uint64_t amount = std::strtoull(arguments[2], nullptr, 10), seed = std::strtoull(arguments[3], nullptr, 10);
  if (std::string(arguments[1]) == "fuzz") fuzz(amount, seed);
  else stress(amount, seed, count > 4 && std::string(arguments[4]) == "drop");
  return 0;
}
