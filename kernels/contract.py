"""Argument types that every backend's operators share. Only torch is imported here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
Update = tuple[Tensor, Tensor | None]  # [T, D] to add to the residual stream, and its gate [D] float32 or None for 1


@dataclass(frozen=True)
class Norm:
    """A LayerNorm's modulation and the published roundings around it (spec dit.md section 3).

    out = LN * a + b with b = shift and a = scale, or R(1 + scale) with `plus_one`, R in the dtype of scale.
    scale, shift [D], or [F, D] for one row per latent frame. round_input: the input is rounded to the stream's dtype
    first; round_norm: LN's result is.
    """

    scale: Tensor
    shift: Tensor
    plus_one: bool = True
    round_input: bool = False
    round_norm: bool = False


@dataclass(frozen=True)
class Scales:
    """What the e4m3 codes of a layer's attention stand for: value = code * scale, fixed when its weights are loaded.

    q, k [H] float32, one for each head; v: one number. e4m3 is a float format, so that a scale only has to keep
    values in range, and none of them is looked up for a single key. Queries and keys are those of
    `torch_ops.hadamard`.
    """

    q: Tensor
    k: Tensor
    v: float


def hadamard_block(head_dim: int) -> int:
    """How many neighbours in a head are transformed together: 16, or the largest power of two below that divides it."""
    return math.gcd(head_dim, 16)


def transposed(shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Zeros [..., N, H, d] in e4m3 whose N is contiguous, each channel's first token at a multiple of 16 bytes.

    Of v in FP8 attention: the tensor cores take an FP8 operand only with the sum's dimension contiguous.
    """
    *outer, rows, heads, head_dim = shape
    stored = torch.zeros(*outer, heads, head_dim, -(-rows // 16) * 16, device=device, dtype=FP8)
    return stored.movedim(-1, -3)[..., :rows, :, :]


@dataclass
class Place:
    """Where a block stands in its arena: first row of its slot, rows that attention sees, whether the sink moves.

    `scalars` int32 [3] holds the same on the device, for kernels whose launch is captured once and replayed.
    """

    row: int
    valid: int
    moved: bool
    scalars: Tensor

    @classmethod
    def make(cls, device: torch.device | str) -> Place:
        return cls(0, 0, False, torch.zeros(3, dtype=torch.int32, device=device))

    def fill(self, row: int, valid: int, moved: bool) -> Place:
        """Set all three, here and on the device, which is waited for: not for what goes on without end."""
        self.row, self.valid, self.moved = row, valid, moved
        self.scalars.copy_(torch.tensor([row, valid, int(moved)], dtype=torch.int32))
        return self
