"""The engine: one loaded checkpoint on one device, from which sessions are opened."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from liverelay.engine.config import DEFAULT_MAX_SIZE, DiTConfig, StreamConfig
from liverelay.engine.devices import device_fault
from liverelay.engine.errors import InputError, StageLost
from liverelay.engine.loading import Loader, LoadOptions, devices_of
from liverelay.engine.models.attention_choice import choose_attention
from liverelay.engine.models.audio import AudioEncoder
from liverelay.engine.models.dit import DiT
from liverelay.engine.models.geometry import LONGEST_SIDE, Geometry, check_size
from liverelay.engine.models.image import as_image, choose_size, prepare_image
from liverelay.engine.models.vae import VAE
from liverelay.engine.progress import uninterrupted
from liverelay.engine.prompts import Prompts
from liverelay.engine.relay.messages import Tensors
from liverelay.engine.relay.pipeline import Observer, Pipeline, local_pipeline
from liverelay.engine.relay.plan import Plan, balanced_plan
from liverelay.engine.relay.ranks import Leader
from liverelay.engine.relay.room import refused_when_full
from liverelay.engine.relay.stage import LineSpec, Stage
from liverelay.engine.relay.times import vae_share
from liverelay.engine.snapshot import Snapshot, model_id

if TYPE_CHECKING:
    from liverelay.engine.models.audio_live import LiveAudioConfig
    from liverelay.engine.session import Session
    from liverelay.engine.steps import StageSet, SteppedSession
    from liverelay.engine.stream import AudioTrack

DEFAULT_MAX_AREA = DEFAULT_MAX_SIZE[0] * DEFAULT_MAX_SIZE[1]
VAE_STRIDE = 8
KEPT_LINES = 2
SESSIONS = 16


class Engine:
    """Models of one checkpoint. Sessions take turns; each resolution has one line of stages.

    Make one with `Engine.load`, open sessions with `open`. Sessions may be used from several threads; `lock` guards
    the encoders of pictures and sound. sessions: how many may be open at a time in one resolution; memory is taken when
    a place is first used. admit_by_rate: refuse a live session that the line has no time for. observe: is told every
    event of a stage.
    """

    def __init__(
        self, loader: Loader, plan: Plan, dits: Mapping[str, DiT], vaes: Mapping[str, VAE], audio: AudioEncoder,
        stream: StreamConfig,
    ) -> None:
        self.loader, self.plan, self.audio, self.stream = loader, plan, audio, stream
        self.dit, self.vae = dits[plan.stages[0].device], list(vaes.values())[-1]
        self.lock = threading.RLock()
        self.sessions = SESSIONS
        self.admit_by_rate = False
        self.observe: Observer | None = None
        self.leader: Leader | None = None  # where the other stages are processes of their own
        self._dits, self._vaes = dits, vaes
        self._lines: dict[Geometry, Pipeline] = {}
        self._stages: dict[Geometry, StageSet] = {}  # those without a line, for `open_steps`
        self._prompts = Prompts(
            loader.files, self.dit.config, self.dit.device, self.dit.dtype, home=loader.text_encoder, say=loader.say
        )

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        device: str | torch.device | Plan | None = None,
        stream: StreamConfig | None = None,
        **options: Unpack[LoadOptions],
    ) -> Engine:
        """Load a checkpoint in the published layout (see `liverelay.engine.checkpoint`).

        lora: a file, "none", or None to find it. device: "cpu", "cuda", "cuda:1"; several with commas between them
        are a line of stages, as is a Plan; None: a GPU where there is one.
        dtype: torch.bfloat16 or torch.float32; None: bfloat16 on a GPU, float32 on a CPU. backend: a kernel
        backend for all operators, or an attention (`liverelay kernels` lists both); None: the fastest.
        fp8: what is in e4m3: "products" (or True), the transformer's large ones; "attention", self-attention with
        arenas of half the size; "all". On a CPU it is only for looking at its error.
        text_encoder: where the text encoder's weights are between new prompts, "device", "host" or "disk"; None: in
        the host's memory where there is room.
        say(line) is told what is being loaded. CheckpointError names a file, key or shape that does not fit.
        """
        stream = stream or StreamConfig()
        plan = device if isinstance(device, Plan) else balanced_plan(devices_of(device), stream.steps, vae_share())
        loader = Loader.make(checkpoint, plan.devices, **options)
        return cls.assemble(loader, plan, stream)

    @classmethod
    def assemble(cls, loader: Loader, plan: Plan, stream: StreamConfig, own: int | None = None) -> Engine:
        """Load what this process needs: models on the devices of all stages, or of its own one and of the encoders."""
        stages = plan.stages if own is None else plan.stages[own : own + 1]
        dits = {device: loader.dit(device) for device in dict.fromkeys(s.device for s in stages if s.steps)}
        first = stages[0].device
        decoding = [stage.device for stage in stages if stage.decode]  # and the last one encodes pictures
        vaes = {device: loader.vae(device) for device in dict.fromkeys([*decoding, stages[-1].device])}
        return cls(loader, plan, dits, vaes, loader.audio(first, dits[first].config), stream)

    def open(
        self,
        image: Any,
        prompt: str = "",
        *,
        audio: Any = None,
        size: tuple[int, int] | None = None,
        max_area: int = DEFAULT_MAX_AREA,
        seed: int = 0,
        session_id: int = 0,
        live: LiveAudioConfig | None = None,
    ) -> Session:
        """Open a session: encode the image and the prompt, fill the sink, warm up the decoder.

        image: a path, a Pillow image or uint8 [H, W, 3]. audio: a path or float32 samples [n] at 16 kHz for the
        whole-file way (equal to the published one); None for a live session that is given sound by `push_audio`.
        size: (width, height) in pixels, multiples of 64; None: the model's own size if it has but one and `max_area`
        pixels are enough, else the published rule under `max_area` pixels.
        seed and session_id key all randomness. InputError for a picture, sound or size that cannot be used; BusyError,
        with the numbers, where there is no place, memory or time for one more session.
        """
        from liverelay.engine.session import Session

        check_keys(seed, session_id)
        with refused_when_full():
            given, track, latent = self._prepare(image, prompt, audio, size, max_area, live)
            with self.lock:
                line = self.line(*latent)
                serial = line.open(given, rate=self.rate(live=audio is None))
        return Session(self, line, serial, track, given, seed=seed, session_id=session_id)

    def open_steps(
        self, image: Any, prompt: str = "", *, seed: int = 0, session_id: int = 0, **options: Any
    ) -> SteppedSession:
        """As `open`, with its options, for a scheduler that runs each stage of each block itself (`SteppedSession`)."""
        from liverelay.engine.steps import StageSet, SteppedSession

        check_keys(seed, session_id)
        with refused_when_full():
            given, track, latent = self._prepare(image, prompt, **options)
            with self.lock:
                geometry = self._geometry(*latent)
                if geometry not in self._stages:
                    self._choose_attention(geometry)
                    self._stages[geometry] = StageSet(self._make_stages(geometry), self.sessions)
                return SteppedSession(self, self._stages[geometry], track, given, seed=seed, session_id=session_id)

    def _prepare(
        self, image: Any, prompt: str, audio: Any = None, size: tuple[int, int] | None = None,
        max_area: int = DEFAULT_MAX_AREA, live: LiveAudioConfig | None = None,
    ) -> tuple[Tensors, AudioTrack, tuple[int, int]]:
        """What a session is opened with, its sound, and the latent's height and width."""
        from liverelay.engine.models.audio_live import LiveAudio
        from liverelay.engine.stream import WholeFile, as_waveform

        if not isinstance(prompt, str):
            raise InputError("the prompt must be a text")
        waveform = None if audio is None else as_waveform(audio)
        picture = as_image(image)
        only = self.dit.config.video_size
        if size is None and only is not None and only[0] * only[1] <= max_area:
            size = only
        height, width = pick_size(picture.size, size, max_area)
        pixels = prepare_image(picture, (height, width)).to(self.vae.device, self.dit.dtype)
        text = self.encode_text(prompt)  # without the lock, which running sessions need for their sound
        with self.lock:
            # The first chunk of the encoder is the single frame, so the reference is the first motion latent.
            motion = self.vae.encode(pixels.unsqueeze(1).expand(-1, self.stream.motion_pixel_frames, -1, -1))
            given = {"text": text, "reference": motion[:, :1].clone(), "motion": motion}
            track: AudioTrack = LiveAudio(self.audio, live)
            if waveform is not None:
                track = WholeFile(self.audio, waveform, self.stream.fps)
        return given, track, (height // VAE_STRIDE, width // VAE_STRIDE)

    def resume(self, snapshot: Snapshot | str | Path) -> Session:
        """Go on with a session from `Session.snapshot`, or from its file, bit for bit, whatever the plan is here.

        InputError where the snapshot is of another model, precision or stream configuration, or cannot be read.
        """
        from liverelay.engine.session import resume

        snapshot = snapshot if isinstance(snapshot, Snapshot) else Snapshot.load(snapshot)
        snapshot.check("model", self.model_id)
        snapshot.check("stream", asdict(self.stream))
        with refused_when_full(), self.lock:
            return resume(self, snapshot)

    @functools.cached_property
    def model_id(self) -> str:
        """Names checkpoint and precision, for snapshots."""
        return model_id(self.dit)

    def rate(self, *, live: bool) -> float:
        """Blocks that a session needs in a second; 0 where it is not held to that."""
        return 1 / self.stream.block_seconds if live and self.admit_by_rate else 0.0

    def _geometry(self, latent_h: int, latent_w: int) -> Geometry:
        stream = self.stream
        return Geometry(latent_h, latent_w, self.dit.config.head_dim, stream.frames_per_block, stream.ring_frames)

    def line(self, latent_h: int, latent_w: int) -> Pipeline:
        """The pipeline of one resolution, made when first asked for."""
        geometry = self._geometry(latent_h, latent_w)
        found = self._lines.pop(geometry, None)
        if found is None or found.error is not None:
            for device in {*self._dits, *self._vaes}:
                if fault := device_fault(torch.device(device)):
                    raise StageLost(f"{device} was lost: {fault}; start the program again")
            if found is not None:
                found.close()  # its other stages still hold their memory
            self._make_room()
            self._choose_attention(geometry)
            found = self._make_line(geometry)
        self._lines[geometry] = found  # the latest last
        return found

    def _choose_attention(self, geometry: Geometry) -> None:
        """Before the first stages that compute with it; a backend that was asked for has its own."""
        if self.loader.backend is None and not (self._lines or self._stages):
            for dit in self._dits.values():
                choose_attention(dit, geometry, self.loader.say)

    def _make_room(self) -> None:
        """Close lines without sessions, the oldest first: a line's buffers are some hundred MB at 14B."""
        kept = 0 if self.leader is not None else KEPT_LINES - 1
        for old in [old for old, line in self._lines.items() if not line.sessions]:
            if len(self._lines) > kept:
                self._lines.pop(old).close()
        if self.leader is not None and self._lines:
            raise InputError("stages in other processes hold one resolution at a time; close the sessions of the other")

    def _spec(self, geometry: Geometry) -> LineSpec:
        config, stream = self.dit.config, self.stream
        shape = audio_shape(config, stream)
        return LineSpec.make(geometry, stream, shape, channels=config.in_channels, vae=self.vae.config)

    def _make_stages(self, geometry: Geometry) -> list[Stage]:
        """All stages, in this process."""
        if self.leader is not None:
            raise InputError("the stages are in other processes; start the engine in one")
        spec, dits, vaes, dtype = self._spec(geometry), self._dits, self._vaes, self.loader.dtype
        return [
            Stage(part, spec, dits.get(part.device), vaes.get(part.device), dtype, say=self.loader.say)
            for part in self.plan.stages
        ]

    def _make_line(self, geometry: Geometry) -> Pipeline:
        spec, plan = self._spec(geometry), self.plan
        if self.leader is not None:
            first = Stage(plan.stages[0], spec, self.dit, self.vae, self.loader.dtype, say=self.loader.say)
            return self.leader.build(spec, first, places=self.sessions, observe=self.observe)
        return local_pipeline(plan, spec, self._make_stages(geometry), places=self.sessions, observe=self.observe)

    def close(self) -> None:
        """End the stages of all resolutions; open sessions are lost. An interrupt waits until it is done."""
        with uninterrupted():
            self._stages.clear()
            while self._lines:
                self._lines.popitem()[1].close()
            if self.leader is not None:
                self.leader.close()

    def after_interrupt(self) -> None:
        """StageLost when the interrupt came because another process of the line has died."""
        if self.leader is not None:
            self.leader.last_words()

    def encode_text(self, prompt: str) -> Tensor:
        """A prompt's states [n, text_dim] on the host; the 64 prompts used last are kept, also for the next start."""
        return self._prompts.states(prompt)


def check_keys(*keys: Any) -> None:
    """InputError unless seed and session number are whole."""
    if any(type(key) is not int for key in keys):
        raise InputError("seed and session_id must be whole numbers")


def audio_shape(config: DiTConfig, stream: StreamConfig) -> tuple[int, int, int, int]:
    """Of the features that a block is given: one speaker, states, width, video frames."""
    return 1, config.audio_states, config.audio_dim, stream.block_frames


def pick_size(picture: tuple[int, int], size: tuple[int, int] | None, max_area: int) -> tuple[int, int]:
    """(height, width) of the video from (width, height) of the picture and what was asked for; InputError else."""
    if type(max_area) is not int:
        raise InputError(f"an area is a whole number of pixels, not {max_area!r}")
    if size is None:
        if max_area < 64 * 64:
            raise InputError(f"an area of {max_area} pixels is too small; the smallest video is 64x64")
        height, width = choose_size(picture[1], picture[0], min(max_area, LONGEST_SIDE**2))
        if max(height, width) > LONGEST_SIDE:
            raise InputError(f"a picture of {picture[0]}x{picture[1]} gives a video of {width}x{height}; cut it first")
        return height, width
    if not isinstance(size, tuple | list) or len(size) != 2 or not all(type(side) is int for side in size):
        raise InputError(f"a size is (width, height) in whole pixels, not {size!r}")
    check_size(size)
    return size[1], size[0]
