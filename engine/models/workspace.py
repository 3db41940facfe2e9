"""The static buffers that a block-step works in, and the RoPE tables that it keeps on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
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

# Writes that may be under way: a block writes once for each of its steps, a new sink once, and a stage is at most two
# blocks ahead of its device.
STAGED = 16


class RopeTable:
    """cos and sin [T, d/2] float32 of a token grid, kept on the device; only the time columns ever change.

    times: cos and sin [frames, d/2's time part] float32 on the device, from which `spread` takes those columns.
    """

    def __init__(self, table: Angles, times: Sequence[Tensor]) -> None:
        self.times = times
        frames, pairs = times[0].shape
        self.cos, self.sin = (torch.from_numpy(part).to(device=times[0].device, dtype=torch.float32) for part in table)
        self._columns = [part.view(frames, -1, part.shape[1])[:, :, :pairs] for part in (self.cos, self.sin)]

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        return self.cos, self.sin

    def spread(self) -> None:
        """Give all tokens of a latent frame its time."""
        for columns, times in zip(self._columns, self.times, strict=True):
            columns.copy_(times.unsqueeze(1))


class Staging:
    """Fills a small device buffer from the host while the device works: nobody waits, and nothing is allocated."""

    def __init__(self, target: Tensor) -> None:
        self._target = target
        self._slots: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        for _ in range(STAGED if target.is_cuda else 0):
            pinned = torch.zeros(target.shape, dtype=target.dtype, pin_memory=True)
            self._slots.append((pinned, torch.cuda.Event()))

    def write(self, values: Tensor) -> None:
        """values: on the host, free again when this returns."""
        if not self._slots:
            self._target.copy_(values)
            return
        pinned, copied = self._slots[0]
        self._slots.rotate(-1)
        copied.synchronize()  # of the copy STAGED writes ago, which is long done unless a caller never waits
        self._target.copy_(pinned.copy_(values), non_blocking=True)
        copied.record(torch.cuda.current_stream(self._target.device))


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
        self.q, self.attended = make(*heads, of=FP8 if fp8_attention else dtype), make(*heads)
        self.q_factor = make(of=torch.float32)  # 1 / rms of the text's queries
        self.head = make(width, of=torch.float32)
        self.flow = make(4 * config.in_channels)
        self._make_control(config.head_dim, device)

    def _make_control(self, head_dim: int, device: torch.device) -> None:
        """What the host decides of a pass, in one buffer of words: the place in the arena, and RoPE times (cos and sin
        of the block's latent frames, and of the reference); the tables made of it."""
        geometry, pairs = self.geometry, split_pairs(head_dim)[0]
        frames, rows, cols = geometry.frames_per_block, range(geometry.rows), range(geometry.cols)
        sizes = [4, *[frames * pairs] * 2, *[pairs] * 2]
        words = torch.zeros(sum(sizes), device=device)
        self.words, self._staging = words, Staging(words)
        self._draft = np.zeros(sum(sizes), dtype=np.float32)
        place, *times = (part.view(-1, pairs) if i else part for i, part in enumerate(words.split(sizes)))
        self.place = Place(0, 0, False, place.view(torch.int32)[:3])
        self.block_rope = RopeTable(grid_angles(range(frames), rows, cols, head_dim), times[:2])
        self.reference_rope = RopeTable(grid_angles([REFERENCE_POSITION], rows, cols, head_dim), times[2:])
        cos, sin = (
            torch.cat([first, torch.from_numpy(second).to(device=device, dtype=torch.float32)])
            for first, second in zip(self.reference_rope.both, motion_angles(geometry), strict=True)
        )
        self.sink_rope = (cos, sin)
        self._pairs = pairs

    def fill(self, row: int, valid: int, moved: bool, times: tuple[int, int] | None = None) -> None:
        """Set the place and, for a block, the RoPE times of its first latent frame and of the sink's reference, here
        and on the device: one copy that nothing waits for."""
        self.write(self.draft(row, valid, moved, times))

    def write(self, draft: Tensor) -> None:
        self._staging.write(draft)

    def place_at(self, start_frame: int, moved: bool) -> Place:
        """Where a block will stand; changes nothing."""
        geometry = self.geometry
        return Place(geometry.slot_row(start_frame), geometry.valid_tokens(start_frame), moved, self.place.scalars)

    def draft(self, row: int, valid: int, moved: bool, times: tuple[int, int] | None = None) -> Tensor:
        """What `fill` writes into `words`, valid until the next draft. Exact at any position (design section 2.3)."""
        place = self.place
        place.row, place.valid, place.moved = row, valid, moved
        draft = self._draft
        draft[:3].view(np.int32)[:] = row, valid, moved
        if times is not None:
            first, reference = times
            frames = range(first, first + self.geometry.frames_per_block)
            parts = [*angles(frames, self._pairs), *angles([reference], self._pairs)]
            draft[4:] = np.concatenate([part.ravel() for part in parts])
        return torch.from_numpy(draft)

    def spread_times(self) -> None:
        """From the words that were filled to the tables: the device's part of it, which a graph can hold."""
        self.block_rope.spread()
        self.reference_rope.spread()
