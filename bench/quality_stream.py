"""Long streams: a voice without end, whatever answers it with video, and what is noted of that, window by window."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from bench import quality_measures as measures
from bench.quality_measures import Array
from distill.clips import Clip, clip
from distill.measure import identity_features, mouth_opening
from distill.motion import FPS, HOP, RATE, mouth_track, random_motion
from distill.portrait import Identity, render, render_still
from distill.speech import speech
from liverelay.engine import Engine

SIZE = (128, 128)
PIECE_S = 8
BLOCK = 12  # frames; a stream may end with a part of one that nothing is made of
WINDOW = 5 * FPS  # frames
SETTLED_S = 4.0  # before it the sink of the picture is in use: 4 blocks, and the ring that remembers them
MARKS = (10, 100, 1000, 10_000)  # seconds
KEPT = (0, 1, 3, 10, 30, 100, 300, 990, 3000, 9_990)  # seconds of which a frame is kept


class Talker(Protocol):
    """Answers sound with video."""

    def say(self, sound: Array) -> Iterator[Array | int]:
        """Frames uint8 [n, H, W, 3] that can be made by now, or how many were made that nobody will look at."""

    def close(self) -> None: ...


class Live:
    """A live session of the engine."""

    def __init__(self, engine: Engine, of: Clip, seed: int) -> None:
        self._session = engine.open(of.still, of.prompt, size=SIZE, seed=seed)

    def say(self, sound: Array) -> Iterator[Array]:
        self._session.push_audio(sound, RATE)
        for chunk in self._session.frames():
            yield chunk.frames

    def close(self) -> None:
        self._session.close()


class Truth:
    """The renderer's own video of the sound, through `change`: what a perfect model would do."""

    def __init__(self, of: Clip, seed: int, change: Callable[[Array], Array] = lambda frames: frames) -> None:
        self._identity, self._change = of.identity, change
        self._rng = np.random.default_rng(seed)

    def say(self, sound: Array) -> Iterator[Array]:
        count = len(sound) // HOP
        motion = random_motion(self._rng, count).with_mouth(*mouth_track(sound, count))
        yield self._change(render(self._identity, motion, SIZE[0]))

    def close(self) -> None:
        """Nothing is held."""


def voice(seed: int) -> Iterator[tuple[Array, Array]]:
    """Held-out speech without end, at one loudness: pieces of sound [n * 640] and their true openings [n]."""
    number, count = 0, PIECE_S * FPS
    while True:
        sound = speech(np.random.default_rng([2, seed, number]), PIECE_S, held_out=True)
        power = (sound.reshape(count, HOP) ** 2).mean(1)
        loud = power[power >= max(np.percentile(power, 60), 1e-9)].mean() if power.max() > 1e-9 else 1.0
        sound = np.clip(sound * 0.1 / math.sqrt(loud), -1, 1).astype(np.float32)  # -20 dBFS
        yield sound, mouth_track(sound, count)[0]
        number += 1


@dataclass(frozen=True)
class Who:
    """A held-out person to compare with. reference [30]: mean features of the true video; gradient: its sharpness;
    others: how far other people are away."""

    of: Clip
    reference: Array
    gradient: float
    others: float

    @classmethod
    def of_seed(cls, seed: int, frames: int = 200) -> Who:
        made = clip(seed, frames, held_out=True, size=SIZE[0])
        reference = identity_features(made.frames_uint8).mean(0)
        people = [Identity.random(np.random.default_rng([3, seed, i])) for i in range(8)]
        strangers = identity_features(np.stack([render_still(person, SIZE[0]) for person in people]))
        others = float(measures.distance(strangers, reference).mean())
        return cls(made, reference, measures.gradient(made.frames_uint8), others)


@dataclass
class Watch:
    """Turns a stream into a row a window; holds a window's frames and no more."""

    who: Who
    rows: list[dict[str, float]] = field(default_factory=list)
    kept: dict[int, Array] = field(default_factory=dict)  # seconds -> a frame
    frames: int = 0
    _true: Array = field(default_factory=lambda: np.zeros(0, np.float32))
    _seen: list[Array] = field(default_factory=list)

    def hear(self, opening: Array) -> None:
        self._true = np.concatenate([self._true, opening])

    def see(self, frames: Array | int) -> None:
        if isinstance(frames, int):
            begun = sum(len(part) for part in self._seen)
            self._seen, self._true = [], self._true[begun + frames :]
            self.frames += frames
            return
        for mark in KEPT:
            if self.frames <= mark * FPS < self.frames + len(frames):
                self.kept[mark] = frames[mark * FPS - self.frames].copy()
        self.frames += len(frames)
        self._seen.append(frames)
        while sum(len(part) for part in self._seen) >= WINDOW:
            everything = np.concatenate(self._seen)
            self._close(everything[:WINDOW], self.frames - len(everything))
            self._seen = [everything[WINDOW:].copy()]

    def _close(self, frames: Array, first: int) -> None:
        true, self._true = self._true[:WINDOW], self._true[WINDOW:]
        opening = mouth_opening(frames)
        curve = measures.lag_curve(opening, true, measures.spoken(true))
        shut = measures.silent(true)
        self.rows.append({
            "seconds": (first + WINDOW / 2) / FPS,
            "identity": float(measures.distance(identity_features(frames).mean(0), self.who.reference)),
            "sharpness": measures.gradient(frames) / self.who.gradient,
            "silent_opening": float(opening[shut].mean()) if shut.sum() >= 3 else math.nan,
            **{f"sync {measures.LAGS[i]}": float(curve[i]) for i in measures.CLOSE}, "memory_mb": resident_mb(),
        })  # fmt: skip


def looked_at(seconds: float, each: int = 12, all_of: float = 60.0) -> set[int]:
    """Windows of a long stream to look at: all of its first ones, then about `each` in a doubling of the time, and
    those of which a frame is kept."""
    count, first = int(seconds * FPS - BLOCK) // WINDOW, int(all_of * FPS) // WINDOW
    if count <= first:
        return set(range(count))
    steps = max(2, round(each * math.log2(count / first)))
    shown = {window for mark in KEPT if (window := mark * FPS // WINDOW) < count}
    return {*range(first), *np.geomspace(first, count - 1, steps).astype(int).tolist(), *shown}


def pieces(seconds: float) -> int:
    """Of sound in a stream."""
    return math.ceil(seconds / PIECE_S)


def run(
    talkers: Sequence[Talker], watches: Sequence[Watch], seconds: float, *, seed: int,
    tell: Callable[[int], None] = lambda frames: None,
) -> None:
    """Talk to all of them in turns, piece by piece, so that a run that is cut off has as much of each.

    tell(frames): what is done of one stream, after every piece.
    """
    voices = [voice(seed + i) for i in range(len(talkers))]
    for _ in range(pieces(seconds)):
        for talker, watch, heard in zip(talkers, watches, voices, strict=True):
            sound, opening = next(heard)
            watch.hear(opening)
            for frames in talker.say(sound):
                watch.see(frames)
        tell(watches[-1].frames)


def resident_mb() -> float:
    """Memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def table_of(watches: Sequence[Watch]) -> dict[str, Array]:
    """Columns over windows, means over streams, without the stream's first seconds."""
    count = min(len(watch.rows) for watch in watches)
    names = list(watches[0].rows[0]) if count else ["seconds"]
    columns = {}
    for name in names:
        values = np.array([[row[name] for row in watch.rows[:count]] for watch in watches])
        there = ~np.isnan(values)
        sums = np.where(there, values, 0).sum(0)
        columns[name] = np.where(there.any(0), sums / np.maximum(there.sum(0), 1), math.nan)
    settled = columns["seconds"] - WINDOW / 2 / FPS >= SETTLED_S
    return {name: values[settled] for name, values in columns.items()}


def summary(columns: dict[str, Array]) -> dict[str, Any]:
    """Identity at the marks and its slopes; lip sync and sharpness in the first and the last fifth."""
    seconds = columns["seconds"]
    if len(seconds) < 4:
        return {"windows": len(seconds)}
    identity = columns["identity"]
    marks = {str(mark): _around(columns, mark) for mark in MARKS if mark <= seconds[-1] + 2 * WINDOW / FPS}
    fifth = max(2, len(seconds) // 5)
    parts = {"early": slice(0, fifth), "late": slice(-fifth, None)}
    sync = max((f"sync {lag}" for lag in (0, -1, 1)), key=lambda name: np.nan_to_num(columns[name], nan=-1).mean())
    return {
        "windows": len(seconds), "seconds": float(seconds[-1] + WINDOW / 2 / FPS), "marks": marks,
        "slope_per_decade": measures.slope(np.log10(seconds), identity),
        "slope_per_1000_s": measures.slope(seconds / 1000, identity),
        "lag": int(sync.split()[1]),
        **{f"{name}_{when}": measures.interval(columns[column][part], _block(columns[column][part]))
           for name, column in (("sync", sync), ("identity", "identity"), ("sharpness", "sharpness"))
           for when, part in parts.items()},
        "silent_opening": measures.interval(columns["silent_opening"]),
        "memory_mb": [float(columns["memory_mb"][0]), float(columns["memory_mb"][-1])],
    }  # fmt: skip


def _block(values: Array) -> int:
    values = values[~np.isnan(values)]
    return measures.block_length(values) if len(values) > 3 else 1


def _around(columns: dict[str, Array], mark: float) -> dict[str, Any]:
    """Identity from half to twice the mark, and its ratio to that at the first mark."""

    def values(at: float) -> Array:
        seconds = columns["seconds"]
        found = (seconds >= 0.5 * at) & (seconds <= 2 * at)
        return columns["identity"][found] if found.any() else columns["identity"][[np.abs(seconds - at).argmin()]]

    here, first = values(mark), values(MARKS[0])
    found = measures.interval(here, _block(here))
    ratios = [measures.interval(part, _block(part)) for part in (here, first)]
    spread = math.hypot(*((part["high"] - part["low"]) / max(part["value"], 1e-9) for part in ratios)) / 2
    ratio = found["value"] / max(ratios[1]["value"], 1e-9)
    return found | {"ratio": ratio, "ratio_low": ratio * (1 - spread), "ratio_high": ratio * (1 + spread)}
