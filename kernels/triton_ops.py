"""Backend `triton`: the fused kernels; what stays PyTorch (matrix products, cold paths) comes from `torch_ops`."""

from __future__ import annotations

from liverelay.kernels.attention import attention
from liverelay.kernels.audio import audio_attention
from liverelay.kernels.feedforward import gelu
from liverelay.kernels.latent import embed, euler_step
from liverelay.kernels.norm import inverse_rms, residual_norm, rms_norm
from liverelay.kernels.quant import quantize_rows
from liverelay.kernels.rope import qk_norm_rope
from liverelay.kernels.torch_ops import linear, linear_fp8, patches, unpatchify
from liverelay.kernels.values import store_values

__all__ = [
    "attention", "audio_attention", "embed", "euler_step", "gelu", "inverse_rms", "linear", "linear_fp8", "patches",
    "qk_norm_rope", "quantize_rows", "residual_norm", "rms_norm", "store_values", "unpatchify",
]  # fmt: skip
