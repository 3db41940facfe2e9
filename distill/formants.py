"""A speech synthesiser of its own, source and filter, that needs no package: syllables by chance, no words.

A glottal sawtooth and noise are filtered frame by frame (5 ms) with the resonances of the vocal tract. It sounds like a
robot that mumbles, but its loudness, formants, stops and hisses move as in speech.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill.motion import RATE

HOP, WINDOW = 80, 320
VOWELS = {  # first three formants of an average tract, Hz
    "a": (760, 1250, 2500), "e": (480, 1900, 2550), "i": (300, 2250, 3000), "o": (460, 850, 2450),
    "u": (320, 780, 2300), "ae": (680, 1700, 2450), "y": (300, 1750, 2200), "uh": (600, 1150, 2450),
    "schwa": (500, 1500, 2500),
}
HISSES = {"s": (5200, 7800), "sh": (2600, 5600), "f": (3800, 7600), "ch": (2000, 4200), "h": (700, 3000)}  # Hz


@dataclass(frozen=True)
class Voice:
    """Who speaks: pitch in Hz, formants' factor (a short tract has high ones), syllables a second, breath 0..1."""

    pitch: float
    tract: float
    pace: float
    breath: float

    @staticmethod
    def random(rng: np.random.Generator, held_out: bool = False) -> Voice:
        """Tracts of evaluation lie in a gap that training leaves."""
        tract = rng.uniform(0.97, 1.03) if held_out else rng.choice([rng.uniform(0.84, 0.96), rng.uniform(1.04, 1.2)])
        pitch = 110 * float(tract) ** 3.2 * rng.uniform(0.85, 1.2)
        return Voice(float(pitch), float(tract), float(rng.uniform(3.2, 5.5)), float(rng.uniform(0.02, 0.15)))


@dataclass
class _Track:
    """Targets of each 5 ms frame: formants [n, 3], loudness of voice and of noise [n], noise band [n, 2]."""

    formants: np.ndarray
    voiced: np.ndarray
    noise: np.ndarray
    band: np.ndarray


def utterance(rng: np.random.Generator, voice: Voice, seconds: float) -> np.ndarray:
    """float32 16 kHz, about as long as asked for."""
    track = _track(rng, voice, max(1, round(seconds * voice.pace)))
    frames = len(track.voiced)
    samples = frames * HOP
    time = np.linspace(0, 1, samples)
    wave = np.sin(2 * np.pi * (time * rng.uniform(0.4, 1.3) * seconds + rng.random()))
    contour = 1.12 - 0.24 * time + 0.10 * wave
    jitter = 1 + 0.01 * np.repeat(rng.normal(size=frames), HOP)
    phase = np.cumsum(voice.pitch * contour * jitter / RATE)
    source = 1 - 2 * np.remainder(phase, 1) + rng.normal(0, voice.breath, samples)
    hiss = rng.normal(0, 1, samples)
    hertz = np.fft.rfftfreq(WINDOW, 1 / RATE)
    tract = _resonance(hertz, track.formants) * track.voiced[:, None]
    low, high = track.band[:, :1], track.band[:, 1:]
    shaper = track.noise[:, None] / (1 + np.exp((low - hertz) / 150)) / (1 + np.exp((hertz - high) / 300))
    window = np.hanning(WINDOW + 1)[:-1]
    sound = np.zeros(samples + WINDOW)
    spectra = [np.fft.rfft(_cut(x, frames) * window) for x in (source, hiss)]
    pieces = np.fft.irfft(spectra[0] * tract + spectra[1] * shaper, WINDOW)
    for part in range(WINDOW // HOP):  # overlap-add, a quarter of each window at a time
        sound[part * HOP : part * HOP + samples] += pieces[:, part * HOP : (part + 1) * HOP].reshape(-1)
    return sound[:samples].astype(np.float32)


def _cut(sound: np.ndarray, frames: int) -> np.ndarray:
    padded = np.concatenate([sound, np.zeros(WINDOW)])
    return np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:frames]


def _resonance(hertz: np.ndarray, formants: np.ndarray) -> np.ndarray:
    """Gain [n, bins] of resonances in a row, about 1 below the first; the sawtooth brings 6 dB an octave."""
    gain = np.ones((len(formants), len(hertz)))
    for index in range(formants.shape[1]):
        centre, width = formants[:, index : index + 1], 60 + 40 * index
        gain *= centre**2 / np.hypot(centre**2 - hertz**2, width * hertz + 1.0)
    return gain


def _track(rng: np.random.Generator, voice: Voice, syllables: int) -> _Track:
    """Consonant and vowel by turns, with smooth ways between their targets."""
    rows: list[tuple[float, ...]] = []

    def add(seconds: float, formants: tuple[float, ...], voiced: float, noise: float, band: tuple[float, ...]) -> None:
        rows.extend([(*formants, voiced, noise, *band)] * max(1, round(seconds * RATE / HOP)))

    quiet = (2000.0, 5000.0)
    for _ in range(syllables):
        length = rng.uniform(0.7, 1.3) / voice.pace
        vowel = VOWELS[str(rng.choice(list(VOWELS)))]
        onset = rng.choice(["stop", "hiss", "nasal", "glide", "none"], p=(0.3, 0.25, 0.2, 0.15, 0.1))
        if onset == "stop":
            add(length * 0.22, vowel, 0.03, 0.0, quiet)
            add(0.012, vowel, 0.0, 0.25, (float(rng.uniform(800, 3500)), 7000.0))
        elif onset == "hiss":
            add(length * 0.35, vowel, 0.0, float(rng.uniform(0.1, 0.3)), HISSES[str(rng.choice(list(HISSES)))])
        elif onset == "nasal":
            add(length * 0.28, (270, 1150, 2300), 0.22, 0.0, quiet)
        elif onset == "glide":
            add(length * 0.22, VOWELS[str(rng.choice(["i", "u"]))], 0.35, 0.0, quiet)
        add(length * 0.65, vowel, float(rng.uniform(0.5, 1.0)), 0.0, quiet)
        if rng.random() < 0.08:
            add(float(rng.uniform(0.05, 0.15)), vowel, 0.0, 0.0, quiet)
    add(0.08, VOWELS["schwa"], 0.0, 0.0, quiet)
    table = np.array(rows)
    padded = np.pad(table, ((4, 4), (0, 0)), mode="edge")
    smooth = np.stack([padded[i : i + len(table)] for i in range(9)]).mean(0)
    return _Track(smooth[:, :3] * voice.tract, smooth[:, 3], table[:, 4], table[:, 5:])
