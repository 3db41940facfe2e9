"""The engine: one loaded checkpoint on one device, from which sessions are opened."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from liverelay.engine.checkpoint import CheckpointFiles, find_checkpoint
from liverelay.engine.config import DEFAULT_MAX_SIZE, StreamConfig
from liverelay.engine.devices import (
    check_device,
    check_fp8,
    default_device,
    default_dtype,
    fp8_parts,
    use_exact_float32,
)
from liverelay.engine.errors import CheckpointError, InputError
from liverelay.engine.models.audio import AudioEncoder
from liverelay.engine.models.dit import DiT
from liverelay.engine.models.geometry import Geometry
from liverelay.engine.models.image import as_image, choose_size, prepare_image
from liverelay.engine.models.text import TextEncoder
from liverelay.engine.models.vae import VAE
from liverelay.engine.models.weights import is_quantized, open_pth
from liverelay.engine.relay.pipeline import Pipeline, local_pipeline
from liverelay.engine.relay.plan import Plan, balanced_plan
from liverelay.engine.relay.stage import LineSpec, Stage
from liverelay.kernels import dispatch
from liverelay.kernels.attention_backends import named

if TYPE_CHECKING:
    from liverelay.engine.models.audio_live import LiveAudioConfig
    from liverelay.engine.session import Session

DEFAULT_MAX_AREA = DEFAULT_MAX_SIZE[0] * DEFAULT_MAX_SIZE[1]
VAE_STRIDE = 8
KEPT_LINES = 2
SESSIONS = 16
LONGEST_SIDE = 8192
Say = Callable[[str], None]


class Engine:
    """Models of one checkpoint. Sessions take turns; each resolution has one line of stages.

    Make one with `Engine.load`, open sessions with `open`. Sessions may be used from several threads; `lock` guards
    the encoders. sessions: how many may be open at a time in one resolution; memory is taken when a place is first
    used. admit_by_rate: refuse a live session that the line has no time for.
    """

    def __init__(self, files: CheckpointFiles, dit: DiT, vae: VAE, audio: AudioEncoder, stream: StreamConfig) -> None:
        self.files, self.dit, self.vae, self.audio, self.stream = files, dit, vae, audio, stream
        self.lock = threading.RLock()
        self.sessions = SESSIONS
        self.admit_by_rate = False
        self._backend: str | None = None  # a name forces all operators to it
        self._say: Say = lambda line: None
        self._plan: Plan | None = None
        self._lines: dict[Geometry, Pipeline] = {}
        self._texts: dict[str, Tensor] = {}

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        lora: str | Path | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        fp8: bool | str = False,
        stream: StreamConfig | None = None,
        say: Say | None = None,
    ) -> Engine:
        """Load a checkpoint in the published layout (see `liverelay.engine.checkpoint`).

        lora: a file, "none", or None to find it. device: "cpu", "cuda", "cuda:1"; None: a GPU where there is one.
        dtype: torch.bfloat16 or torch.float32; None: bfloat16 on a GPU, float32 on a CPU. backend: a kernel
        backend for all operators, or an attention (`liverelay kernels` lists both); None: the fastest.
        fp8: what is in e4m3: "products" (or True), the transformer's large ones; "attention", self-attention with
        arenas of half the size; "all". On a CPU it is only for looking at its error.
        say(line) is told what is being loaded. CheckpointError names a file, key or shape that does not fit.
        """
        files = find_checkpoint(Path(checkpoint), lora)
        missing = files.missing()
        if missing:
            more = f" (and {len(missing) - 1} more parts; see liverelay inspect)" if len(missing) > 1 else ""
            raise CheckpointError(f"{missing[0]} is missing{more}")
        device = check_device(default_device() if device is None else device)
        try:  # before anything long is read
            operators = None if named(backend, torch.device(device)) else backend
            dispatch.choose(operators, torch.device(device))
        except ValueError as error:
            raise InputError(str(error)) from None
        dtype = dtype or default_dtype(device)
        if dtype not in (torch.float32, torch.bfloat16):
            raise InputError(f"the engine computes in float32 or bfloat16, not {str(dtype).removeprefix('torch.')}")
        use_exact_float32(device, dtype)
        tell = say or (lambda line: None)
        source, config = files.open_dit(device)
        merged = f"with the LoRA {files.lora.name}" if files.lora else "without a LoRA"
        products, fp8_attention = fp8_parts(fp8)
        if products or fp8_attention or is_quantized(source):
            check_fp8(device, dtype)
        tell("loading the transformer " + ("as it was quantised" if is_quantized(source) else merged))
        dit = DiT.load(
            source, config, device=device, dtype=dtype, backend=operators, fp8=products, fp8_attention=fp8_attention
        )
        if backend != operators:
            dit.force_attention(backend)
        tell("loading the VAE")
        vae = VAE.load(open_pth(files.vae), device=device, dtype=dtype, backend=operators)
        tell("loading the audio encoder")
        audio = AudioEncoder.load(files.audio, device=device, dtype=dtype)
        if (audio.num_states, audio.width) != (config.audio_states, config.audio_dim):
            raise CheckpointError(
                f"{files.audio} gives {audio.num_states} states of width {audio.width}, "
                f"the transformer expects {config.audio_states} of {config.audio_dim}"
            )
        engine = cls(files, dit, vae, audio, stream or StreamConfig())
        engine._backend, engine._say = backend, tell
        return engine

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
        size: (width, height) in pixels, multiples of 64; None: the published rule under `max_area` pixels.
        seed and session_id key all randomness. InputError for a picture, sound or size that cannot be used.
        """
        from liverelay.engine.session import Session, as_waveform

        if type(seed) is not int or type(session_id) is not int or not isinstance(prompt, str):
            raise InputError("seed and session_id must be whole numbers, the prompt a text")
        waveform = None if audio is None else as_waveform(audio)
        picture = as_image(image)
        height, width = pick_size(picture.size, size, max_area)
        pixels = prepare_image(picture, (height, width)).to(self.dit.device, self.dit.dtype)
        with self.lock:
            text = self.encode_text(prompt)
            # The first chunk of the encoder is the single frame, so the reference is the first motion latent.
            motion = self.vae.encode(pixels.unsqueeze(1).expand(-1, self.stream.motion_pixel_frames, -1, -1))
            line = self.line(height // VAE_STRIDE, width // VAE_STRIDE)
            given = {"text": text, "reference": motion[:, :1].clone(), "motion": motion}
            rate = 1 / self.stream.block_seconds if waveform is None and self.admit_by_rate else 0.0
            serial = line.open(given, rate=rate)
            return Session(self, line, serial, waveform=waveform, seed=seed, session_id=session_id, live=live)

    def line(self, latent_h: int, latent_w: int) -> Pipeline:
        """The pipeline of one resolution, made when first asked for."""
        geometry = Geometry(
            latent_h, latent_w, self.dit.config.head_dim, self.stream.frames_per_block, self.stream.ring_frames
        )
        found = self._lines.pop(geometry, None)
        if found is None or found.error is not None:
            if not self._lines and self._backend is None:
                self.dit.choose_attention(geometry, self._say)
            found = self._make_line(geometry)
        self._lines[geometry] = found  # the latest last
        idle = [old for old, line in self._lines.items() if line is not found and not line.sessions]
        for old in idle[: max(0, len(self._lines) - KEPT_LINES)]:  # a line's buffers are some hundred MB at 14B
            self._lines.pop(old).close()
        return found

    def _make_line(self, geometry: Geometry) -> Pipeline:
        config, stream = self.dit.config, self.stream
        audio = (1, config.audio_states, config.audio_dim, stream.block_frames)
        spec = LineSpec.make(geometry, stream, audio, channels=config.in_channels)
        steps = len(spec.schedule.timesteps)
        plan = self._plan or balanced_plan([str(self.dit.device)], steps)
        stages = [Stage(part, spec, self.dit, self.vae, self.dit.dtype) for part in plan.stages]
        return local_pipeline(plan, spec, stages, places=self.sessions)

    def close(self) -> None:
        """End the stages of all resolutions; open sessions are lost."""
        while self._lines:
            self._lines.popitem()[1].close()

    def encode_text(self, prompt: str) -> Tensor:
        """A prompt's states [n, text_dim]; the text encoder (11 GB) is in memory only meanwhile."""
        if prompt not in self._texts:
            self._texts.clear()
            self._texts[prompt] = self._text_states(prompt)
        return self._texts[prompt]

    def _text_states(self, prompt: str) -> Tensor:
        config, dit, weights = self.dit.config, self.dit, open_pth(self.files.text)
        encoder = TextEncoder.load(
            weights, self.files.tokenizer, device=dit.device, dtype=dit.dtype, text_len=config.text_len
        )
        states = encoder.encode(prompt)
        if states.shape[1] != config.text_dim:
            raise CheckpointError(
                f"{self.files.text} has width {states.shape[1]}, the transformer expects {config.text_dim}"
            )
        return states


def pick_size(picture: tuple[int, int], size: tuple[int, int] | None, max_area: int) -> tuple[int, int]:
    """(height, width) of the video from (width, height) of the picture and what was asked for; InputError else."""
    if size is None:
        if max_area < 64 * 64:
            raise InputError(f"an area of {max_area} pixels is too small; the smallest video is 64x64")
        height, width = choose_size(picture[1], picture[0], min(max_area, LONGEST_SIDE**2))
        if max(height, width) > LONGEST_SIDE:
            raise InputError(f"a picture of {picture[0]}x{picture[1]} gives a video of {width}x{height}; cut it first")
        return height, width
    if len(size) != 2 or not all(type(side) is int for side in size):
        raise InputError(f"a size is (width, height) in whole pixels, not {size!r}")
    width, height = size
    if width < 64 or height < 64 or width % 64 or height % 64 or max(size) > LONGEST_SIDE:
        near = [min(LONGEST_SIDE, max(64, round(side / 64) * 64)) for side in (width, height)]
        raise InputError(
            f"a size of {width}x{height} is not made of multiples of 64 up to {LONGEST_SIDE}; "
            f"{near[0]}x{near[1]} is near"
        )
    return height, width
