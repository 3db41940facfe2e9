"""`vae_norm_silu`, the activation before the VAE's convolutions; `to_uint8` and `to_nv12`, frames to bytes.

    vae_norm_silu:  y = x / max(||x||, 1e-12) * sqrt(C) * gamma over the channels of a position; out = R(y * sigmoid(y))
    to_uint8:       byte = trunc(255 * (clamp(x, -1, 1) + 1) / 2), packed RGB
    to_nv12:        Y = 16 + 219 L, Cb = 128 + 224 (B - L) / 1.8556, Cr = 128 + 224 (R - L) / 1.5748, to nearest, with
                    L = 0.2126 R + 0.7152 G + 0.0722 B (BT.709, limited range); chroma of the mean of 2x2 pixels

All between input and output is float32; a NaN pixel is black. vae_norm_silu: x, out [n, C, h, w] channels last.
Bytes: 2 n C h w * element size, FLOPs: about 9 for each element; frames [3, T, H, W]: T H W (3 * element size + 3) and,
NV12, T H W (3 * element size + 1.5), FLOPs: 12 and about 22 for each pixel. Source: spec vae_audio_text.md 1.1, 2.6, 7;
ITU-R BT.709.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from liverelay.kernels import vae_ops
from liverelay.kernels.launch import check, next_power_of_two, refuse, run
from liverelay.kernels.spec import Case, Cost, Dims, KernelSpec, MakeCase, poisoned, random

NORM_TILE = 2048  # elements of a program of vae_norm_silu
PIXEL_TILE = 1024  # pixels of a program of to_uint8; of each row of to_nv12


@triton.jit
def vae_norm_silu_kernel(
    x, gamma, out, x_frame, x_row, x_column, out_frame, out_row, out_column, positions, plane, width, root,
    CHANNELS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    position = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    channel = tl.arange(0, TILE)[None, :]
    inside = (position < positions) & (channel < CHANNELS)
    frame = (position // plane).to(tl.int64)
    row, column = (position % plane) // width, position % width
    place = frame * x_frame + (row * x_row + column * x_column) + channel
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(gamma + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32) * root
    length = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1, keep_dims=True)), 1e-12)
    normed = value * (1.0 / length) * factor
    result = normed / (1.0 + tl.exp(-normed))
    target = frame * out_frame + (row * out_row + column * out_column) + channel
    tl.store(out + target, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def unit(frames, place, inside):
    """Pixels of one channel as float32 in 0..1; NaN is black."""
    value = tl.load(frames + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(value == value, value, -1.0)
    return (tl.minimum(tl.maximum(value, -1.0), 1.0) + 1.0) * 0.5


@triton.jit
def to_uint8_kernel(
    frames, out, channel_stride, frame_stride, row_stride, column_stride, out_frame, pixels,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(pixels, TILE)
    program = tl.program_id(0)
    frame = (program // tiles).to(tl.int64)
    pixel = (program % tiles) * TILE + tl.arange(0, TILE)
    inside = pixel < pixels
    place = frame * frame_stride + ((pixel // WIDTH) * row_stride + (pixel % WIDTH) * column_stride)
    target = out + frame * out_frame + pixel * 3
    channel_step = tl.full([1], channel_stride, tl.int64)
    for channel in tl.static_range(3):
        value = unit(frames, place + channel * channel_step, inside) * 255.0
        tl.store(target + channel, value.to(tl.int32).to(tl.uint8), mask=inside)


@triton.jit
def luma(r, g, b):
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@triton.jit
def nearest(value):
    """The nearest byte to a float32 in 0..255; half goes up."""
    return (value + 0.5).to(tl.int32).to(tl.uint8)


@triton.jit
def pair_mean(upper, lower, PAIRS: tl.constexpr):
    """Mean of 2x2 pixels of two rows."""
    return tl.sum(tl.reshape(upper + lower, [PAIRS, 2]), axis=1) * 0.25


@triton.jit
def to_nv12_kernel(
    frames, out, channel_stride, frame_stride, row_stride, column_stride, out_frame, out_row, pixels, height,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(pixels, TILE)
    program = tl.program_id(0)
    frame = (program // tiles).to(tl.int64)
    pixel = (program % tiles) * TILE + tl.arange(0, TILE)  # counted over the pairs of rows: pixels = H / 2 * W
    inside = pixel < pixels
    row, column = pixel // WIDTH, pixel % WIDTH
    green = tl.full([1], channel_stride, tl.int64)
    upper = frame * frame_stride + (2 * row * row_stride + column * column_stride)
    r0, r1 = unit(frames, upper, inside), unit(frames, upper + row_stride, inside)
    g0, g1 = unit(frames, upper + green, inside), unit(frames, upper + green + row_stride, inside)
    b0, b1 = unit(frames, upper + 2 * green, inside), unit(frames, upper + 2 * green + row_stride, inside)
    base = out + frame * out_frame
    target = base + (2 * row * out_row + column)
    tl.store(target, nearest(luma(r0, g0, b0) * 219.0 + 16.0), mask=inside)
    tl.store(target + out_row, nearest(luma(r1, g1, b1) * 219.0 + 16.0), mask=inside)
    r, g, b = pair_mean(r0, r1, TILE // 2), pair_mean(g0, g1, TILE // 2), pair_mean(b0, b1, TILE // 2)
    mean = luma(r, g, b)
    cb = nearest((b - mean) * (224.0 / 1.8556) + 128.0)
    cr = nearest((r - mean) * (224.0 / 1.5748) + 128.0)
    tl.store(base + ((height + row) * out_row + column), tl.interleave(cb, cr), mask=inside)


def vae_norm_silu(x: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
    """Channel RMS norm and SiLU of [n, C, h, w], channels last, in one pass."""
    name = "vae_norm_silu"
    frames, channels, height, width = x.shape
    if out.shape != x.shape:
        refuse(name, f"out has shape {list(out.shape)}, expected {list(x.shape)}")
    for argument, tensor in (("x", x), ("out", out)):
        if channels > 1 and tensor.stride(1) != 1:
            refuse(name, f"{argument} is not channels last (strides {list(tensor.stride())})")
    rows = (frames, height, width, channels)
    check(name, {
        "x": (x.permute(0, 2, 3, 1), rows), "gamma": (gamma, (channels,)), "out": (out.permute(0, 2, 3, 1), rows),
    })  # fmt: skip
    positions, tile = frames * height * width, next_power_of_two(channels)
    count = min(max(1, NORM_TILE // tile), next_power_of_two(positions))
    run(
        vae_norm_silu_kernel, triton.cdiv(positions, count), x, gamma, out, x.stride(0), x.stride(2), x.stride(3),
        out.stride(0), out.stride(2), out.stride(3), positions, height * width, width, channels**0.5,
        CHANNELS=channels, TILE=tile, ROWS=count, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def _checked(name: str, frames: Tensor, out: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse what is not [3, T, H, W], and an output of another shape, dtype or device."""
    if frames.dim() != 4 or frames.shape[0] != 3 or not frames.dtype.is_floating_point:
        refuse(name, f"frames is {frames.dtype} {list(frames.shape)}, expected floating point [3, T, H, W]")
    check(name, {"out": (out, shape)})
    if out.device != frames.device or out.dtype != torch.uint8:
        refuse(name, f"out is {out.dtype} on {out.device}, expected uint8 on {frames.device}")


def to_uint8(frames: Tensor, out: Tensor | None = None) -> Tensor:
    """Packed RGB bytes [T, H, W, 3] of frames [3, T, H, W] of any strides, truncated."""
    name, (height, width) = "to_uint8", frames.shape[-2:]
    shape = (*frames.shape[1:], 3)
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=frames.device)
    _checked(name, frames, out, shape)
    if out.stride()[1:] != (3 * width, 3, 1):
        refuse(name, f"the pixels of out are not packed (strides {list(out.stride())})")
    pixels = height * width
    tile = min(PIXEL_TILE, next_power_of_two(pixels))
    run(
        to_uint8_kernel, frames.shape[1] * triton.cdiv(pixels, tile), frames, out, *frames.stride(), out.stride(0),
        pixels, WIDTH=width, TILE=tile, num_warps=4, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def to_nv12(frames: Tensor, out: Tensor | None = None) -> Tensor:
    """NV12 bytes [T, H * 3/2, W] of frames [3, T, H, W] of any strides: BT.709 limited range, to nearest."""
    name, (height, width) = "to_nv12", frames.shape[-2:]
    if height % 2 or width % 2:
        refuse(name, f"frames has odd height or width: {list(frames.shape)}")
    shape = (*frames.shape[1:-2], height // 2 * 3, width)
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=frames.device)
    _checked(name, frames, out, shape)
    pixels = height // 2 * width
    tile = min(PIXEL_TILE, next_power_of_two(pixels))
    run(
        to_nv12_kernel, frames.shape[1] * triton.cdiv(pixels, tile), frames, out, *frames.stride(), *out.stride()[:2],
        pixels, height, WIDTH=width, TILE=tile, num_warps=4, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    return out


# -- reference, inputs, cost ------------------------------------------------------------------------------------------


def reference_vae_norm_silu(x: Tensor, gamma: Tensor, out: Tensor) -> dict[str, Tensor]:
    """Float64, no rounding; [n, h, w, C] as the outputs of the case."""
    wide = x.double()
    normed = wide / wide.norm(dim=1, keepdim=True).clamp_min(1e-12) * x.shape[1] ** 0.5 * gamma.double().view(-1, 1, 1)
    return {"out": torch.nn.functional.silu(normed).permute(0, 2, 3, 1)}


def _unit64(frames: Tensor) -> Tensor:
    return (frames.double().clamp(-1, 1) + 1) / 2


def _scaled_rgb(frames: Tensor) -> Tensor:
    return (255 * _unit64(frames)).permute(1, 2, 3, 0)


def _scaled_nv12(frames: Tensor) -> Tensor:
    """Y, Cb and Cr before rounding, float64, from the definition of BT.709 and its limited range."""
    weights = torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64, device=frames.device)
    rgb = _unit64(frames)
    y = torch.einsum("c,cthw->thw", weights, rgb)
    mean = torch.nn.functional.avg_pool2d(rgb, 2)
    mean_y = torch.einsum("c,cthw->thw", weights, mean)
    chroma = [224 * (mean[i] - mean_y) / (2 * (1 - weights[i])) + 128 for i in (2, 0)]
    return torch.cat((16 + 219 * y, torch.stack(chroma, dim=-1).flatten(2)), dim=1)


def reference_to_uint8(frames: Tensor, out: Tensor) -> dict[str, Tensor]:
    """The bytes themselves, computed in float64."""
    return {"out": _scaled_rgb(frames).floor()}


def reference_to_nv12(frames: Tensor, out: Tensor) -> dict[str, Tensor]:
    """The bytes themselves, computed in float64."""
    return {"out": (_scaled_nv12(frames) + 0.5).floor()}


def make_vae_norm_silu(dims: Dims, dtype: torch.dtype, rng: torch.Generator, device: torch.device) -> Case:
    """`out` is the chunk of a [history | chunk] buffer, as in the VAE."""
    frames, height, width, channels = (dims[name] for name in ("frames", "height", "width", "channels"))
    x = random((frames, height, width, channels), dtype, rng, device) * 2
    out = poisoned((2 + frames, height, width, channels), dtype, device)[2:]
    gamma = random((channels,), torch.float32, rng, device)
    return Case((x.permute(0, 3, 1, 2), gamma, out.permute(0, 3, 1, 2)), {}, {"out": out})


def make_bytes(planar: bool) -> MakeCase:
    """Input maker; pixels whose exact result lies within 1e-3 of where it jumps are replaced: 127.5, and 70.75."""

    def make(dims: Dims, dtype: torch.dtype, rng: torch.Generator, device: torch.device) -> Case:
        count, height, width = dims["frames"], dims["height"], dims["width"]
        frames = random((3, count, height, width), dtype, rng, device) * 0.7
        if planar:
            scaled = _scaled_nv12(frames) + 0.5
            near = (scaled - scaled.round()).abs() < 1e-3
            blocks = torch.stack([near[:, i:height:2, j::2] for i in (0, 1) for j in (0, 1)]).any(0)
            blocks |= near[:, height:].unflatten(2, (-1, 2)).any(-1)
            frames[:, blocks.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)] = -0.5
        else:
            scaled = _scaled_rgb(frames).permute(3, 0, 1, 2)
            frames[((scaled - scaled.round()).abs() < 1e-3) & (frames.abs() < 1)] = 0
        shape = (count, height // 2 * 3, width) if planar else (count, height, width, 3)
        out = poisoned(shape, torch.uint8, device)
        return Case((frames, out), {}, {"out": out})

    return make


def cost_vae_norm_silu(dims: Dims, dtype: torch.dtype) -> Cost:
    elements = dims["frames"] * dims["height"] * dims["width"] * dims["channels"]
    return Cost(2 * elements * dtype.itemsize, 9 * elements)


def cost_to_uint8(dims: Dims, dtype: torch.dtype) -> Cost:
    pixels = dims["frames"] * dims["height"] * dims["width"]
    return Cost(pixels * (3 * dtype.itemsize + 3), 12 * pixels)


def cost_to_nv12(dims: Dims, dtype: torch.dtype) -> Cost:
    pixels = dims["frames"] * dims["height"] * dims["width"]
    return Cost(pixels * (3 * dtype.itemsize + 1.5), 22 * pixels)


_FRAMES = {"704x384": dict(frames=12, height=704, width=384)}
SPECS = [
    KernelSpec(
        "vae_norm_silu", vae_norm_silu, reference_vae_norm_silu, vae_ops.vae_norm_silu, make_vae_norm_silu,
        cost_vae_norm_silu,
        small={
            "odd": dict(frames=2, height=5, width=7, channels=20),
            "one-position": dict(frames=1, height=1, width=1, channels=4),
            "mid": dict(frames=1, height=4, width=6, channels=384),
            "tiles": dict(frames=3, height=6, width=5, channels=96),
        },
        production={
            "704x384, 96 channels": dict(frames=12, height=704, width=384, channels=96),
            "704x384, 384 channels": dict(frames=3, height=88, width=48, channels=384),
        },
    ),
    KernelSpec(
        "to_uint8", to_uint8, reference_to_uint8, vae_ops.to_uint8, make_bytes(planar=False), cost_to_uint8,
        small={"odd": dict(frames=2, height=5, width=7), "tiles": dict(frames=3, height=48, width=40),
               "one": dict(frames=1, height=1, width=1)},
        production=_FRAMES,
    ),
    KernelSpec(
        "to_nv12", to_nv12, reference_to_nv12, vae_ops.to_nv12, make_bytes(planar=True), cost_to_nv12,
        small={"odd": dict(frames=2, height=6, width=10), "tiles": dict(frames=3, height=64, width=36),
               "one": dict(frames=1, height=2, width=2)},
        production=_FRAMES,
    ),
]  # fmt: skip
