// client_test use SOCKET PICTURE SEED        every call of the interface on a real server, right and wrong
// client_test threads SOCKET PICTURE SEED    many threads on one session, closed under their hands
// client_test fuzz SOCKET PICTURE ROUNDS     a server that answers nonsense: any code, but nothing worse
//
// Built with LIVERELAY_SANITIZE=address or thread; tests/test_embedding.py and test_control.py run it.
#include <liverelay.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

using Random = std::mt19937_64;
constexpr std::int64_t kWaitMs = 60000;
constexpr std::uint32_t kRate = 16000;

#define REQUIRE(condition)                                                                                     \
  do {                                                                                                         \
    if (!(condition)) {                                                                                        \
      std::fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #condition, liverelay_last_error());        \
      std::exit(1);                                                                                            \
    }                                                                                                          \
  } while (false)

std::string picture;
std::atomic<std::uint64_t> bytes_seen{0};  // a sum, so that reading them is not optimised away

template <typename T>
T sized() {
  T value{};
  value.struct_bytes = sizeof(T);
  return value;
}

std::vector<float> noise(Random& random, std::size_t count) {
  std::vector<float> samples(count);
  for (float& sample : samples) sample = 0.2F * static_cast<float>(random() % 1000) / 1000.0F - 0.1F;
  return samples;
}

liverelay_session open_session(liverelay_client client, std::uint32_t slots = 8) {
  auto options = sized<liverelay_options>();
  options.width = options.height = 64;
  options.slots = slots;
  liverelay_session session = 0;
  REQUIRE(liverelay_open(client, picture.data(), picture.size(), "Hi.", &options, kWaitMs, &session) == LIVERELAY_OK);
  return session;
}

void look(const liverelay_frame& frame) {
  std::uint64_t sum = 0;
  for (std::uint64_t i = 0; i < frame.pixel_bytes; ++i) sum += frame.pixels[i];
  for (std::uint64_t i = 0; i < frame.audio_samples; ++i) sum += std::isfinite(frame.audio[i]) ? 1U : 0U;
  bytes_seen.fetch_add(sum);
}

// Pops and releases until the end; how many there were, and the last one's number.
std::uint64_t drain(liverelay_session session, std::uint64_t& last) {
  auto frame = sized<liverelay_frame>();
  std::uint64_t count = 0;
  while (liverelay_pop(session, kWaitMs, &frame) == LIVERELAY_OK) {
    look(frame);
    last = frame.index;
    ++count;
    REQUIRE(liverelay_release(session, &frame) == LIVERELAY_OK);
  }
  return count;
}

void wrong_arguments(liverelay_client client) {
  auto options = sized<liverelay_options>();
  liverelay_session session = 0;
  const auto open = [&](const liverelay_options* chosen) {
    return liverelay_open(client, picture.data(), picture.size(), "Hi.", chosen, kWaitMs, &session);
  };
  REQUIRE(liverelay_open(client, nullptr, 1, "", nullptr, 0, &session) == LIVERELAY_E_ARGUMENT);
  REQUIRE(liverelay_open(client, picture.data(), 0, "", nullptr, 0, &session) == LIVERELAY_E_ARGUMENT);
  REQUIRE(liverelay_open(client + 1000, picture.data(), 1, "", nullptr, 0, &session) == LIVERELAY_E_HANDLE);
  REQUIRE(liverelay_open(client, "no picture", 10, "", nullptr, kWaitMs, &session) == LIVERELAY_E_INPUT);
  REQUIRE(std::strstr(liverelay_last_error(), "not a readable image") != nullptr);
  const char* latin = "caf\xE9";
  REQUIRE(liverelay_open(client, picture.data(), picture.size(), latin, nullptr, kWaitMs, &session) == LIVERELAY_E_INPUT);
  options.struct_bytes = 4;
  REQUIRE(open(&options) == LIVERELAY_E_VERSION);
  options = sized<liverelay_options>();
  options.width = 65;
  options.height = 64;
  REQUIRE(open(&options) == LIVERELAY_E_INPUT && session == 0);
  options = sized<liverelay_options>();
  options.slots = 1000;
  REQUIRE(open(&options) == LIVERELAY_E_ARGUMENT);
  REQUIRE(liverelay_resume(client, "../x", nullptr, 0, &session) == LIVERELAY_E_ARGUMENT);
  REQUIRE(liverelay_resume(client, std::string(32, '0').c_str(), nullptr, kWaitMs, &session) == LIVERELAY_E_INPUT);
  REQUIRE(liverelay_disconnect(session) == LIVERELAY_E_HANDLE);
}

void wrong_sound(liverelay_session session) {
  const float samples[2] = {0, NAN};
  std::uint64_t taken = 9;
  REQUIRE(liverelay_push(session, samples, 2, LIVERELAY_F32, 1, kRate, 0, &taken) == LIVERELAY_E_ARGUMENT && taken == 0);
  REQUIRE(liverelay_push(session, samples, 1, LIVERELAY_F32, 3, kRate, 0, nullptr) == LIVERELAY_E_ARGUMENT);
  REQUIRE(liverelay_push(session, samples, 1, 7, 1, kRate, 0, nullptr) == LIVERELAY_E_ARGUMENT);
  REQUIRE(liverelay_push(session, samples, 1, LIVERELAY_F32, 1, 999, 0, nullptr) == LIVERELAY_E_ARGUMENT);
  REQUIRE(liverelay_push(session, nullptr, 1, LIVERELAY_F32, 1, kRate, 0, nullptr) == LIVERELAY_E_ARGUMENT);
  REQUIRE(liverelay_push(session, nullptr, 0, LIVERELAY_F32, 1, kRate, 0, nullptr) == LIVERELAY_OK);
}

// Stereo in 16 bits: one channel is the negative of the other, so the mean is silence.
void stereo(liverelay_client client) {
  const liverelay_session session = open_session(client);
  std::vector<std::int16_t> both(2 * 6400);
  for (std::size_t i = 0; i < both.size(); ++i) both[i] = static_cast<std::int16_t>(i % 2 == 0 ? 12345 : -12345);
  REQUIRE(liverelay_push(session, both.data(), 6400, LIVERELAY_S16, 2, kRate, kWaitMs, nullptr) == LIVERELAY_OK);
  REQUIRE(liverelay_push(session, both.data(), 1, LIVERELAY_S16, 2, 8000, 0, nullptr) == LIVERELAY_E_ARGUMENT);
  REQUIRE(liverelay_end_sound(session) == LIVERELAY_OK);
  REQUIRE(liverelay_push(session, both.data(), 1, LIVERELAY_S16, 2, kRate, 0, nullptr) == LIVERELAY_E_STATE);
  auto frame = sized<liverelay_frame>();
  std::uint64_t count = 0;
  for (; liverelay_pop(session, kWaitMs, &frame) == LIVERELAY_OK; ++count) {
    REQUIRE(frame.index == count && frame.pts_ns == static_cast<std::int64_t>(count) * 40000000);
    REQUIRE(frame.pixel_bytes == 64 * 64 * 3 && frame.audio_samples == 640 && frame.sample_rate == kRate);
    for (std::uint64_t i = 0; i < frame.audio_samples; ++i) REQUIRE(frame.audio[i] == 0);
    REQUIRE(liverelay_release(session, &frame) == LIVERELAY_OK);
    REQUIRE(liverelay_release(session, &frame) == LIVERELAY_E_ARGUMENT);  // twice
  }
  REQUIRE(count == 10 && liverelay_pop(session, 0, &frame) == LIVERELAY_END);
  REQUIRE(liverelay_interrupt(session, kWaitMs, nullptr) == LIVERELAY_E_STATE);
  REQUIRE(liverelay_close(session) == LIVERELAY_OK && liverelay_close(session) == LIVERELAY_E_HANDLE);
}

// Interrupt, snapshot, resume; frames that outlive their session.
void life(liverelay_client client, Random& random) {
  const liverelay_session session = open_session(client, 4);
  wrong_sound(session);
  const std::vector<float> speech = noise(random, 30 * kRate);
  std::uint64_t taken = 0, free_again = 0, next = 0, last = 0;
  // More than the rings hold, and nobody pops.
  REQUIRE(liverelay_push(session, speech.data(), speech.size(), LIVERELAY_F32, 1, kRate, 0, &taken) >= 0);
  std::thread mouth([&] {  // waits until the interrupt forgets the rest
    for (int i = 0; i < 100; ++i)
      REQUIRE(liverelay_push(session, speech.data(), speech.size(), LIVERELAY_F32, 1, kRate, kWaitMs, nullptr) ==
              LIVERELAY_OK);
  });
  std::vector<liverelay_frame> held(3, sized<liverelay_frame>());
  for (auto& frame : held) REQUIRE(liverelay_pop(session, kWaitMs, &frame) == LIVERELAY_OK);
  auto frame = sized<liverelay_frame>();
  REQUIRE(liverelay_pop(session, kWaitMs, &frame) == LIVERELAY_E_STATE);  // all but one are held
  REQUIRE(liverelay_release(session, &held[0]) == LIVERELAY_OK);
  std::atomic<bool> silent{false};
  std::thread nag([&] {  // as often as it takes: each one ends a push
    while (!silent.load()) REQUIRE(liverelay_interrupt(session, kWaitMs, &free_again) == LIVERELAY_OK);
  });
  mouth.join();
  silent.store(true);
  nag.join();
  REQUIRE(liverelay_interrupt(session, kWaitMs, &free_again) == LIVERELAY_OK);
  REQUIRE(liverelay_push(session, speech.data(), kRate, LIVERELAY_F32, 1, kRate, kWaitMs, nullptr) == LIVERELAY_OK);
  char token[LIVERELAY_TOKEN_BYTES];
  REQUIRE(liverelay_snapshot(session, kWaitMs, token, &next) == LIVERELAY_OK && std::strlen(token) == 32);
  REQUIRE(liverelay_end_sound(session) == LIVERELAY_OK);
  const std::uint64_t count = drain(session, last);
  REQUIRE(last == free_again + 24 && count == last + 1 - 3);
  REQUIRE(liverelay_close(session) == LIVERELAY_OK && liverelay_pop(session, 0, &frame) == LIVERELAY_E_HANDLE);
  look(held[1]);  // its memory lives on
  REQUIRE(liverelay_release(session, &held[1]) == LIVERELAY_OK && liverelay_release(session, &held[2]) == LIVERELAY_OK);
  REQUIRE(liverelay_release(session, &held[2]) == LIVERELAY_E_HANDLE);

  liverelay_session resumed = 0;
  REQUIRE(liverelay_resume(client, token, nullptr, kWaitMs, &resumed) == LIVERELAY_OK);
  auto info = sized<liverelay_info>();
  REQUIRE(liverelay_session_info(resumed, &info) == LIVERELAY_OK && info.next_frame == next && info.width == 64);
  REQUIRE(liverelay_end_sound(resumed) == LIVERELAY_OK && drain(resumed, last) == free_again + 25 - next);
  REQUIRE(liverelay_close(resumed) == LIVERELAY_OK && liverelay_forget(client, token, kWaitMs) == LIVERELAY_OK);
  REQUIRE(liverelay_resume(client, token, nullptr, kWaitMs, &resumed) == LIVERELAY_E_INPUT && resumed == 0);
}

void use(const char* socket, Random& random) {
  liverelay_client client = 0;
  REQUIRE(liverelay_abi() == LIVERELAY_ABI && std::strlen(liverelay_version()) > 0);
  REQUIRE(liverelay_connect(socket, LIVERELAY_ABI + 1, kWaitMs, &client) == LIVERELAY_E_VERSION && client == 0);
  REQUIRE(liverelay_connect("/nowhere/at/all", LIVERELAY_ABI, 0, &client) == LIVERELAY_E_CONNECT);
  REQUIRE(liverelay_connect(std::string(200, 'x').c_str(), LIVERELAY_ABI, 0, &client) == LIVERELAY_E_ARGUMENT);
  REQUIRE(liverelay_connect(nullptr, LIVERELAY_ABI, 0, &client) == LIVERELAY_E_ARGUMENT);
  REQUIRE(liverelay_connect(socket, LIVERELAY_ABI, kWaitMs, &client) == LIVERELAY_OK);
  wrong_arguments(client);
  stereo(client);
  life(client, random);
  auto health = sized<liverelay_health>();
  REQUIRE(liverelay_server_health(client, kWaitMs, &health) == LIVERELAY_OK && health.sessions == 0);
  REQUIRE(liverelay_disconnect(client) == LIVERELAY_OK && liverelay_disconnect(client) == LIVERELAY_E_HANDLE);
}

// Codes that any thread may meet when another one closes the session.
bool expected(int code) {
  return code == LIVERELAY_OK || code == LIVERELAY_TIMEOUT || code == LIVERELAY_E_HANDLE;
}

void crowd(liverelay_session session, std::uint64_t seed) {
  std::vector<std::thread> threads;
  for (std::uint64_t number = 0; number < 6; ++number)
    threads.emplace_back([=] {
      Random random(seed + number);
      const std::vector<float> samples = noise(random, 5000);
      auto frame = sized<liverelay_frame>();
      auto health = sized<liverelay_health>();
      char token[LIVERELAY_TOKEN_BYTES];
      int code = LIVERELAY_OK;
      while (code != LIVERELAY_E_HANDLE) {
        const std::uint64_t kind = number < 4 ? number / 2 : random() % 4;
        if (kind == 0) {
          code = liverelay_push(session, samples.data(), random() % 5000, LIVERELAY_F32, 1, kRate, 50, nullptr);
        } else if (kind == 1) {
          code = liverelay_pop(session, 50, &frame);
          if (code == LIVERELAY_OK) {
            look(frame);
            REQUIRE(liverelay_release(session, &frame) == LIVERELAY_OK);
          }
        } else if (kind == 2) {
          code = random() % 4 == 0 ? liverelay_snapshot(session, 5000, token, nullptr)
                                   : liverelay_interrupt(session, 5000, nullptr);
        } else {
          code = liverelay_session_health(session, 5000, &health);
        }
        REQUIRE(expected(code));
      }
    });
  std::this_thread::sleep_for(std::chrono::milliseconds(1500));
  REQUIRE(liverelay_close(session) == LIVERELAY_OK);
  for (std::thread& thread : threads) thread.join();
}

void threads(const char* socket, Random& random) {
  liverelay_client client = 0;
  REQUIRE(liverelay_connect(socket, LIVERELAY_ABI, kWaitMs, &client) == LIVERELAY_OK);
  for (int round = 0; round < 3; ++round) crowd(open_session(client), random());
  REQUIRE(liverelay_disconnect(client) == LIVERELAY_OK);
}

void fuzz(const char* socket, int rounds) {
  constexpr std::int64_t kSoonMs = 100;
  std::map<int, int> codes;
  const float samples[100] = {};
  for (int round = 0; round < rounds; ++round) {
    liverelay_client client = 0;
    liverelay_session session = 0;
    auto health = sized<liverelay_health>();
    auto frame = sized<liverelay_frame>();
    char token[LIVERELAY_TOKEN_BYTES];
    ++codes[liverelay_connect(socket, LIVERELAY_ABI, kSoonMs, &client)];
    if (client == 0) continue;
    ++codes[liverelay_server_health(client, kSoonMs, &health)];
    ++codes[liverelay_open(client, picture.data(), picture.size(), "Hi.", nullptr, kSoonMs, &session)];
    if (session != 0) {
      ++codes[liverelay_push(session, samples, 100, LIVERELAY_F32, 1, kRate, 0, nullptr)];
      for (int i = 0; i < 3; ++i) {
        const int code = liverelay_pop(session, 10, &frame);
        ++codes[code];
        if (code != LIVERELAY_OK) continue;
        look(frame);
        REQUIRE(liverelay_release(session, &frame) == LIVERELAY_OK);
      }
      ++codes[liverelay_snapshot(session, kSoonMs, token, nullptr)];
      ++codes[liverelay_interrupt(session, kSoonMs, nullptr)];
      ++codes[liverelay_session_health(session, kSoonMs, &health)];
      REQUIRE(liverelay_close(session) == LIVERELAY_OK);
    }
    REQUIRE(liverelay_disconnect(client) == LIVERELAY_OK);
  }
  for (const auto& [code, count] : codes) std::printf("%d:%d ", code, count);
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  REQUIRE(argc == 5);
  std::ifstream file(argv[3], std::ios::binary);
  picture.assign(std::istreambuf_iterator<char>(file), {});
  const std::string verb = argv[1];
  Random random(std::strtoull(argv[4], nullptr, 10));
  if (verb == "use") use(argv[2], random);
  if (verb == "threads") threads(argv[2], random);
  if (verb == "fuzz") fuzz(argv[2], std::atoi(argv[4]));
  std::printf("done\n");
  return 0;
}
