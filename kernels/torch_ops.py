"""Backend `torch`: every operator of the transformer in plain PyTorch, on any device.

This is the definition the fused kernels have to meet: R(x) means one rounding to the working dtype (the dtype of
`out`), everything between two roundings is float32 (spec dit.md sections 3 and 6). All results go to given buffers.
Dimension letters: T tokens, D width, H heads, d head size, P tokens per latent frame, F latent frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from liverelay.kernels.contract import Norm, Place, Scales, Update, hadamard_block

Table = tuple[Tensor, Tensor]  # cos and sin [T, d/2] float32 holding float16 values


def linear(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """out = R(x @ weight^T + bias). x [T, in], weight [n, in], bias [n], out [T, n], all of the working dtype."""
    return torch.addmm(bias, x, weight.t(), out=out)


def quantize_rows(x: Tensor, out: Tensor, scale_out: Tensor) -> Tensor:
    """Each row of x [T, n] to e4m3 codes out [T, n] and its scale [T]: the largest value becomes 448."""
    wide = x.float()
    amax = wide.abs().amax(dim=1).clamp_min(1e-30)
    scale_out.copy_(amax / 448)
    return out.copy_((wide * (448 / amax).unsqueeze(1)).clamp_(-448, 448))


def linear_fp8(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """out = R(x_scale * weight_scale * (x @ weight^T) + bias): x [T, in] and weight [n, in] e4m3, scales [T] and [n].

    On a GPU the sum is the tensor cores' fast accumulation, as published; elsewhere it is float32.
    """
    if x.is_cuda:
        return torch._scaled_mm(
            x, weight.t(), scale_a=x_scale.unsqueeze(1), scale_b=weight_scale.unsqueeze(0), bias=bias,
            out_dtype=out.dtype, use_fast_accum=True, out=out,
        )  # fmt: skip
    product = x.float() @ weight.float().t()
    return out.copy_(product * x_scale.unsqueeze(1) * weight_scale + bias.float())


def residual_norm(
    x: Tensor, updates: Sequence[Update], norm: Norm, out: Tensor, *, eps: float, x_out: Tensor | None = None,
    scale_out: Tensor | None = None,
) -> Tensor:
    """Gated residuals, LayerNorm and modulation: s = x + sum(y * gate); x_out = R(s); out = R(LN(s) * a + b).

    x, y, out, x_out [T, D]; x_out may be x; out of the working dtype or float32 (the head's input); with scale_out
    [T] it is e4m3, quantised row by row. See `Norm`.
    """
    total = x.float()
    for y, gate in updates:
        total = total + y.float() if gate is None else torch.addcmul(total, y.float(), gate)
    if x_out is not None:
        x_out.copy_(total)
    if norm.round_input and x.dtype != torch.float32:
        total = total.to(x.dtype).float()
    normed = F.layer_norm(total, total.shape[-1:], eps=eps)
    if norm.round_norm and x.dtype != torch.float32:
        normed = normed.to(x.dtype).float()
    factor = (1 + norm.scale if norm.plus_one else norm.scale).float()
    if factor.dim() == 1:
        result = normed.mul_(factor).add_(norm.shift)
    else:
        spread = normed.unflatten(0, (factor.shape[0], -1))
        result = spread.mul_(factor.unsqueeze(1)).add_(norm.shift.float().unsqueeze(1)).flatten(0, 1)
    return out.copy_(result) if scale_out is None else quantize_rows(result, out, scale_out)


def rms_norm(x: Tensor, weight: Tensor, out: Tensor, *, eps: float) -> Tensor:
    """out = R(R(x * rsqrt(mean(x^2) + eps)) * weight), statistics over the full width. x [T, D], weight [D]."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return torch.mul(normed.to(out.dtype), weight, out=out)


def inverse_rms(x: Tensor, out: Tensor, *, eps: float) -> Tensor:
    """out = rsqrt(mean(x^2) + eps), statistics over the full width. x [T, D], out [T] float32."""
    return torch.rsqrt(x.float().square().mean(-1) + eps, out=out)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """RoPE of adjacent pairs: (a, b) -> (a c - b s, a s + b c) in float32, rounded once.

    x and out [T, H, d] (out may be a strided view, not x itself), cos and sin [T, d/2] float32 holding float16 values.
    """
    pairs, result = x.float().unflatten(-1, (-1, 2)), out.unflatten(-1, (-1, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    result[..., 0] = a * c - b * s
    result[..., 1] = a * s + b * c
    return out


def qk_norm_rope(
    qk: Tensor,
    weights: tuple[Tensor, Tensor],
    table: Table,
    outs: tuple[Tensor, ...],
    place: Place,
    *,
    eps: float,
    reference: tuple[Tensor, Table] | None = None,
    scales: Scales | None = None,
) -> None:
    """Full-width RMS norm of q and k, RoPE, and the write of k into its arena rows.

    qk [T, 2D]; weights: RMS weights of q and k [D]; table: cos and sin [T, d/2]; outs: q [T, H, d], and one layer's
    arena of keys [N, H, d], written from row place.row on; a third [T, H, d] receives k before RoPE. reference: the
    sink's reference keys before RoPE [P, H, d] and their table, written to rows 0..P-1 where they move. With scales q
    and the arena are e4m3 codes of what `hadamard` makes of them.
    """
    width = qk.shape[1] // 2
    q_out, arena, *given = outs
    raw = given[0] if given else torch.empty(q_out.shape, dtype=qk.dtype, device=qk.device)
    q_scale, k_scale = (None, None) if scales is None else (scales.q, scales.k)

    def turn(x: Tensor, angles: Table, out: Tensor, scale: Tensor | None) -> None:
        if scale is None:
            rotate(x, *angles, out=out)
        else:
            turned = rotate(x.float(), *angles, out=torch.empty(x.shape, device=x.device))
            out.copy_((hadamard(turned) * (1 / scale)[:, None]).clamp_(-448, 448))

    targets = ((q_out, q_scale), (arena[place.row : place.row + len(qk)], k_scale))
    for part, weight, target in zip(qk.split(width, dim=1), weights, targets, strict=True):
        rms_norm(part, weight, raw.view(-1, width), eps=eps)
        turn(raw, table, *target)
    if reference is not None and place.moved:
        turn(*reference, arena[: len(reference[0])], k_scale)


def hadamard(x: Tensor) -> Tensor:
    """The Hadamard transform of each `hadamard_block` neighbours of a head, an orthogonal one; x [T, H, d].

    Applied to queries and keys it changes no product, but where a few large elements decide the products, their e4m3
    roundings would decide the error: transformed, sixteen roundings share in each of them (docs/fp8.md).
    """
    block = hadamard_block(x.shape[-1])
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    matrix = torch.tensor(signs, dtype=x.dtype, device=x.device) * block**-0.5
    return (x.unflatten(-1, (-1, block)) @ matrix).flatten(-2)


def store_values(v: Tensor, arena: Tensor, place: Place, scale: float) -> None:
    """e4m3 codes of v [T, H, d] / scale to the arena's rows from place.row on. arena [N, H, d], any strides."""
    arena[place.row : place.row + len(v)].copy_((v.float() / scale).clamp_(-448, 448))


def attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None = None, scales: Scales | None = None,
    q_factor: Tensor | None = None,
) -> Tensor:
    """out = softmax(q k^T / sqrt(d)) v without mask, over the first place.valid rows of k and v (None: all).

    q, out [T, H, d]; k, v [N, H, d], any strides but the last. With scales q, k and v are e4m3 codes. q_factor [T]
    float32: a factor of every query, which is rounded; not of codes.
    """
    if place is not None:
        k, v = k[: place.valid], v[: place.valid]
    if q_factor is not None:
        q = (q.float() * q_factor[:, None, None]).to(q.dtype)
    if scales is not None:
        return _attention_fp8(q, k, v, out, scales)
    attended = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0), k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)
    )
    return out.copy_(attended.squeeze(0).transpose(0, 1))


def _attention_fp8(q: Tensor, k: Tensor, v: Tensor, out: Tensor, scales: Scales) -> Tensor:
    """Head by head in float32; the shares are e4m3 too, of which a row's largest is 256, and the sum of the exact."""
    factors = scales.q * scales.k * q.shape[2] ** -0.5
    for head in range(q.shape[1]):
        logits = (q[:, head].float() @ k[:, head].float().t()) * factors[head]
        shares = 256 * torch.exp(logits - logits.amax(dim=1, keepdim=True))
        mixed = shares.to(v.dtype).float() @ v[:, head].float()
        out[:, head].copy_(mixed * (scales.v / shares.sum(dim=1, keepdim=True)))
    return out


def gelu(x: Tensor, out: Tensor, scale_out: Tensor | None = None) -> Tensor:
    """out = R(gelu(x)), tanh form. x, out [T, n]; out may be x; with scale_out [T] out is e4m3."""
    if scale_out is not None:
        return quantize_rows(F.gelu(x.float(), approximate="tanh"), out, scale_out)
    return out.copy_(F.gelu(x, approximate="tanh"))


def audio_attention(q: Tensor, weight: Tensor, k: Tensor, v: Tensor, out: Tensor, *, eps: float) -> Tensor:
    """Full-width RMS norm of q, then each latent frame's tokens attend to that frame's few audio tokens.

    q [F*P, D] as projected; weight [D]; k, v [F, N, H, d]; out [F*P, H, d].
    """
    frames, heads = k.shape[0], k.shape[2:]
    normed = rms_norm(q, weight, torch.empty_like(q), eps=eps)
    attended = F.scaled_dot_product_attention(
        normed.view(frames, -1, *heads).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    )
    return out.copy_(attended.transpose(1, 2).flatten(0, 1))


def patches(latent: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Flattened patches of a convolution whose stride is its kernel.

    latent [C, F, h, w] -> [F/st * h/sh * w/sw, C*st*sh*sw], tokens frame-major, features channel-major.
    """
    st, sh, sw = stride
    c, f, h, w = latent.shape
    cut = latent.reshape(c, f // st, st, h // sh, sh, w // sw, sw)
    return cut.permute(1, 3, 5, 0, 2, 4, 6).reshape(-1, c * st * sh * sw)


def embed(
    latent: Tensor, weight: tuple[Tensor, Tensor], pose: Tensor, kind: Tensor, out: Tensor
) -> Tensor:
    """Tokens of a noisy block: out = R(R(R(patch(latent)) + pose) + kind).

    latent [16, F, h, w]; weight: patch embedding [D, 64] and bias; pose: embedded pose condition [F*P, D] or, where
    there is no pose video, its bias [D]; kind [D]: the embedding of 'noisy' tokens; out [F*P, D].
    """
    torch.addmm(weight[1], patches(latent, (1, 2, 2)), weight[0].t(), out=out)
    return out.add_(pose).add_(kind)


def euler_step(latent: Tensor, flow: Tensor, step_size: float, out: Tensor) -> Tensor:
    """out = R(latent + R(R(step_size) * flow)), un-patchifying the flow on the way.

    flow [F*P, 64], features (row, column, channel) with the channel fastest; latent, out [16, F, h, w]; out may be
    latent. The step size itself is rounded to the working dtype, as published (spec dit.md section 8).
    """
    rounded = float(torch.tensor(step_size, dtype=out.dtype))
    update = unpatchify(flow, latent.shape) * rounded
    return out.copy_(latent.float() + update.float())


def unpatchify(flow: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """[F*P, 64] -> [16, F, h, w] of the given shape."""
    c, f, h, w = shape
    return flow.view(f, h // 2, w // 2, 2, 2, c).permute(5, 0, 1, 3, 2, 4).reshape(c, f, h, w)
