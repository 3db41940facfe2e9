"""`audio_attention`: RMS norm of the audio injector's queries and attention to the few audio tokens of each frame.

    y = R(R(x * rsqrt(mean(x^2) + eps)) * w)                          a row of x, over the full width D
    out_h = R(sum_n softmax_n(y_h . k_{f,n,h} / sqrt(d)) v_{f,n,h})   for each head h of the token's latent frame f

x [F*P, D]; k, v [F, N, H, d] with N = 5; out [F*P, H, d]. One program takes one token with all its heads: the norm
needs the full width, and the frame's keys and values (100 KB at 14B) stay in the L2 cache.
Bytes: 2 F P D * element size (+ k and v once); FLOPs: (4 N + 6) F P D. Source: spec dit.md 6.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from liverelay.kernels import torch_ops
from liverelay.kernels.launch import ELEMENTS, check, next_power_of_two, refuse, run
from liverelay.kernels.spec import Case, Cost, Dims, KernelSpec, poisoned, random


@triton.jit
def audio_attention_kernel(
    x, weight, k, v, out, x_stride, kv_frame_stride, kv_token_stride, frame_tokens, tokens, qk_scale, eps,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_TILE: tl.constexpr, HEADS_TILE: tl.constexpr, COUNT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    head = tl.arange(0, HEADS_TILE)[None, :, None]
    place = tl.arange(0, HEAD_TILE)[None, None, :]
    offsets = head * HEAD_DIM + place
    inside = (place < HEAD_DIM) & (offsets < WIDTH)
    mask = (token < tokens) & inside
    rounded = x.dtype.element_ty
    value = tl.load(x + token * x_stride + offsets, mask=mask, other=0.0).to(tl.float32)
    square = tl.sum(tl.sum(value * value, axis=2), axis=1)[:, None, None]
    normed = value * tl.rsqrt(square / WIDTH + eps)
    w = tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float32)
    q = (normed.to(rounded).to(tl.float32) * w).to(rounded).to(tl.float32) * qk_scale
    base = (token // frame_tokens) * kv_frame_stride + offsets
    highest = tl.full([ROWS, HEADS_TILE], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, HEADS_TILE], tl.float32)
    mixed = tl.zeros([ROWS, HEADS_TILE, HEAD_TILE], tl.float32)
    for n in tl.static_range(COUNT):
        keys = tl.load(k + n * kv_token_stride + base, mask=mask, other=0.0).to(tl.float32)
        logit = tl.sum(q * keys, axis=2)
        above = tl.maximum(highest, logit)
        shrink = tl.exp2(highest - above)
        share = tl.exp2(logit - above)
        values = tl.load(v + n * kv_token_stride + base, mask=mask, other=0.0).to(tl.float32)
        mixed = mixed * shrink[:, :, None] + share[:, :, None] * values
        total = total * shrink + share
        highest = above
    result = mixed / total[:, :, None]
    tl.store(out + token * WIDTH + offsets, result.to(out.dtype.element_ty), mask=mask)


def audio_attention(q: Tensor, weight: Tensor, k: Tensor, v: Tensor, out: Tensor, *, eps: float) -> Tensor:
    """RMS norm of q and attention to the audio tokens of each token's latent frame, one pass."""
    name = "audio_attention"
    tokens, heads, head_dim = out.shape
    width, (frames, count) = heads * head_dim, k.shape[:2]
    shape = (frames, count, heads, head_dim)
    check(name, {
        "q": (q, (tokens, width)), "weight": (weight, (width,)), "k": (k, shape), "v": (v, shape),
        "out": (out, (tokens, heads, head_dim)),
    })  # fmt: skip
    if tokens % frames or not out.is_contiguous() or k.stride() != v.stride() or k.stride(2) != head_dim:
        strides = f"strides of out {out.stride()}, k {k.stride()}, v {v.stride()}"
        refuse(name, f"{tokens} tokens in {frames} frames, {strides}")
    head_tile, heads_tile = next_power_of_two(head_dim), next_power_of_two(heads)
    rows = max(1, min(16, ELEMENTS // (head_tile * heads_tile)))
    run(
        audio_attention_kernel, triton.cdiv(tokens, rows), q, weight, k, v, out, q.stride(0), k.stride(0), k.stride(1),
        tokens // frames, tokens, head_dim**-0.5 * 1.4426950408889634, eps, WIDTH=width, HEAD_DIM=head_dim,
        HEAD_TILE=head_tile, HEADS_TILE=heads_tile, COUNT=count, ROWS=rows,
        num_warps=min(16, max(4, rows * head_tile * heads_tile // 2048)), num_stages=1,
    )  # fmt: skip
    return out


def reference_audio_attention(
    q: Tensor, weight: Tensor, k: Tensor, v: Tensor, out: Tensor, *, eps: float
) -> dict[str, Tensor]:
    """Float64, no rounding."""
    wide, frames = q.double(), k.shape[0]
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.double()
    split = normed.view(frames, -1, *k.shape[2:])
    logits = torch.einsum("fphd,fnhd->fphn", split, k.double()) * k.shape[3] ** -0.5
    return {"out": torch.einsum("fphn,fnhd->fphd", logits.softmax(-1), v.double()).flatten(0, 1)}


def make_inputs(dims: Dims, dtype: torch.dtype, rng: torch.Generator, device: torch.device) -> Case:
    frames, heads, head_dim = dims["frames"], dims["heads"], dims["head_dim"]
    tokens, width = frames * dims["frame_tokens"], heads * head_dim
    q, weight = random((tokens, width), dtype, rng, device), random((width,), dtype, rng, device)
    kv = random((2, frames, dims["count"], heads, head_dim), dtype, rng, device)
    out = poisoned((tokens, heads, head_dim), dtype, device)
    return Case((q, weight, kv[0], kv[1], out), {"eps": 1e-6}, {"out": out})


def cost(dims: Dims, dtype: torch.dtype) -> Cost:
    width, tokens = dims["heads"] * dims["head_dim"], dims["frames"] * dims["frame_tokens"]
    elements = 2 * tokens * width + 2 * dims["frames"] * dims["count"] * width
    return Cost(elements * dtype.itemsize, (4 * dims["count"] + 6) * tokens * width)


SPECS = [
    KernelSpec(
        "audio_attention", audio_attention, reference_audio_attention, torch_ops.audio_attention, make_inputs, cost,
        small={
            "tiny-model": dict(frames=3, frame_tokens=6, heads=4, head_dim=32, count=5),
            "one-token": dict(frames=1, frame_tokens=1, heads=1, head_dim=128, count=5),
            "odd": dict(frames=2, frame_tokens=5, heads=3, head_dim=96, count=3),
            "tiny-head": dict(frames=1, frame_tokens=4, heads=5, head_dim=6, count=1),
        },
        production={"14B 704x384": dict(frames=3, frame_tokens=1056, heads=40, head_dim=128, count=5)},
    )
]  # fmt: skip
