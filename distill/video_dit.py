"""The engine's transformer for training: batches, gradients, whole sequences at once, the published keys.

In the timestep-forced pipeline a block at noise level t attends to what the same level kept of the blocks before it.
Keys and values of a level therefore depend on that level's inputs alone, and a stream of n blocks is one pass over all
its tokens in which every block sees itself, the blocks before it that the ring still holds, and the sink roped for its
own position. A rollout of n blocks and 4 steps is 4 such passes, equal to the engine's n * 4 block-steps (tested).
The bidirectional teacher is the same pass with one block as long as the sequence. Source: spec dit.md 4 to 9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liverelay.engine.config import DiTConfig
from liverelay.engine.models.geometry import (
    MOTION_BUCKETS,
    REFERENCE_POSITION,
    ROPE_THETA,
    coarse_positions,
    split_pairs,
)

Table = tuple[Tensor, Tensor]  # cos and sin [..., tokens, d/2]


@dataclass(frozen=True)
class Condition:
    """What a sequence is made from: reference [B, 16, 1, h, w] and motion [B, 16, 19, h, w] latents, the prompt's
    states [B, n, text_dim], sound [B, states, audio_dim, 4 F]."""

    reference: Tensor
    motion: Tensor
    text: Tensor
    audio: Tensor


@dataclass(frozen=True)
class Span:
    """Which part of a stream a sequence is, and who sees whom.

    start [B]: absolute latent frame of its first block; distance [B, blocks]: of the rolling sink ahead of each block;
    frames: latent frames of a block; ring: blocks that a block sees, itself among them; rolling: whether the sink moves
    at all; corruption: standard deviation of noise on the keys and values of the blocks before, relative to theirs.
    """

    start: Tensor
    distance: Tensor
    frames: int = 3
    ring: int = 4
    rolling: bool = True
    corruption: float = 0.0


def rope(times: Tensor, rows: Tensor, cols: Tensor, head_dim: int) -> Table:
    """times [..., t], rows [r], cols [c] -> tables [..., t * r * c, d/2], rounded to float16 as published."""
    lead, counts = times.shape[:-1], (times.shape[-1], len(rows), len(cols))
    parts: list[list[Tensor]] = [[], []]
    for axis, (positions, pairs) in enumerate(zip((times, rows, cols), split_pairs(head_dim), strict=True)):
        frequency = ROPE_THETA ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        angle = positions.double()[..., None] * frequency
        shape = [1, 1, 1, pairs]
        shape[axis] = counts[axis]
        spread = angle.reshape(*(lead if axis == 0 else ()), *shape).expand(*lead, *counts, pairs)
        for part, value in zip(parts, (spread.cos(), spread.sin()), strict=True):
            part.append(value.flatten(-4, -2).float().half().float())
    return torch.cat(parts[0], dim=-1), torch.cat(parts[1], dim=-1)


def rotate(x: Tensor, table: Tensor | Table) -> Tensor:
    """x [..., tokens, H, d] by cos and sin [..., tokens, d/2]."""
    cos, sin = (part.unsqueeze(-2) for part in table)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, 1e-6).to(x.dtype)


class Attention(nn.Module):
    """Projections of self, text or audio attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.norm_k(self.k(context))), self.split(self.v(context))

    def query(self, x: Tensor) -> Tensor:
        return self.split(self.norm_q(self.q(x)))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [B, T, D] over context [B, n, D]."""
        out: Tensor = self.o(attend(self.query(x), *self.keys(context)))
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, T, H, d] over [B, n, H, d] -> [B, T, H * d]; mask: added to the scores."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    mask = None if mask is None else mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask).transpose(1, 2).flatten(2)


class Layer(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.self_attn, self.cross_attn = Attention(dim, config.num_heads), Attention(dim, config.num_heads)
        self.norm3 = nn.LayerNorm(dim, config.eps)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x: Tensor, e: Tensor, text: Tensor, see: See | SeeSink) -> Tensor:
        """x [B, T, D], e [B, 6, D], text [B, n, D]; `see` is the self-attention over whatever a token sees."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + e).unsqueeze(2).unbind(1)
        h = norm(x) * (1 + scale1) + shift1
        attn = self.self_attn
        x = x + attn.o(see(attn.query(h), *attn.keys(h))) * gate1
        x = x + self.cross_attn(self.norm3(x), text)
        return x + self.ffn(norm(x) * (1 + scale2) + shift2) * gate2


class SeeSink:
    """Prefill: sink tokens see each other. `kept` are a layer's keys as they were before RoPE, and its values."""

    kept: tuple[Tensor, Tensor]

    def __init__(self, table: Table) -> None:
        self.table = table

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.kept = k, v
        return attend(rotate(q, self.table), rotate(k, self.table), v)


class See:
    """Blocks see themselves, what the ring holds and `sink`: that layer's keys and values of it."""

    sink: tuple[Tensor, Tensor]

    def __init__(self, table: Table, sink_table: Table, span: Span) -> None:
        self.table, self.sink_table, self.span = table, sink_table, span

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks, ring = self.span.distance.shape[1], self.span.ring
        sink_k, sink_v = self.sink
        own = [part.unflatten(1, (blocks, -1)) for part in (rotate(q, self.table), rotate(k, self.table), v)]
        keys, values = (self._window(part) for part in own[1:])
        sink_k = rotate(sink_k.unsqueeze(1).expand(-1, blocks, -1, -1, -1), self.sink_table)
        sink_v = sink_v.unsqueeze(1).expand(-1, blocks, -1, -1, -1)
        keys, values = torch.cat([keys, sink_k], dim=2), torch.cat([values, sink_v], dim=2)
        mask = None
        if ring > 1:  # the first blocks have none, one and two blocks before them
            tokens = own[0].shape[2]
            there = torch.arange(blocks)[:, None] + torch.arange(1 - ring, 1)[None, :] >= 0
            there = there.repeat_interleave(tokens, dim=1)
            there = torch.cat([there, there.new_ones(blocks, sink_k.shape[2])], dim=1)
            hidden = torch.where(there, 0.0, float("-inf"))
            mask = hidden.repeat(len(q), 1)[:, None, None, :].to(q.device)
        flat = (part.flatten(0, 1) for part in (own[0], keys, values))
        return attend(*flat, mask).unflatten(0, (len(q), blocks)).flatten(1, 2)

    def _window(self, x: Tensor) -> Tensor:
        """[B, blocks, n, H, d] -> [B, blocks, ring * n, H, d]: the blocks before, the oldest first, and the block."""
        ring, before = self.span.ring, x
        if self.span.corruption:
            before = x + self.span.corruption * x.detach().std() * torch.randn_like(x)
        padded = F.pad(before, (0, 0, 0, 0, 0, 0, ring - 1, 0))
        return torch.cat([*(padded[:, i : i + x.shape[1]] for i in range(ring - 1)), x], dim=2)


class UnpaddedConv(nn.Module):
    def __init__(self, inner: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inner, out, 3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


class AudioEncoder(nn.Module):
    """Features [B, A, 12] of a block's video frames -> 5 tokens and a global vector for each latent frame."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim, self.tokens = config.dim, config.num_audio_tokens
        self.conv1_local = UnpaddedConv(config.audio_dim, dim // 4 * self.tokens, 1)
        self.conv1_global = UnpaddedConv(config.audio_dim, dim // 4, 1)
        self.conv2, self.conv3 = UnpaddedConv(dim // 4, dim // 2, 2), UnpaddedConv(dim // 2, dim, 2)
        self.final_linear = nn.Linear(dim, dim)
        self.padding_tokens = nn.Parameter(torch.randn(1, 1, 1, dim) / dim**0.5)

    @staticmethod
    def act(x: Tensor) -> Tensor:
        return F.silu(norm(x.transpose(1, 2))).transpose(1, 2)

    def rest(self, x: Tensor) -> Tensor:
        """[B, D/4, 15] -> [B, 3, D]."""
        return self.act(self.conv3(self.act(self.conv2(self.act(x))))).transpose(1, 2)

    def forward(self, mixed: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([mixed[..., :1].expand(-1, -1, 5), mixed], dim=2)
        local = self.rest(self.conv1_local(x).unflatten(1, (self.tokens, -1)).flatten(0, 1))
        local = local.unflatten(0, (-1, self.tokens)).transpose(1, 2)
        padding = self.padding_tokens.expand(*local.shape[:2], 1, -1)
        return torch.cat([local, padding], dim=2), self.final_linear(self.rest(self.conv1_global(x)))


class Adain(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)


class Head(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.head = nn.Linear(dim, out)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation + e.unsqueeze(1)).unsqueeze(2).unbind(1)
        out: Tensor = self.head(norm(x) * (1 + scale) + shift)
        return out


class VideoDiT(nn.Module):
    """flow = model(latents, timestep, condition, span)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        c, dim = config, config.dim
        self.config = config
        self.patch_embedding = nn.Conv3d(c.in_channels, dim, (1, 2, 2), (1, 2, 2))
        self.cond_encoder = nn.Conv3d(c.cond_channels, dim, (1, 2, 2), (1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(c.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(c.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.trainable_cond_mask = nn.Embedding(3, dim)
        nn.init.normal_(self.trainable_cond_mask.weight, std=dim**-0.5)
        packers = {"proj": (1, 2, 2), "proj_2x": (2, 4, 4), "proj_4x": (4, 8, 8)}
        self.frame_packer = nn.ModuleDict({name: nn.Conv3d(c.in_channels, dim, s, s) for name, s in packers.items()})
        self.blocks = nn.ModuleList(Layer(c) for _ in range(c.num_layers))
        self.head = Head(dim, 4 * c.in_channels)
        self.casual_audio_encoder = nn.Module()
        self.casual_audio_encoder.weights = nn.Parameter(torch.ones(1, c.audio_states, 1, 1))
        self.casual_audio_encoder.encoder = AudioEncoder(c)
        count = len(c.audio_inject_layers)
        self.audio_injector = nn.Module()
        self.audio_injector.injector = nn.ModuleList(Attention(dim, c.num_heads) for _ in range(count))
        self.audio_injector.injector_adain_layers = nn.ModuleList(Adain(dim) for _ in range(count))

    def load(self, weights: Mapping[str, Tensor]) -> VideoDiT:
        self.load_state_dict({key: value.float() for key, value in weights.items()})
        return self

    # -- parts -----------------------------------------------------------------------------------------------------

    def modulation(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """timestep [B] -> e [B, D], e6 [B, 6, D], in float32."""
        with torch.autocast(timestep.device.type, enabled=False):
            half = self.config.freq_dim // 2
            angle = timestep.double()[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
            e = self.time_embedding(torch.cat([angle.cos(), angle.sin()], dim=1).float())
            return e, self.time_projection(e).unflatten(1, (6, -1))

    def text(self, states: Tensor) -> Tensor:
        """States [B, n, text_dim] -> [B, text_len, D]; the rows after them take part, as published."""
        embedded: Tensor = self.text_embedding(F.pad(states, (0, 0, 0, self.config.text_len - states.shape[1])))
        return embedded

    def sound(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, states, A, 4 F] -> tokens [B * F, 5, D] and global vectors [B * F, 1, D]."""
        with torch.autocast(features.device.type, enabled=False):
            weight = F.silu(self.casual_audio_encoder.weights)
            mixed = (features.float() * weight).sum(1) / weight.sum()
            blocks = mixed.unflatten(2, (-1, 12)).transpose(1, 2).flatten(0, 1)
            tokens, overall = self.casual_audio_encoder.encoder(blocks)
        return tokens.flatten(0, 1), overall.flatten(0, 1).unsqueeze(1)

    def sink(self, condition: Condition, text: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Table]:
        """Keys before RoPE and values of every layer, and the RoPE table of the motion tokens."""
        mask = self.trainable_cond_mask.weight
        tokens = [self.patch_embedding(condition.reference).flatten(2).transpose(1, 2) + mask[1]]
        rows, cols = condition.reference.shape[3] // 2, condition.reference.shape[4] // 2
        tables = []
        for name, (first, count, _, stride, times) in zip(("proj", "proj_2x", "proj_4x"), MOTION_BUCKETS, strict=True):
            part = condition.motion[:, :, first : first + count]
            tokens.append(self.frame_packer[name](part).flatten(2).transpose(1, 2) + mask[2])
            places = (torch.as_tensor(coarse_positions(side, side // stride)).to(part) for side in (rows, cols))
            tables.append(rope(torch.tensor(times), *places, self.config.head_dim))
        motion = tuple(torch.cat([table[i] for table in tables]) for i in range(2))
        x = torch.cat(tokens, dim=1)
        still = rope(torch.tensor([REFERENCE_POSITION]), torch.arange(rows), torch.arange(cols), self.config.head_dim)
        see = SeeSink((torch.cat([still[0], motion[0]]), torch.cat([still[1], motion[1]])))
        _, e = self.modulation(torch.zeros(len(x)))
        kept = []
        for layer in self.blocks:
            x = layer(x, e, text, see)
            kept.append(see.kept)
        return kept, (motion[0], motion[1])

    def sink_table(self, motion: Table, span: Span, rows: int, cols: int) -> Table:
        """Of the whole sink for every block [B, blocks, S, d/2]: its reference lies ahead of the block."""
        blocks = torch.arange(span.distance.shape[1]) * span.frames
        ahead = (span.start[:, None] + blocks + span.distance).clamp(min=REFERENCE_POSITION)
        times = ahead if span.rolling else torch.full_like(ahead, REFERENCE_POSITION)
        still = rope(times[..., None], torch.arange(rows), torch.arange(cols), self.config.head_dim)
        pairs = zip(still, motion, strict=True)
        cos, sin = (torch.cat([a, b.expand(*a.shape[:2], *b.shape)], dim=2) for a, b in pairs)
        return cos, sin

    def inject(self, j: int, x: Tensor, tokens: Tensor, overall: Tensor, frames: int) -> Tensor:
        """Audio injection into x [B, T, D] of `frames` latent frames."""
        own = x.unflatten(1, (frames, -1)).flatten(0, 1)
        shift, scale = self.audio_injector.injector_adain_layers[j].linear(F.silu(overall)).chunk(2, dim=2)
        heard = self.audio_injector.injector[j](norm(own, 1e-5) * (1 + scale) + shift, tokens)
        return x + heard.unflatten(0, (len(x), -1)).flatten(1, 2)

    def forward(self, latents: Tensor, timestep: Tensor, condition: Condition, span: Span) -> Tensor:
        """latents [B, 16, F, h, w] at noise levels timestep [B] -> flow (noise - clean) of the same shape."""
        frames, rows, cols = latents.shape[2], latents.shape[3] // 2, latents.shape[4] // 2
        text = self.text(condition.text)
        sinks, motion = self.sink(condition, text)
        tokens, overall = self.sound(condition.audio)
        x = self.patch_embedding(latents).flatten(2).transpose(1, 2)
        x = x + self.cond_encoder.bias + self.trainable_cond_mask.weight[0]  # no pose video: its latents are zero
        e, six = self.modulation(timestep)
        times = span.start[:, None] + torch.arange(frames)
        table = rope(times, torch.arange(rows), torch.arange(cols), self.config.head_dim)
        see = See(table, self.sink_table(motion, span, rows, cols), span)
        for i, layer in enumerate(self.blocks):
            see.sink = sinks[i]
            x = layer(x, six, text, see)
            if i in self.config.audio_inject_layers:
                x = self.inject(self.config.audio_inject_layers.index(i), x, tokens, overall, frames)
        out = self.head(x, e).float().unflatten(1, (frames, rows, cols)).unflatten(4, (2, 2, -1))
        return out.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
