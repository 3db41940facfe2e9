#include "ring_segment.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace liverelay {
namespace {

constexpr std::uint64_t kStartMask = (1ULL << 42) - 1;

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

RingStatus system_error(const std::string& what) {
  return {RingCode::system, what + ": " + std::strerror(errno)};
}

std::int64_t clock_ns(clockid_t clock) {
  timespec now{};
  ::clock_gettime(clock, &now);
  return static_cast<std::int64_t>(now.tv_sec) * 1000000000 + now.tv_nsec;
}

std::uint64_t checksum(const RingStatic& header) {
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(&header);
  std::uint64_t sum = 0xCBF29CE484222325ULL;
  for (std::size_t i = 0; i < offsetof(RingStatic, checksum); ++i) sum = (sum ^ bytes[i]) * 0x100000001B3ULL;
  return sum;
}

std::uint64_t round_up(std::uint64_t bytes, std::uint64_t unit) { return (bytes + unit - 1) / unit * unit; }

// Start time in clock ticks since boot (field 22 of /proc/PID/stat); 0 where the process is gone or a zombie.
std::uint64_t start_time(unsigned long pid) {
  char path[40], text[1024];
  std::snprintf(path, sizeof path, "/proc/%lu/stat", pid);
  const Descriptor file(::open(path, O_RDONLY | O_CLOEXEC));
  if (file.get() < 0) return 0;
  const ssize_t size = ::read(file.get(), text, sizeof text - 1);
  if (size <= 0) return 0;
  text[size] = 0;
  const char* field = std::strrchr(text, ')');  // the name before it may hold anything
  if (field == nullptr || field[1] != ' ' || std::strchr("ZXx", field[2]) != nullptr) return 0;
  for (int number = 2; number < 22; ++number) {
    field = std::strchr(field + 1, ' ');
    if (field == nullptr) return 0;
  }
  return std::strtoull(field + 1, nullptr, 10) & kStartMask;
}

std::uint64_t pid_namespace() {
  struct stat info {};
  return ::stat("/proc/self/ns/pid", &info) == 0 ? info.st_ino : 0;
}

// All fields that follow from the sizes. `request` is within bounds.
RingStatic lay_out(const RingRequest& request) {
  RingStatic header{};
  header.magic = kRingMagic;
  header.abi = kRingAbi;
  header.slots = request.slots;
  header.drop_oldest = request.drop_oldest ? 1 : 0;
  header.slots_offset = kRingHeaderBytes;
  header.frame_offset = kRingSlotHeaderBytes;
  header.frame_bytes = request.frame_bytes;
  header.audio_offset = kRingSlotHeaderBytes + round_up(request.frame_bytes, 64);
  header.audio_bytes = request.audio_bytes;
  header.slot_stride = round_up(header.audio_offset + request.audio_bytes, 4096);
  header.total_bytes = kRingHeaderBytes + header.slot_stride * request.slots;
  return header;
}

RingStatus check_request(const RingRequest& request) {
  const auto refuse = [](const std::string& text) { return RingStatus{RingCode::refused, text}; };
  if (request.slots < kRingMinSlots || request.slots > kRingMaxSlots)
    return refuse("a ring has " + std::to_string(kRingMinSlots) + " to " + std::to_string(kRingMaxSlots) + " slots");
  if (request.frame_bytes > kRingMaxFrameBytes) return refuse("a slot holds at most 256 MiB of pixels");
  if (request.audio_bytes > kRingMaxAudioBytes || request.audio_bytes % 4 != 0)
    return refuse("a slot holds at most 16 MiB of sound, in whole float32 samples");
  if (request.frame_bytes + request.audio_bytes == 0) return refuse("a slot needs room for pixels or sound");
  if (lay_out(request).total_bytes > kRingMaxBytes) return refuse("a ring has at most 8 GiB; use fewer slots");
  return {};
}

RingStatus check_header(const RingStatic& found, const std::string& name, std::uint64_t size) {
  const auto refuse = [&](const std::string& text) {
    return RingStatus{RingCode::damaged, "ring " + name + " " + text};
  };
  if (found.magic != kRingMagic) return refuse("is no frame ring or is damaged (magic number)");
  if (found.abi != kRingAbi)
    return refuse("has layout " + std::to_string(found.abi) + ", this program knows " + std::to_string(kRingAbi) +
                  "; use the same version on both sides");
  if (found.checksum != checksum(found)) return refuse("is damaged (checksum of its header)");
  if (found.file_lock != 0) return refuse("belongs to the Python twin; use the compiled module on both sides or on none");
  const RingRequest request{found.slots, found.frame_bytes, found.audio_bytes, found.drop_oldest != 0};
  if (!check_request(request).ok()) return refuse("is damaged (sizes out of bounds)");
  RingStatic expected = lay_out(request);
  expected.created_ns = found.created_ns;
  expected.creator = found.creator;
  expected.pid_namespace = found.pid_namespace;
  expected.checksum = found.checksum;
  if (std::memcmp(&expected, &found, sizeof found) != 0) return refuse("is damaged (sizes and offsets do not fit)");
  if (size != found.total_bytes) return refuse("is damaged (its file has another size than its header says)");
  if (found.pid_namespace != pid_namespace())
    return {RingCode::refused, "ring " + name + " was made in another PID namespace, whose processes cannot be seen"};
  return {};
}

// Taking a role and sweeping exclude each other. A peer that never lets go must not hang us. Unlocked by hand, because
// the mapping keeps the open file, and with it the lock, when the descriptor is closed.
class FileLock {
 public:
  explicit FileLock(int descriptor) : descriptor_(descriptor) {
    for (int attempt = 0; attempt < 1000 && !held_; ++attempt) {
      held_ = ::flock(descriptor, LOCK_EX | LOCK_NB) == 0;
      if (!held_) ::usleep(1000);
    }
  }
  ~FileLock() {
    if (held_) ::flock(descriptor_, LOCK_UN);
  }
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;
  bool held() const { return held_; }

 private:
  int descriptor_;
  bool held_ = false;
};

std::atomic<std::uint64_t>& claim_of(RingDynamic& dynamic, RingRole role) {
  return role == RingRole::writer ? dynamic.writer_claim : dynamic.reader_claim;
}

}  // namespace

std::int64_t monotonic_ns() { return clock_ns(CLOCK_MONOTONIC); }

std::uint64_t process_identity() {
  const auto pid = static_cast<std::uint64_t>(::getpid());
  const std::uint64_t start = start_time(static_cast<unsigned long>(pid));
  return start == 0 ? 0 : pid << 42U | start;
}

bool process_alive(std::uint64_t identity) {
  const std::uint64_t start = identity & kStartMask;
  return start != 0 && start_time(static_cast<unsigned long>(identity >> 42U)) == start;
}

bool ring_name_is_valid(const std::string& name) {
  constexpr std::size_t prefix = sizeof kRingPrefix - 1;
  return name.size() == prefix + 16 && name.compare(0, prefix, kRingPrefix) == 0 &&
         name.find_first_not_of("0123456789abcdef", prefix) == std::string::npos;
}

std::uint64_t ring_picture_bytes(std::uint32_t format, std::uint32_t width, std::uint32_t height) {
  if (width == 0 || height == 0 || width > kRingMaxSide || height > kRingMaxSide) return 0;
  const std::uint64_t pixels = std::uint64_t{width} * height;
  if (format == kRgb24) return pixels * 3;
  if (format == kNv12 && width % 2 == 0 && height % 2 == 0) return pixels / 2 * 3;
  return 0;
}

RingStatus RingSegment::create(const RingRequest& request, RingRole role, std::shared_ptr<RingSegment>& out) {
  if (RingStatus status = check_request(request); !status.ok()) return status;
  std::shared_ptr<RingSegment> segment(new RingSegment);
  segment->layout_ = lay_out(request);
  RingStatic& header = segment->layout_;
  header.created_ns = static_cast<std::uint64_t>(clock_ns(CLOCK_REALTIME));
  header.creator = segment->identity_ = process_identity();
  header.pid_namespace = pid_namespace();
  header.checksum = checksum(header);
  if (header.creator == 0) return {RingCode::system, "a frame ring needs /proc to tell live processes from dead ones"};

  std::uint64_t number = 0;
  if (::getrandom(&number, sizeof number, 0) != static_cast<ssize_t>(sizeof number)) return system_error("no random");
  char digits[17];
  std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(number));
  segment->name_ = kRingPrefix + std::string(digits);
  const Descriptor file(::shm_open(("/" + segment->name_).c_str(), O_CREAT | O_EXCL | O_RDWR, 0600));
  if (file.get() < 0) return system_error("cannot make shared memory");
  segment->maker_ = true;
  segment->pid_ = ::getpid();
  RingStatus status;
  // fallocate: a full /dev/shm is an error now, not a SIGBUS later.
  if (::fchmod(file.get(), 0600) != 0) {
    status = system_error("cannot protect shared memory");
  } else if (const int error = ::posix_fallocate(file.get(), 0, static_cast<off_t>(header.total_bytes)); error != 0) {
    errno = error;
    status = system_error("no " + std::to_string(header.total_bytes >> 20U) + " MiB of shared memory for the ring");
  } else if (status = segment->map(file.get()); status.ok()) {
    status = segment->claim(role);
    std::memcpy(segment->base_, &header, sizeof header);
  }
  if (status.ok()) out = std::move(segment);
  else segment->unlink();
  return status;
}

RingStatus RingSegment::open(const std::string& name, RingRole role, std::shared_ptr<RingSegment>& out) {
  if (!ring_name_is_valid(name))
    return {RingCode::refused, "that is no name of a ring; give the name that FrameRing.create made"};
  const Descriptor file(::shm_open(("/" + name).c_str(), O_RDWR, 0));
  if (file.get() < 0 && errno == ENOENT)
    return {RingCode::refused, "there is no ring " + name + "; whoever made it has closed it"};
  if (file.get() < 0) return system_error("cannot open ring " + name);
  const FileLock lock(file.get());
  if (!lock.held()) return {RingCode::refused, "ring " + name + " is locked by another process"};
  struct stat info {};
  if (::fstat(file.get(), &info) != 0) return system_error("cannot look at ring " + name);
  if (!S_ISREG(info.st_mode) || info.st_uid != ::geteuid() || (info.st_mode & 0177) != 0)
    return {RingCode::refused, "ring " + name + " is not this user's own (owner and mode 0600)"};
  if (info.st_nlink == 0) return {RingCode::refused, "ring " + name + " has just been removed"};
  std::shared_ptr<RingSegment> segment(new RingSegment);
  segment->name_ = name;
  // A private copy, so that nothing can change between check and use.
  if (::pread(file.get(), &segment->layout_, sizeof(RingStatic), 0) != static_cast<ssize_t>(sizeof(RingStatic)))
    return {RingCode::damaged, "ring " + name + " is damaged (shorter than its header)"};
  RingStatus status = check_header(segment->layout_, name, static_cast<std::uint64_t>(info.st_size));
  if (!status.ok()) return status;
  segment->identity_ = process_identity();
  if (segment->identity_ == 0) return {RingCode::system, "a frame ring needs /proc to tell live processes from dead"};
  segment->pid_ = ::getpid();
  if (status = segment->map(file.get()); !status.ok()) return status;
  if (status = segment->claim(role); status.ok()) out = std::move(segment);
  return status;
}

RingStatus RingSegment::map(int descriptor) {
  // Populated: no page fault while a frame is on its way.
  void* memory = ::mmap(nullptr, layout_.total_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, descriptor, 0);
  if (memory == MAP_FAILED) return system_error("cannot map ring " + name_);
  base_ = static_cast<std::uint8_t*>(memory);
  return {};
}

RingSegment::~RingSegment() {
  if (base_ != nullptr) ::munmap(base_, layout_.total_bytes);
}

RingStatus RingSegment::claim(RingRole role) {
  auto& word = claim_of(dynamic(), role);
  const char* noun = role == RingRole::writer ? "writer" : "reader";
  std::uint64_t before = word.load();
  if (process_alive(before) || !word.compare_exchange_strong(before, identity_))
    return {RingCode::refused, "ring " + name_ + " has a live " + noun + " already (process " +
                                   std::to_string(before >> 42U) + ")"};
  repair(role);
  return {};
}

void RingSegment::repair(RingRole role) {
  RingDynamic& shared = dynamic();
  const std::uint64_t head = shared.head.load();
  for (std::uint32_t i = 0; i < layout_.slots; ++i) {
    std::uint64_t seen = word(i).load();
    const std::uint64_t state = seen & 3U;
    // Held by a dead reader; begun by a dead writer, or finished but not announced. The live side touches none of them.
    const bool left = role == RingRole::reader ? state == kHeld
                                               : state == kWriting || (state == kFull && seen >> 2U >= head);
    if (left) word(i).compare_exchange_strong(seen, ring_word(seen >> 2U, kFree));
  }
  const auto now = static_cast<std::uint64_t>(monotonic_ns());
  if (role == RingRole::reader) {
    shared.reader_beat_ns.store(now);
  } else {
    shared.writer_beat_ns.store(now);
    shared.closed.store(0);
  }
}

void RingSegment::unclaim(RingRole role) {
  std::uint64_t mine = identity_;
  if (ours()) claim_of(dynamic(), role).compare_exchange_strong(mine, 0);
}

RingPeer RingSegment::holder(RingRole role) const {
  const std::uint64_t identity = claim_of(dynamic(), role).load();
  if (identity == 0) return RingPeer::none;
  return process_alive(identity) ? RingPeer::alive : RingPeer::dead;
}

bool RingSegment::ours() const { return ::getpid() == pid_; }

void RingSegment::unlink() {
  if (ours() && maker_.exchange(false)) ::shm_unlink(("/" + name_).c_str());
}

}  // namespace liverelay
