"""A dumb twin of the transformer in float64: lists instead of arenas, everything recomputed, straight from the spec.

Only the RoPE tables are rounded (to float16 through float32), as the published model does in every precision.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rope_table(positions: list[tuple[float, int, int]], head_dim: int) -> Tensor:
    """Complex64-exact rotation [T, d/2] of (time, row, column) positions."""
    spatial = head_dim // 6
    counts = (head_dim // 2 - 2 * spatial, spatial, spatial)
    rows = []
    for position in positions:
        angles = [p * 10000.0 ** (-i / n) for p, n in zip(position, counts, strict=True) for i in range(n)]
        rows.append([(math.cos(a), math.sin(a)) for a in angles])
    table = torch.tensor(rows, dtype=torch.float64).float().half().double()
    return torch.complex(table[..., 0], table[..., 1])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x [T, H, d]."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * table[:, None]).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[T, H, d] x [N, H, d] -> [T, H * d]."""
    weights = torch.softmax(torch.einsum("thd,nhd->htn", q, k) / math.sqrt(q.shape[-1]), dim=-1)
    return torch.einsum("htn,nhd->thd", weights, v).flatten(1)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def spread(size: int, count: int) -> list[int]:
    return [0] if count == 1 else [int(v) for v in torch.linspace(0, size - 1, count, dtype=torch.float64) + 1e-9]


class Twin:
    """weights: published names; h, w: latent size; ring: latent frames kept; frames: latent frames a block."""

    def __init__(
        self, weights: dict[str, Tensor], heads: int, inject: tuple[int, ...], size: tuple[int, int],
        ring: int, frames: int,
    ) -> None:
        self.w = {key: tensor.double() for key, tensor in weights.items()}
        self.heads, self.inject, self.ring, self.frames = heads, inject, ring, frames
        self.h, self.wd = size[0] // 2, size[1] // 2
        self.layers = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
        self.dim = weights["patch_embedding.weight"].shape[0]
        self.history: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(self.layers)]

    def lin(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], self.heads, -1)

    def conv(self, name: str, latent: Tensor) -> Tensor:
        kernel = self.w[f"{name}.weight"]
        y = F.conv3d(latent[None].double(), kernel, self.w[f"{name}.bias"], stride=kernel.shape[2:])
        return y[0].flatten(1).T

    def time(self, t: float) -> tuple[Tensor, Tensor]:
        half = self.w["time_embedding.0.weight"].shape[1] // 2
        angles = t * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        wave = torch.cat([angles.cos(), angles.sin()]).float().double()
        e = self.lin("time_embedding.2", F.silu(self.lin("time_embedding.0", wave)))
        return e, self.lin("time_projection.1", F.silu(e)).reshape(6, -1)

    def text(self, states: Tensor, length: int) -> Tensor:
        padded = torch.zeros(length, states.shape[1], dtype=torch.float64)
        padded[: len(states)] = states
        return self.lin("text_embedding.2", F.gelu(self.lin("text_embedding.0", padded), approximate="tanh"))

    def grid(self, time: float) -> list[tuple[float, int, int]]:
        return [(time, row, col) for row in range(self.h) for col in range(self.wd)]

    def sink(self, reference: Tensor, motion: Tensor) -> tuple[Tensor, list[tuple[float, int, int]]]:
        mask = self.w["trainable_cond_mask.weight"]
        motion = F.pad(motion, (0, 0, 0, 0, 19 - motion.shape[1], 0))
        tokens = [self.conv("patch_embedding", reference) + mask[1]]
        for name, part in (("proj", motion[:, 18:]), ("proj_2x", motion[:, 16:18]), ("proj_4x", motion[:, :16])):
            tokens.append(self.conv(f"frame_packer.{name}", part) + mask[2])
        places = self.grid(-1)
        places += [(-3, r, c) for r in spread(self.h, self.h // 2) for c in spread(self.wd, self.wd // 2)]
        for time in (-19, -14, -9, -4):
            places += [(time, r, c) for r in spread(self.h, self.h // 4) for c in spread(self.wd, self.wd // 4)]
        return torch.cat(tokens), places

    def layer(
        self, i: int, x: Tensor, e: Tensor, text: Tensor, table: Tensor, others: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer over x; `others`: rotated keys and values besides x's own. Returns x, its un-rotated k, its v."""
        name = f"blocks.{i}"
        m = self.w[f"{name}.modulation"][0] + e
        h = norm(x) * (1 + m[1]) + m[0]
        attn = f"{name}.self_attn"
        q = self.split(rms(self.lin(f"{attn}.q", h), self.w[f"{attn}.norm_q.weight"]))
        k = self.split(rms(self.lin(f"{attn}.k", h), self.w[f"{attn}.norm_k.weight"]))
        v = self.split(self.lin(f"{attn}.v", h))
        keys = torch.cat([rotate(k, table), *(pair[0] for pair in others)])
        values = torch.cat([v, *(pair[1] for pair in others)])
        x = x + self.lin(f"{attn}.o", attend(rotate(q, table), keys, values)) * m[2]
        h = norm(x) * self.w[f"{name}.norm3.weight"] + self.w[f"{name}.norm3.bias"]
        x = x + self.cross(f"{name}.cross_attn", h, text)
        h = norm(x) * (1 + m[4]) + m[3]
        return x + self.lin(f"{name}.ffn.2", F.gelu(self.lin(f"{name}.ffn.0", h), approximate="tanh")) * m[5], k, v

    def cross(self, name: str, h: Tensor, context: Tensor) -> Tensor:
        q = self.split(rms(self.lin(f"{name}.q", h), self.w[f"{name}.norm_q.weight"]))
        k = self.split(rms(self.lin(f"{name}.k", context), self.w[f"{name}.norm_k.weight"]))
        return self.lin(f"{name}.o", attend(q, k, self.split(self.lin(f"{name}.v", context))))

    def prefill(self, reference: Tensor, motion: Tensor, text: Tensor) -> None:
        x, self.sink_places = self.sink(reference, motion)
        _, e = self.time(0.0)
        head_dim = self.dim // self.heads
        table = rope_table(self.grid(30) + self.sink_places, head_dim)
        self.sink_kv = []
        for i in range(self.layers):
            x, k, v = self.layer(i, x, e, text, table, [])
            self.sink_kv.append((k, v))

    def audio(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """features [states, A, 4 F], the long way: 73 copies in front, 19 latent frames dropped at the end."""
        enc = "casual_audio_encoder.encoder"
        weight = F.silu(self.w["casual_audio_encoder.weights"]).reshape(-1, 1, 1)
        long = torch.cat([features[..., :1].expand(-1, -1, 73), features], dim=-1).double()
        mixed = (long * weight).sum(0) / weight.sum()

        def conv(x: Tensor, name: str, stride: int) -> Tensor:
            padded = torch.cat([x[..., :1], x[..., :1], x], dim=-1)
            weight, bias = (self.w[f"{enc}.{name}.conv.{leaf}"] for leaf in ("weight", "bias"))
            return F.conv1d(padded, weight, bias, stride=stride)

        def act(x: Tensor) -> Tensor:
            return F.silu(norm(x.transpose(1, 2))).transpose(1, 2)

        def rest(x: Tensor) -> Tensor:
            return act(conv(act(conv(act(x), "conv2", 2)), "conv3", 2))[..., 19:]

        local = conv(mixed[None], "conv1_local", 1)
        local = local.reshape(4, -1, local.shape[-1])
        tokens = rest(local).permute(2, 0, 1)
        tokens = torch.cat([tokens, self.w[f"{enc}.padding_tokens"][0].expand(self.frames, 1, -1)], dim=1)
        overall = self.lin(f"{enc}.final_linear", rest(conv(mixed[None], "conv1_global", 1))[0].T)
        return tokens, overall

    def block(
        self, latent: Tensor, t: float, start: int, distance: int, text: Tensor, features: Tensor, pose: Tensor
    ) -> Tensor:
        """Flow [16, F, h, w] of one block; its keys and values join the history."""
        mask = self.w["trainable_cond_mask.weight"]
        x = self.conv("patch_embedding", latent) + self.conv("cond_encoder", pose) + mask[0]
        e, six = self.time(t)
        head_dim = self.dim // self.heads
        places = [place for frame in range(self.frames) for place in self.grid(start + frame)]
        table = rope_table(places, head_dim)
        sink_table = rope_table(self.grid(max(30, start + distance)) + self.sink_places, head_dim)
        tokens, overall = self.audio(features)
        for i in range(self.layers):
            kept = self.history[i][-(self.ring // self.frames - 1) :] if self.ring > self.frames else []
            k, v = self.sink_kv[i]
            x, k_own, v_own = self.layer(i, x, six, text, table, [*kept, (rotate(k, sink_table), v)])
            self.history[i].append((rotate(k_own, table), v_own))
            if i in self.inject:
                x = x + self.injection(self.inject.index(i), x, tokens, overall)
        m = self.w["head.modulation"][0] + e
        out = self.lin("head.head", norm(x) * (1 + m[1]) + m[0])
        c, f, h, w = latent.shape
        return out.reshape(f, h // 2, w // 2, 2, 2, c).permute(5, 0, 1, 3, 2, 4).reshape(c, f, h, w)

    def injection(self, j: int, x: Tensor, tokens: Tensor, overall: Tensor) -> Tensor:
        parts = []
        for frame, own in enumerate(x.reshape(self.frames, -1, self.dim)):
            adain = self.lin(f"audio_injector.injector_adain_layers.{j}.linear", F.silu(overall[frame]))
            shift, scale = adain.chunk(2)
            a = norm(own, 1e-5) * (1 + scale) + shift
            parts.append(self.cross(f"audio_injector.injector.{j}", a, tokens[frame]))
        return torch.cat(parts)
