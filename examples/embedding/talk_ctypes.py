"""Python without torch and without liverelay: only the shared library and ctypes. Raw video and its sound as WAV.

    liverelay serve --checkpoint DIR --socket run/liverelay
    python talk_ctypes.py PREFIX/lib/libliverelay.so run/liverelay portrait.png speech.wav out.rgb out.wav
    ffmpeg -f rawvideo -pix_fmt rgb24 -color_primaries bt709 -color_trc bt709 -s WxH -r 25 -i out.rgb -i out.wav \\
        -vf scale=out_color_matrix=bt709:out_range=tv -pix_fmt yuv420p talk.mp4
"""

from __future__ import annotations

import array
import ctypes
import sys
import wave
from ctypes import POINTER, byref, c_char_p, c_float, c_int64, c_uint8, c_uint32, c_uint64, c_void_p
from pathlib import Path

ABI, S16, END, TIMEOUT, WAIT_MS = 1, 1, 2, 1, 120_000


class Options(ctypes.Structure):
    _fields_ = [
        ("struct_bytes", c_uint32), ("width", c_uint32), ("height", c_uint32), ("max_area", c_uint32),
        ("seed", c_int64), ("stream", c_int64), ("pixel_format", c_uint32), ("policy", c_uint32), ("slots", c_uint32),
        ("idle", c_uint32),
    ]  # fmt: skip


class Frame(ctypes.Structure):
    _fields_ = [
        ("struct_bytes", c_uint32), ("pixel_format", c_uint32), ("width", c_uint32), ("height", c_uint32),
        ("pixels", POINTER(c_uint8)), ("pixel_bytes", c_uint64), ("audio", POINTER(c_float)),
        ("audio_samples", c_uint64), ("sample_rate", c_uint64), ("index", c_uint64), ("pts_ns", c_int64),
        ("made_ns", c_uint64), ("position", c_uint64),
    ]  # fmt: skip


def load(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    library.liverelay_last_error.restype = c_char_p
    library.liverelay_connect.argtypes = [c_char_p, c_uint32, c_int64, POINTER(c_uint64)]
    library.liverelay_open.argtypes = [
        c_uint64, c_char_p, c_uint64, c_char_p, POINTER(Options), c_int64, POINTER(c_uint64),
    ]  # fmt: skip
    library.liverelay_push.argtypes = [
        c_uint64, c_void_p, c_uint64, c_uint32, c_uint32, c_uint32, c_int64, POINTER(c_uint64),
    ]  # fmt: skip
    library.liverelay_pop.argtypes = [c_uint64, c_int64, POINTER(Frame)]
    library.liverelay_release.argtypes = [c_uint64, POINTER(Frame)]
    for name in ("end_sound", "close", "disconnect"):
        getattr(library, f"liverelay_{name}").argtypes = [c_uint64]
    return library


def main() -> None:
    library_path, socket, picture, sound, video_path, wav_path = sys.argv[1:]
    library = load(library_path)

    def check(code: int) -> int:
        if code < 0:
            sys.exit(f"talk_ctypes: {library.liverelay_last_error().decode()} ({code})")
        return code

    with wave.open(sound) as file:
        channels, rate, data = file.getnchannels(), file.getframerate(), file.readframes(file.getnframes())
        if file.getsampwidth() != 2 or not data:
            sys.exit(f"talk_ctypes: no 16-bit PCM in {sound}")
    prompt = b"A friendly person talks."
    samples, image = array.array("h", data), Path(picture).read_bytes()
    client, session, taken, frame = c_uint64(), c_uint64(), c_uint64(), Frame(ctypes.sizeof(Frame))
    options = Options(struct_bytes=ctypes.sizeof(Options), max_area=128 * 128)
    check(library.liverelay_connect(socket.encode(), ABI, WAIT_MS, byref(client)))
    check(library.liverelay_open(client, image, len(image), prompt, options, WAIT_MS, byref(session)))
    given, total, frames, address = 0, len(samples) // channels, 0, samples.buffer_info()[0]
    with open(video_path, "wb") as video, wave.open(wav_path, "wb") as out:
        out.setparams((1, 2, 16000, 0, "NONE", ""))
        while True:
            if given < total:  # as much as there is room for, without waiting
                at = address + given * channels * 2
                check(library.liverelay_push(session, at, total - given, S16, channels, rate, 0, byref(taken)))
                given += taken.value
                if given == total:
                    check(library.liverelay_end_sound(session))
            code = check(library.liverelay_pop(session, 100, byref(frame)))
            if code == END:
                break
            if code == TIMEOUT:
                continue
            video.write(memoryview((c_uint8 * frame.pixel_bytes).from_address(ctypes.addressof(frame.pixels.contents))))
            heard = frame.audio[: frame.audio_samples]
            out.writeframes(array.array("h", [max(-32768, min(32767, round(x * 32768))) for x in heard]).tobytes())
            size, frames = f"{frame.width}x{frame.height}", frames + 1
            check(library.liverelay_release(session, byref(frame)))
    check(library.liverelay_close(session))
    check(library.liverelay_disconnect(client))
    print(
        f"{frames} frames: ffmpeg -f rawvideo -pix_fmt rgb24 -color_primaries bt709 -color_trc bt709 -s {size} -r 25 "
        f"-i {video_path} -i {wav_path} -vf scale=out_color_matrix=bt709:out_range=tv -pix_fmt yuv420p talk.mp4"
    )


if __name__ == "__main__":
    main()
