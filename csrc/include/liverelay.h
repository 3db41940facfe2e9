/* liverelay.h: use a running engine (`liverelay serve`) from any language. docs/embedding.md shows how.
 *
 * Every function returns a liverelay_code, but for the first three; liverelay_last_error says in one line what is wrong.
 * Handles are numbers that are never used again: a closed one is refused, not followed. All functions may be called from
 * any thread at any time, also while another thread closes the handle; those that wait then return. After a fork they
 * are the parent's alone. Timeouts are in milliseconds, a negative one waits for ever. Structures begin with their size,
 * which the caller sets.
 */
#ifndef LIVERELAY_H
#define LIVERELAY_H

#include <stdint.h>

#if defined(__GNUC__)
#define LIVERELAY_API __attribute__((visibility("default")))
#else
#define LIVERELAY_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/** Version of this interface. liverelay_connect refuses a program that was built with another one. */
#define LIVERELAY_ABI 1u

typedef enum liverelay_code {
  LIVERELAY_OK = 0,
  LIVERELAY_TIMEOUT = 1,       /**< nothing came, or there was no room, in time; try again */
  LIVERELAY_END = 2,           /**< the stream has ended and all its frames were given out */
  LIVERELAY_E_ARGUMENT = -1,   /**< a null pointer or a value out of bounds; nothing was done */
  LIVERELAY_E_HANDLE = -2,     /**< no such client or session, or it was closed */
  LIVERELAY_E_VERSION = -3,    /**< another version of this interface, of a structure or of the server's protocol */
  LIVERELAY_E_CONNECT = -4,    /**< nobody listens on that socket, or it is not this user's */
  LIVERELAY_E_LOST = -5,       /**< the server ended or died; the session is gone, frames that were popped are not */
  LIVERELAY_E_INPUT = -6,      /**< picture, prompt, size, sound or token that cannot be used */
  LIVERELAY_E_BUSY = -7,       /**< no place, or no time, for one more session now */
  LIVERELAY_E_STATE = -8,      /**< not possible now: sound after its end, all frames held, ... */
  LIVERELAY_E_ENGINE = -9,     /**< the engine failed at this session; open a new one */
  LIVERELAY_E_PROTOCOL = -10,  /**< the other side does not keep the protocol, or shared memory is damaged */
  LIVERELAY_E_SYSTEM = -11     /**< no memory, no shared memory, no descriptors */
} liverelay_code;

enum { LIVERELAY_RGB24 = 1, LIVERELAY_NV12 = 2 };       /**< NV12: BT.709, limited range, chroma of 2x2 pixels' mean */
enum { LIVERELAY_BLOCK = 0, LIVERELAY_DROP_OLDEST = 1 }; /**< what happens when frames are not popped in time */
enum { LIVERELAY_S16 = 1, LIVERELAY_F32 = 2 };          /**< samples: int16_t, or float in [-1, 1] */
enum { LIVERELAY_RUNS = 1, LIVERELAY_ENDED = 2, LIVERELAY_FAILED = 3 };
enum { LIVERELAY_TOKEN_BYTES = 33 };                    /**< 32 hexadecimal digits and a zero */

typedef uint64_t liverelay_client;  /**< a connection to a server; 0 is none */
typedef uint64_t liverelay_session; /**< one avatar's stream, with a connection of its own; 0 is none */

/** How a session is opened. Zeros are defaults. A resumed session keeps its size and seed. */
typedef struct liverelay_options {
  uint32_t struct_bytes;  /**< sizeof(liverelay_options) */
  uint32_t width, height; /**< of the video, multiples of 64; both 0: from the picture, within max_area */
  uint32_t max_area;      /**< most pixels; 0: what the server allows */
  int64_t seed, stream;   /**< together the key of all randomness */
  uint32_t pixel_format;  /**< LIVERELAY_RGB24 (default) or LIVERELAY_NV12 */
  uint32_t policy;        /**< LIVERELAY_BLOCK: the engine waits; LIVERELAY_DROP_OLDEST: unread frames are given up */
  uint32_t slots;         /**< frames in shared memory, 2 to 256 (0: 8); all but one can be held */
  uint32_t idle;          /**< 1: without sound the stream goes on in silence, at the pace of its video */
} liverelay_options;

/** What a session is. */
typedef struct liverelay_info {
  uint32_t struct_bytes;
  uint32_t width, height, pixel_format;
  uint32_t frames_per_second, sample_rate; /**< of what is popped: 25 and 16000 */
  uint64_t next_frame;                     /**< number of its first frame: 0, or where a resumed session goes on */
} liverelay_info;

/** A frame and its sound, in shared memory, valid until liverelay_release. */
typedef struct liverelay_frame {
  uint32_t struct_bytes;
  uint32_t pixel_format, width, height;
  const uint8_t* pixels;  /**< rows without gaps: RGB, or NV12 (height rows of luma, height / 2 of chroma) */
  uint64_t pixel_bytes;
  const float* audio;     /**< one channel in [-1, 1] */
  uint64_t audio_samples; /**< 640 for 25 frames a second */
  uint64_t sample_rate;
  uint64_t index;    /**< number of the frame in its stream; a gap is what was dropped */
  int64_t pts_ns;    /**< when to show it, from the stream's start: index / 25 s */
  uint64_t made_ns;  /**< CLOCK_MONOTONIC when the engine published it */
  uint64_t position; /**< for liverelay_release */
} liverelay_frame;

typedef struct liverelay_health {
  uint32_t struct_bytes;
  uint32_t state;            /**< of this session: LIVERELAY_RUNS, _ENDED or _FAILED; 0 for a client */
  uint64_t sessions, places; /**< open now in the server, and how many can be */
  uint64_t frames_made, frames_dropped;
  uint64_t samples_heard;    /**< sound that the engine has taken, at 16 kHz */
  uint64_t busy_ms;          /**< for how long the engine has been waited for: large when it hangs */
  uint64_t uptime_ms;        /**< of the server */
} liverelay_health;

LIVERELAY_API uint32_t liverelay_abi(void);        /**< LIVERELAY_ABI of the library */
LIVERELAY_API const char* liverelay_version(void); /**< version of liverelay, as in "0.1.0" */
/** One line about the last call of this thread that failed; valid until its next call. */
LIVERELAY_API const char* liverelay_last_error(void);

/** Connect to the server on a Unix socket. abi: LIVERELAY_ABI. */
LIVERELAY_API int liverelay_connect(const char* socket_path, uint32_t abi, int64_t timeout_ms, liverelay_client* out);
/** End the connection; sessions live on. */
LIVERELAY_API int liverelay_disconnect(liverelay_client client);
/** State of the server. */
LIVERELAY_API int liverelay_server_health(liverelay_client client, int64_t timeout_ms, liverelay_health* out);

/** Open a session. image: a whole PNG, JPEG, WebP or BMP file; prompt: UTF-8; options: may be null. */
LIVERELAY_API int liverelay_open(liverelay_client client, const void* image, uint64_t image_bytes, const char* prompt,
                                 const liverelay_options* options, int64_t timeout_ms, liverelay_session* out);
/** Go on from a snapshot, bit for bit; also after a restart of a server that keeps them in a folder. */
LIVERELAY_API int liverelay_resume(liverelay_client client, const char* token, const liverelay_options* options,
                                   int64_t timeout_ms, liverelay_session* out);
/** Remove a snapshot that is needed no more. */
LIVERELAY_API int liverelay_forget(liverelay_client client, const char* token, int64_t timeout_ms);
LIVERELAY_API int liverelay_session_info(liverelay_session session, liverelay_info* out);

/** Give the session sound: `frames` samples of each of 1 or 2 interleaved channels, any number, at `rate` (1000 to
 * 384000, the same throughout a session). Waits while the engine has enough; `taken` (may be null) tells how many it
 * took, also after LIVERELAY_TIMEOUT. A thread that also pops must not wait here: it gives 0 and pops in between. */
LIVERELAY_API int liverelay_push(liverelay_session session, const void* samples, uint64_t frames, uint32_t format,
                                 uint32_t channels, uint32_t rate, int64_t timeout_ms, uint64_t* taken);
/** No more sound comes: the stream ends with it. */
LIVERELAY_API int liverelay_end_sound(liverelay_session session);
/** The oldest unread frame, without a copy. Each popped frame must be released. */
LIVERELAY_API int liverelay_pop(liverelay_session session, int64_t timeout_ms, liverelay_frame* out);
/** Give a frame's memory back; its pointers are invalid from now on. Also after liverelay_close. */
LIVERELAY_API int liverelay_release(liverelay_session session, const liverelay_frame* frame);

/** Forget the sound that the engine has not begun with, a push that waits included: the avatar falls silent or says
 * what is pushed next, which is heard from frame `next_frame` (may be null). Earlier frames still come. */
LIVERELAY_API int liverelay_interrupt(liverelay_session session, int64_t timeout_ms, uint64_t* next_frame);
/** Keep the session's state in the server. A session that is resumed from `token` begins with frame `next_frame` (may be
 * null); earlier ones come from this session, which goes on. */
LIVERELAY_API int liverelay_snapshot(liverelay_session session, int64_t timeout_ms, char token[LIVERELAY_TOKEN_BYTES],
                                     uint64_t* next_frame);
/** State of the session and of the server. */
LIVERELAY_API int liverelay_session_health(liverelay_session session, int64_t timeout_ms, liverelay_health* out);
/** End the session and give its place back. Frames that were not released stay valid. */
LIVERELAY_API int liverelay_close(liverelay_session session);

#ifdef __cplusplus
}
#endif

#endif /* LIVERELAY_H */
