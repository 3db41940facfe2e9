"""Frozen configurations of the model and of the stream. Derived sizes are properties; nothing here imports torch."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liverelay.engine.errors import CheckpointError, InputError

# Width and height whose area bounds the video's size when none is asked for (the published rule makes 704x384 of it).
DEFAULT_MAX_SIZE = (720, 400)

# Names in the published config.json that change what the model computes, and the one value that the engine computes.
_FIXED = {
    "model_type": "s2v",
    "enable_adain": True,
    "adain_mode": "attn_norm",
    "zero_timestep": True,
    "enable_motioner": False,
    "enable_framepack": True,
    "framepack_drop_mode": "padd",
    "enable_tsm": False,
    "trainable_token_pos_emb": False,
    "add_last_motion": True,
    "qk_norm": True,
    "cross_attn_norm": True,
}


def set_process_defaults() -> None:
    """For a process of our own, before torch is imported: OpenMP threads sleep at barriers instead of spinning.

    Spinning threads take the cores from whoever they wait for as soon as anything else runs: a CPU block-step became
    2 to 6 times slower on a shared machine. A value that the user has set is kept.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def cache_root() -> Path | None:
    """Where the user's cached files belong (`cache_folder`); None for a user without a home."""
    if given := os.environ.get("LIVERELAY_CACHE"):
        return Path(given).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification: a relative one is to be ignored
        return Path(base, "liverelay")
    try:
        return Path.home() / ".cache" / "liverelay"
    except RuntimeError:
        return None


def _count(published: Mapping[str, Any], name: str, default: int) -> int:
    value = published.get(name, default)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"config.json says {name}={value!r}; it must be a whole number above 0")
    return value


def _video_size(given: Any) -> tuple[int, int] | None:
    if given is None:
        return None
    sides = given if isinstance(given, list) and len(given) == 2 else [0]
    if not all(type(side) is int and side > 0 and side % 64 == 0 for side in sides):
        raise CheckpointError(f"config.json says video_size={given!r}; it must be [width, height], multiples of 64")
    return given[0], given[1]


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the causal audio-driven video transformer (spec dit.md section 1).

    video_size: (width, height) in pixels of the only videos that a small model was trained on, or None; ours, not
    published.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    audio_inject_layers: tuple[int, ...]
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    audio_dim: int = 1024
    audio_states: int = 25
    in_channels: int = 16
    cond_channels: int = 16
    num_audio_tokens: int = 4
    eps: float = 1e-6
    video_size: tuple[int, int] | None = None

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @classmethod
    def from_published(cls, published: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> DiTConfig:
        """The one adapter from a published config.json to ours.

        What the tensors show (widths, counts) is taken from their shapes; only what they cannot show (heads, inject
        layers, eps, text length) is read from the file. CheckpointError when the two disagree or when the file asks
        for a variant of the model that the engine does not compute.
        """
        for name, value in _FIXED.items():
            if name in published and published[name] != value:
                raise CheckpointError(f"config.json says {name}={published[name]!r}; only {value!r} is computed")

        def shape(key: str, ndim: int) -> tuple[int, ...]:
            if key not in shapes:
                raise CheckpointError(f"the weights lack '{key}'")
            if len(shapes[key]) != ndim:
                raise CheckpointError(f"'{key}' has shape {list(shapes[key])}, expected {ndim} dimensions")
            return shapes[key]

        for name in ("num_heads", "audio_inject_layers"):
            if name not in published:
                raise CheckpointError(f"config.json lacks '{name}'")
        dim, in_channels = shape("patch_embedding.weight", 5)[:2]
        num_layers = len({key.split(".")[1] for key in shapes if key.startswith("blocks.")})
        shown = {
            "dim": dim,
            "ffn_dim": shape("blocks.0.ffn.0.weight", 2)[0],
            "num_layers": num_layers,
            "text_dim": shape("text_embedding.0.weight", 2)[1],
            "freq_dim": shape("time_embedding.0.weight", 2)[1],
            "audio_dim": shape("casual_audio_encoder.encoder.conv1_local.conv.weight", 3)[1],
            "audio_states": shape("casual_audio_encoder.weights", 4)[1],
            "in_channels": in_channels,
            "cond_channels": shape("cond_encoder.weight", 5)[1],
        }
        names = {"in_channels": "in_dim", "cond_channels": "cond_dim"}
        for name, value in shown.items():
            said = published.get(names.get(name, name), value)
            if said != value:
                raise CheckpointError(f"config.json says {names.get(name, name)}={said}, the weights show {value}")
        layers, eps = published["audio_inject_layers"], published.get("eps", 1e-6)
        if not isinstance(layers, list | tuple) or not all(type(layer) is int for layer in layers):
            raise CheckpointError(f"config.json says audio_inject_layers={layers!r}; it must be a list of layers")
        if not isinstance(eps, float | int) or not 0 < eps < 1:
            raise CheckpointError(f"config.json says eps={eps!r}; it must be a small positive number")
        config = cls(
            num_heads=_count(published, "num_heads", 0),
            audio_inject_layers=tuple(layers),
            text_len=_count(published, "text_len", 512),
            num_audio_tokens=_count(published, "num_audio_token", 4),
            eps=float(eps),
            video_size=_video_size(published.get("video_size")),
            **shown,
        )
        config.check()
        return config

    def check(self) -> None:
        """CheckpointError when the sizes cannot belong together."""
        if self.num_heads < 1 or self.dim % self.num_heads or self.head_dim % 2:
            raise CheckpointError(f"a width of {self.dim} cannot be split into {self.num_heads} heads of even size")
        layers = self.audio_inject_layers
        if list(layers) != sorted(set(layers)) or any(not 0 <= layer < self.num_layers for layer in layers):
            raise CheckpointError(f"audio_inject_layers {list(layers)} do not fit {self.num_layers} layers")


@dataclass(frozen=True)
class StreamConfig:
    """How a stream is cut into blocks and denoised (spec dit.md sections 1, 8 and 9)."""

    frames_per_block: int = 3
    ring_frames: int = 12
    blocks_per_clip: int = 4
    steps: int = 4
    shift: float = 3.0
    fps: int = 25
    video_frames_per_latent: int = 4
    motion_pixel_frames: int = 73
    prime_latents: int = 7
    dropped_frames: int = 3
    # None: drawn uniformly from 4..30 for every block and step, as published; a number: constant.
    relative_distance: int | None = None

    def __post_init__(self) -> None:
        if self.ring_frames % self.frames_per_block or self.ring_frames < self.frames_per_block:
            raise InputError(
                f"a ring of {self.ring_frames} latent frames does not hold whole blocks of {self.frames_per_block}"
            )
        if self.relative_distance is not None and not 0 <= self.relative_distance <= 1000:
            raise InputError(f"relative distance {self.relative_distance} is not within 0..1000 latent frames")

    @property
    def block_frames(self) -> int:
        """Video frames in one block."""
        return self.frames_per_block * self.video_frames_per_latent

    @property
    def block_seconds(self) -> float:
        return self.block_frames / self.fps


@dataclass(frozen=True)
class RankEnvironment:
    """What torchrun tells each of the processes that it starts."""

    rank: int
    world: int
    local_rank: int
    address: str
    port: int
    attempt: int

    @classmethod
    def read(cls) -> RankEnvironment | None:
        """None in a process that was started alone."""
        if os.environ.get("WORLD_SIZE", "1") in ("", "0", "1"):
            return None
        try:
            numbers = [int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")]
            address, attempt = os.environ["MASTER_ADDR"], int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        except (KeyError, ValueError) as error:
            raise InputError(f"WORLD_SIZE is set, but {error} is not as torchrun sets it") from None
        rank, world, local, port = numbers
        return cls(rank, world, local, address, port, attempt)


def leave(status: int) -> None:
    """End the process at once: threads that wait for a lost peer in a library cannot be joined."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed by the caller, or its disk is full
            stream.flush()
    os._exit(status)
