"""The static buffers that a block-step works in, and the RoPE tables that it keeps on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from liverelay.engine.config import DiTConfig
from liverelay.engine.models.geometry import (
    REFERENCE_POSITION,
    Angles,
    Geometry,
    angles,
    grid_angles,
    motion_angles,
    split_pairs,
)
from liverelay.kernels.contract import FP8, Place


class RopeTable:
    """cos and sin [T, d/2] float32 of a token grid, kept on the device; only the time columns ever change."""

    def __init__(self, table: Angles, frames: int, head_dim: int, device: torch.device) -> None:
        self.cos, self.sin = (torch.from_numpy(part).to(device=device, dtype=torch.float32) for part in table)
        self._pairs = split_pairs(head_dim)[0]
        self._times = [part.view(frames, -1, part.shape[1])[:, :, : self._pairs] for part in (self.cos, self.sin)]

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        return self.cos, self.sin

    def fill_times(self, first: int) -> None:
        """Set the latent frames' RoPE times to first, first + 1, ...: exact at any position (design section 2.3)."""
        frames = self._times[0].shape[0]
        for place, part in zip(self._times, angles(range(first, first + frames), self._pairs), strict=True):
            place.copy_(torch.from_numpy(part).unsqueeze(1))


class Workspace:
    """The static buffers of one device and resolution. Stages on the same device that run in turn share them."""

    def __init__(
        self, config: DiTConfig, geometry: Geometry, device: torch.device, dtype: torch.dtype, *, fp8: bool = False,
        fp8_attention: bool = False,
    ) -> None:
        tokens = max(geometry.block_tokens, geometry.sink_tokens)
        width, heads = config.dim, (config.num_heads, config.head_dim)

        def make(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.empty((tokens, *shape), device=device, dtype=of)

        self.geometry = geometry
        self.x = make(width)  # the residual stream between layers
        # What the next product reads: a norm's or attention's result, and the feed-forward's; in FP8 with row scales.
        self.h = make(width, of=FP8 if fp8 else dtype)
        self.h_scale = make(of=torch.float32) if fp8 else None
        self.wide = make(config.ffn_dim, of=FP8) if fp8 else None
        self.y = [make(width) for _ in range(3)]  # what self-attention, cross attention and feed-forward add to it
        self.qk, self.ffn = make(2 * width), make(config.ffn_dim)
        self.q, self.attended = make(*heads), make(*heads)
        # Queries of FP8 attention and their scales; other attentions keep to q.
        self.q8 = make(*heads, of=FP8) if fp8_attention else None
        self.q_scale = torch.empty((config.num_heads, tokens), device=device) if fp8_attention else None
        self.head = make(width, of=torch.float32)
        self.place = Place.make(device)
        self.flow = make(4 * config.in_channels)
        head_dim, rows, cols = config.head_dim, range(geometry.rows), range(geometry.cols)
        frames = geometry.frames_per_block
        self.block_rope = RopeTable(grid_angles(range(frames), rows, cols, head_dim), frames, head_dim, device)
        reference = grid_angles([REFERENCE_POSITION], rows, cols, head_dim)
        self.reference_rope = RopeTable(reference, 1, head_dim, device)
        motion = motion_angles(geometry)
        cos, sin = (
            torch.cat([first, torch.from_numpy(second).to(device=device, dtype=torch.float32)])
            for first, second in zip(self.reference_rope.both, motion, strict=True)
        )
        self.sink_rope = (cos, sin)
