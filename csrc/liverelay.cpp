// The C interface: checks arguments, finds what a handle means, keeps the last error of each thread.
#include "include/liverelay.h"

#include <atomic>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <unordered_map>
#include <utility>

#include "client.h"

using liverelay::Client;
using liverelay::deadline_in;
using liverelay::Fields;
using liverelay::Kind;
using liverelay::Message;
using liverelay::Result;
using liverelay::Session;
using liverelay::Tag;

namespace {

thread_local std::string last_error;
std::atomic<std::uint64_t> handles_made{0};  // clients and sessions have no number in common

// Objects by number. Whoever uses one keeps it alive, so that another thread may close it meanwhile.
template <typename T>
class Handles {
 public:
  std::uint64_t add(std::shared_ptr<T> object) {
    const std::uint64_t handle = handles_made.fetch_add(1) + 1;
    const std::lock_guard<std::mutex> lock(mutex_);
    objects_.emplace(handle, std::move(object));
    return handle;
  }
  std::shared_ptr<T> find(std::uint64_t handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(handle);
    return found == objects_.end() ? nullptr : found->second;
  }
  void remove(std::uint64_t handle) {
    std::shared_ptr<T> object;  // ends without the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(handle);
    if (found == objects_.end()) return;
    object = std::move(found->second);
    objects_.erase(found);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<std::uint64_t, std::shared_ptr<T>> objects_;
};

// Never destroyed: threads may still use them while the program ends.
template <typename T>
Handles<T>& handles() {
  static auto* all = new Handles<T>;
  return *all;
}

Result bad(const char* text) { return {LIVERELAY_E_ARGUMENT, text}; }

// Runs the body, remembers its error; no exception leaves the library.
template <typename Body>
int guarded(const Body& body) noexcept {
  try {
    Result result;
    try {
      result = body();
    } catch (const std::bad_alloc&) {
      result = {LIVERELAY_E_SYSTEM, "out of memory"};
    } catch (const std::exception& error) {
      result = {LIVERELAY_E_SYSTEM, error.what()};
    }
    if (!result.ok()) last_error = std::move(result.text);
    return result.code;
  } catch (...) {
    return LIVERELAY_E_SYSTEM;
  }
}

template <typename T, typename Body>
int with(std::uint64_t handle, const Body& body) noexcept {
  return guarded([&]() -> Result {
    const Result gone{LIVERELAY_E_HANDLE, "there is no such client or session, or it was closed"};
    const std::shared_ptr<T> object = handles<T>().find(handle);
    if (object == nullptr) return gone;
    Result result = body(*object);
    // What another thread's close does to this call is nothing that the server did.
    const bool blamed = result.code == LIVERELAY_E_LOST || result.code == LIVERELAY_E_STATE || result.code == LIVERELAY_END;
    return blamed && object->closing() ? gone : result;
  });
}

template <typename T>
Result check_struct(const T* given) {
  if (given == nullptr) return bad("a structure is missing");
  if (given->struct_bytes == sizeof(T)) return {};
  return {LIVERELAY_E_VERSION, "struct_bytes is " + std::to_string(given->struct_bytes) + ", not " +
                                   std::to_string(sizeof(T)) + "; set it to sizeof, and use the header of this library"};
}

// Fields of OPEN and RESUME.
Result add_output(const liverelay_options& options, Message& request) {
  if (options.pixel_format > LIVERELAY_NV12) return bad("no such pixel format");
  if (options.policy > LIVERELAY_DROP_OLDEST) return bad("no such policy");
  if (options.idle > 1) return bad("idle is 0 or 1");
  if (options.slots == 1 || options.slots > 256) return bad("slots are 2 to 256");
  request.add(Tag::pixels, std::int64_t{options.pixel_format == 0 ? 1U : options.pixel_format});
  request.add(Tag::policy, std::int64_t{options.policy});
  request.add(Tag::slots, std::int64_t{options.slots == 0 ? 8U : options.slots});
  request.add(Tag::idle, std::int64_t{options.idle});
  return {};
}

Result add_stream(const liverelay_options& options, Message& request) {
  if (options.width > 16384 || options.height > 16384) return bad("a video has at most 16384 pixels a side");
  if (options.max_area > 1U << 28U) return bad("max_area is at most 2^28");
  request.add(Tag::width, std::int64_t{options.width});
  request.add(Tag::height, std::int64_t{options.height});
  request.add(Tag::max_area, std::int64_t{options.max_area});
  request.add(Tag::seed, options.seed);
  request.add(Tag::stream, options.stream);
  return {};
}

Result begin(const Client& client, Kind kind, const Message& request, std::int64_t timeout_ms, liverelay_session* out) {
  std::shared_ptr<Session> session;
  Result result = Session::open(client.path(), kind, request, deadline_in(timeout_ms), session);
  if (result.ok()) *out = handles<Session>().add(std::move(session));
  return result;
}

constexpr liverelay_options kDefaults{sizeof(liverelay_options), 0, 0, 0, 0, 0, 0, 0, 0, 0};

Result check_token(const char* token) {
  const bool whole = token != nullptr && ::strnlen(token, LIVERELAY_TOKEN_BYTES) == LIVERELAY_TOKEN_BYTES - 1;
  return whole ? Result{} : bad("a token has 32 characters");
}

}  // namespace

uint32_t liverelay_abi(void) { return LIVERELAY_ABI; }

const char* liverelay_version(void) { return LIVERELAY_VERSION; }

const char* liverelay_last_error(void) { return last_error.c_str(); }

int liverelay_connect(const char* socket_path, uint32_t abi, int64_t timeout_ms, liverelay_client* out) {
  return guarded([&]() -> Result {
    if (out == nullptr || socket_path == nullptr) return bad("no path, or no place for the client");
    *out = 0;
    if (abi != LIVERELAY_ABI)
      return {LIVERELAY_E_VERSION, "the program was built for version " + std::to_string(abi) + " of the interface, " +
                                       "the library has " + std::to_string(LIVERELAY_ABI)};
    std::shared_ptr<Client> client;
    Result result = Client::connect(socket_path, deadline_in(timeout_ms), client);
    if (result.ok()) *out = handles<Client>().add(std::move(client));
    return result;
  });
}

int liverelay_disconnect(liverelay_client client) {
  return with<Client>(client, [&](Client& found) -> Result {
    found.close();
    handles<Client>().remove(client);
    return {};
  });
}

int liverelay_server_health(liverelay_client client, int64_t timeout_ms, liverelay_health* out) {
  return with<Client>(client, [&](Client& found) -> Result {
    if (Result result = check_struct(out); !result.ok()) return result;
    return found.health(deadline_in(timeout_ms), *out);
  });
}

int liverelay_open(liverelay_client client, const void* image, uint64_t image_bytes, const char* prompt,
                   const liverelay_options* options, int64_t timeout_ms, liverelay_session* out) {
  return with<Client>(client, [&](Client& found) -> Result {
    if (out == nullptr || image == nullptr || prompt == nullptr) return bad("no image, prompt or place for the session");
    *out = 0;
    const liverelay_options& chosen = options == nullptr ? kDefaults : *options;
    if (Result result = check_struct(&chosen); !result.ok()) return result;
    if (image_bytes == 0 || image_bytes > liverelay::kImageBytes) return bad("a picture file has 1 byte to 32 MiB");
    const std::size_t length = ::strnlen(prompt, liverelay::kPromptBytes + 1);
    if (length > liverelay::kPromptBytes) return bad("a prompt has at most 64 KiB");
    Message request;
    request.add(Tag::image, image, image_bytes);
    request.add(Tag::prompt, prompt, length);
    if (Result result = add_stream(chosen, request); !result.ok()) return result;
    if (Result result = add_output(chosen, request); !result.ok()) return result;
    return begin(found, Kind::open, request, timeout_ms, out);
  });
}

int liverelay_resume(liverelay_client client, const char* token, const liverelay_options* options, int64_t timeout_ms,
                     liverelay_session* out) {
  return with<Client>(client, [&](Client& found) -> Result {
    if (out == nullptr) return bad("no place for the session");
    *out = 0;
    const liverelay_options& chosen = options == nullptr ? kDefaults : *options;
    if (Result result = check_struct(&chosen); !result.ok()) return result;
    if (Result result = check_token(token); !result.ok()) return result;
    Message request;
    request.add(Tag::token, std::string(token));
    if (Result result = add_output(chosen, request); !result.ok()) return result;
    return begin(found, Kind::resume, request, timeout_ms, out);
  });
}

int liverelay_forget(liverelay_client client, const char* token, int64_t timeout_ms) {
  return with<Client>(client, [&](Client& found) -> Result {
    if (Result result = check_token(token); !result.ok()) return result;
    return found.forget(token, deadline_in(timeout_ms));
  });
}

int liverelay_session_info(liverelay_session session, liverelay_info* out) {
  return with<Session>(session, [&](Session& found) -> Result {
    if (Result result = check_struct(out); !result.ok()) return result;
    *out = found.info();
    return {};
  });
}

int liverelay_push(liverelay_session session, const void* samples, uint64_t frames, uint32_t format, uint32_t channels,
                   uint32_t rate, int64_t timeout_ms, uint64_t* taken) {
  if (taken != nullptr) *taken = 0;
  return with<Session>(session, [&](Session& found) {
    std::uint64_t count = 0;
    Result result = found.push({samples, frames, format, channels, rate}, deadline_in(timeout_ms), count);
    if (taken != nullptr) *taken = count;
    return result;
  });
}

int liverelay_end_sound(liverelay_session session) {
  return with<Session>(session, [](Session& found) { return found.end_sound(); });
}

int liverelay_pop(liverelay_session session, int64_t timeout_ms, liverelay_frame* out) {
  return with<Session>(session, [&](Session& found) -> Result {
    if (Result result = check_struct(out); !result.ok()) return result;
    return found.pop(deadline_in(timeout_ms), *out);
  });
}

int liverelay_release(liverelay_session session, const liverelay_frame* frame) {
  return with<Session>(session, [&](Session& found) -> Result {
    if (Result result = check_struct(frame); !result.ok()) return result;
    Result result = found.release(frame->position);
    if (found.done()) handles<Session>().remove(session);
    return result;
  });
}

int liverelay_interrupt(liverelay_session session, int64_t timeout_ms, uint64_t* next_frame) {
  return with<Session>(session, [&](Session& found) {
    std::uint64_t frame = 0;
    Result result = found.interrupt(deadline_in(timeout_ms), frame);
    if (result.ok() && next_frame != nullptr) *next_frame = frame;
    return result;
  });
}

int liverelay_snapshot(liverelay_session session, int64_t timeout_ms, char token[LIVERELAY_TOKEN_BYTES],
                       uint64_t* next_frame) {
  return with<Session>(session, [&](Session& found) -> Result {
    if (token == nullptr) return bad("no place for the token");
    std::string made;
    std::uint64_t frame = 0;
    Result result = found.snapshot(deadline_in(timeout_ms), made, frame);
    if (!result.ok()) return result;
    std::memcpy(token, made.c_str(), LIVERELAY_TOKEN_BYTES);
    if (next_frame != nullptr) *next_frame = frame;
    return result;
  });
}

int liverelay_session_health(liverelay_session session, int64_t timeout_ms, liverelay_health* out) {
  return with<Session>(session, [&](Session& found) -> Result {
    if (Result result = check_struct(out); !result.ok()) return result;
    return found.health(deadline_in(timeout_ms), *out);
  });
}

int liverelay_close(liverelay_session session) {
  return with<Session>(session, [&](Session& found) -> Result {
    found.close();
    if (found.done()) handles<Session>().remove(session);
    return {};
  });
}
