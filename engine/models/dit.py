"""The causal DiT over static buffers: sink prefill and block-step share one path through the layers.

A block-step embeds one noisy block, runs every layer against the arena of its noise level (its own keys are written
into the ring slot before anything attends), and leaves the flow in a buffer. Sources: spec dit.md sections 5 to 7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from liverelay.engine.cache import Arena
from liverelay.engine.config import DiTConfig
from liverelay.engine.errors import InputError
from liverelay.engine.models.geometry import (
    MOTION_BUCKETS,
    MOTION_LATENTS,
    REFERENCE_POSITION,
    Angles,
    Geometry,
    angles,
    grid_angles,
    motion_angles,
    split_pairs,
)
from liverelay.engine.models.layers import (
    ADAIN_EPS,
    AudioCondition,
    DiTWeights,
    InjectorWeights,
    LayerWeights,
    TextCondition,
    TimestepTables,
    encode_audio,
    load_weights,
    timestep_tables,
)
from liverelay.kernels import dispatch

Tap = Callable[[str, Tensor], None]
NOISY, REFERENCE, MOTION = 0, 1, 2


class RopeTable:
    """cos and sin [T, d/2] float32 of a token grid, kept on the device; only the time columns ever change."""

    def __init__(self, table: Angles, frames: int, head_dim: int, device: torch.device) -> None:
        self.cos, self.sin = (torch.from_numpy(part).to(device=device, dtype=torch.float32) for part in table)
        self._pairs = split_pairs(head_dim)[0]
        self._times = [part.view(frames, -1, part.shape[1])[:, :, : self._pairs] for part in (self.cos, self.sin)]

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        return self.cos, self.sin

    def fill_times(self, first: int) -> None:
        """Set the latent frames' RoPE times to first, first + 1, ...: exact at any position (design section 2.3)."""
        frames = self._times[0].shape[0]
        for place, part in zip(self._times, angles(range(first, first + frames), self._pairs), strict=True):
            place.copy_(torch.from_numpy(part).unsqueeze(1))


class Workspace:
    """The static buffers of one device and resolution. Stages on the same device that run in turn share them."""

    def __init__(self, config: DiTConfig, geometry: Geometry, device: torch.device, dtype: torch.dtype) -> None:
        tokens = max(geometry.block_tokens, geometry.sink_tokens)
        width, heads = config.dim, (config.num_heads, config.head_dim)

        def make(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.empty((tokens, *shape), device=device, dtype=of)

        self.geometry = geometry
        self.x = make(width)  # between layers: the working dtype
        self.x32 = make(width, of=torch.float32)  # inside a layer
        self.h, self.y = make(width), make(width)
        self.qkv, self.ffn = make(3 * width), make(config.ffn_dim)
        self.q, self.k_raw, self.attended = make(*heads), make(*heads), make(*heads)
        self.flow = make(4 * config.in_channels)
        head_dim, rows, cols = config.head_dim, range(geometry.rows), range(geometry.cols)
        frames = geometry.frames_per_block
        self.block_rope = RopeTable(grid_angles(range(frames), rows, cols, head_dim), frames, head_dim, device)
        reference = grid_angles([REFERENCE_POSITION], rows, cols, head_dim)
        self.reference_rope = RopeTable(reference, 1, head_dim, device)
        motion = motion_angles(geometry)
        cos, sin = (
            torch.cat([first, torch.from_numpy(second).to(device=device, dtype=torch.float32)])
            for first, second in zip(self.reference_rope.both, motion, strict=True)
        )
        self.sink_rope = (cos, sin)


class DiT:
    """The transformer of one device: weights, operators and the functions that fill static buffers with them."""

    def __init__(
        self, weights: DiTWeights, config: DiTConfig, *, dtype: torch.dtype, backend: str | None = None
    ) -> None:
        self.weights, self.config, self.dtype = weights, config, dtype
        self.device = weights.patch.weight.device
        try:
            self.ops: ModuleType = dispatch.get(backend)
        except ValueError as error:
            raise InputError(str(error)) from None

    @classmethod
    def load(
        cls,
        source: Mapping[str, Tensor],
        config: DiTConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        backend: str | None = None,
    ) -> DiT:
        """Build from checkpoint tensors (spec dit.md section 2). CheckpointError names a key that does not fit."""
        return cls(load_weights(source, config, device, dtype), config, dtype=dtype, backend=backend)

    def make_workspace(self, geometry: Geometry) -> Workspace:
        return Workspace(self.config, geometry, self.device, self.dtype)

    def make_arena(self, geometry: Geometry) -> Arena:
        return Arena(self.config, geometry, self.device, self.dtype)

    def timestep_tables(self, timestep: float) -> TimestepTables:
        return timestep_tables(self.weights, self.config, timestep)

    # -- conditions: once per prompt, block of sound, or pose ------------------------------------------------------

    def text_condition(self, states: Tensor) -> TextCondition:
        """Keys and values of a prompt for all layers. states [n, text_dim], n <= text_len; padding takes part."""
        config = self.config
        if states.dim() != 2 or states.shape[0] > config.text_len or states.shape[1] != config.text_dim:
            raise InputError(
                f"the text states have shape {list(states.shape)}, expected [<= {config.text_len}, {config.text_dim}]"
            )
        x = states.to(self.device, self.dtype)
        x = F.pad(x, (0, 0, 0, config.text_len - x.shape[0]))
        first, second = self.weights.text
        x = F.linear(F.gelu(F.linear(x, first.weight, first.bias), approximate="tanh"), second.weight, second.bias)
        shape = (config.num_layers, config.text_len, config.num_heads, config.head_dim)
        text = TextCondition(*(torch.empty(shape, device=self.device, dtype=self.dtype) for _ in range(2)))
        for i, layer in enumerate(self.weights.layers):
            kv = F.linear(x, layer.text_kv.weight, layer.text_kv.bias)
            k, v = kv.chunk(2, dim=1)
            self.ops.rms_norm(k, layer.cross_attn.norm_k, text.k[i].view(-1, config.dim), eps=config.eps)
            text.v[i].view(-1, config.dim).copy_(v)
        return text

    def audio_condition(self, audio: Tensor, frames: int, mask: Tensor | None = None) -> AudioCondition:
        """Injector keys, values and AdaIN of one block's sound.

        audio [S, states, A, 4 F] for S speakers; mask [S, F, h/2, w/2, 1], 1 where a speaker may act, or None.
        """
        if audio.dim() != 4 or (mask is None and audio.shape[0] != 1):
            raise InputError(f"audio features of shape {list(audio.shape)} need one speaker, or a mask for each")
        audio, config = audio.to(self.device, self.dtype), self.config
        encoded = [encode_audio(self.weights, config, speaker, frames) for speaker in audio]
        tokens, overall = (torch.stack(part) for part in zip(*encoded, strict=True))
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for injector in self.weights.injectors.values():
            adain = F.linear(F.silu(overall), injector.adain.weight, injector.adain.bias)
            shift, scale = adain.chunk(2, dim=-1)
            raw, v = F.linear(tokens, injector.kv.weight, injector.kv.bias).chunk(2, dim=-1)
            k = torch.empty_like(raw, memory_format=torch.contiguous_format)
            self.ops.rms_norm(raw, injector.attn.norm_k, k, eps=config.eps)
            heads = (config.num_heads, config.head_dim)
            parts.append((k.unflatten(-1, heads), v.unflatten(-1, heads), scale, shift))
        k, v, scale, shift = (torch.stack(part) for part in zip(*parts, strict=True))
        if mask is not None:
            mask = mask.to(self.device, torch.float32).reshape(audio.shape[0], -1, 1)
        return AudioCondition(k, v, scale, shift, mask)

    def pose_condition(self, pose: Tensor | None) -> Tensor:
        """Embedded pose latents [F*P, D]; without a pose video the convolution of zeros, which is its bias [D]."""
        conv = self.weights.pose
        if pose is None:
            return conv.bias
        cut = self.ops.patches(pose.to(self.device, self.dtype), (1, 2, 2))
        return F.linear(cut, conv.weight, conv.bias)

    # -- the sink --------------------------------------------------------------------------------------------------

    def sink_tokens(self, reference: Tensor, motion: Tensor) -> Tensor:
        """Embedded sink [2.5 P, D]: reference [16, 1, h, w], then packed motion [16, <= 19, h, w] (spec section 5)."""
        reference, motion = (latent.to(self.device, self.dtype) for latent in (reference, motion))
        motion = F.pad(motion, (0, 0, 0, 0, MOTION_LATENTS - motion.shape[1], 0))
        kinds = self.weights.kinds
        patch = self.weights.patch
        parts = [F.linear(self.ops.patches(reference, (1, 2, 2)), patch.weight, patch.bias) + kinds[REFERENCE]]
        for (first, count, time_stride, stride, _), packer in zip(MOTION_BUCKETS, self.weights.packers, strict=True):
            cut = self.ops.patches(motion[:, first : first + count], (time_stride, 2 * stride, 2 * stride))
            parts.append(F.linear(cut, packer.weight, packer.bias) + kinds[MOTION])
        return torch.cat(parts)

    def prefill(
        self, ws: Workspace, arena: Arena, tables: TimestepTables, text: TextCondition, tokens: Tensor, *,
        tap: Tap | None = None,
    ) -> None:
        """Compute the sink's keys and values into an arena (spec 7.2). tables: those of timestep 0.

        The ring is not touched. The sink does not depend on the timestep: other arenas take it by `copy_sink`.
        """
        sink, reference = ws.geometry.sink_tokens, ws.geometry.frame_tokens
        ws.x[:sink].copy_(tokens)
        last = len(self.weights.layers) - 1
        for i, layer in enumerate(self.weights.layers):
            if tap:
                tap(f"hidden.{i}", ws.x[:sink])
            self._project(ws, layer, tables.layers[i], arena, (i, 0, sink), ws.sink_rope, None)
            arena.reference_k[i].copy_(ws.k_raw[:reference])
            if tap:
                tap(f"cond_k.{i}", ws.k_raw[:sink])
                tap(f"cond_v.{i}", arena.v[i, :sink])
            if i < last:  # the last layer's output has no reader
                self._attend(ws, layer, tables.layers[i], (arena.k[i, :sink], arena.v[i, :sink]), text, i)
        arena.reference_position = REFERENCE_POSITION

    # -- one block -------------------------------------------------------------------------------------------------

    def block_step(
        self, ws: Workspace, arena: Arena, tables: TimestepTables, latent: Tensor, start_frame: int,
        reference_position: int, conditions: tuple[TextCondition, AudioCondition, Tensor], *, tap: Tap | None = None,
    ) -> Tensor:
        """One evaluation of the model: the flow of the block [F*P, 64], in the workspace's buffer.

        latent [16, F, h, w] in the working dtype; conditions: text, audio, embedded pose. Writes the block's keys
        and values into the ring slot of `start_frame` (spec 7.3) and moves the sink's reference frame.
        """
        geometry, tokens = ws.geometry, ws.geometry.block_tokens
        text, audio, pose = conditions
        row, valid = geometry.slot_row(start_frame), geometry.valid_tokens(start_frame)
        ws.block_rope.fill_times(start_frame)
        moved = reference_position != arena.reference_position
        if moved:
            ws.reference_rope.fill_times(reference_position)
            arena.reference_position = reference_position
        patch = self.weights.patch
        x = ws.x[:tokens]
        self.ops.embed(latent, (patch.weight, patch.bias), pose, self.weights.kinds[NOISY], x)
        if tap:
            tap("tokens_in", x)
        injected = 0
        for i, layer in enumerate(self.weights.layers):
            reference = None
            if moved:
                rows = arena.k[i, : geometry.frame_tokens]
                reference = (arena.reference_k[i], ws.reference_rope.both, rows)
            self._project(ws, layer, tables.layers[i], arena, (i, row, tokens), ws.block_rope.both, reference)
            self._attend(ws, layer, tables.layers[i], (arena.k[i, :valid], arena.v[i, :valid]), text, i, tokens)
            if tap:
                tap(f"hidden.block.{i}", x)
            if i in self.weights.injectors:
                self._inject(ws, self.weights.injectors[i], audio, injected, tokens)
                injected += 1
            if tap:
                tap(f"hidden.after_audio.{i}", x)
        return self._head(ws, tables, tokens)

    def _project(
        self, ws: Workspace, layer: LayerWeights, modulation: Tensor, arena: Arena, place: tuple[int, int, int],
        rope: tuple[Tensor, Tensor], reference: tuple[Tensor, tuple[Tensor, Tensor], Tensor] | None,
    ) -> None:
        """norm1, modulation, q/k/v, RMS norm, RoPE; keys and values go to rows of the arena. place: layer, row, T."""
        i, row, tokens = place
        ops, eps, attn = self.ops, self.config.eps, layer.self_attn
        h, qkv = ws.h[:tokens], ws.qkv[:tokens]
        shift, scale = modulation[0], modulation[1]
        ops.norm_modulate(ws.x[:tokens], scale, shift, h, eps=eps, round_norm=True)
        ops.linear(h, attn.first.weight, attn.first.bias, qkv)
        outs = (ws.q[:tokens], arena.k[i, row : row + tokens], arena.v[i, row : row + tokens])
        ops.qk_norm_rope(qkv, (attn.norm_q, attn.norm_k), rope, outs, ws.k_raw[:tokens], reference, eps=eps)

    def _attend(
        self, ws: Workspace, layer: LayerWeights, modulation: Tensor, keys: tuple[Tensor, Tensor],
        text: TextCondition, i: int, tokens: int | None = None,
    ) -> None:
        """The rest of a layer, from self-attention over `keys` to the gated feed-forward; x is rounded at its end."""
        tokens = tokens or ws.geometry.sink_tokens
        ops, eps = self.ops, self.config.eps
        _, _, gate1, shift2, scale2, gate2 = modulation
        x, x32, h, y = ws.x[:tokens], ws.x32[:tokens], ws.h[:tokens], ws.y[:tokens]
        q, attended, ffn = ws.q[:tokens], ws.attended[:tokens], ws.ffn[:tokens]

        ops.attention(q, *keys, attended)
        ops.linear(attended.flatten(1), layer.self_attn.out.weight, layer.self_attn.out.bias, y)
        ops.gate_residual(x, y, gate1, x32)

        cross = layer.cross_attn
        ops.norm_affine(x32, *layer.norm3, h, eps=eps)
        ops.linear(h, cross.first.weight, cross.first.bias, y)
        ops.rms_norm(y, cross.norm_q, q.flatten(1), eps=eps)
        ops.attention(q, text.k[i], text.v[i], attended)
        ops.linear(attended.flatten(1), cross.out.weight, cross.out.bias, y)
        ops.gate_residual(x32, y, None, x32)

        ops.norm_modulate(x32, scale2, shift2, h, eps=eps)
        ops.linear(h, layer.ffn_in.weight, layer.ffn_in.bias, ffn)
        ops.gelu(ffn, ffn)
        ops.linear(ffn, layer.ffn_out.weight, layer.ffn_out.bias, y)
        ops.gate_residual(x32, y, gate2, x)

    def _inject(self, ws: Workspace, injector: InjectorWeights, audio: AudioCondition, j: int, tokens: int) -> None:
        """Audio injection after a layer (spec section 6): x_f = R(x_f + r), r summed over speakers where masked."""
        ops, eps, attn = self.ops, self.config.eps, injector.attn
        x, h, y = ws.x[:tokens], ws.h[:tokens], ws.y[:tokens]
        q, attended, total = ws.q[:tokens], ws.attended[:tokens], ws.x32[:tokens]
        for s in range(audio.k.shape[1]):
            ops.audio_norm(x, audio.scale[j, s], audio.shift[j, s], h, eps=ADAIN_EPS)
            ops.linear(h, attn.first.weight, attn.first.bias, y)
            ops.rms_norm(y, attn.norm_q, q.flatten(1), eps=eps)
            ops.audio_attention(q, audio.k[j, s], audio.v[j, s], attended)
            ops.linear(attended.flatten(1), attn.out.weight, attn.out.bias, y)
            if audio.mask is not None:
                part = y.float() * audio.mask[s]
                total.copy_(part) if s == 0 else total.add_(part)
        ops.gate_residual(x, y if audio.mask is None else total, None, x)

    def _head(self, ws: Workspace, tables: TimestepTables, tokens: int) -> Tensor:
        """Final norm, modulation and float32 projection; rounded to the working dtype."""
        shift, scale = tables.head
        x32, head = ws.x32[:tokens], self.weights.head
        # The norm's result is rounded to the stream's dtype before the modulation, which stays float32 here.
        normed = F.layer_norm(ws.x[:tokens].float(), (self.config.dim,), eps=self.config.eps).to(self.dtype)
        torch.addcmul(shift, normed.float(), 1 + scale, out=x32)
        return ws.flow[:tokens].copy_(F.linear(x32, head.weight, head.bias))
