/* One thread, plain C: a picture and a sound in, raw video and its sound as WAV out.
 *
 *   liverelay serve --checkpoint DIR --socket run/liverelay
 *   talk_c run/liverelay portrait.png speech.wav out.rgb out.wav
 *   ffmpeg -f rawvideo -pix_fmt rgb24 -color_primaries bt709 -color_trc bt709 -s WxH -r 25 -i out.rgb -i out.wav
 *     -vf scale=out_color_matrix=bt709:out_range=tv -pix_fmt yuv420p talk.mp4
 *
 * It prints the ffmpeg command with the video's size. Both WAV files have 16 bits a sample.
 */
#include <inttypes.h>
#include <liverelay.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WAIT_MS 120000

static void check(int code, const char* what) {
  if (code >= 0) return;
  fprintf(stderr, "talk_c: %s: %s (%d)\n", what, liverelay_last_error(), code);
  exit(1);
}

static void fail(const char* what, const char* path) {
  fprintf(stderr, "talk_c: %s %s\n", what, path);
  exit(1);
}

static unsigned char* read_file(const char* path, size_t* size) {
  FILE* file = fopen(path, "rb");
  unsigned char* bytes;
  long length;
  if (file == NULL || fseek(file, 0, SEEK_END) != 0 || (length = ftell(file)) <= 0) fail("cannot read", path);
  rewind(file);
  bytes = malloc((size_t)length);
  if (bytes == NULL || fread(bytes, 1, (size_t)length, file) != (size_t)length) fail("cannot read", path);
  fclose(file);
  *size = (size_t)length;
  return bytes;
}

static uint32_t number(const unsigned char* at, int bytes) {
  uint32_t value = 0;
  while (bytes-- > 0) value = value << 8 | at[bytes];
  return value;
}

typedef struct {
  int16_t* samples;
  uint64_t frames;
  uint32_t channels, rate;
} sound;

/* The chunks "fmt " and "data" of a WAV file of 16-bit PCM. */
static sound read_wav(const char* path) {
  size_t size, at = 12, i;
  unsigned char* file = read_file(path, &size);
  sound found = {NULL, 0, 0, 0};
  while (at + 8 <= size) {
    const uint32_t length = number(file + at + 4, 4);
    if (length > size - at - 8) break;
    if (memcmp(file + at, "fmt ", 4) == 0 && length >= 16 && number(file + at + 22, 2) == 16) {
      found.channels = number(file + at + 10, 2);
      found.rate = number(file + at + 12, 4);
    } else if (memcmp(file + at, "data", 4) == 0 && found.channels != 0) {
      found.frames = length / 2 / found.channels;
      found.samples = malloc(length + 1);
      if (found.samples == NULL) fail("no memory for", path);
      for (i = 0; i < length / 2; i++) found.samples[i] = (int16_t)number(file + at + 8 + 2 * i, 2);
      break;
    }
    at += 8 + length + length % 2;
  }
  free(file);
  if (found.samples == NULL) fail("no 16-bit PCM in", path);
  return found;
}

/* The 44 bytes before `bytes` of 16-bit samples of one channel: the letters RIFF, WAVE, fmt_ and data, and sizes. */
static void write_header(FILE* file, uint32_t rate, uint32_t bytes, const char* path) {
  const uint32_t words[11] = {0x46464952, 36 + bytes, 0x45564157, 0x20746D66, 16, 1 | 1 << 16, rate, 2 * rate,
                              2 | 16 << 16, 0x61746164, bytes};
  if (fseek(file, 0, SEEK_SET) != 0 || fwrite(words, 4, 11, file) != 11) fail("cannot write", path);
}

static void write_sound(FILE* file, const liverelay_frame* frame, const char* path) {
  uint64_t i;
  for (i = 0; i < frame->audio_samples; i++) {
    const float wanted = frame->audio[i] * 32768.0f;
    const int16_t sample = (int16_t)lrintf(wanted > 32767.0f ? 32767.0f : wanted < -32768.0f ? -32768.0f : wanted);
    if (fwrite(&sample, 2, 1, file) != 1) fail("cannot write", path);
  }
}

int main(int argc, char** argv) {
  liverelay_client client;
  liverelay_session session;
  liverelay_options options = {sizeof options, 0, 0, 128 * 128, 0, 0, LIVERELAY_RGB24, LIVERELAY_BLOCK, 0, 0};
  liverelay_info info = {sizeof info, 0, 0, 0, 0, 0, 0};
  liverelay_frame frame;
  unsigned char* picture;
  size_t picture_bytes;
  sound speech;
  uint64_t given = 0, taken, frames = 0, heard = 0;
  int code, ended = 0;
  FILE *video, *audio;

  if (argc != 6) fail("usage: talk_c SOCKET PICTURE WAV OUT.rgb OUT.wav", "");
  picture = read_file(argv[2], &picture_bytes);
  speech = read_wav(argv[3]);
  video = fopen(argv[4], "wb");
  audio = fopen(argv[5], "wb");
  if (video == NULL || audio == NULL) fail("cannot write", argv[4]);

  check(liverelay_connect(argv[1], LIVERELAY_ABI, WAIT_MS, &client), "connect");
  check(liverelay_open(client, picture, picture_bytes, "A friendly person talks.", &options, WAIT_MS, &session), "open");
  check(liverelay_session_info(session, &info), "info");
  write_header(audio, info.sample_rate, 0, argv[5]);
  memset(&frame, 0, sizeof frame);
  frame.struct_bytes = sizeof frame;
  for (;;) {
    if (given < speech.frames) { /* as much as there is room for, without waiting */
      check(liverelay_push(session, speech.samples + given * speech.channels, speech.frames - given, LIVERELAY_S16,
                           speech.channels, speech.rate, 0, &taken),
            "push");
      given += taken;
    } else if (!ended) {
      check(liverelay_end_sound(session), "end of sound");
      ended = 1;
    }
    code = liverelay_pop(session, 100, &frame);
    check(code, "pop");
    if (code == LIVERELAY_END) break;
    if (code == LIVERELAY_TIMEOUT) continue;
    if (fwrite(frame.pixels, 1, (size_t)frame.pixel_bytes, video) != frame.pixel_bytes) fail("cannot write", argv[4]);
    write_sound(audio, &frame, argv[5]);
    frames++;
    heard += frame.audio_samples;
    check(liverelay_release(session, &frame), "release");
  }
  check(liverelay_close(session), "close");
  check(liverelay_disconnect(client), "disconnect");
  write_header(audio, info.sample_rate, (uint32_t)(2 * heard), argv[5]);
  if (fclose(video) != 0 || fclose(audio) != 0) fail("cannot write", argv[4]);
  printf("%" PRIu64 " frames: ffmpeg -f rawvideo -pix_fmt rgb24 -color_primaries bt709 -color_trc bt709 -s %ux%u -r %u "
         "-i %s -i %s -vf scale=out_color_matrix=bt709:out_range=tv -pix_fmt yuv420p talk.mp4\n",
         frames, (unsigned)info.width, (unsigned)info.height, (unsigned)info.frames_per_second, argv[4], argv[5]);
  free(picture);
  free(speech.samples);
  return 0;
}
