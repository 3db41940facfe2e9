"""`audio_attention`: RMS norm of the audio injector's queries and attention to the few audio tokens of each frame.

    y = R(R(x * rsqrt(mean(x^2) + eps)) * w)                          a row of x, over the full width D
    out_h = R(sum_n softmax_n(y_h . k_{f,n,h} / sqrt(d)) v_{f,n,h})   for each head h of the token's latent frame f

x [F*P, D]; k, v [F, N, H, d] with N = 5; out [F*P, H, d]. One program takes tokens of one frame with all their heads,
because the norm needs the full width: first the sums of squares, then group by group of heads, whose keys and values
are loaded and converted once for all its tokens. They are ten times a row: read anew for each token (100 KB at 14B,
from the L2 cache) they would be most of the traffic.
Bytes: 2 F P D * element size (+ k and v once); FLOPs: (4 N + 6) F P D. Source: spec dit.md 6.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from liverelay.kernels import torch_ops
from liverelay.kernels.launch import check, next_power_of_two, refuse, run
from liverelay.kernels.spec import Case, Cost, Dims, KernelSpec, poisoned, random

ROWS = 2  # tokens of a program: with 4 there are half as many blocks on an SM


@triton.jit
def softmax_mix(q, k, v, kv_token_stride, mask, COUNT: tl.constexpr):
    """softmax(q k^T) v over COUNT keys: q [heads, ROWS, d]; k, v: addresses of the first key [heads, 1, d]."""
    logits: tl.tuple = ()
    highest = tl.full([q.shape[0], q.shape[1]], float("-inf"), tl.float32)
    for n in tl.static_range(COUNT):
        keys = tl.load(k + n * kv_token_stride, mask=mask, other=0.0).to(tl.float32)
        logit = tl.sum(q * keys, axis=2)
        logits += (logit,)
        highest = tl.maximum(highest, logit)
    total = tl.zeros_like(highest)
    mixed = tl.zeros_like(q)
    for n in tl.static_range(COUNT):
        share = tl.exp2(logits[n] - highest)
        total += share
        values = tl.load(v + n * kv_token_stride, mask=mask, other=0.0).to(tl.float32)
        mixed += share[:, :, None] * values
    return mixed * (1.0 / total)[:, :, None]


@triton.jit
def audio_attention_kernel(
    x, weight, k, v, out, x_stride, kv_frame_stride, kv_token_stride, frame_tokens, frame_programs, qk_scale, eps,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_TILE: tl.constexpr, HEADS_TILE: tl.constexpr,
    GROUPS: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    frame = tl.program_id(0) // frame_programs
    token = ((tl.program_id(0) % frame_programs) * ROWS + tl.arange(0, ROWS))[None, :, None]
    live = token < frame_tokens
    row = (frame * frame_tokens + token).to(tl.int64)
    place = tl.arange(0, HEAD_TILE)[None, None, :]
    first = tl.arange(0, HEADS_TILE)[:, None, None] * HEAD_DIM + place
    squares = tl.zeros([HEADS_TILE, ROWS, HEAD_TILE], tl.float32)
    for group in tl.static_range(GROUPS):
        offsets = group * (HEADS_TILE * HEAD_DIM) + first
        inside = (place < HEAD_DIM) & (offsets < WIDTH)
        value = tl.load(x + row * x_stride + offsets, mask=live & inside, other=0.0).to(tl.float32)
        squares += value * value
    inverse = tl.rsqrt(tl.sum(tl.sum(squares, axis=2), axis=0)[None, :, None] / WIDTH + eps)
    rounded = x.dtype.element_ty
    for group in tl.range(GROUPS):
        offsets = group * (HEADS_TILE * HEAD_DIM) + first
        inside = (place < HEAD_DIM) & (offsets < WIDTH)
        value = tl.load(x + row * x_stride + offsets, mask=live & inside, other=0.0).to(tl.float32)
        w = tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float32)
        q = ((value * inverse).to(rounded).to(tl.float32) * w).to(rounded).to(tl.float32) * qk_scale
        at = frame.to(tl.int64) * kv_frame_stride + offsets
        result = softmax_mix(q, k + at, v + at, kv_token_stride, inside, COUNT)
        tl.store(out + row * WIDTH + offsets, result.to(out.dtype.element_ty), mask=live & inside)


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
    head_tile = next_power_of_two(head_dim)
    heads_tile = min(next_power_of_two(heads), max(1, 1024 // head_tile))
    programs = triton.cdiv(tokens // frames, ROWS)
    run(
        audio_attention_kernel, frames * programs, q, weight, k, v, out, q.stride(0), k.stride(0), k.stride(1),
        tokens // frames, programs, head_dim**-0.5 * 1.4426950408889634, eps, WIDTH=width, HEAD_DIM=head_dim,
        HEAD_TILE=head_tile, HEADS_TILE=heads_tile, GROUPS=triton.cdiv(heads, heads_tile), COUNT=count, ROWS=ROWS,
        num_warps=max(1, head_tile * heads_tile // 256), num_stages=1,
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
