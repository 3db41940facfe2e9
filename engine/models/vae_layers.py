"""The VAE's building blocks as functions over a table of weights and static feature caches.

Activations are [n, C, h, w], one row a frame, channels last: the layout of 3-D convolutions on a GPU. On a CPU three
neighbouring frames become the 3C input channels of a 2-D convolution, which is twice as fast in this layout where the
channels are few. Source: spec vae_audio_text.md 1.1, 2.1 to 2.3, 2.6.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from liverelay.engine.models.convolution import convolve

FORMAT = torch.channels_last


@dataclass
class Conv:
    """Weight and bias of one convolution, in the layout and dtype that it is computed in."""

    weight: Tensor
    bias: Tensor


@dataclass
class FeatureCache:
    """Static [history | chunk] buffers of one stream, by name of the convolution that reads them.

    `first`: nothing was decoded (encoded) yet; then the time convolutions are skipped (spec 2.2, 2.3).
    """

    buffers: dict[str, Tensor] = field(default_factory=dict)
    first: bool = True

    def reset(self) -> None:
        """Back to the empty cache of a new stream."""
        for buffer in self.buffers.values():
            buffer.zero_()
        self.first = True

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers.values())


class Layers:
    """Convolutions, norms and blocks of one half of the VAE.

    keys: those of `weights` that this half needs; values: dtype that all weights are rounded to; operand: dtype that
    a convolution's inputs are rounded to; stream: dtype of everything between convolutions; ops: operators of the
    kernel backend. A CPU convolves in float32, which is the definition of a 16-bit convolution before its rounding.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], keys: Iterable[str], device: torch.device, *, values: torch.dtype,
        operand: torch.dtype, stream: torch.dtype, ops: ModuleType,
    ) -> None:
        self.ops = ops
        self.device, self.operand, self.stream = device, operand, stream
        self._on_cpu = device.type == "cpu"
        self._compute = torch.float32 if self._on_cpu else operand
        self._tf32 = values != torch.float32  # whoever asks for float32 wants it throughout
        self._convs: dict[str, Conv] = {}
        self._gammas: dict[str, Tensor] = {}
        for key in keys:
            name, leaf = key.rsplit(".", 1)
            value = weights[key].to(device, values, copy=True)  # never a view of the mapped file
            if leaf == "gamma":
                self._gammas[name] = value.flatten().float()
            elif leaf == "weight":
                bias = weights[f"{name}.bias"].to(device, values, copy=True).to(self._compute)
                self._convs[name] = Conv(self._arrange(value.to(self._compute)), bias)

    def _arrange(self, weight: Tensor) -> Tensor:
        """Channels last; 2-D throughout on a CPU (time taps become channels)."""
        if weight.dim() == 5 and (self._on_cpu or weight.shape[2] == 1):
            weight = weight.transpose(1, 2).flatten(1, 2)
        layout = torch.channels_last_3d if weight.dim() == 5 else FORMAT
        return weight.contiguous(memory_format=layout)

    def conv(self, name: str, x: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
        """A 2-D (or 1x1x1) convolution, frame by frame."""
        conv = self._convs[name]
        x = x.to(self.operand).to(self._compute)
        return self._convolve(x, conv, stride, padding).to(self.stream)

    def _convolve(self, x: Tensor, conv: Conv, stride: int | tuple[int, ...], padding: int | tuple[int, ...]) -> Tensor:
        return convolve(x, conv.weight, conv.bias, stride=stride, padding=padding, tf32=self._tf32)

    def _time_conv(self, name: str, slot: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
        """A convolution over three frames at a time: slot [2 + n, C, h, w] -> [n (every stride-th), C', h, w]."""
        conv = self._convs[name]
        x = slot.to(self._compute)
        if self._on_cpu:
            frames = x.shape[0]
            windows = torch.cat([x[tap : frames - 2 + tap : stride] for tap in range(3)], dim=1)
            return self._convolve(windows, conv, 1, padding).to(self.stream)
        volume = x.transpose(0, 1).unsqueeze(0)
        y = self._convolve(volume, conv, (stride, 1, 1), (0, padding, padding))
        return y[0].transpose(0, 1).to(self.stream)

    def make(self, channels: int, frames: int, height: int, width: int) -> Tensor:
        """An empty feature buffer; its zeros are the published left padding."""
        buffer = torch.zeros((frames, channels, height, width), device=self.device, dtype=self.operand)
        return buffer.contiguous(memory_format=FORMAT)

    def arranged(self, memory: Tensor) -> Tensor:
        """Contiguous memory of [n, C, h, w] in the layout of activations."""
        n, channels, height, width = memory.shape
        return memory.view(n, height, width, channels).permute(0, 3, 1, 2)

    def _slot(self, name: str, x: Tensor, cache: FeatureCache, history: int = 2) -> Tensor:
        """The [history | chunk] view for a chunk like x; made at first use where the cache did not foresee it."""
        frames = history + x.shape[0]
        buffer = cache.buffers.get(name)
        if buffer is None or buffer.shape[0] < frames:
            grown = self.make(x.shape[1], frames, x.shape[2], x.shape[3])
            if buffer is not None:
                grown[:history].copy_(buffer[:history])
            buffer = cache.buffers[name] = grown
        return buffer[:frames]

    @staticmethod
    def _keep_history(slot: Tensor, history: int = 2) -> None:
        """The slot's last frames become its first, in an order that is safe where the two overlap."""
        frames = slot.shape[0]
        for i in range(history):
            slot[i].copy_(slot[frames - history + i])

    def causal(self, conv: str, x: Tensor, cache: FeatureCache, padding: int = 1) -> Tensor:
        """A causal convolution over time of x itself."""
        slot = self._slot(conv, x, cache)
        slot[2:].copy_(x)
        y = self._time_conv(conv, slot, padding=padding)
        self._keep_history(slot)
        return y

    def norm_conv(self, norm: str, conv: str, x: Tensor, cache: FeatureCache) -> Tensor:
        """Norm, SiLU and a causal 3x3x3 convolution."""
        slot = self._slot(conv, x, cache)
        self.ops.vae_norm_silu(x, self._gammas[norm], slot[2:])
        y = self._time_conv(conv, slot, padding=1)
        self._keep_history(slot)
        return y

    def residual(self, name: str, x: Tensor, cache: FeatureCache) -> Tensor:
        """Two norm-SiLU-convolutions and the shortcut."""
        y = self.norm_conv(f"{name}.residual.0", f"{name}.residual.2", x, cache)
        y = self.norm_conv(f"{name}.residual.3", f"{name}.residual.6", y, cache)
        shortcut = self.conv(f"{name}.shortcut", x) if f"{name}.shortcut" in self._convs else x
        return y.add_(shortcut)

    def middle(self, name: str, x: Tensor, cache: FeatureCache) -> Tensor:
        """Residual block, attention, residual block."""
        x = self.residual(f"{name}.0", x, cache)
        x = self.attention(f"{name}.1", x)
        return self.residual(f"{name}.2", x, cache)

    def attention(self, name: str, x: Tensor) -> Tensor:
        """Single-head attention over the positions of each frame, plus x."""
        normed = self.ops.vae_norm(x, self._gammas[f"{name}.norm"])
        qkv = self.conv(f"{name}.to_qkv", normed).flatten(2).transpose(1, 2)  # [n, h w, 3C]
        q, k, v = (part.unsqueeze(1) for part in qkv.chunk(3, dim=2))
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.conv(f"{name}.proj", y.transpose(1, 2).reshape(x.shape))

    def up(self, name: str, x: Tensor, cache: FeatureCache, temporal: bool) -> Tensor:
        """Double height and width; with `temporal` first double the frames, except for the very first latent."""
        if temporal and not cache.first:
            y = self.causal(f"{name}.time_conv", x, cache, padding=0)
            x = y.unflatten(1, (2, -1)).flatten(0, 1)  # the two halves of the channels are neighbours in time
        doubled = F.interpolate(x, scale_factor=2.0, mode="nearest-exact")
        return self.conv(f"{name}.resample.1", doubled, padding=1)

    def down(self, name: str, x: Tensor, cache: FeatureCache, temporal: bool) -> Tensor:
        """Halve height and width; with `temporal` then halve the frames, except for the very first chunk."""
        x = self.conv(f"{name}.resample.1", F.pad(x, (0, 1, 0, 1)), stride=2)
        if not temporal:
            return x
        slot = self._slot(f"{name}.time_conv", x, cache, history=1)
        slot[1:].copy_(x)
        y = x if cache.first else self._time_conv(f"{name}.time_conv", slot, stride=2)
        self._keep_history(slot, history=1)
        return y
