"""The transformer as one would write it first: nn.Module layers, concatenated caches, everything recomputed each call.

The baseline of the benchmarks, never imported by the engine. It computes the same numbers in float32 (spec dit.md).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liverelay.engine.config import DiTConfig

Cache = list[tuple[Tensor, Tensor]]


def rope_table(times: list[int], rows: list[int], cols: list[int], head_dim: int) -> Tensor:
    """Complex rotations [T, 1, d/2] of a token grid, made anew at every call; rounded to float16 as published."""
    spatial = head_dim // 6
    parts = []
    for axis, pairs in ((times, head_dim // 2 - 2 * spatial), (rows, spatial), (cols, spatial)):
        frequency = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        angle = torch.tensor(axis, dtype=torch.float64)[:, None] * frequency
        parts.append(torch.complex(angle.cos().float().half().double(), angle.sin().float().half().double()))
    t, r, c = len(times), len(rows), len(cols)
    grid = [
        parts[0].view(t, 1, 1, -1).expand(t, r, c, -1),
        parts[1].view(1, r, 1, -1).expand(t, r, c, -1),
        parts[2].view(1, 1, c, -1).expand(t, r, c, -1),
    ]
    return torch.cat(grid, dim=-1).reshape(t * r * c, 1, -1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x [T, H, d] in complex128, as the published code does."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of [T, H, d] over [N, H, d] -> [T, H * d]."""
    y = F.scaled_dot_product_attention(*(part.transpose(0, 1).unsqueeze(0) for part in (q, k, v)))
    return y.squeeze(0).transpose(0, 1).flatten(1)


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    """Projections of self, text or audio attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def qkv(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = self.norm_q(self.q(x)), self.norm_k(self.k(context))
        return self.split(q), self.split(k), self.split(self.v(context))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        out: Tensor = self.o(attend(*self.qkv(x, context)))
        return out


class Layer(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.self_attn, self.cross_attn = Attention(dim, config.num_heads), Attention(dim, config.num_heads)
        self.norm1 = nn.LayerNorm(dim, config.eps, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, config.eps, elementwise_affine=False)
        self.norm3 = nn.LayerNorm(dim, config.eps)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(
        self, x: Tensor, e: Tensor, text: Tensor, table: Tensor, others: Cache
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """x [T, D], e [6, D]; others: keys and values besides x's own. Also returns k before and after RoPE, and v."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation[0] + e).unsqueeze(1).expand(-1, len(x), -1)
        q, k, v = self.self_attn.qkv(*(2 * (self.norm1(x) * (1 + scale1) + shift1,)))
        rotated = rotate(k, table)
        keys = torch.cat([rotated, *(pair[0] for pair in others)])
        values = torch.cat([v, *(pair[1] for pair in others)])
        x = x + self.self_attn.o(attend(rotate(q, table), keys, values)) * gate1
        x = x + self.cross_attn(self.norm3(x), text)
        x = x + self.ffn(self.norm2(x) * (1 + scale2) + shift2) * gate2
        return x, (k, rotated, v)


class CausalConv(nn.Module):
    def __init__(self, inner: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv, self.stride = nn.Conv1d(inner, out, 3, stride=stride), stride

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.pad(x, (2, 0), mode="replicate"))
        return y


class AudioEncoder(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim, self.tokens = config.dim, config.num_audio_tokens
        self.conv1_local = CausalConv(config.audio_dim, dim // 4 * self.tokens, 1)
        self.conv1_global = CausalConv(config.audio_dim, dim // 4, 1)
        self.conv2, self.conv3 = CausalConv(dim // 4, dim // 2, 2), CausalConv(dim // 2, dim, 2)
        self.final_linear = nn.Linear(dim, dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))

    @staticmethod
    def act(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return F.silu(F.layer_norm(x, x.shape[-1:], eps=1e-6)).transpose(1, 2)

    def rest(self, x: Tensor) -> Tensor:
        return self.act(self.conv3(self.act(self.conv2(self.act(x))))).permute(2, 0, 1)

    def forward(self, mixed: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """mixed [1, A, n] -> tokens [frames, tokens + 1, D] and global vectors [frames, D] of the last frames."""
        local = self.conv1_local(mixed)[0].unflatten(0, (self.tokens, -1))
        tokens = self.rest(local)[-frames:]
        tokens = torch.cat([tokens, self.padding_tokens[0].expand(frames, 1, -1)], dim=1)
        return tokens, self.final_linear(self.rest(self.conv1_global(mixed))[-frames:, 0])


class PlainDiT(nn.Module):
    """One stream at one noise level; `load` takes published weights, `prefill` and `forward` run like the engine's."""

    def __init__(self, config: DiTConfig, ring_frames: int = 12, frames: int = 3) -> None:
        super().__init__()
        c, dim = config, config.dim
        self.config, self.ring_frames, self.frames = config, ring_frames, frames
        self.patch_embedding = nn.Conv3d(c.in_channels, dim, (1, 2, 2), (1, 2, 2))
        self.cond_encoder = nn.Conv3d(c.cond_channels, dim, (1, 2, 2), (1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(c.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(c.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.trainable_cond_mask = nn.Embedding(3, dim)
        packers = {"proj": (1, 2, 2), "proj_2x": (2, 4, 4), "proj_4x": (4, 8, 8)}
        self.frame_packer = nn.ModuleDict({name: nn.Conv3d(16, dim, s, s) for name, s in packers.items()})
        self.blocks = nn.ModuleList(Layer(c) for _ in range(c.num_layers))
        self.head = nn.ParameterDict({"modulation": nn.Parameter(torch.zeros(1, 2, dim))})
        self.head_linear = nn.Linear(dim, 4 * c.in_channels)
        self.audio_mix = nn.Parameter(torch.zeros(1, c.audio_states, 1, 1))
        self.audio_encoder = AudioEncoder(c)
        count = len(c.audio_inject_layers)
        self.injector = nn.ModuleList(Attention(dim, c.num_heads) for _ in range(count))
        self.adain = nn.ModuleList(nn.Linear(dim, 2 * dim) for _ in range(count))
        self.cached: list[Cache] = [[] for _ in range(c.num_layers)]
        self.sink: Cache = []

    def load(self, weights: Mapping[str, Tensor]) -> PlainDiT:
        """Take weights under their published names."""
        renames = {
            "head.head.": "head_linear.", "casual_audio_encoder.weights": "audio_mix",
            "casual_audio_encoder.encoder.": "audio_encoder.", "audio_injector.injector.": "injector.",
        }  # fmt: skip
        state = {}
        for key, value in weights.items():
            name = key
            for old, new in renames.items():
                name = new + name[len(old) :] if name.startswith(old) else name
            if name.startswith("audio_injector.injector_adain_layers."):
                name = "adain." + name.removeprefix("audio_injector.injector_adain_layers.").replace(".linear", "")
            state[name] = value.float()
        self.load_state_dict(state)
        return self

    def modulation(self, timestep: float) -> tuple[Tensor, Tensor]:
        half = self.config.freq_dim // 2
        angle = timestep * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        e = self.time_embedding(torch.cat([angle.cos(), angle.sin()]).float())
        return e, self.time_projection(e).view(6, -1)

    def text(self, states: Tensor) -> Tensor:
        padded = F.pad(states.float(), (0, 0, 0, self.config.text_len - len(states)))
        embedded: Tensor = self.text_embedding(padded)
        return embedded

    def sink_places(self, rows: int, cols: int) -> Tensor:
        """Rotations of the packed motion tokens."""
        def spread(size: int, count: int) -> list[int]:
            return [k * (size - 1) // max(1, count - 1) for k in range(count)]

        head_dim, parts = self.config.head_dim, []
        for times, stride in (([-1], 1), ([-3], 2), ([-19, -14, -9, -4], 4)):
            grid = spread(rows, rows // stride), spread(cols, cols // stride)
            parts.append(rope_table(times, *grid, head_dim))
        return torch.cat(parts)

    def prefill(self, reference: Tensor, motion: Tensor, text_states: Tensor) -> None:
        """Keys (before RoPE) and values of reference [16, 1, h, w] and motion [16, 19, h, w] latents."""
        kinds = self.trainable_cond_mask.weight
        def tokens(conv: nn.Module, latent: Tensor) -> Tensor:
            embedded: Tensor = conv(latent.unsqueeze(0))
            return embedded[0].flatten(1).T

        parts = [tokens(self.patch_embedding, reference) + kinds[1]]
        for name, first, count in (("proj", 18, 1), ("proj_2x", 16, 2), ("proj_4x", 0, 16)):
            parts.append(tokens(self.frame_packer[name], motion[:, first : first + count]) + kinds[2])
        x, (_, e), text = torch.cat(parts), self.modulation(0.0), self.text(text_states)
        rows, cols = reference.shape[2] // 2, reference.shape[3] // 2
        grid = list(range(rows)), list(range(cols))
        table = torch.cat([rope_table([30], *grid, self.config.head_dim), self.sink_places(rows, cols)])
        self.sink = []
        for layer in self.blocks:
            x, (k, _, v) = layer(x, e, text, table, [])
            self.sink.append((k, v))

    def forward(
        self, latent: Tensor, timestep: float, start: int, distance: int, conditions: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """Flow [16, F, h, w] of a block; conditions: text states [n, text_dim], audio [states, A, 4F], pose latents."""
        text_states, audio, pose = conditions
        embedded = self.patch_embedding(latent[None]) + self.cond_encoder(pose[None])
        x = embedded[0].flatten(1).T + self.trainable_cond_mask.weight[0]
        (head, e), text = self.modulation(timestep), self.text(text_states)
        rows, cols = latent.shape[2] // 2, latent.shape[3] // 2
        grid = list(range(rows)), list(range(cols))
        table = rope_table(list(range(start, start + self.frames)), *grid, self.config.head_dim)
        reference = rope_table([max(30, start + distance)], *grid, self.config.head_dim)
        sink_table = torch.cat([reference, self.sink_places(rows, cols)])
        mix = F.silu(self.audio_mix[0])
        long = torch.cat([audio[..., :1].expand(-1, -1, 73), audio], dim=-1)
        tokens, overall = self.audio_encoder(((long * mix).sum(0) / mix.sum())[None], self.frames)
        for i, layer in enumerate(self.blocks):
            k, v = self.sink[i]
            x, (_, k, v) = layer(x, e, text, table, [*self.cached[i], (rotate(k, sink_table), v)])
            self.cached[i] = [*self.cached[i], (k, v)][-(self.ring_frames // self.frames - 1) :]
            if i in self.config.audio_inject_layers:
                x = x + self.inject(self.config.audio_inject_layers.index(i), x, tokens, overall)
        shift, scale = self.head["modulation"][0] + head
        out = self.head_linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        c, f, h, w = latent.shape
        return out.view(f, h // 2, w // 2, 2, 2, c).permute(5, 0, 1, 3, 2, 4).reshape(c, f, h, w)

    def inject(self, j: int, x: Tensor, tokens: Tensor, overall: Tensor) -> Tensor:
        """AdaIN and attention to the audio tokens, latent frame by latent frame."""
        parts = []
        for frame, own in enumerate(x.unflatten(0, (self.frames, -1))):
            shift, scale = self.adain[j](F.silu(overall[frame])).chunk(2)
            normed = F.layer_norm(own, own.shape[-1:], eps=1e-5) * (1 + scale) + shift
            parts.append(self.injector[j](normed, tokens[frame]))
        return torch.cat(parts)
