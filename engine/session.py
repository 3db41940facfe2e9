"""A session: one live avatar. Sound goes in, video frames with the sound they belong to come out, block by block."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from liverelay.engine.errors import InputError, LiveRelayError
from liverelay.engine.models.audio import SAMPLE_RATE, AudioEncoder, as_samples, load_waveform
from liverelay.engine.models.audio_live import LiveAudio, LiveAudioConfig
from liverelay.engine.models.sampler import block_noise, relative_distance
from liverelay.engine.relay.rollout import Rollout

if TYPE_CHECKING:
    from liverelay.engine.engine import Engine

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Chunk:
    """The video of one block and the sound that belongs to it.

    frames: uint8 [n, H, W, 3], n <= 12; audio: float32 [n * 640] mono at 16 kHz, as the model heard it;
    first_frame: number of the first frame in the stream; seconds spent on denoising and on decoding.
    """

    block: int
    first_frame: int
    frames: npt.NDArray[np.uint8]
    audio: Samples
    denoise_s: float
    decode_s: float


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


class Session:
    """One avatar's stream; opened by `Engine.open`.

    A whole-file session was given its sound when it was opened; a live one is given it by `push_audio`, in pieces of
    any size, until `end_audio`. `frames` yields what can be made of it.

    The published stream drops its first 3 frames, so its picture runs 120 ms ahead of the sound. Here the model hears
    its first audio frame 3 frames longer instead (pre-roll), so that picture and sound are in step.
    """

    def __init__(
        self, engine: Engine, rollout: Rollout, motion: Tensor, *, waveform: Samples | None, seed: int = 0,
        session_id: int = 0, live: LiveAudioConfig | None = None,
    ) -> None:
        self.engine, self.seed, self.session_id = engine, seed, session_id
        self._rollout: Rollout | None = rollout
        self._broken = False
        fps = engine.stream.fps
        self._track: AudioTrack
        self._live: LiveAudio | None = None
        if waveform is None:
            self._live = LiveAudio(engine.audio, live or LiveAudioConfig())
            self._track = self._live
        else:
            self._track = WholeFile(engine.audio, waveform, fps)
        geometry = rollout.line.geometry
        self._decoder = engine.vae.new_decoder(geometry.latent_h, geometry.latent_w)
        engine.vae.prime(self._decoder, motion[:, : engine.stream.prime_latents])
        shape = (engine.dit.config.in_channels, geometry.frames_per_block, geometry.latent_h, geometry.latent_w)
        self._latent = torch.empty(shape, device=engine.dit.device, dtype=engine.dit.dtype)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the video in pixels."""
        geometry = self._open_rollout().line.geometry
        return geometry.latent_w * 8, geometry.latent_h * 8

    @property
    def next_frame(self) -> int:
        """Number of the video frame that the next block begins with; frames before it have been yielded."""
        stream = self.engine.stream
        block = self._open_rollout().next_block
        return max(0, block * stream.block_frames - stream.dropped_frames)

    @property
    def total_frames(self) -> int | None:
        """Frames of the whole video, as long as its sound; None in a live session that has not ended."""
        self._open_rollout()
        return self._track.total_frames()

    def push_audio(self, samples: npt.ArrayLike, sample_rate: int) -> None:
        """Give a live session more sound: float samples in [-1, 1] or integers, [n] or [n, channels], any n.

        The sample rate is the same throughout a session. May be called from another thread than `frames`.
        """
        self._open_rollout()
        if self._live is None:
            raise InputError("this session was opened with its whole sound; open one without audio= to push pieces")
        self._live.push(samples, sample_rate)

    def end_audio(self) -> None:
        """Say that no more sound comes: `frames` then makes the rest and ends."""
        self._open_rollout()
        if self._live is not None:
            self._live.finish()

    def frames(self, *, idle: bool = False) -> Iterator[Chunk]:
        """Yield blocks as long as there is sound for them.

        In a live session the iterator ends when the sound that has come is used up (call it again after the next
        push), and for good after `end_audio`. With `idle` it goes on with silence instead and never ends.
        """
        while True:
            self._open_rollout()
            total = self._track.total_frames()
            if total is not None and self.next_frame >= total and not idle:
                return
            end = self._block_end()
            if not self._track.ready(end):
                if not idle:
                    return
                if self._live is not None:
                    self._live.push_silence(end)
            yield self._run_block(None if idle else total)

    def _block_end(self) -> int:
        stream = self.engine.stream
        return (self._open_rollout().next_block + 1) * stream.block_frames - stream.dropped_frames

    def _run_block(self, total: int | None) -> Chunk:
        with self.engine.lock:
            return self._compute_block(self._open_rollout(), total)

    def _compute_block(self, rollout: Rollout, total: int | None) -> Chunk:
        stream, dit = self.engine.stream, self.engine.dit
        block, started = rollout.next_block, time.perf_counter()
        first, end = self.next_frame, self._block_end()
        features = self._track.features(first, end)
        if block == 0:  # pre-roll: the first frame's features stand for the frames that will be dropped
            features = torch.cat([features[:, :, :1].expand(-1, -1, stream.dropped_frames), features], dim=2)
        noise = block_noise(self.seed, self.session_id, block, tuple(self._latent.shape))
        self._latent.copy_(torch.from_numpy(noise))
        audio = dit.audio_condition(features.unsqueeze(0), stream.frames_per_block)
        distances = [self._distance(block, stage.step) for stage in rollout.line.stages]
        rollout.run_block(self._latent, audio, dit.pose_condition(None), distances)
        denoised = time.perf_counter()
        self._broken = True  # until the frames are out: a decoder that stopped half-way cannot go on
        video = self.engine.vae.decode(self._latent, self._decoder)
        if block == 0:
            video = video[:, stream.dropped_frames :]
        if total is not None:
            end = min(end, total)
            video = video[:, : end - first]
        frames = self.engine.vae.to_uint8(video).cpu().numpy()
        self._broken = False
        decoded = time.perf_counter()
        sound = self._track.samples(first, end)
        return Chunk(block, first, frames, sound, denoised - started, decoded - denoised)

    def _distance(self, block: int, step: int) -> int:
        constant = self.engine.stream.relative_distance
        return relative_distance(self.seed, self.session_id, block, step) if constant is None else constant

    def _open_rollout(self) -> Rollout:
        if self._rollout is None:
            raise LiveRelayError("the session is closed")
        if self._broken:
            raise LiveRelayError("a block of this session failed while it was decoded; open a new session")
        return self._rollout

    def close(self) -> None:
        """Give the session's memory back; it cannot be used afterwards."""
        self._rollout, self._live = None, None
        self._decoder.buffers.clear()
        del self._track, self._latent

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def as_waveform(audio: Any) -> Samples:
    """A sound file, or samples [n] at 16 kHz, as float32 samples of our own; InputError when they cannot be used."""
    if isinstance(audio, str | Path):
        return load_waveform(audio)
    waveform = as_samples(audio)
    if waveform.ndim != 1 or not len(waveform) or not np.isfinite(waveform).all():
        raise InputError("the sound must be finite float32 samples [n] at 16 kHz, at least one")
    return waveform
