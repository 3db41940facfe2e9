"""Backend `triton`, the VAE's part: activations lie channels last, as its convolutions want them on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from liverelay.kernels import pixels
from liverelay.kernels.pixels import to_nv12, to_uint8
from liverelay.kernels.vae_ops import vae_norm

__all__ = ["to_nv12", "to_uint8", "vae_norm", "vae_norm_silu"]


def vae_norm_silu(x: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
    """The fused kernel; x is brought into channels-last layout first where a convolution left it in another."""
    return pixels.vae_norm_silu(x.contiguous(memory_format=torch.channels_last), gamma, out)
