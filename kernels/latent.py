"""`embed`, patches of the noisy latents to tokens; `euler_step`, the sampler's step with the flow un-patchified.

    embed:       out = R(R(R(patch(latent) @ weight^T + bias) + pose) + kind)
    euler_step:  out = R(latent + R(R(step) * flow))

latent [C, F, h, w]; a token is a patch of 2x2 positions, F*P of them with P = h/2 * w/2, frame-major. The features of
a patch are (channel, row, column) on the way in and (row, column, channel) on the way out, the last fastest.
Bytes: embed F P (4 C + D, and D for a pose video) * element size (+ the weight once), FLOPs: 2 F P D (4 C + 1);
euler_step 3 C F h w * element size, FLOPs: 2 for each element. Source: spec dit.md 5 and 8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from liverelay.kernels import torch_ops
from liverelay.kernels.launch import check, next_power_of_two, refuse, run
from liverelay.kernels.spec import Case, Cost, CostOf, Dims, KernelSpec, MakeCase, poisoned, random


@triton.jit
def embed_kernel(
    latent, weight, bias, pose, kind, out, channel_stride, frame_stride, row_stride, weight_stride, pose_stride,
    out_stride, tokens, frame_tokens, across, WIDTH: tl.constexpr, FEATURES: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, TILE_K: tl.constexpr, STEPS: tl.constexpr, POSE_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_n: tl.constexpr = (WIDTH + TILE_N - 1) // TILE_N
    token = (tl.program_id(0) // tiles_n) * TILE_M + tl.arange(0, TILE_M)
    column = (tl.program_id(0) % tiles_n) * TILE_N + tl.arange(0, TILE_N)
    within = token % frame_tokens
    corner = (token // frame_tokens).to(tl.int64) * frame_stride
    corner += 2 * (within // across) * row_stride + 2 * (within % across)
    total = tl.zeros([TILE_M, TILE_N], tl.float32)
    for i in tl.static_range(STEPS):
        feature = i * TILE_K + tl.arange(0, TILE_K)
        known = feature < FEATURES
        place = (feature // 4).to(tl.int64) * channel_stride + (feature // 2 % 2) * row_stride + feature % 2
        patch = tl.load(
            latent + corner[:, None] + place[None, :], mask=(token < tokens)[:, None] & known[None, :], other=0.0
        )
        factors = tl.load(
            weight + column[:, None] * weight_stride + feature[None, :],
            mask=(column < WIDTH)[:, None] & known[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(patch, tl.trans(factors), total, input_precision=PRECISION)
    rounded = out.dtype.element_ty
    row = token.to(tl.int64)[:, None]
    inside = (token < tokens)[:, None] & (column < WIDTH)[None, :]
    total += tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    total = total.to(rounded).to(tl.float32)
    if POSE_ROWS:
        total += tl.load(pose + row * pose_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        total += tl.load(pose + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    total = total.to(rounded).to(tl.float32)
    total += tl.load(kind + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row * out_stride + column[None, :], total.to(rounded), mask=inside)


@triton.jit
def euler_step_kernel(
    latent, flow, out, step, channel_stride, frame_stride, row_stride, flow_stride, out_channel, out_frame, out_row,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, TILE_C: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (WIDTH + TILE_W - 1) // TILE_W
    row = tl.program_id(0) // tiles  # of all frames
    frame, y = (row // HEIGHT).to(tl.int64), row % HEIGHT
    x = ((tl.program_id(0) % tiles) * TILE_W + tl.arange(0, TILE_W))[None, :]
    channel = tl.arange(0, TILE_C)[:, None]
    inside = (channel < CHANNELS) & (x < WIDTH)
    token = (row // 2).to(tl.int64) * (WIDTH // 2) + x // 2  # the height is even
    feature = (y % 2 * 2 + x % 2) * CHANNELS + channel
    value = tl.load(flow + token * flow_stride + feature, mask=inside, other=0.0)
    update = (value.to(tl.float32) * step).to(value.dtype).to(tl.float32)
    far = channel.to(tl.int64)
    source = latent + far * channel_stride + frame * frame_stride + (y * row_stride + x)
    before = tl.load(source, mask=inside, other=0.0)
    result = before.to(tl.float32) + update
    target = out + far * out_channel + frame * out_frame + (y * out_row + x)
    tl.store(target, result.to(out.dtype.element_ty), mask=inside)


def embed(latent: Tensor, weight: tuple[Tensor, Tensor], pose: Tensor, kind: Tensor, out: Tensor) -> Tensor:
    """Patch embedding of a noisy block, pose and kind added, in one pass."""
    name = "embed"
    channels, frames, height, width = latent.shape
    if height % 2 or width % 2:
        refuse(name, f"latent has odd height or width: {list(latent.shape)}")
    across, size, features = width // 2, weight[0].shape[0], 4 * channels
    frame_tokens = height // 2 * across
    tokens = frames * frame_tokens
    shape = (tokens, size)
    check(name, {
        "latent": (latent, tuple(latent.shape)), "weight": (weight[0], (size, features)), "bias": (weight[1], (size,)),
        "pose": (pose, (size,) if pose.dim() == 1 else shape), "kind": (kind, (size,)), "out": (out, shape),
    })  # fmt: skip
    exact = latent.dtype == torch.float32
    if weight[0].dtype != latent.dtype:
        refuse(name, f"weight is {weight[0].dtype}, latent {latent.dtype}")
    tile_m, tile_n, tile_k = (32, 64, 16) if exact else (64, 128, min(64, max(16, next_power_of_two(features))))
    run(
        embed_kernel, triton.cdiv(tokens, tile_m) * triton.cdiv(size, tile_n), latent, *weight, pose, kind, out,
        *latent.stride()[:3], weight[0].stride(0), pose.stride(0), out.stride(0), tokens, frame_tokens, across,
        WIDTH=size, FEATURES=features, TILE_M=tile_m, TILE_N=tile_n, TILE_K=tile_k,
        STEPS=triton.cdiv(features, tile_k), POSE_ROWS=pose.dim() == 2, PRECISION="ieee" if exact else "tf32",
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def euler_step(latent: Tensor, flow: Tensor, step_size: float, out: Tensor) -> Tensor:
    """One step of the sampler from the flow of the head's features; out may be latent."""
    name = "euler_step"
    channels, frames, height, width = latent.shape
    if height % 2 or width % 2:
        refuse(name, f"latent has odd height or width: {list(latent.shape)}")
    check(name, {
        "latent": (latent, tuple(latent.shape)), "flow": (flow, (frames * height * width // 4, 4 * channels)),
        "out": (out, tuple(latent.shape)),
    })  # fmt: skip
    tile = min(64, next_power_of_two(width))
    run(
        euler_step_kernel, frames * height * triton.cdiv(width, tile), latent, flow, out, rounded_step(step_size, out),
        *latent.stride()[:3], flow.stride(0), *out.stride()[:3], HEIGHT=height, WIDTH=width, CHANNELS=channels,
        TILE_C=next_power_of_two(channels), TILE_W=tile, num_warps=4, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def rounded_step(step_size: float, out: Tensor) -> float:
    """The step size in the working dtype, as published."""
    return float(torch.tensor(step_size, dtype=out.dtype))


# -- reference, inputs, cost ------------------------------------------------------------------------------------------


def reference_embed(
    latent: Tensor, weight: tuple[Tensor, Tensor], pose: Tensor, kind: Tensor, out: Tensor
) -> dict[str, Tensor]:
    """Float64, no rounding."""
    c, f, h, w = latent.shape
    patches = torch.nn.functional.unfold(latent.double().transpose(0, 1), 2, stride=2)  # [F, 4C, P]
    tokens = patches.transpose(1, 2).reshape(f * h * w // 4, 4 * c)
    return {"out": tokens @ weight[0].double().t() + weight[1].double() + pose.double() + kind.double()}


def reference_euler_step(latent: Tensor, flow: Tensor, step_size: float, out: Tensor) -> dict[str, Tensor]:
    """Float64, no rounding but the step size's."""
    c, f, h, w = latent.shape
    spread = torch.einsum("fyxijc->cfyixj", flow.double().view(f, h // 2, w // 2, 2, 2, c)).reshape(latent.shape)
    return {"out": latent.double() + rounded_step(step_size, out) * spread}


def make_embed(video: bool) -> MakeCase:
    """Input maker with the embedding of a pose video, or with its bias alone."""

    def make(dims: Dims, dtype: torch.dtype, rng: torch.Generator, device: torch.device) -> Case:
        latent = random(_latent(dims), dtype, rng, device)
        size, features, tokens = dims["width"], 4 * dims["channels"], latent[0].numel() // 4
        weight = random((size, features), dtype, rng, device) / features**0.5
        bias, kind = (random((size,), dtype, rng, device) for _ in range(2))
        pose = random((tokens, size) if video else (size,), dtype, rng, device)
        out = poisoned((tokens, size), dtype, device)
        return Case((latent, (weight, bias), pose, kind, out), {}, {"out": out})

    return make


def make_euler_step(dims: Dims, dtype: torch.dtype, rng: torch.Generator, device: torch.device) -> Case:
    latent = random(_latent(dims), dtype, rng, device)
    flow = random((latent[0].numel() // 4, 4 * dims["channels"]), dtype, rng, device)
    out = poisoned(_latent(dims), dtype, device)
    return Case((latent, flow, -0.14230769872665405, out), {}, {"out": out})


def cost_embed(video: bool) -> CostOf:
    def cost(dims: Dims, dtype: torch.dtype) -> Cost:
        tokens = dims["frames"] * dims["rows"] * dims["columns"] // 4
        size, features = dims["width"], 4 * dims["channels"]
        elements = tokens * (features + size * (2 if video else 1)) + size * features
        return Cost(elements * dtype.itemsize, 2 * tokens * size * (features + 1))

    return cost


def cost_euler_step(dims: Dims, dtype: torch.dtype) -> Cost:
    elements = dims["channels"] * dims["frames"] * dims["rows"] * dims["columns"]
    return Cost(3 * elements * dtype.itemsize, 2 * elements)


def _latent(dims: Dims) -> tuple[int, ...]:
    return dims["channels"], dims["frames"], dims["rows"], dims["columns"]


SMALL = {
    "tiny-model": dict(channels=16, frames=3, rows=8, columns=24, width=128),
    "odd": dict(channels=3, frames=2, rows=6, columns=14, width=97),
    "one-patch": dict(channels=16, frames=1, rows=2, columns=2, width=97),
    "wide": dict(channels=16, frames=1, rows=16, columns=8, width=130),
    "many-channels": dict(channels=20, frames=1, rows=2, columns=70, width=32),
}
PRODUCTION = {"14B 704x384": dict(channels=16, frames=3, rows=88, columns=48, width=5120)}
SPECS = [
    KernelSpec(
        name, embed, reference_embed, torch_ops.embed, make_embed(video), cost_embed(video), SMALL, PRODUCTION,
        dot=True,
    )
    for name, video in (("embed", False), ("embed_pose", True))
] + [
    KernelSpec(
        "euler_step", euler_step, reference_euler_step, torch_ops.euler_step, make_euler_step, cost_euler_step, SMALL,
        PRODUCTION,
    )
]  # fmt: skip
