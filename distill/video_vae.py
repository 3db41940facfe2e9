"""The Wan VAE for training: whole clips in batches, gradients, the published keys (spec vae_audio_text.md 1, 2).

The engine streams it chunk by chunk against feature caches; for a whole clip the same sums are plain causal
convolutions, but for the first frame, which the time convolutions leave alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liverelay.engine.models.vae_config import VAEConfig

Format = torch.channels_last_3d  # three to ten times faster on a CPU in bfloat16


class Norm(nn.Module):
    """x / |x| * sqrt(C) * gamma over the channels."""

    def __init__(self, width: int, dims: int = 4) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *[1] * (dims - 1)))

    def forward(self, x: Tensor) -> Tensor:
        scale = (x.float().square().mean(dim=1, keepdim=True) + 1e-12).rsqrt().to(x.dtype)
        return x * scale * self.gamma.to(x.dtype)


class CausalConv(nn.Conv3d):
    """3x3x3, two zero frames before the clip. It begins as a convolution of each frame by itself."""

    def __init__(self, inner: int, out: int) -> None:
        super().__init__(inner, out, 3, padding=(0, 1, 1))
        with torch.no_grad():
            self.weight[:, :, :2] = 0
            self.weight[:, :, 2] *= 3**0.5

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] == 1:  # a picture: both frames before it are zero
            return F.conv2d(x[:, :, 0], self.weight[:, :, 2], self.bias, padding=1).unsqueeze(2)
        return super().forward(F.pad(x, (0, 0, 0, 0, 2, 0)))


class Residual(nn.Module):
    """Two norm-SiLU-convolutions and the shortcut."""

    def __init__(self, inner: int, out: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            Norm(inner), nn.SiLU(), CausalConv(inner, out), Norm(out), nn.SiLU(), nn.Identity(), CausalConv(out, out)
        )
        self.shortcut = nn.Conv3d(inner, out, 1) if inner != out else nn.Identity()
        nn.init.zeros_(self.residual[6].weight)  # a residual block begins as its shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.residual(x)


class Attention(nn.Module):
    """Single-head attention over the positions of each frame, plus x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Norm(width, 3)
        self.to_qkv, self.proj = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        frames = x.transpose(1, 2).reshape(b * t, c, h, w)
        q, k, v = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=3)
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(b * t, c, h, w)
        return x + self.proj(y).reshape(b, t, c, h, w).transpose(1, 2)


class Resample(nn.Module):
    """Half or double height and width; with `temporal` the frames too, but for the first one."""

    def __init__(self, inner: int, out: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(inner, out, 3))
        if kind.endswith("3d"):
            copies = 2 if kind == "up3d" else 1
            self.time_conv = nn.Conv3d(inner, inner * copies, (3, 1, 1))
            with torch.no_grad():  # it begins by taking, or doubling, the latest frame
                self.time_conv.weight.zero_()
                self.time_conv.weight[:, :, 2, 0, 0] = torch.eye(inner).repeat(copies, 1)
                self.time_conv.bias.zero_()

    def spatial(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        x, conv = x.transpose(1, 2).reshape(b * t, c, h, w), self.resample[1]
        if self.kind.startswith("up"):
            x = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest-exact"), conv.weight, conv.bias, padding=1)
        else:
            x = F.conv2d(F.pad(x, (0, 1, 0, 1)), conv.weight, conv.bias, stride=2)
        return x.reshape(b, t, *x.shape[1:]).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "up3d" and x.shape[2] > 1:
            later = self.time_conv(F.pad(x[:, :, 1:], (0, 0, 0, 0, 2, 0)))
            b, c, t, h, w = later.shape
            later = later.view(b, 2, c // 2, t, h, w).permute(0, 2, 3, 1, 4, 5).reshape(b, c // 2, 2 * t, h, w)
            x = torch.cat([x[:, :, :1], later], dim=2)
        x = self.spatial(x)
        if self.kind == "down3d" and x.shape[2] > 1:
            time = self.time_conv
            x = torch.cat([x[:, :, :1], F.conv3d(x, time.weight, time.bias, stride=(2, 1, 1))], dim=2)
        return x


class Half(nn.Module):
    """Encoder or decoder: convolution, the plan's steps beside the middle, norm, convolution."""

    def __init__(self, config: VAEConfig, encoder: bool) -> None:
        super().__init__()
        plan = config.encoder_plan() if encoder else config.decoder_plan()
        widths = config.encoder_widths() if encoder else config.decoder_widths()
        top, first = config.base_dim * config.dim_mult[-1], config.base_dim
        self.conv1 = CausalConv(3, first) if encoder else CausalConv(config.z_dim, top)
        self.middle = nn.Sequential(Residual(top, top), Attention(top), Residual(top, top))
        steps = nn.Sequential(*(
            Residual(*width) if kind == "residual" else Resample(*width, kind)
            for (_, kind), width in zip(plan, widths, strict=True)
        ))  # fmt: skip
        last, out = (top, 2 * config.z_dim) if encoder else (first * config.dim_mult[0], 3)
        if encoder:
            self.downsamples = steps
        else:
            self.upsamples = steps
        self.head = nn.Sequential(Norm(last), nn.SiLU(), CausalConv(last, out))
        self._order = [self.conv1, steps, self.middle] if encoder else [self.conv1, self.middle, steps]

    def forward(self, x: Tensor) -> Tensor:
        for part in self._order:
            x = part(x)
        return self.head(x)


class VideoVAE(nn.Module):
    """encode: [B, 3, 1 + 4n, H, W] in [-1, 1] -> normalised latents [B, 16, 1 + n, H/8, W/8]; decode: the way back."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config, z = config, config.z_dim
        self.encoder, self.decoder = Half(config, True), Half(config, False)
        self.conv1, self.conv2 = nn.Conv3d(2 * z, 2 * z, 1), nn.Conv3d(z, z, 1)
        for name, values in (("mean", config.latent_mean), ("std", config.latent_std)):
            self.register_buffer(name, torch.tensor(values).view(1, z, 1, 1, 1), persistent=False)
        for weight in self.parameters():
            if weight.dim() == 5:
                weight.data = weight.data.contiguous(memory_format=Format)

    def encode(self, video: Tensor) -> Tensor:
        coded = self.conv1(self.encoder(video.contiguous(memory_format=Format))).float()
        return (coded[:, : self.config.z_dim] - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        x = self.conv2((latents * self.std + self.mean).contiguous(memory_format=Format))
        return self.decoder(x).float()
