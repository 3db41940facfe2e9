"""How a portrait moves, frame by frame at 25 FPS: the head by chance, the mouth by sound."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

FPS, RATE = 25, 16000
HOP, WINDOW = RATE // FPS, 1024  # samples of a frame; of what decides its mouth
Curve = np.ndarray  # float32 [T]


@dataclass(frozen=True)
class Motion:
    """Curves, float32 [T] each."""

    x: Curve  # head, points (1/128 of the picture) to the right
    y: Curve  # and down
    roll: Curve  # radians, clockwise
    yaw: Curve  # -1..1, the features shift to the right against the face's outline
    pitch: Curve  # -1..1, they shift down
    blink: Curve  # 0 open .. 1 shut
    brow: Curve  # -1 low .. 1 raised
    gaze_x: Curve  # -1..1
    gaze_y: Curve
    opening: Curve  # mouth, 0 shut .. 1
    spread: Curve  # -1 round .. 1 wide

    @property
    def frames(self) -> int:
        return len(self.x)

    def __getitem__(self, part: slice) -> Motion:
        """The motion of some of the frames."""
        return Motion(**{field.name: getattr(self, field.name)[part] for field in fields(self)})

    def with_mouth(self, opening: Curve, spread: Curve) -> Motion:
        return replace(self, opening=opening.astype(np.float32), spread=spread.astype(np.float32))


def neutral(frames: int = 1) -> Motion:
    """Straight ahead, eyes open, mouth shut."""
    return Motion(**{field.name: np.zeros(frames, np.float32) for field in fields(Motion)})


def random_motion(rng: np.random.Generator, frames: int) -> Motion:
    """Sway, blinks, glances and brows; the mouth is shut until `with_mouth`."""
    lively = rng.uniform(0.5, 1.3)

    def sway(size: float, fastest: float = 0.55) -> Curve:
        """Slow sines of random frequency and phase with a standard deviation near `size`."""
        rates, phases = rng.uniform(0.08, fastest, 5), rng.uniform(0, 2 * np.pi, 5)
        weights = rng.dirichlet(np.ones(5)) ** 0.5
        time = np.arange(frames)[:, None] / FPS
        return (np.sin(2 * np.pi * rates * time + phases) * weights).sum(1) * size * lively * 2**0.5

    yaw, roll = sway(0.28), sway(0.022)
    curves = {
        "x": sway(1.0) + 2.5 * yaw, "y": sway(0.8), "roll": roll, "yaw": yaw, "pitch": sway(0.22),
        "blink": blinks(rng, frames), "brow": sway(0.3, 0.8), "gaze_x": glances(rng, frames) - 0.4 * yaw,
        "gaze_y": 0.4 * glances(rng, frames), "opening": np.zeros(frames), "spread": np.zeros(frames),
    }
    return Motion(**{name: curve.astype(np.float32) for name, curve in curves.items()})


def blinks(rng: np.random.Generator, frames: int) -> Curve:
    """A blink of 0.2 s every 2 to 5 s."""
    time, curve, at = np.arange(frames) / FPS, np.zeros(frames), rng.uniform(0, 4)
    while at < frames / FPS:
        curve = np.maximum(curve, np.clip(1.5 * (1 - np.abs(time - at - 0.1) / 0.12), 0, 1))
        at += rng.uniform(2, 5)
    return curve


def glances(rng: np.random.Generator, frames: int) -> Curve:
    """The eyes rest, mostly in the middle, and jump within two frames."""
    curve, at = np.zeros(frames), 0
    while at < frames:
        rest = int(rng.integers(15, 70))
        curve[at : at + rest] = 0.0 if rng.random() < 0.6 else rng.uniform(-0.8, 0.8)
        at += rest
    return smoothed(curve, 0.25)


def smoothed(curve: Curve, side: float) -> Curve:
    """Each value with a share `side` of both neighbours; the ends are repeated."""
    padded = np.pad(curve, 1, mode="edge")
    return (1 - 2 * side) * padded[1:-1] + side * (padded[:-2] + padded[2:])


def mouth_track(sound: np.ndarray, frames: int) -> tuple[Curve, Curve]:
    """Opening and spread of the mouth, float32 [frames] each, for sound float32 16 kHz mono.

    A frame is decided by the 64 ms around its middle: how loud it is below 3 kHz, how much of that is in the range of
    a high first formant (open vowels), and the balance of second formants (front vowels wide, back ones round). The
    clip's loudness counts a fifth only, so that a window's own spectrum says nearly all.
    """
    start = HOP // 2 - WINDOW // 2
    needed = (frames - 1) * HOP + WINDOW
    padded = np.zeros(needed, np.float32)
    source = sound[: max(0, needed + start)]
    padded[-start : -start + len(source)] = source
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    hann = np.hanning(WINDOW).astype(np.float32)
    power = np.abs(np.fft.rfft(windows * hann)) ** 2 / (hann**2).sum() / WINDOW * 2
    hertz = np.fft.rfftfreq(WINDOW, 1 / RATE)

    def level(low: float, high: float) -> Curve:
        """dBFS of a band: 0 for a sine of full scale's mean square 1."""
        return 10 * np.log10(power[:, (hertz >= low) & (hertz < high)].sum(1) + 1e-9)

    voice = level(100, 3000)
    active = voice[voice > -45]
    usual = float(np.percentile(active, 70)) if len(active) else -20.0
    loud = voice + 0.2 * (-20.0 - usual)
    loudness = np.clip((loud + 43) / 26, 0, 1.1)
    open_vowel = 1 / (1 + np.exp(-(level(520, 1150) - level(100, 480) + 4) / 4))
    hiss = 1 / (1 + np.exp((level(3000, 8000) - voice - 3) / 2))
    opening = np.clip(loudness * (0.40 + 0.65 * open_vowel) * hiss, 0, 1)
    balance = np.tanh((level(1600, 3400) - level(550, 1300) + 7) / 8)
    spread = balance * (1 - 0.5 * open_vowel) * np.clip(loudness * 3, 0, 1)
    return smoothed(opening, 0.15).astype(np.float32), smoothed(spread, 0.2).astype(np.float32)
