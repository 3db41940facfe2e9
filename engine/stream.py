"""What makes a session a stream, whoever computes its blocks: sound in, what each block is made of, chunks out.

The published stream drops its first 3 frames, so its picture runs 120 ms ahead of the sound. Here the model hears its
first audio frame 3 frames longer instead (pre-roll), so that picture and sound are in step.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from liverelay.engine.errors import InputError
from liverelay.engine.models.audio import SAMPLE_RATE, AudioEncoder, as_samples, load_waveform
from liverelay.engine.models.audio_live import LiveAudio
from liverelay.engine.models.sampler import block_noise, relative_distance
from liverelay.engine.relay.stage import LineSpec

if TYPE_CHECKING:
    from liverelay.engine.engine import Engine

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Chunk:
    """The video of one block and the sound that belongs to it.

    frames: uint8 [n, H, W, 3], n <= 12; audio: float32 [n * 640] mono at 16 kHz, as the model heard it;
    first_frame: number of the first frame in the stream; latency_s: seconds from when the block was asked for.
    """

    block: int
    first_frame: int
    frames: npt.NDArray[np.uint8]
    audio: Samples
    latency_s: float


class AudioTrack(Protocol):
    """Where a session's audio features come from. Frames are counted at the video's rate."""

    def total_frames(self) -> int | None:
        """Video frames that the sound lasts, rounded up; None while it is not known."""

    def ready(self, frame_end: int) -> bool:
        """Whether features of all frames below `frame_end` can be computed now."""

    def features(self, frame_start: int, frame_end: int) -> Tensor:
        """wav2vec2 states [states, width, frames] of frames frame_start..frame_end-1."""

    def samples(self, frame_start: int, frame_end: int) -> Samples:
        """The sound of these frames at 16 kHz, silence where there is none."""

    def state(self) -> tuple[Samples, dict[str, Any]]:
        """The sound that is needed to go on, and the numbers beside it."""


class WholeFile:
    """The published way: the whole sound is encoded before the first block (spec vae_audio_text.md 4.1 to 4.5)."""

    def __init__(self, encoder: AudioEncoder, waveform: Samples, fps: int) -> None:
        self._waveform = waveform
        self._frame_samples = SAMPLE_RATE // fps
        self._features = encoder.encode_file(waveform)

    def total_frames(self) -> int:
        return -(-len(self._waveform) // self._frame_samples)

    def ready(self, frame_end: int) -> bool:
        return True

    def features(self, frame_start: int, frame_end: int) -> Tensor:
        found = self._features[:, :, frame_start:frame_end]
        missing = frame_end - frame_start - found.shape[2]
        return torch.nn.functional.pad(found, (0, missing))  # past the end the published features are zero

    def samples(self, frame_start: int, frame_end: int) -> Samples:
        found = self._waveform[frame_start * self._frame_samples : frame_end * self._frame_samples]
        return np.pad(found, (0, (frame_end - frame_start) * self._frame_samples - len(found)))

    def state(self) -> tuple[Samples, dict[str, Any]]:
        return self._waveform, {}


@dataclass(frozen=True)
class BlockInput:
    """What a block is made of: noise and features of its sound, a distance of the rolling sink for each step.

    first_frame: of the video; sound: what its frames are shown with; asked: when it was asked for.
    """

    block: int
    first_frame: int
    parts: dict[str, Tensor]
    distances: tuple[int, ...]
    sound: Samples
    asked: float


class Stream:
    """Base of the sessions. Those given their whole sound when they were opened need no more; a live one is given it by
    `push_audio`, in pieces of any size, until `end_audio`."""

    def __init__(
        self, engine: Engine, spec: LineSpec, track: AudioTrack, *, seed: int = 0, session_id: int = 0
    ) -> None:
        self.engine, self.spec, self.seed, self.session_id = engine, spec, seed, session_id
        self._track = track
        self._next = 0  # the block that is asked for next
        self._asking = threading.RLock()  # held while it is asked for: an interrupt comes before or after that
        self._live = track if isinstance(track, LiveAudio) else None

    def check_open(self) -> None:
        """LiveRelayError where the session is closed or broken."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the video in pixels."""
        self.check_open()
        return self.spec.geometry.latent_w * 8, self.spec.geometry.latent_h * 8

    @property
    def total_frames(self) -> int | None:
        """Frames of the whole video, as long as its sound; None in a live session that has not ended."""
        self.check_open()
        return self._track.total_frames()

    @property
    def heard_samples(self) -> int:
        """Sound that a live session has been given, and silence in its place, in samples at 16 kHz."""
        self.check_open()
        return self._live.end if self._live else 0

    def push_audio(self, samples: npt.ArrayLike, sample_rate: int) -> None:
        """Give a live session more sound: float samples in [-1, 1] or integers, [n] or [n, channels], any n.

        The sample rate is the same throughout a session. May be called from another thread than the one that takes
        the video.
        """
        self.check_open()
        if self._live is None:
            raise InputError("this session was opened with its whole sound; open one without audio= to push pieces")
        self._live.push(samples, sample_rate)

    def end_audio(self) -> None:
        """Say that no more sound comes: the video ends with it."""
        self.check_open()
        if self._live is not None:
            self._live.finish()

    def interrupt(self) -> None:
        """Drop the sound of a live session that no block was asked for yet: the avatar falls silent, or says what is
        pushed next. Blocks that are under way still come. May be called from another thread, as `push_audio`."""
        self.check_open()
        if self._live is None:
            raise InputError("only a live session can be interrupted; open one without audio=")
        with self._asking:
            self._live.drop_after(self.frames_before(self._next))

    def frames_before(self, block: int) -> int:
        """Number of the video frame that a block begins with."""
        stream = self.engine.stream
        return max(0, block * stream.block_frames - stream.dropped_frames)

    def past_end(self, block: int) -> bool:
        """Whether the block lies behind the end of the sound."""
        total = self._track.total_frames()
        return total is not None and self.frames_before(block) >= total

    def has_sound(self, block: int) -> bool:
        """Whether the block's sound has come."""
        return self._track.ready(self.frames_before(block + 1))

    def fill_silence(self, block: int) -> None:
        """Let a live session hear silence up to the end of the block, where nothing else has come."""
        if self._live is not None:
            self._live.push_silence(self.frames_before(block + 1))

    def block_input(self, block: int) -> BlockInput:
        """What the block is made of; blocks are asked for in order."""
        stream, first, end = self.engine.stream, self.frames_before(block), self.frames_before(block + 1)
        with self.engine.lock:
            features = self._track.features(first, end)
        if block == 0:  # pre-roll: the first frame's features stand for the frames that will be dropped
            features = torch.cat([features[:, :, :1].expand(-1, -1, stream.dropped_frames), features], dim=2)
        noise = block_noise(self.seed, self.session_id, block, self.spec.parcel["latent"])
        parts = {"latent": torch.from_numpy(noise), "audio": features.unsqueeze(0)}
        distances = tuple(self._distance(block, step) for step in range(len(self.spec.schedule.timesteps)))
        return BlockInput(block, first, parts, distances, self._track.samples(first, end), time.perf_counter())

    def _distance(self, block: int, step: int) -> int:
        constant = self.engine.stream.relative_distance
        return relative_distance(self.seed, self.session_id, block, step) if constant is None else constant

    def chunk(self, made: BlockInput, frames: npt.NDArray[np.uint8], *, idle: bool = False) -> Chunk:
        """A block's video with its sound, cut where the sound ends unless the stream idles on."""
        total, count = None if idle else self._track.total_frames(), len(frames)
        if total is not None:
            count = min(count, total - made.first_frame)
        sound = made.sound[: count * SAMPLE_RATE // self.engine.stream.fps]
        return Chunk(made.block, made.first_frame, frames[:count], sound, time.perf_counter() - made.asked)


def as_waveform(audio: Any) -> Samples:
    """A sound file, or samples [n] at 16 kHz, as float32 samples of our own; InputError when they cannot be used."""
    if isinstance(audio, str | Path):
        return load_waveform(audio)
    waveform = as_samples(audio)
    if waveform.ndim != 1 or not len(waveform) or not np.isfinite(waveform).all():
        raise InputError("the sound must be finite float32 samples [n] at 16 kHz, at least one")
    return waveform
