"""Sizes of the Wan VAE, read off the checkpoint's tensors (the published file has no configuration)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from liverelay.engine.errors import CheckpointError

LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
Shapes = dict[str, tuple[int, ...]]
# The decoder whole, or as two pieces in order, and which part of its operations each has at the published widths.
WHOLE, FIRST, SECOND = "vae", "vae1", "vae2"
PIECES = {WHOLE: 1.0, FIRST: 0.489, SECOND: 0.511}
# Steps of `decoder_plan` in the first piece. No other cut has a smaller larger piece (spec 2.7), and only cuts of which
# one piece has 79% or more hand over less: here 192 channels of 4 frames at half the video's width and height.
CUT = 10


class DecoderStep(NamedTuple):
    """channels in and out; frames of a later latent, and scale, of what comes in."""

    name: str
    kind: str
    inner: int
    out: int
    frames: int
    scale: int


@dataclass(frozen=True)
class VAEConfig:
    """Widths and plan of the VAE (spec vae_audio_text.md 1); `temporal` says which encoder levels halve the frames."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[float, ...] = LATENT_MEAN
    latent_std: tuple[float, ...] = LATENT_STD

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]], **given: tuple[float, ...]) -> VAEConfig:
        """Derive everything from the state dict's shapes; `given` may set latent_mean and latent_std."""
        for key in ("encoder.conv1.weight", "conv2.weight"):
            if key not in shapes or not shapes[key]:
                raise CheckpointError(f"the VAE checkpoint lacks '{key}'")
        base = max(1, shapes["encoder.conv1.weight"][0])
        widths, temporal, blocks, i = [], [], [0], 0
        while parts := [key for key in shapes if key.startswith(f"encoder.downsamples.{i}.")]:
            # Weight or bias tells: where one of them is lost, the comparison with all shapes names it.
            outs = [shapes[key][0] for key in parts if ".residual." in key and key.endswith("bias") and shapes[key]]
            if outs:
                width = outs[0]
                blocks[-1] += 1
            elif blocks[-1]:
                widths.append(width)
                temporal.append(any(".time_conv." in key for key in parts))
                blocks.append(0)
            else:
                break
            i += 1
        if not blocks[-1] or len(set(blocks)) > 1 or any(each % base for each in (*widths, width)):
            raise CheckpointError("the VAE checkpoint's 'encoder.downsamples' are not levels of equal depth")
        mult = tuple(each // base for each in (*widths, width))
        config = cls(base, shapes["conv2.weight"][0], mult, blocks[0], tuple(temporal), **given)
        if len(config.latent_mean) != config.z_dim or len(config.latent_std) != config.z_dim:
            raise CheckpointError(f"the VAE has {config.z_dim} latent channels; its normalisation is known for 16")
        return config

    def encoder_plan(self) -> list[tuple[str, str]]:
        """(name, kind) of `encoder.downsamples` in order; kind: residual, down2d, down3d."""
        kinds = []
        for level in range(len(self.dim_mult)):
            kinds += ["residual"] * self.num_res_blocks
            if level < len(self.temporal):
                kinds.append("down3d" if self.temporal[level] else "down2d")
        return [(f"encoder.downsamples.{i}", kind) for i, kind in enumerate(kinds)]

    def decoder_plan(self) -> list[tuple[str, str]]:
        """(name, kind) of `decoder.upsamples` in order; kind: residual, up2d, up3d."""
        kinds = []
        for level in range(len(self.dim_mult)):
            kinds += ["residual"] * (self.num_res_blocks + 1)
            if level < len(self.temporal):
                kinds.append("up3d" if self.temporal[-1 - level] else "up2d")
        return [(f"decoder.upsamples.{i}", kind) for i, kind in enumerate(kinds)]

    def decoder_widths(self) -> list[tuple[int, int]]:
        """(channels in, channels out) of each step of `decoder_plan`."""
        widths = [self.base_dim * mult for mult in reversed(self.dim_mult)]
        level, current, pairs = 0, widths[0], []
        for _, kind in self.decoder_plan():
            out = widths[level] if kind == "residual" else current // 2
            pairs.append((current, out))
            level += kind != "residual"
            current = out
        return pairs

    def encoder_widths(self) -> list[tuple[int, int]]:
        """(channels in, channels out) of each step of `encoder_plan`."""
        widths = [self.base_dim * mult for mult in self.dim_mult]
        level, current, pairs = 0, self.base_dim, []
        for _, kind in self.encoder_plan():
            out = widths[level] if kind == "residual" else current
            pairs.append((current, out))
            level += kind != "residual"
            current = out
        return pairs

    def decoder_steps(self) -> list[DecoderStep]:
        """The steps of `decoder_plan`, and the head."""
        frames = scale = 1
        steps = []
        for (name, kind), (inner, out) in zip(self.decoder_plan(), self.decoder_widths(), strict=True):
            steps.append(DecoderStep(name, kind, inner, out, frames, scale))
            if kind != "residual":
                frames, scale = frames * (2 if kind == "up3d" else 1), scale * 2
        return [*steps, DecoderStep("decoder.head", "head", out, 3, frames, scale)]

    def decoder_slots(self, piece: str = WHOLE) -> dict[str, tuple[int, int, int]]:
        """Feature caches of the decoder: convolution -> (channels, frames of a later latent, scale) (spec 2.4)."""
        top = self.base_dim * self.dim_mult[-1]
        slots = {"decoder.conv1": (self.z_dim, 1, 1)}
        for i in (0, 2):
            slots |= {f"decoder.middle.{i}.residual.{conv}": (top, 1, 1) for conv in (2, 6)}
        if piece == SECOND:
            slots = {}
        for name, kind, inner, out, frames, scale in self._steps_of(piece):
            convs = {"residual": {"residual.2": inner, "residual.6": out}, "up3d": {"time_conv": inner},
                     "head": {"2": inner}}  # fmt: skip
            slots |= {f"{name}.{conv}": (channels, frames, scale) for conv, channels in convs.get(kind, {}).items()}
        return slots

    def primed_steps(self, piece: str = WHOLE) -> list[tuple[DecoderStep, int]]:
        """A piece's steps, each with how many of a new stream's latest latents it has to see for all of the piece's
        feature caches to end as if it had seen every one. A cache holds two frames; a step has to be given as many
        right ones as its own caches and the steps after it look back on."""
        counted, right = list[tuple[DecoderStep, int]](), 0  # frames at the end
        for step in reversed(self._steps_of(piece)):
            if step.kind == "up3d":
                right = -(-right // 2) + 2
            else:
                right += {"residual": 4, "head": 2, "up2d": 0}[step.kind]
            counted.append((step, -(-right // step.frames)))
        return counted[::-1]

    def _steps_of(self, piece: str) -> list[DecoderStep]:
        steps = self.decoder_steps()
        return {WHOLE: steps, FIRST: steps[:CUT], SECOND: steps[CUT:]}[piece]

    def handoff(self, latents: int, latent_h: int, latent_w: int) -> tuple[int, int, int, int]:
        """Between the pieces of the decoder, for later latents: features [frames, channels, height, width]."""
        step = self.decoder_steps()[CUT]
        return latents * step.frames, step.inner, latent_h * step.scale, latent_w * step.scale


def expected_shapes(config: VAEConfig) -> Shapes:
    """Every key of the state dict with its shape."""
    c = config

    def conv(name: str, out: int, inner: int, *kernel: int) -> Shapes:
        return {f"{name}.weight": (out, inner, *kernel), f"{name}.bias": (out,)}

    def residual(name: str, inner: int, out: int) -> Shapes:
        shapes: Shapes = {f"{name}.residual.0.gamma": (inner, 1, 1, 1), f"{name}.residual.3.gamma": (out, 1, 1, 1)}
        shapes |= conv(f"{name}.residual.2", out, inner, 3, 3, 3) | conv(f"{name}.residual.6", out, out, 3, 3, 3)
        return shapes | (conv(f"{name}.shortcut", out, inner, 1, 1, 1) if inner != out else {})

    def middle(name: str, width: int) -> Shapes:
        attention: Shapes = {f"{name}.1.norm.gamma": (width, 1, 1)}
        attention |= conv(f"{name}.1.to_qkv", 3 * width, width, 1, 1) | conv(f"{name}.1.proj", width, width, 1, 1)
        return residual(f"{name}.0", width, width) | attention | residual(f"{name}.2", width, width)

    top, z = c.base_dim * c.dim_mult[-1], c.z_dim
    shapes = conv("encoder.conv1", c.base_dim, 3, 3, 3, 3) | conv("decoder.conv1", top, z, 3, 3, 3)
    plans, widths = c.encoder_plan() + c.decoder_plan(), c.encoder_widths() + c.decoder_widths()
    for (name, kind), (inner, out) in zip(plans, widths, strict=True):
        if kind == "residual":
            shapes |= residual(name, inner, out)
            continue
        shapes |= conv(f"{name}.resample.1", out, inner, 3, 3)
        if kind in ("down3d", "up3d"):
            shapes |= conv(f"{name}.time_conv", inner * (2 if kind == "up3d" else 1), inner, 3, 1, 1)
    shapes |= middle("encoder.middle", top) | middle("decoder.middle", top)
    last = c.base_dim * c.dim_mult[0]
    shapes |= {"encoder.head.0.gamma": (top, 1, 1, 1), "decoder.head.0.gamma": (last, 1, 1, 1)}
    shapes |= conv("encoder.head.2", 2 * z, top, 3, 3, 3) | conv("decoder.head.2", 3, last, 3, 3, 3)
    return shapes | conv("conv1", 2 * z, 2 * z, 1, 1, 1) | conv("conv2", z, z, 1, 1, 1)
