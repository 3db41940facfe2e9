"""Backend `torch`: every operator of the transformer in plain PyTorch, on any device.

This is the definition the fused kernels have to meet: R(x) means one rounding to the working dtype (the dtype of
`out`), everything between two roundings is float32 (spec dit.md sections 3 and 6). All results go to given buffers.
Dimension letters: T tokens, D width, H heads, d head size, P tokens per latent frame, F latent frames.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "torch"


def linear(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """out = R(x @ weight^T + bias). x [T, in], weight [n, in], bias [n], out [T, n], all of the working dtype."""
    return torch.addmm(bias, x, weight.t(), out=out)


def norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, out: Tensor, *, eps: float, round_norm: bool = False
) -> Tensor:
    """out = R(LN(x) * (1 + scale) + shift); with `round_norm` LN(x) is rounded first.

    x [T, D] of any float dtype, scale and shift [D] float32, out [T, D].
    """
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    if round_norm and out.dtype != torch.float32:
        normed = normed.to(out.dtype).float()
    return out.copy_(normed.mul_(1 + scale).add_(shift))


def norm_affine(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, *, eps: float) -> Tensor:
    """out = R(LN(R(x)) * weight + bias). x [T, D] float32 or working dtype, weight and bias [D], out [T, D]."""
    rounded = x.to(out.dtype).float()
    return out.copy_(F.layer_norm(rounded, x.shape[-1:], weight.float(), bias.float(), eps))


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None, out: Tensor) -> Tensor:
    """out = R(x + y * gate) with float32 arithmetic; gate [D] float32 or None for 1. x, y, out [T, D]; out may be x."""
    update = y.float() if gate is None else y.float() * gate
    if out.dtype == torch.float32:
        return torch.add(x, update, out=out)
    return out.copy_(x + update)


def rms_norm(x: Tensor, weight: Tensor, out: Tensor, *, eps: float) -> Tensor:
    """out = R(R(x * rsqrt(mean(x^2) + eps)) * weight), statistics over the full width. x [T, D], weight [D]."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return torch.mul(normed.to(out.dtype), weight, out=out)


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
    qkv: Tensor,
    weights: tuple[Tensor, Tensor],
    table: tuple[Tensor, Tensor],
    outs: tuple[Tensor, Tensor, Tensor],
    k_raw: Tensor,
    reference: tuple[Tensor, tuple[Tensor, Tensor], Tensor] | None = None,
    *,
    eps: float,
) -> None:
    """Full-width RMS norm of q and k, RoPE, and the write of k and v into their arena rows.

    qkv [T, 3D]; weights: RMS weights of q and k [D]; table: cos and sin [T, d/2];
    outs: q [T, H, d], and the arena rows of k and v [T, H, d]; k_raw [T, H, d] receives k before RoPE.
    reference: the sink's reference keys before RoPE [P, H, d], their table and their arena rows, when they must move.
    """
    q_out, k_out, v_out = outs
    width = qkv.shape[1] // 3
    q, k, v = qkv.split(width, dim=1)
    rms_norm(q, weights[0], k_raw.view(-1, width), eps=eps)
    rotate(k_raw, *table, out=q_out)
    rms_norm(k, weights[1], k_raw.view(-1, width), eps=eps)
    rotate(k_raw, *table, out=k_out)
    v_out.copy_(v.unflatten(1, v_out.shape[1:]))
    if reference is not None:
        raw, reference_table, rows = reference
        rotate(raw, *reference_table, out=rows)


def attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
    """out = softmax(q k^T / sqrt(d)) v without mask. q, out [T, H, d]; k, v [N, H, d], any strides but the last."""
    attended = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0), k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)
    )
    return out.copy_(attended.squeeze(0).transpose(0, 1))


def gelu(x: Tensor, out: Tensor) -> Tensor:
    """out = R(gelu(x)), tanh form. x, out [T, n]; out may be x."""
    return out.copy_(F.gelu(x, approximate="tanh"))


def audio_norm(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor, *, eps: float) -> Tensor:
    """AdaIN: out = R(LN(x_f) * R(1 + scale_f) + shift_f), scale and shift per latent frame.

    x, out [F*P, D]; scale and shift [F, D] of the working dtype.
    """
    frames = scale.shape[0]
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps).unflatten(0, (frames, -1))
    factor = (1 + scale).float().unsqueeze(1)
    return out.copy_((normed * factor + shift.float().unsqueeze(1)).flatten(0, 1))


def audio_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
    """Each latent frame's tokens attend to that frame's few audio tokens. q, out [F*P, H, d]; k, v [F, N, H, d]."""
    frames = k.shape[0]
    attended = F.scaled_dot_product_attention(
        q.unflatten(0, (frames, -1)).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
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
