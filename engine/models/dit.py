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
from liverelay.engine.models.geometry import MOTION_BUCKETS, MOTION_LATENTS, REFERENCE_POSITION, Geometry
from liverelay.engine.models.layers import (
    ADAIN_EPS,
    AudioCondition,
    DiTWeights,
    InjectorWeights,
    LayerWeights,
    TextCondition,
    TimestepTables,
    attention_scales,
    encode_audio,
    load_weights,
    timestep_tables,
)
from liverelay.engine.models.weights import Linear
from liverelay.engine.models.workspace import Workspace
from liverelay.kernels import dispatch, torch_ops
from liverelay.kernels.attention_backends import Attention
from liverelay.kernels.contract import Norm, Place, Scales, Update

Tap = Callable[[str, Tensor], None]
NOISY, REFERENCE, MOTION = 0, 1, 2


class DiT:
    """The transformer of one device: weights, operators and the functions that fill static buffers with them."""

    def __init__(
        self, weights: DiTWeights, config: DiTConfig, *, dtype: torch.dtype, backend: str | None = None,
        fp8_attention: bool = False,
    ) -> None:
        self.weights, self.config, self.dtype = weights, config, dtype
        self.device = weights.patch.weight.device
        try:
            self.ops: ModuleType = dispatch.get(backend, self.device)
            # Of the backend, until `attention_choice` has taken another one.
            self.attention: Attention = self.ops.attention
            self.text_attention: Attention = self.ops.attention
            self.attention_fp8: Attention = self.ops.attention
        except ValueError as error:
            raise InputError(str(error)) from None
        self.scales = attention_scales(weights, config) if fp8_attention else []
        self.whole_text = Place.make(self.device).fill(0, config.text_len, False)

    @classmethod
    def load(
        cls,
        source: Mapping[str, Tensor],
        config: DiTConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        backend: str | None = None,
        fp8: bool = False,
        fp8_attention: bool = False,
    ) -> DiT:
        """Build from checkpoint tensors (spec dit.md section 2). CheckpointError names a key that does not fit.

        fp8: the stage loop's linear layers in e4m3, one scale per output channel and per row of activations.
        fp8_attention: self-attention and its arena in e4m3, with scales fixed here by the weights (`Scales`).
        """
        weights = load_weights(source, config, device, dtype, fp8=fp8)
        return cls(weights, config, dtype=dtype, backend=backend, fp8_attention=fp8_attention)

    @property
    def fp8_attention(self) -> bool:
        return bool(self.scales)

    def make_workspace(self, geometry: Geometry) -> Workspace:
        return Workspace(
            self.config, geometry, self.device, self.dtype, fp8=self.weights.fp8, fp8_attention=self.fp8_attention
        )

    def make_arena(self, geometry: Geometry, *, sink_only: bool = False) -> Arena:
        return Arena(self.config, geometry, self.device, self.dtype, fp8=self.fp8_attention, sink_only=sink_only)

    def make_text(self) -> TextCondition:
        """Buffers for a prompt's keys and values."""
        config = self.config
        shape = (config.num_layers, config.text_len, config.num_heads, config.head_dim)
        return TextCondition(*(torch.empty(shape, device=self.device, dtype=self.dtype) for _ in range(2)))

    def timestep_tables(self, timestep: float) -> TimestepTables:
        return timestep_tables(self.weights, self.config, timestep)

    # -- conditions: once per prompt, block of sound, or pose ------------------------------------------------------

    def text_condition(self, states: Tensor, out: TextCondition | None = None) -> TextCondition:
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
        text = out or self.make_text()
        for i, layer in enumerate(self.weights.layers):
            kv = F.linear(x, layer.text_kv.weight, layer.text_kv.bias)
            k, v = kv.chunk(2, dim=1)
            keys = text.k[i].view(-1, config.dim)
            self.ops.rms_norm(k, layer.cross_attn.norm_k, keys, eps=config.eps).mul_(layer.cross_attn.norm_q)
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
            raw, v = F.linear(tokens.flatten(0, 2), injector.kv.weight, injector.kv.bias).chunk(2, dim=-1)
            k = torch.empty_like(raw, memory_format=torch.contiguous_format)
            self.ops.rms_norm(raw, injector.attn.norm_k, k, eps=config.eps)
            shape = (*tokens.shape[:3], config.num_heads, config.head_dim)
            parts.append((k.view(shape), v.reshape(shape), scale, shift))
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
        x, h = ws.x[:sink].copy_(tokens), ws.h[:sink]
        ws.fill(0, sink, False)
        raw = ws.y[2][:sink].view(sink, self.config.num_heads, -1)
        last = len(self.weights.layers) - 1
        scale = _rows(ws.h_scale, sink)
        self.ops.residual_norm(x, [], _stream_norm(tables.layers[0]), h, eps=self.config.eps, scale_out=scale)
        for i, layer in enumerate(self.weights.layers):
            if tap:
                tap(f"hidden.{i}", x)
            self._project(ws, layer, arena, i, sink, ws.sink_rope, k_raw=raw)
            arena.reference_k[i].copy_(raw[:reference])
            if tap:
                tap(f"cond_k.{i}", raw)
                tap(f"cond_v.{i}", arena.v[i, :sink])
            if i < last:  # the last layer's output has no reader
                updates = self._attend(ws, layer, tables.layers[i], arena, text, i, sink)
                following = _stream_norm(tables.layers[i + 1])
                self.ops.residual_norm(x, updates, following, h, eps=self.config.eps, x_out=x, scale_out=scale)
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
        self.fill_block(ws, arena, start_frame, reference_position)
        return self.compute_block(ws, arena, tables, latent, conditions, tap=tap)

    def fill_block(self, ws: Workspace, arena: Arena, start_frame: int, reference_position: int) -> None:
        """The part of a block-step that the host decides: positions, ring slot and valid rows, into device buffers."""
        ws.write(self.draft_block(ws, arena, start_frame, reference_position))

    def draft_block(self, ws: Workspace, arena: Arena, start_frame: int, reference_position: int) -> Tensor:
        """As `fill_block`, for a caller who copies the words to the device when their turn has come."""
        place = ws.place_at(start_frame, reference_position != arena.reference_position)
        arena.reference_position = reference_position
        return ws.draft(place.row, place.valid, place.moved, (start_frame, reference_position))

    def variant(self, place: Place) -> tuple[int, ...]:
        """What of `fill_block` is in the launches of `compute_block` themselves: a graph holds for these numbers.

        Ring slot and fill level, and whether the sink moves. Our kernels read all three on the device; with an arena
        in FP8 nothing else looks at them. In the working dtype values are projected straight into the ring slot, and
        a library may attend to the arena, so slot and fill level stay; as they do where no kernel of ours was right,
        and plain PyTorch attends to an arena in FP8.
        """
        if self.ops.qk_norm_rope is torch_ops.qk_norm_rope:
            return place.row, place.valid, int(place.moved)
        reads_device = self.fp8_attention and self.attention_fp8 is not torch_ops.attention
        return () if reads_device else (place.row, place.valid)

    def compute_block(
        self, ws: Workspace, arena: Arena, tables: TimestepTables, latent: Tensor,
        conditions: tuple[TextCondition, AudioCondition, Tensor], *, tap: Tap | None = None,
    ) -> Tensor:
        """The rest of it, which a graph can capture; see `variant`."""
        ws.spread_times()
        tokens, eps = ws.geometry.block_tokens, self.config.eps
        text, audio, pose = conditions
        patch, x, h = self.weights.patch, ws.x[:tokens], ws.h[:tokens]
        self.ops.embed(latent, (patch.weight, patch.bias), pose, self.weights.kinds[NOISY], x)
        if tap:
            tap("tokens_in", x)
        # The norm that reads a layer's output is made in the same pass that completes it.
        norms = [_stream_norm(modulation) for modulation in (*tables.layers, tables.head)]
        injectors, scale = list(self.weights.injectors), _rows(ws.h_scale, tokens)
        self.ops.residual_norm(x, [], norms[0], h, eps=eps, scale_out=scale)
        for i, layer in enumerate(self.weights.layers):
            reference = (arena.reference_k[i], ws.reference_rope.both)  # rotated anew only where ws.place.moved
            self._project(ws, layer, arena, i, tokens, ws.block_rope.both, reference=reference)
            updates = self._attend(ws, layer, tables.layers[i], arena, text, i, tokens)
            last = i + 1 == len(self.weights.layers)
            following = (ws.head[:tokens], None) if last else (h, scale)
            if i in self.weights.injectors:
                j = injectors.index(i)
                norm = _audio_norm(audio, j, 0)
                self.ops.residual_norm(x, updates, norm, h, eps=ADAIN_EPS, x_out=x, scale_out=scale)
                if tap:
                    tap(f"hidden.block.{i}", x)
                updates = self._inject(ws, self.weights.injectors[i], audio, j, tokens)
            out, out_scale = following
            self.ops.residual_norm(x, updates, norms[i + 1], out, eps=eps, x_out=x, scale_out=out_scale)
            if tap and i not in self.weights.injectors:
                tap(f"hidden.block.{i}", x)
            if tap:
                tap(f"hidden.after_audio.{i}", x)
        head = self.weights.head
        return ws.flow[:tokens].copy_(F.linear(ws.head[:tokens], head.weight, head.bias))

    def _project(
        self, ws: Workspace, layer: LayerWeights, arena: Arena, i: int, tokens: int, rope: tuple[Tensor, Tensor], *,
        k_raw: Tensor | None = None, reference: tuple[Tensor, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """q, k and v of ws.h: normalised and rotated q into the workspace, keys and values into rows of the arena."""
        ops, attn, h, place = self.ops, layer.self_attn, ws.h[:tokens], ws.place
        row_scale, q = _rows(ws.h_scale, tokens), ws.q[:tokens]
        scales = self._scales(i)
        self._linear(h, row_scale, attn.first, ws.qk[:tokens])
        if scales is None:
            self._linear(h, row_scale, layer.v, arena.v[i, place.row : place.row + tokens].flatten(1))
        else:
            v = ws.y[0][:tokens]  # nothing else is in it by now
            self._linear(h, row_scale, layer.v, v)
            ops.store_values(v.view(q.shape), arena.v[i], place, scales.v)
        outs = (q, arena.k[i]) if k_raw is None else (q, arena.k[i], k_raw)
        ops.qk_norm_rope(
            ws.qk[:tokens], (attn.norm_q, attn.norm_k), rope, outs, place, eps=self.config.eps, reference=reference,
            scales=scales,
        )

    def _self_attention(self, ws: Workspace, arena: Arena, i: int, tokens: int) -> Tensor:
        """Queries of the workspace against a layer of the arena, into ws.attended."""
        operands = (ws.q[:tokens], arena.k[i], arena.v[i], ws.attended[:tokens], ws.place)
        scales = self._scales(i)
        return self.attention(*operands) if scales is None else self.attention_fp8(*operands, scales)

    def _scales(self, i: int) -> Scales | None:
        """What a layer's codes stand for, where self-attention is in FP8."""
        return self.scales[i] if self.scales else None

    def _linear(self, x: Tensor, scale: Tensor | None, layer: Linear, out: Tensor) -> None:
        """A product in the working dtype, or in FP8 where the layer is: x then holds codes, scale one value a row."""
        if layer.scale is None or scale is None:
            self.ops.linear(x, layer.weight, layer.bias, out)
        else:
            self.ops.linear_fp8(x, scale, layer.weight, layer.scale, layer.bias, out)

    def _project_out(self, ws: Workspace, layer: Linear, tokens: int, out: Tensor) -> None:
        """The product after an attention."""
        attended, scale = ws.attended[:tokens].flatten(1), _rows(ws.h_scale, tokens)
        if scale is not None:
            attended = self.ops.quantize_rows(attended, ws.h[:tokens], scale)
        self._linear(attended, scale, layer, out)

    def _attend(
        self, ws: Workspace, layer: LayerWeights, modulation: Tensor, arena: Arena, text: TextCondition, i: int,
        tokens: int,
    ) -> list[Update]:
        """The rest of a layer; returns what it adds to the residual stream: self, cross attention, feed-forward."""
        ops, eps = self.ops, self.config.eps
        _, _, gate1, shift2, scale2, gate2 = modulation
        x, h, ffn = ws.x[:tokens], ws.h[:tokens], ws.ffn[:tokens]
        attended, factor = ws.attended[:tokens], ws.q_factor[:tokens]
        own, cross, forward = (y[:tokens] for y in ws.y)

        self._self_attention(ws, arena, i, tokens)
        self._project_out(ws, layer.self_attn.out, tokens, own)
        affine, scale = Norm(*layer.norm3, plus_one=False, round_input=True), _rows(ws.h_scale, tokens)
        ops.residual_norm(x, [(own, gate1)], affine, h, eps=eps, scale_out=scale)

        attn = layer.cross_attn
        self._linear(h, scale, attn.first, cross)
        ops.inverse_rms(cross, factor, eps=eps)  # the weight of this norm is in the keys
        queries = cross.view(attended.shape)
        self.text_attention(queries, text.k[i], text.v[i], attended, self.whole_text, q_factor=factor)
        self._project_out(ws, attn.out, tokens, cross)
        ops.residual_norm(x, [(own, gate1), (cross, None)], Norm(scale2, shift2), h, eps=eps, scale_out=scale)

        self._linear(h, scale, layer.ffn_in, ffn)
        wide = ops.gelu(ffn, ffn if ws.wide is None else ws.wide[:tokens], scale)
        self._linear(wide, scale, layer.ffn_out, forward)
        return [(own, gate1), (cross, None), (forward, gate2)]

    def _inject(
        self, ws: Workspace, injector: InjectorWeights, audio: AudioCondition, j: int, tokens: int
    ) -> list[Update]:
        """What a layer's audio adds (spec section 6): summed over speakers, each where its mask lets it act.

        ws.h holds the first speaker's AdaIN norm.
        """
        ops, eps, attn = self.ops, self.config.eps, injector.attn
        x, h, attended, y, total = (part[:tokens] for part in (ws.x, ws.h, ws.attended, ws.y[0], ws.head))
        scale = _rows(ws.h_scale, tokens)
        for s in range(audio.k.shape[1]):
            if s:
                ops.residual_norm(x, [], _audio_norm(audio, j, s), h, eps=ADAIN_EPS, scale_out=scale)
            self._linear(h, scale, attn.first, y)
            ops.audio_attention(y, attn.norm_q, audio.k[j, s], audio.v[j, s], attended, eps=eps)
            self._project_out(ws, attn.out, tokens, y)
            if audio.mask is None:
                return [(y, None)]
            part = y.float() * audio.mask[s]
            total.copy_(part) if s == 0 else total.add_(part)
        return [(total, None)]


def _rows(scale: Tensor | None, tokens: int) -> Tensor | None:
    return None if scale is None else scale[:tokens]


def _stream_norm(modulation: Tensor) -> Norm:
    """norm1 of a layer, or the head's: the input is the rounded stream, so the result is rounded too."""
    return Norm(modulation[1], modulation[0], round_input=True, round_norm=True)


def _audio_norm(audio: AudioCondition, j: int, speaker: int) -> Norm:
    """AdaIN: scale and shift per latent frame, from the sound."""
    return Norm(audio.scale[j, speaker], audio.shift[j, speaker], round_input=True)
