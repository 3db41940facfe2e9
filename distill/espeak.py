"""Speech from libespeak-ng through ctypes, where the optional package `espeakng_loader` brought it along."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np

from distill.motion import RATE

SYNCHRONOUS, DONT_EXIT, UTF8 = 2, 0x8000, 1  # of libespeak-ng's speak_lib.h
SPEED, PITCH, RANGE = 1, 3, 4
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@cache
def files() -> tuple[str, str] | None:
    """The library and the folder of its data; None where the package is not installed."""
    try:
        import espeakng_loader
    except ImportError:
        return None
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


def say(text: str, voice: str, speed: int, pitch: int, liveliness: int) -> np.ndarray:
    """float32 16 kHz; voice such as `de+f2`, speed in words a minute, pitch and liveliness in 0..100.

    The library keeps a state from text to text and draws from the C library's random numbers, so it is loaded anew for
    each (under 1 ms) with the same seed: a text always sounds the same, whatever was spoken before.
    """
    found = files()
    if found is None:
        raise RuntimeError("espeak voices need the package espeakng_loader: pip install espeakng-loader")
    system = ctypes.CDLL(None)
    system.srand(1)
    library = ctypes.CDLL(found[0])
    try:
        sound, rate = _synthesised(library, found[1], text, voice, {SPEED: speed, PITCH: pitch, RANGE: liveliness})
    finally:
        library.espeak_Terminate()
        system.dlclose(ctypes.c_void_p(library._handle))
    return resampled(sound, rate)


def _synthesised(
    library: ctypes.CDLL, data: str, text: str, voice: str, settings: dict[int, int]
) -> tuple[np.ndarray, int]:
    """Samples float32 and their rate."""
    parts = [np.zeros(1, np.int16)]

    def receive(samples: ctypes._Pointer[ctypes.c_short], count: int, _events: int) -> int:
        if samples and count > 0:
            parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    callback, written = CALLBACK(receive), text.encode()
    rate = int(library.espeak_Initialize(SYNCHRONOUS, 0, data.encode(), DONT_EXIT))
    if rate <= 0:
        raise RuntimeError(f"libespeak-ng does not start with its data in {data}")
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(voice.encode()):
        raise RuntimeError(f"libespeak-ng has no voice {voice}")
    for parameter, value in settings.items():
        library.espeak_SetParameter(parameter, value, 0)
    if library.espeak_Synth(written, ctypes.c_size_t(len(written) + 1), 0, 1, 0, UTF8, None, None):
        raise RuntimeError(f"libespeak-ng does not speak {text!r}")
    return np.concatenate(parts).astype(np.float32) / 32768, rate


def resampled(sound: np.ndarray, rate: int) -> np.ndarray:
    """A whole utterance from `rate` to 16 kHz by its spectrum, without what lies above 8 kHz."""
    length = (len(sound) // rate + 1) * rate  # a whole number of seconds, zeros after the end
    spectrum = np.fft.rfft(sound, length)
    samples = length // rate * RATE
    kept = np.zeros(samples // 2 + 1, complex)
    kept[: len(spectrum)] = spectrum[: len(kept)]
    return (np.fft.irfft(kept, samples) * (samples / length))[: len(sound) * RATE // rate].astype(np.float32)
