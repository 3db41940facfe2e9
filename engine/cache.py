"""The arena `[sink | ring]`: keys and values of one session at one stage, allocated once, never concatenated.

Every key in it is ready to use (normalised and rotated), so that any dense attention kernel reads rows 0..valid
without a copy. Order does not matter to attention, so the ring wraps in place (design section 2, spec dit.md 7).
"""

from __future__ import annotations

import torch

from liverelay.engine.config import DiTConfig
from liverelay.engine.models.geometry import REFERENCE_POSITION, Geometry


class Arena:
    """Keys and values of all layers at one noise level.

    `k`, `v` [L, N, H, d] with N = geometry.arena_tokens; `reference_k` [L, P, H, d] keeps the reference frame's keys
    before RoPE, from which they are rotated anew when their position moves; `reference_position` is where they are.
    """

    def __init__(
        self, config: DiTConfig, geometry: Geometry, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.geometry = geometry
        heads = (config.num_heads, config.head_dim)
        self.k = torch.zeros((config.num_layers, geometry.arena_tokens, *heads), device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.reference_k = torch.zeros(
            (config.num_layers, geometry.frame_tokens, *heads), device=device, dtype=dtype
        )
        self.reference_position = REFERENCE_POSITION

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes + self.reference_k.nbytes

    def reset(self) -> None:
        """Back to the state of a new session: unwritten ring rows are zero, as in the published caches."""
        for tensor in (self.k, self.v, self.reference_k):
            tensor.zero_()
        self.reference_position = REFERENCE_POSITION

    def copy_sink(self, other: Arena) -> None:
        """Take the sink of an arena of the same shape: it is the same at every timestep, so one prefill serves all."""
        sink = self.geometry.sink_tokens
        self.k[:, :sink].copy_(other.k[:, :sink])
        self.v[:, :sink].copy_(other.v[:, :sink])
        self.reference_k.copy_(other.reference_k)
        self.reference_position = other.reference_position


def arena_bytes(config: DiTConfig, geometry: Geometry, element_bytes: int = 2) -> int:
    """Memory of one arena: what one session needs at one stage."""
    rows = 2 * geometry.arena_tokens + geometry.frame_tokens
    return config.num_layers * rows * config.dim * element_bytes
