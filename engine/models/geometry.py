"""From latent sizes to tokens, arena rows and RoPE angles: pure integers and float64, no torch.

Sources: spec dit.md sections 4 (RoPE), 5 (motion packing) and 7 (caches).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from liverelay.engine.errors import InputError

REFERENCE_POSITION = 30
ROPE_THETA = 10000.0
MOTION_LATENTS = 19
LONGEST_SIDE = 8192  # pixels of a video
# (first latent frame, number of latent frames, temporal stride, spatial stride in tokens, RoPE time of each group)
MOTION_BUCKETS = (
    (18, 1, 1, 1, (-1,)),
    (16, 2, 2, 2, (-3,)),
    (0, 16, 4, 4, (-19, -14, -9, -4)),
)

Angles = tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]


@dataclass(frozen=True)
class Geometry:
    """Token counts and arena rows of one resolution.

    The arena of a layer is `[sink | ring]`: rows 0..P-1 the reference frame, then the motion tokens up to
    `sink_tokens`, then `ring_frames` latent frames overwritten in place.
    """

    latent_h: int
    latent_w: int
    head_dim: int
    frames_per_block: int = 3
    ring_frames: int = 12

    def __post_init__(self) -> None:
        if self.latent_h < 8 or self.latent_w < 8 or self.latent_h % 8 or self.latent_w % 8:
            raise InputError(
                f"a latent of {self.latent_h}x{self.latent_w} does not divide into motion patches; "
                "height and width of the video must be multiples of 64 pixels"
            )
        if self.ring_frames % self.frames_per_block or self.ring_frames < self.frames_per_block:
            raise InputError(
                f"a ring of {self.ring_frames} latent frames does not hold whole blocks of {self.frames_per_block}"
            )

    @property
    def rows(self) -> int:
        return self.latent_h // 2

    @property
    def cols(self) -> int:
        return self.latent_w // 2

    @property
    def frame_tokens(self) -> int:
        """P: tokens of one latent frame."""
        return self.rows * self.cols

    @property
    def block_tokens(self) -> int:
        return self.frames_per_block * self.frame_tokens

    @property
    def sink_tokens(self) -> int:
        """Reference frame plus packed motion tokens: 2.5 P."""
        return self.frame_tokens * 5 // 2

    @property
    def arena_tokens(self) -> int:
        return self.sink_tokens + self.ring_frames * self.frame_tokens

    def slot_row(self, start_frame: int) -> int:
        """First arena row of the ring slot for the block at absolute latent frame `start_frame`."""
        slot = start_frame % self.ring_frames
        if start_frame < 0 or slot + self.frames_per_block > self.ring_frames:
            raise InputError(f"a block of {self.frames_per_block} latent frames cannot start at frame {start_frame}")
        return self.sink_tokens + slot * self.frame_tokens

    def valid_tokens(self, start_frame: int) -> int:
        """Arena rows that the block at `start_frame` attends to, once its own keys are written."""
        return self.sink_tokens + min(start_frame + self.frames_per_block, self.ring_frames) * self.frame_tokens


def check_size(size: tuple[int, int]) -> None:
    """InputError, with a size that is near, unless (width, height) in pixels is made of multiples of 64."""
    width, height = size
    if width < 64 or height < 64 or width % 64 or height % 64 or max(size) > LONGEST_SIDE:
        near = [min(LONGEST_SIDE, max(64, round(side / 64) * 64)) for side in (width, height)]
        raise InputError(
            f"a size of {width}x{height} is not made of multiples of 64 up to {LONGEST_SIDE}; "
            f"{near[0]}x{near[1]} is near"
        )


def split_pairs(head_dim: int) -> tuple[int, int, int]:
    """Complex pairs of a head given to time, row and column: d=128 -> (22, 21, 21)."""
    spatial = head_dim // 6
    return head_dim // 2 - 2 * spatial, spatial, spatial


def angles(positions: npt.ArrayLike, pairs: int) -> Angles:
    """cos and sin of position * theta^(-i/pairs): float64, rounded to float32, then to float16, as published.

    positions: [n], any integers (negative ones give the conjugate). Returns two arrays [n, pairs].
    """
    frequencies = ROPE_THETA ** (-np.arange(pairs, dtype=np.float64) / pairs)
    angle = np.asarray(positions, dtype=np.float64)[:, None] * frequencies
    return (
        np.cos(angle).astype(np.float32).astype(np.float16),
        np.sin(angle).astype(np.float32).astype(np.float16),
    )


def grid_angles(times: npt.ArrayLike, rows: npt.ArrayLike, cols: npt.ArrayLike, head_dim: int) -> Angles:
    """RoPE table of a token grid, time-major then row then column: two arrays [len(t)*len(r)*len(c), head_dim/2]."""
    axes = [np.asarray(axis) for axis in (times, rows, cols)]
    counts = [len(axis) for axis in axes]
    parts = [angles(axis, pairs) for axis, pairs in zip(axes, split_pairs(head_dim), strict=True)]
    tables = []
    for which in range(2):
        spread = []
        for axis, part in enumerate(parts):
            shape = [1, 1, 1, part[which].shape[1]]
            shape[axis] = counts[axis]
            spread.append(np.broadcast_to(part[which].reshape(shape), (*counts, shape[3])))
        tables.append(np.concatenate(spread, axis=3).reshape(-1, head_dim // 2))
    return tables[0], tables[1]


def coarse_positions(size: int, count: int) -> npt.NDArray[np.int64]:
    """`count` integer positions spread over 0..size-1 with both ends, truncated (spec dit.md section 4)."""
    if count == 1:
        return np.zeros(1, dtype=np.int64)
    return np.arange(count, dtype=np.int64) * (size - 1) // (count - 1)


def motion_angles(geometry: Geometry) -> Angles:
    """RoPE table of the packed motion tokens, in sink order: two arrays [sink_tokens - P, head_dim/2]."""
    tables = [
        grid_angles(
            times,
            coarse_positions(geometry.rows, geometry.rows // stride),
            coarse_positions(geometry.cols, geometry.cols // stride),
            geometry.head_dim,
        )
        for _, _, _, stride, times in MOTION_BUCKETS
    ]
    return np.concatenate([table[0] for table in tables]), np.concatenate([table[1] for table in tables])


def reference_position(start_frame: int, relative_distance: int) -> int:
    """RoPE time of the sink's reference frame while the block at `start_frame` runs (spec dit.md 7.3)."""
    return max(REFERENCE_POSITION, start_frame + relative_distance)
