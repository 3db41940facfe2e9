"""Speech for training and evaluation: several voices, languages and loudnesses, with pauses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from distill import espeak
from distill.formants import Voice, utterance
from distill.motion import RATE
from distill.sentences import GRAMMAR, sentence

# Variants of libespeak-ng's voices. Those of evaluation are never used in training.
# f2, f3, f5 and Alicia are left out: now and then they say the same text with other samples.
TRAINING_VOICES = ("m1", "m2", "m3", "m5", "m7", "f1", "klatt2", "Alex", "Annie", "max", "linda", "ed", "steph",
                   "anika", "aunty", "shelby", "Mike", "adam")
EVALUATION_VOICES = ("m4", "m8", "f4", "Andrea", "belinda", "paul")
OWN_SHARE = 0.2  # of the sound comes from the synthesiser of our own also where espeak is there


def speech(rng: np.random.Generator, seconds: float, held_out: bool = False) -> np.ndarray:
    """One person who speaks with pauses, float32 [seconds * 16000] at 16 kHz, speech at -30..-12 dBFS.

    `held_out`: a voice and sentences of evaluation. Where espeakng_loader isn't installed all is mumbled syllables.
    """
    samples = round(seconds * RATE)
    own = rng.random() < OWN_SHARE or espeak.files() is None
    say = _mumbler(rng, held_out) if own else _reader(rng, held_out)
    parts, length = [np.zeros(int(rng.uniform(0, 0.6) * RATE), np.float32)], 0
    while length < samples:
        spoken = say()
        parts += [_even(spoken), np.zeros(int(rng.uniform(0.2, 1.5) * RATE), np.float32)]
        length = sum(len(part) for part in parts)
    sound = np.concatenate(parts)[:samples] * 10 ** (rng.uniform(-30, -12) / 20)
    sound = 0.97 * np.tanh(sound / 0.97)  # loud peaks are rounded off
    if rng.random() < 0.3:
        sound = sound + noise(rng, samples) * 10 ** (rng.uniform(-75, -55) / 20)
    return sound.astype(np.float32)


def _reader(rng: np.random.Generator, held_out: bool) -> Callable[[], np.ndarray]:
    """Sentences in one of libespeak-ng's voices."""
    language = str(rng.choice(list(GRAMMAR), p=(0.4, 0.2, 0.2, 0.2)))
    variant = rng.choice(EVALUATION_VOICES if held_out else TRAINING_VOICES)
    accent = str(rng.choice(["en-us", "en-gb-x-rp", "en-gb-scotland"])) if language == "en" else language
    speed, pitch, liveliness = (int(rng.integers(*span)) for span in ((120, 210), (25, 75), (30, 90)))
    return lambda: espeak.say(sentence(rng, language, held_out), f"{accent}+{variant}", speed, pitch, liveliness)


def _mumbler(rng: np.random.Generator, held_out: bool) -> Callable[[], np.ndarray]:
    voice = Voice.random(rng, held_out)
    return lambda: utterance(rng, voice, float(rng.uniform(1.0, 3.5)))


def _even(sound: np.ndarray) -> np.ndarray:
    """Speech whose louder half has mean square 1, without the silence at its ends."""
    frames = sound[: len(sound) // 320 * 320].reshape(-1, 320)
    power = (frames**2).mean(1)
    if not len(power) or power.max() < 1e-9:
        return sound
    heard = np.flatnonzero(power > power.max() * 1e-4)
    loud = power[power >= np.median(power[heard])].mean()
    return sound[heard[0] * 320 : (heard[-1] + 1) * 320] / np.sqrt(loud)


def noise(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Background noise with mean square 1 that falls by a random slope."""
    spectrum = np.fft.rfft(rng.normal(size=samples))
    spectrum *= np.maximum(np.arange(len(spectrum)), len(spectrum) / 100) ** -rng.uniform(0, 1)
    sound = np.fft.irfft(spectrum, samples)
    return sound / np.sqrt((sound**2).mean())
