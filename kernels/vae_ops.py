"""Backend `torch`: the operators of the VAE in plain PyTorch, on any device (spec vae_audio_text.md 1.1, 2.6, 7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def vae_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """x / max(||x||, 1e-12) * sqrt(C) * gamma over channels, in float32. x [n, C, h, w], gamma [C] float32."""
    wide = x.float()
    length = wide.square().sum(dim=1, keepdim=True).sqrt_().clamp_min_(1e-12)
    return (wide / length).mul_((gamma * x.shape[1] ** 0.5).view(-1, 1, 1))


def vae_norm_silu(x: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
    """out = R(silu(norm(x))): channel RMS norm and SiLU in float32, one rounding.

    x [n, C, h, w] of the working dtype, gamma [C] float32, out of the same shape (a slice of a feature cache).
    """
    return out.copy_(F.silu(vae_norm(x, gamma), inplace=True))


def to_uint8(frames: Tensor) -> Tensor:
    """Packed RGB bytes, truncated: 255 * (clamp(x, -1, 1) + 1) / 2. frames [3, T, H, W] -> [T, H, W, 3] uint8."""
    scaled = frames.clamp(-1, 1).add_(1).div_(2).mul_(255)
    return scaled.permute(1, 2, 3, 0).to(torch.uint8, memory_format=torch.contiguous_format)
