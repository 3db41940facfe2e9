// Two threads, C++17: one gives the sound in small pieces, the other takes NV12 frames as an encoder would; a snapshot on
// the way.
//
//   liverelay serve --checkpoint DIR --socket run/liverelay
//   talk_cpp run/liverelay portrait.png speech.wav out.nv12 out.wav
//   ffmpeg -f rawvideo -pix_fmt nv12 -color_primaries bt709 -color_trc bt709 -colorspace bt709 -color_range tv
//     -s WxH -r 25 -i out.nv12 -i out.wav talk.mp4
#include <liverelay.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr std::int64_t kWaitMs = 120000;

int check(int code) {
  if (code < 0) throw std::runtime_error(liverelay_last_error());
  return code;
}

std::vector<char> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

class Client {
 public:
  explicit Client(const char* path) { check(liverelay_connect(path, LIVERELAY_ABI, kWaitMs, &handle_)); }
  ~Client() { liverelay_disconnect(handle_); }
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;
  liverelay_client get() const { return handle_; }

 private:
  liverelay_client handle_ = 0;
};

class Session {
 public:
  Session(const Client& client, const std::vector<char>& picture, const liverelay_options& options) {
    check(liverelay_open(client.get(), picture.data(), picture.size(), "A friendly person talks.", &options, kWaitMs,
                         &handle_));
  }
  ~Session() { liverelay_close(handle_); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  liverelay_session get() const { return handle_; }

 private:
  liverelay_session handle_ = 0;
};

// A file of 16 kHz, one channel, 16 bits, whose samples begin after a header of 44 bytes.
std::vector<char> read_wav(const std::string& path) {
  const std::uint32_t wanted[4] = {1 | 1 << 16, 16000, 32000, 2 | 16 << 16};
  std::vector<char> wav = read_file(path);
  if (wav.size() < 46 || std::memcmp(wav.data() + 20, wanted, 16) != 0 || std::memcmp(wav.data() + 36, "data", 4) != 0)
    throw std::runtime_error("give a plain WAV file of 16 kHz, one channel and 16 bits, not " + path);
  return wav;
}

// 40 ms at a time, as from a microphone.
void speak(liverelay_session session, const std::vector<char>& wav) {
  std::vector<std::int16_t> samples((wav.size() - 44) / 2);
  std::memcpy(samples.data(), wav.data() + 44, samples.size() * 2);
  constexpr std::size_t kPiece = 640;
  for (std::size_t at = 0; at < samples.size(); at += kPiece) {
    const std::size_t count = std::min(kPiece, samples.size() - at);
    if (liverelay_push(session, samples.data() + at, count, LIVERELAY_S16, 1, 16000, kWaitMs, nullptr) != LIVERELAY_OK)
      return;  // the other thread hears why
  }
  liverelay_end_sound(session);
}

// A WAV file of 16-bit samples of one channel: a header of 44 bytes, which is right once `end` has been called.
class WavFile {
 public:
  WavFile(const char* path, std::uint32_t rate) : file_(path, std::ios::binary), rate_(rate) { end(); }
  void add(const float* samples, std::uint64_t count) {
    std::vector<std::int16_t> whole(count);
    std::transform(samples, samples + count, whole.begin(), [](float sample) {
      return static_cast<std::int16_t>(std::lrint(std::clamp(sample * 32768.0F, -32768.0F, 32767.0F)));
    });
    file_.write(reinterpret_cast<const char*>(whole.data()), static_cast<std::streamsize>(count * 2));
    bytes_ += static_cast<std::uint32_t>(count * 2);
  }
  bool end() {
    // The letters RIFF, WAVE, fmt_ and data, and sizes.
    const std::uint32_t words[11] = {0x46464952, 36 + bytes_, 0x45564157, 0x20746D66, 16, 1 | 1 << 16, rate_,
                                     2 * rate_,  2 | 16 << 16, 0x61746164, bytes_};
    file_.seekp(0).write(reinterpret_cast<const char*>(words), sizeof words);
    return static_cast<bool>(file_.flush());
  }

 private:
  std::ofstream file_;
  std::uint32_t rate_, bytes_ = 0;
};

void run(char** argv) {
  const std::vector<char> picture = read_file(argv[2]), wav = read_wav(argv[3]);
  std::ofstream video(argv[4], std::ios::binary);
  liverelay_options options{};
  options.struct_bytes = sizeof options;
  options.max_area = 128 * 128;
  options.pixel_format = LIVERELAY_NV12;

  const Client client(argv[1]);
  const Session session(client, picture, options);
  liverelay_info info{};
  info.struct_bytes = sizeof info;
  check(liverelay_session_info(session.get(), &info));
  WavFile audio(argv[5], info.sample_rate);
  std::thread mouth(speak, session.get(), std::cref(wav));
  std::uint64_t frames = 0;
  try {
    liverelay_frame frame{};
    frame.struct_bytes = sizeof frame;
    while (check(liverelay_pop(session.get(), kWaitMs, &frame)) == LIVERELAY_OK) {
      video.write(reinterpret_cast<const char*>(frame.pixels), static_cast<std::streamsize>(frame.pixel_bytes));
      audio.add(frame.audio, frame.audio_samples);
      check(liverelay_release(session.get(), &frame));
      if (++frames == 25) {
        char token[LIVERELAY_TOKEN_BYTES];
        std::uint64_t next = 0;
        check(liverelay_snapshot(session.get(), kWaitMs, token, &next));
        std::cout << "snapshot " << token << " goes on with frame " << next << "\n";
      }
    }
  } catch (...) {
    liverelay_close(session.get());  // the other thread's push returns
    mouth.join();
    throw;
  }
  mouth.join();
  if (!video.flush() || !audio.end()) throw std::runtime_error("cannot write the video");
  std::cout << frames << " frames: ffmpeg -f rawvideo -pix_fmt nv12 -color_primaries bt709 -color_trc bt709 "
            << "-colorspace bt709 -color_range tv -s " << info.width << "x" << info.height << " -r "
            << info.frames_per_second << " -i " << argv[4] << " -i " << argv[5] << " talk.mp4\n";
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc != 6) throw std::runtime_error("usage: talk_cpp SOCKET PICTURE WAV OUT.nv12 OUT.wav");
    run(argv);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "talk_cpp: " << error.what() << "\n";
    return 1;
  }
}
