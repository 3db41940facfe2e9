"""Sound that arrives in pieces: features for each block from a sliding window, without knowing the future.

What differs from the whole-file way (spec vae_audio_text.md 4.6), by design:
- wav2vec2 attends to a window (left context, the block, a short look-ahead), not to the whole file;
- mean and variance are those of the stream so far (up to the window's end), not of the file;
- the 50 -> 30 Hz interpolation runs on the absolute grid i * 5/3, not between the file's pinned ends.
A block's features depend only on the sound up to its window's end, so they are the same however the sound was cut.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from liverelay.engine.errors import InputError, MissingExtraError
from liverelay.engine.models.audio import (
    HIGHEST_RATE,
    LOWEST_RATE,
    SAMPLE_RATE,
    AudioEncoder,
    Samples,
    as_samples,
    feature_index,
    normalise,
)

SILENCE = 1e-3  # root mean square of full scale below which a block is silent: -60 dB
MAX_CHANNELS = 32
REMEMBERED = 16  # blocks that can be asked for again
HOP = 320  # samples between two wav2vec2 features
FRAME_SAMPLES = SAMPLE_RATE // 25  # samples of a video frame


@dataclass(frozen=True)
class LiveAudioConfig:
    """Window around a block, in seconds: sound before it, and sound after it that is waited for (adds latency)."""

    left_context_s: float = 4.0
    look_ahead_s: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.left_context_s <= 60 or not 0 <= self.look_ahead_s <= 5:
            raise InputError("live audio: left context must be within 0..60 s and look-ahead within 0..5 s")


@dataclass
class _Statistics:
    """Running count, sum and sum of squares in float64, up to a sample of the stream."""

    heard: int = 0  # the stream was looked at up to this sample
    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, samples: Samples) -> None:
        """Count a block's new sound; silence between speech tells nothing of its loudness and is left out."""
        wide = samples.astype(np.float64)
        self.heard += len(wide)
        if self.count and float(np.square(wide).sum()) <= SILENCE**2 * len(wide):
            return
        self.count += len(wide)
        self.total += float(wide.sum())
        self.squares += float(np.square(wide).sum())

    def normalise(self, samples: Samples) -> Samples:
        mean = self.total / max(1, self.count)
        variance = max(0.0, self.squares / max(1, self.count) - mean * mean)
        return ((samples - mean) / np.sqrt(variance + 1e-7)).astype(np.float32)


class LiveAudio:
    """The sound of one live session at 16 kHz, and features of its video frames at 25 FPS.

    Only the window and the look-ahead are kept; older samples are dropped, so memory does not grow.
    """

    def __init__(self, encoder: AudioEncoder, config: LiveAudioConfig | None = None) -> None:
        self._encoder, self._config = encoder, config or LiveAudioConfig()
        if not isinstance(self._config, LiveAudioConfig):
            raise InputError(f"live audio is set by a LiveAudioConfig, not a {type(config).__name__}")
        self._resampler: Any = None
        self._rate: int | None = None
        self._run_start = 0  # 16 kHz sample at which the present run of sound began; silence ends a run
        self._run_pushed = 0  # samples of this run, at the sound's own rate
        self._buffer: Samples = np.zeros(0, dtype=np.float32)
        self._buffer_start = 0  # absolute number of the buffer's first sample
        self._statistics = _Statistics()
        self._before: deque[tuple[int, _Statistics]] = deque(maxlen=REMEMBERED)  # by a block's first frame
        self._finished = False
        self._lock = threading.RLock()  # sound may come from another thread than the one that asks for features

    # -- sound in --------------------------------------------------------------------------------------------------

    def push(self, samples: npt.ArrayLike, sample_rate: int) -> None:
        """Take more sound: floats in [-1, 1] or integers, [n] or [n, channels], any n, one rate until `finish`."""
        piece = as_samples(samples)
        if piece.ndim not in (1, 2) or 0 in piece.shape[1:] or not np.isfinite(piece).all():
            raise InputError("pushed sound must be finite samples [n] or [n, channels]")
        if piece.ndim == 2 and piece.shape[1] > MAX_CHANNELS:
            raise InputError(f"{piece.shape[1]} channels were pushed; give samples as [n, channels]")
        mono = piece.mean(axis=1, dtype=np.float32) if piece.ndim == 2 else piece
        with self._lock:
            self._check_rate(sample_rate)
            if self._finished:
                raise InputError("the sound of this session was ended; open a new session")
            self._run_pushed += len(mono)
            if self._rate != SAMPLE_RATE:
                self._resampler = self._resampler or _make_resampler(sample_rate)
                mono = self._resampler.resample_chunk(mono)
            self._append(mono)

    def _check_rate(self, sample_rate: int) -> None:
        if not isinstance(sample_rate, int | np.integer) or not LOWEST_RATE <= sample_rate <= HIGHEST_RATE:
            raise InputError(f"a sample rate of {sample_rate!r} is not supported; give {LOWEST_RATE} to {HIGHEST_RATE}")
        if self._rate is not None and sample_rate != self._rate:
            raise InputError(f"the sample rate changed from {self._rate} to {sample_rate} Hz within one session")
        self._rate = int(sample_rate)

    def push_silence(self, frame_end: int) -> None:
        """Fill up with silence to frame `frame_end`: the avatar idles when the sound runs dry."""
        with self._lock:
            self._end_run()
            missing = frame_end * FRAME_SAMPLES - self.end
            if missing > 0:
                self._append(np.zeros(missing, dtype=np.float32))
            self._run_start = self.end

    def drop_after(self, frame: int) -> None:
        """Forget the sound from a frame on, as if it had not come."""
        with self._lock:
            self._buffer = self._cut(self._buffer_start, min(self.end, frame * FRAME_SAMPLES))
            for statistics in (self._statistics, *(before for _, before in self._before)):
                statistics.heard = min(statistics.heard, self.end)
            self._resampler, self._run_start, self._run_pushed = None, self.end, 0

    def finish(self) -> None:
        """No more sound comes; after its end there is silence."""
        with self._lock:
            if not self._finished:
                self._end_run()
            self._finished = True

    def _end_run(self) -> None:
        """Take what the resampler still holds, so that what follows comes after it."""
        if self._resampler is not None and self._rate is not None:
            self._append(self._resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
            due = self._run_start + -(-self._run_pushed * SAMPLE_RATE // self._rate)
            self._append(np.zeros(max(0, due - self.end), dtype=np.float32))  # it may end one sample early
        self._resampler, self._run_start, self._run_pushed = None, self.end, 0

    # -- snapshots -------------------------------------------------------------------------------------------------

    def state(self) -> tuple[Samples, dict[str, Any]]:
        """The sound that is kept, and the numbers beside it.

        A resampler cannot be saved: here, too, it is ended and a new one goes on in time, so that this session and one
        that is restored hear the same. At 16 kHz there is none.
        """
        with self._lock:
            if self._resampler is not None and self._rate is not None:
                self._append(self._resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
                due = max(self._statistics.heard, self._run_start + self._run_pushed * SAMPLE_RATE // self._rate)
                self._buffer = self._cut(self._buffer_start, due)
                self._resampler = None
            names = ("_rate", "_run_start", "_run_pushed", "_buffer_start", "_finished")
            numbers = {name.strip("_"): getattr(self, name) for name in names}
            return self._buffer.copy(), {**numbers, "heard": asdict(self._statistics), "window": asdict(self._config)}

    @classmethod
    def restore(cls, encoder: AudioEncoder, sound: Samples, numbers: Mapping[str, Any]) -> LiveAudio:
        """From a `state`. InputError where it is none."""
        try:
            live = cls(encoder, LiveAudioConfig(**numbers["window"]))
            live._buffer, live._statistics = sound.copy(), _Statistics(**numbers["heard"])
            for name in ("rate", "run_start", "run_pushed", "buffer_start", "finished"):
                setattr(live, f"_{name}", numbers[name])
            figures = (*asdict(live._statistics).values(), live._run_start, live._run_pushed, live._buffer_start)
            if not all(isinstance(figure, int | float) for figure in (*figures, live._rate or 0)):
                raise TypeError("a number is none")
        except (KeyError, TypeError) as error:
            raise InputError(f"the snapshot's sound cannot be read: {error}") from None
        return live

    # -- features out ----------------------------------------------------------------------------------------------

    def total_frames(self) -> int | None:
        """Video frames that the sound lasts, rounded up; None before `finish`."""
        return -(-self.end // FRAME_SAMPLES) if self._finished else None

    def ready(self, frame_end: int) -> bool:
        """Whether the sound up to frame `frame_end` and the look-ahead have come, or no more will come."""
        with self._lock:
            return self._finished or self.end >= self._needed(frame_end)

    def samples(self, frame_start: int, frame_end: int) -> Samples:
        """The 16 kHz sound of the frames last asked for by `features`, silence where there is none."""
        with self._lock:
            return self._cut(frame_start * FRAME_SAMPLES, frame_end * FRAME_SAMPLES)

    def features(self, frame_start: int, frame_end: int) -> Tensor:
        """States [states, width, frames] of frames frame_start..frame_end-1; blocks must be asked for in order, but for
        the latest ones, which may be asked for again: as if they had not been.

        Where the sound has ended (or has not come, when the caller does not wait for `ready`) silence is heard.
        """
        with self._lock:
            window, start = self._window(frame_start, frame_end)
        mixed = on_absolute_grid(self._encoder.hidden_states(window), start // HOP, frame_start, frame_end)
        with self._lock:
            self._drop_before(start)
        return mixed

    def _window(self, frame_start: int, frame_end: int) -> tuple[Samples, int]:
        """The normalised sound that a block's features are computed from, and its first sample's number."""
        left = round(self._config.left_context_s * SAMPLE_RATE)
        start = max(0, (frame_start * FRAME_SAMPLES - left) // HOP * HOP)
        end = self._needed(frame_end)
        if self._finished:  # nothing is heard after the sound, beyond what the block itself needs
            end = min(end, max(self.end, frame_end * FRAME_SAMPLES))
        if start < self._buffer_start:
            raise InputError(f"the sound before frame {frame_start} is gone; ask for blocks in order")
        while self._before and self._before[-1][0] >= frame_start:
            self._statistics = self._before.pop()[1]
        self._before.append((frame_start, replace(self._statistics)))
        self._statistics.add(self._cut(self._statistics.heard, min(end, self.end)))
        return self._statistics.normalise(self._cut(start, end)), start

    # -- the buffer ------------------------------------------------------------------------------------------------

    @property
    def end(self) -> int:
        """Samples that have come since the stream began."""
        return self._buffer_start + len(self._buffer)

    @property
    def buffered_samples(self) -> int:
        return len(self._buffer)

    def _needed(self, frame_end: int) -> int:
        return frame_end * FRAME_SAMPLES + round(self._config.look_ahead_s * SAMPLE_RATE)

    def _append(self, samples: Samples) -> None:
        self._buffer = np.concatenate([self._buffer, samples.astype(np.float32)])

    def _cut(self, start: int, end: int) -> Samples:
        """Samples start..end-1 of the stream, zeros where there are none yet."""
        found = self._buffer[max(0, start - self._buffer_start) : max(0, end - self._buffer_start)]
        return np.pad(found, (0, max(0, end - start) - len(found)))

    def _drop_before(self, start: int) -> None:
        drop = min(start - self._buffer_start, len(self._buffer))
        if drop > 0:
            self._buffer = self._buffer[drop:].copy()
            self._buffer_start += drop


def _make_resampler(sample_rate: int) -> Any:
    try:
        import soxr
    except ImportError:
        raise MissingExtraError("soxr", f"to resample sound from {sample_rate} Hz to 16 kHz", "audio") from None
    return soxr.ResampleStream(sample_rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")


def on_absolute_grid(hidden: Tensor, first: int, frame_start: int, frame_end: int) -> Tensor:
    """Video frames' features from 50 Hz features `first`, ...: [states, T, width] -> [states, width, frames].

    30 Hz sample i lies at the 50 Hz position i * 5/3; between two features the mix is linear, past the last it stays.
    """
    position = torch.from_numpy(feature_index(np.arange(frame_start, frame_end)) * 5 / 3 - first)
    position = position.clamp(max=hidden.shape[1] - 1).to(hidden.device)
    low = position.floor().long()
    high = (low + 1).clamp(max=hidden.shape[1] - 1)
    mixed = torch.lerp(hidden[:, low].float(), hidden[:, high].float(), (position - low).float()[:, None])
    return mixed.to(hidden.dtype).transpose(1, 2)


@dataclass(frozen=True)
class LiveDistance:
    """Relative L2 distance of live features, per wav2vec2 state.

    published: from the whole-file features; window: from whole-file features on live's own time grid, which leaves
    what the window and the running statistics cost.
    """

    published: npt.NDArray[np.float64]
    window: npt.NDArray[np.float64]


def live_distance(encoder: AudioEncoder, waveform: Samples, config: LiveAudioConfig | None = None) -> LiveDistance:
    """Measure what hearing a 16 kHz waveform live changes, over its whole blocks of 12 frames."""
    frames = len(waveform) // (SAMPLE_RATE // 25) // 12 * 12
    if frames == 0:
        raise InputError("the sound is shorter than one block")
    live = LiveAudio(encoder, config)
    live.push(waveform, SAMPLE_RATE)
    live.finish()
    heard = torch.cat([live.features(start, start + 12) for start in range(0, frames, 12)], dim=2)
    whole = encoder.hidden_states(normalise(waveform))

    def distance(reference: Tensor) -> npt.NDArray[np.float64]:
        error = (heard.double() - reference.double()).flatten(1).norm(dim=1) / reference.double().flatten(1).norm(dim=1)
        return np.asarray(error.cpu())

    return LiveDistance(
        distance(encoder.encode_file(waveform)[:, :, :frames]), distance(on_absolute_grid(whole, 0, 0, frames))
    )
