"""A session: one live avatar. Sound goes in, video frames with the sound they belong to come out, block by block."""

from __future__ import annotations

import math
import time
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from liverelay.engine.errors import InputError, LiveRelayError
from liverelay.engine.models.audio import SAMPLE_RATE, AudioEncoder, as_samples, load_waveform
from liverelay.engine.models.audio_live import LiveAudio
from liverelay.engine.models.sampler import block_noise, relative_distance
from liverelay.engine.relay.messages import Tensors
from liverelay.engine.relay.pipeline import Pipeline
from liverelay.engine.snapshot import Snapshot

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
class _Wanted:
    """A block that was asked for: its number, when, its sound, its frames to come."""

    block: int
    asked: float
    sound: Samples
    future: Future[Any]


class Session:
    """One avatar's stream; opened by `Engine.open`.

    A whole-file session was given its sound when it was opened; a live one is given it by `push_audio`, in pieces of
    any size, until `end_audio`. `frames` yields what can be made of it. Blocks whose sound is there are asked of the
    line of stages before they are wanted, as many as keep all its stages busy.

    The published stream drops its first 3 frames, so its picture runs 120 ms ahead of the sound. Here the model hears
    its first audio frame 3 frames longer instead (pre-roll), so that picture and sound are in step.
    """

    def __init__(
        self, engine: Engine, line: Pipeline, serial: int, track: AudioTrack, given: Tensors, *, seed: int = 0,
        session_id: int = 0,
    ) -> None:
        self.engine, self.line, self.seed, self.session_id = engine, line, seed, session_id
        self._serial: int | None = serial
        self._release = weakref.finalize(self, line.abandon, serial)
        self._broken = False
        self._track, self._given = track, given  # given: what the line was opened with
        self._live = track if isinstance(track, LiveAudio) else None
        self._wanted: deque[_Wanted] = deque()  # blocks asked for, in order
        self._next = 0  # the block that is asked for next
        self._epoch: float | None = None  # when a live session's first frame was due

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the video in pixels."""
        self._check_open()
        geometry = self.line.spec.geometry
        return geometry.latent_w * 8, geometry.latent_h * 8

    @property
    def next_block(self) -> int:
        """Number of the block that `frames` yields next."""
        self._check_open()
        return self._wanted[0].block if self._wanted else self._next

    @property
    def next_frame(self) -> int:
        """Number of the video frame that the next block begins with; frames before it have been yielded."""
        return self._frames_before(self.next_block)

    @property
    def total_frames(self) -> int | None:
        """Frames of the whole video, as long as its sound; None in a live session that has not ended."""
        self._check_open()
        return self._track.total_frames()

    @property
    def heard_samples(self) -> int:
        """Sound that a live session has been given, and silence in its place, in samples at 16 kHz."""
        self._check_open()
        return self._live.end if self._live else 0

    def push_audio(self, samples: npt.ArrayLike, sample_rate: int) -> None:
        """Give a live session more sound: float samples in [-1, 1] or integers, [n] or [n, channels], any n.

        The sample rate is the same throughout a session. May be called from another thread than `frames`.
        """
        self._check_open()
        if self._live is None:
            raise InputError("this session was opened with its whole sound; open one without audio= to push pieces")
        self._live.push(samples, sample_rate)

    def end_audio(self) -> None:
        """Say that no more sound comes: `frames` then makes the rest and ends."""
        self._check_open()
        if self._live is not None:
            self._live.finish()

    def frames(self, *, idle: bool = False) -> Iterator[Chunk]:
        """Yield blocks as long as there is sound for them.

        In a live session the iterator ends when the sound that has come is used up (call it again after the next
        push), and for good after `end_audio`. With `idle` it goes on with silence instead and never ends.
        """
        while True:
            self._check_open()
            while len(self._wanted) < self.line.depth and self._has_sound(idle):
                self._want_block()
            if not self._wanted:
                if not idle:
                    return
                if self._live is not None:
                    self._live.push_silence(self._frames_before(self._next + 1))
                self._want_block()
            yield self._take_block(idle)

    def _frames_before(self, block: int) -> int:
        stream = self.engine.stream
        return max(0, block * stream.block_frames - stream.dropped_frames)

    def _has_sound(self, idle: bool) -> bool:
        """Whether the block that is asked for next can be made now and is part of the video."""
        total = self._track.total_frames()
        if total is not None and self._frames_before(self._next) >= total:
            return idle and not self._wanted  # what follows the sound is made when it is wanted
        return self._track.ready(self._frames_before(self._next + 1))

    def _want_block(self) -> None:
        """Ask for the next block: noise, features of its sound, the sink's distances, when it is due."""
        stream, spec, block = self.engine.stream, self.line.spec, self._next
        first, end = self._frames_before(block), self._frames_before(block + 1)
        with self.engine.lock:
            features = self._track.features(first, end)
        if block == 0:  # pre-roll: the first frame's features stand for the frames that will be dropped
            features = torch.cat([features[:, :, :1].expand(-1, -1, stream.dropped_frames), features], dim=2)
        noise = block_noise(self.seed, self.session_id, block, spec.parcel["latent"])
        parts = {"latent": torch.from_numpy(noise), "audio": features.unsqueeze(0)}
        distances = [self._distance(block, step) for step in range(len(spec.schedule.timesteps))]
        future = self.line.request(self._open_serial(), block, parts, distances, deadline=self._deadline(first))
        self._wanted.append(_Wanted(block, time.perf_counter(), self._track.samples(first, end), future))
        self._next += 1

    def _deadline(self, frame: int) -> float:
        """When a live session's frame is due, by the pace of its video; a session that stood still is not late."""
        if self._live is None:
            return math.inf
        now, offset = time.monotonic(), frame / self.engine.stream.fps
        if self._epoch is None or self._epoch + offset < now:
            self._epoch = now - offset
        return self._epoch + offset

    def _take_block(self, idle: bool) -> Chunk:
        """Wait for the first of the blocks that were asked for. An interrupt leaves it there."""
        wanted = self._wanted[0]
        frames = self._frames_of(wanted)
        self._wanted.popleft()
        first, count = self._frames_before(wanted.block), len(frames)
        total = None if idle else self._track.total_frames()
        if total is not None:
            count = min(count, total - first)
        sound = wanted.sound[: count * SAMPLE_RATE // self.engine.stream.fps]
        return Chunk(wanted.block, first, frames[:count], sound, time.perf_counter() - wanted.asked)

    def _frames_of(self, wanted: _Wanted) -> Any:
        try:
            return wanted.future.result()
        except (Exception, CancelledError):
            self._broken = True  # its caches stopped half-way
            raise

    def snapshot(self) -> Snapshot:
        """The session as it is after the last chunk that `frames` gave; `Engine.resume` goes on from there.

        Waits for the blocks that are under way; they are in it. The session itself goes on as if nothing had been.
        """
        self._check_open()
        frames = {wanted.block: self._frames_of(wanted) for wanted in self._wanted}
        saved = self.line.save(self._open_serial()).result()
        kind, (sound, numbers) = "live" if self._live else "file", self._track.state()
        tensors = {f"given.{name}": tensor for name, tensor in self._given.items()} | {"track.sound": _tensor(sound)}
        for part in saved.values():
            tensors |= {f"stage.{name}": tensor for name, tensor in part.tensors.items()}
        reference = self.line.reference(self._open_serial())
        if reference is not None:
            tensors["stage.new_reference"] = reference
        for wanted in self._wanted:
            tensors[f"frames.{wanted.block}"] = _tensor(frames[wanted.block])
            tensors[f"sound.{wanted.block}"] = _tensor(wanted.sound)
        geometry = self.line.spec.geometry
        facts = {
            "model": self.engine.model_id, "stream": asdict(self.engine.stream), "seed": self.seed,
            "session_id": self.session_id, "next": self._next, "latent": [geometry.latent_h, geometry.latent_w],
            "numbers": {name: number for part in saved.values() for name, number in part.numbers.items()},
            "track": {"kind": kind, **numbers},
        }  # fmt: skip
        return Snapshot({name: tensor.detach().cpu() for name, tensor in tensors.items()}, facts)

    def _restore(self, snapshot: Snapshot) -> Session:
        """Take the place in the stream, and the blocks that were done but not given out yet."""
        self._next, sound = snapshot.facts["next"], snapshot.part("sound")
        for block, frames in sorted((int(name), tensor) for name, tensor in snapshot.part("frames").items()):
            future: Future[Any] = Future()
            future.set_result(frames.numpy())
            self._wanted.append(_Wanted(block, time.perf_counter(), sound[str(block)].numpy(), future))
        return self

    def _distance(self, block: int, step: int) -> int:
        constant = self.engine.stream.relative_distance
        return relative_distance(self.seed, self.session_id, block, step) if constant is None else constant

    def _open_serial(self) -> int:
        if self._serial is None:
            raise LiveRelayError("the session is closed")
        return self._serial

    def _check_open(self) -> None:
        self._open_serial()
        if self._broken:
            raise LiveRelayError("a block of this session failed; open a new session")

    def close(self) -> None:
        """Give the session's place back; it cannot be used afterwards."""
        if self._serial is None:
            return
        serial, self._serial, self._live = self._serial, None, None
        self._wanted.clear()
        if self._release.detach():
            self.line.close_session(serial)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def resume(engine: Engine, snapshot: Snapshot) -> Session:
    """Go on with a session on a line of its size; see `Engine.resume`."""
    numbers, track = snapshot.facts["numbers"], dict(snapshot.facts["track"])
    live, sound = track.pop("kind") == "live", snapshot.tensors["track.sound"].numpy()
    heard = LiveAudio.restore(engine.audio, sound, track) if live else WholeFile(engine.audio, sound, engine.stream.fps)
    given, line = snapshot.part("given"), engine.line(*snapshot.facts["latent"])
    serial = line.open(given, rate=engine.rate(live=live), state=(snapshot.part("stage"), numbers))
    keys = {name: snapshot.facts[name] for name in ("seed", "session_id")}
    return Session(engine, line, serial, heard, given, **keys)._restore(snapshot)


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def as_waveform(audio: Any) -> Samples:
    """A sound file, or samples [n] at 16 kHz, as float32 samples of our own; InputError when they cannot be used."""
    if isinstance(audio, str | Path):
        return load_waveform(audio)
    waveform = as_samples(audio)
    if waveform.ndim != 1 or not len(waveform) or not np.isfinite(waveform).all():
        raise InputError("the sound must be finite float32 samples [n] at 16 kHz, at least one")
    return waveform
