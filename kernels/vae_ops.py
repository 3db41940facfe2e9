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


def unit(frames: Tensor) -> Tensor:
    """(clamp(x, -1, 1) + 1) / 2, a new tensor; NaN counts as -1."""
    return frames.nan_to_num(nan=-1.0).clamp_(-1, 1).add_(1).div_(2)


def to_uint8(frames: Tensor, out: Tensor | None = None) -> Tensor:
    """Packed RGB bytes, truncated: 255 * (clamp(x, -1, 1) + 1) / 2. frames [3, T, H, W] -> [T, H, W, 3] uint8."""
    scaled = unit(frames).mul_(255).permute(1, 2, 3, 0)
    return scaled.to(torch.uint8, memory_format=torch.contiguous_format) if out is None else out.copy_(scaled)


def to_nv12(frames: Tensor, out: Tensor | None = None) -> Tensor:
    """NV12 bytes, BT.709 limited range, rounded to nearest; chroma is that of the mean of 2x2 pixels.

    frames [3, T, H, W], H and W even -> [T, H * 3/2, W] uint8: H rows of Y, then H/2 rows of interleaved Cb, Cr.
    """
    return _to_nv12(unit(frames.float()), out)


def bytes_to_nv12(pixels: Tensor, out: Tensor | None = None) -> Tensor:
    """As `to_nv12`, for packed RGB bytes: [T, H, W, 3] uint8, H and W even -> [T, H * 3/2, W] uint8."""
    return _to_nv12(pixels.permute(3, 0, 1, 2).contiguous().float().div_(255), out)


def _to_nv12(rgb: Tensor, out: Tensor | None) -> Tensor:
    """As `to_nv12`, for colours from 0 to 1 in float32 [3, T, H, W]."""
    _, count, height, width = rgb.shape
    if out is None:
        out = torch.empty(count, height // 2 * 3, width, dtype=torch.uint8, device=rgb.device)
    out[:, :height] = _luma(rgb).mul_(219).add_(16).add_(0.5)
    rows = rgb[:, :, 0::2] + rgb[:, :, 1::2]
    mean = (rows[..., 0::2] + rows[..., 1::2]).mul_(0.25)
    luma, chroma = _luma(mean), out[:, height:].unflatten(2, (-1, 2))
    chroma[..., 0] = (mean[2] - luma).mul_(224 / 1.8556).add_(128).add_(0.5)
    chroma[..., 1] = (mean[0] - luma).mul_(224 / 1.5748).add_(128).add_(0.5)
    return out


def _luma(rgb: Tensor) -> Tensor:
    r, g, b = rgb
    return (0.2126 * r).add_(0.7152 * g).add_(0.0722 * b)
