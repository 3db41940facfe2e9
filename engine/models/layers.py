"""The DiT's weights as plain tables, and the parts of it that run once per timestep, prompt or block of sound.

Sources: spec dit.md sections 2 (keys), 3 (precision), 5 (embeddings) and 6 (audio injection).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from liverelay.engine.config import DiTConfig
from liverelay.engine.errors import InputError
from liverelay.engine.models.convolution import convolve
from liverelay.engine.models.weights import Linear, Loader, check_dit, is_quantized
from liverelay.kernels.contract import Scales

ADAIN_EPS = 1e-5


@dataclass
class AttentionWeights:
    """Projections and RMS weights of one attention; `first` is q and k fused (self) or q alone (cross, audio)."""

    first: Linear
    norm_q: Tensor
    norm_k: Tensor
    out: Linear


@dataclass
class LayerWeights:
    """One transformer layer. Keys and values of text are projected once per prompt by `text_kv`."""

    self_attn: AttentionWeights
    v: Linear  # of the self-attention: its own product, because its result goes straight into the arena
    cross_attn: AttentionWeights
    text_kv: Linear
    norm3: tuple[Tensor, Tensor]
    ffn_in: Linear
    ffn_out: Linear
    modulation: Tensor  # [6, D] float32


@dataclass
class InjectorWeights:
    """One audio injector: AdaIN linear, attention to the audio tokens, their fused key and value projection."""

    attn: AttentionWeights
    kv: Linear
    adain: Linear


@dataclass
class DiTWeights:
    """All weights of the transformer on one device, in the working dtype except where float32 or FP8 is said."""

    patch: Linear
    pose: Linear
    kinds: Tensor  # [3, D]: noisy, reference, motion
    packers: tuple[Linear, Linear, Linear]  # proj, proj_2x, proj_4x
    text: tuple[Linear, Linear]
    time: tuple[Linear, Linear, Linear]  # time_embedding.0, .2, time_projection.1; computed in float32
    layers: list[LayerWeights]
    injectors: dict[int, InjectorWeights]  # by layer
    head: Linear  # float32
    head_modulation: Tensor  # [2, D] float32
    audio_mix: Tensor  # [states] working dtype
    audio_convs: dict[str, Linear]  # float32: local, global, conv2, conv3, final
    audio_padding: Tensor  # [1, D] float32

    @property
    def fp8(self) -> bool:
        """Whether the stage loop's linear layers are in FP8."""
        return self.layers[0].ffn_in.scale is not None


@dataclass
class TimestepTables:
    """Everything that depends on the timestep alone: modulation of all layers [L, 6, D] and of the head [2, D]."""

    layers: Tensor
    head: Tensor


@dataclass
class TextCondition:
    """Keys and values of the prompt for all layers: [L, text_len, H, d], in the working dtype.

    The keys carry the weight of the queries' RMS norm, too: of that norm only a factor is left to a block-step.
    """

    k: Tensor
    v: Tensor


@dataclass
class AudioCondition:
    """What the injectors need of one block's sound, per injector and speaker.

    k, v [J, S, F, N, H, d]; scale, shift [J, S, F, D]; mask [S, F*P, 1] or None for a single speaker.
    """

    k: Tensor
    v: Tensor
    scale: Tensor
    shift: Tensor
    mask: Tensor | None


def load_weights(
    source: Mapping[str, Tensor], config: DiTConfig, device: torch.device | str, dtype: torch.dtype, *,
    fp8: bool = False,
) -> DiTWeights:
    """Copy a checkpoint's tensors into the table. CheckpointError names the first key or shape that does not fit.

    fp8: the stage loop's linear layers are quantised on the way (a quantised checkpoint is FP8 whatever is asked).
    """
    shapes = getattr(source, "shapes", None) or {key: tuple(value.shape) for key, value in source.items()}
    check_dit(shapes, config, "the DiT checkpoint")
    load = Loader(source, device, dtype, fp8=fp8 or is_quantized(shapes))

    def attention(name: str, first: str) -> AttentionWeights:
        return AttentionWeights(
            load.linear8(*(f"{name}.{part}" for part in first)),
            load.tensor(f"{name}.norm_q.weight"),
            load.tensor(f"{name}.norm_k.weight"),
            load.linear8(f"{name}.o"),
        )

    def layer(i: int) -> LayerWeights:
        block = f"blocks.{i}"
        return LayerWeights(
            attention(f"{block}.self_attn", "qk"),
            load.linear8(f"{block}.self_attn.v"),
            attention(f"{block}.cross_attn", "q"),
            load.linear(f"{block}.cross_attn.k", f"{block}.cross_attn.v"),
            (load.tensor(f"{block}.norm3.weight"), load.tensor(f"{block}.norm3.bias")),
            load.linear8(f"{block}.ffn.0"),
            load.linear8(f"{block}.ffn.2"),
            load.float32(f"{block}.modulation", (6, config.dim)),
        )

    def injector(j: int) -> InjectorWeights:
        name = f"audio_injector.injector.{j}"
        adain = load.linear(f"audio_injector.injector_adain_layers.{j}.linear")
        return InjectorWeights(attention(name, "q"), load.linear(f"{name}.k", f"{name}.v"), adain)

    audio = "casual_audio_encoder.encoder"
    convs = {"local": "conv1_local.conv", "global": "conv1_global.conv", "conv2": "conv2.conv", "conv3": "conv3.conv"}
    return DiTWeights(
        patch=load.patch("patch_embedding"),
        pose=load.patch("cond_encoder"),
        kinds=load.tensor("trainable_cond_mask.weight"),
        packers=(
            load.patch("frame_packer.proj"), load.patch("frame_packer.proj_2x"), load.patch("frame_packer.proj_4x"),
        ),
        text=(load.linear("text_embedding.0"), load.linear("text_embedding.2")),
        time=(load.linear("time_embedding.0"), load.linear("time_embedding.2"), load.linear("time_projection.1")),
        layers=[layer(i) for i in range(config.num_layers)],
        injectors={i: injector(j) for j, i in enumerate(config.audio_inject_layers)},
        head=load.linear32("head.head"),
        head_modulation=load.float32("head.modulation", (2, config.dim)),
        audio_mix=load.tensor("casual_audio_encoder.weights", (-1,)),
        audio_convs={name: load.linear32(f"{audio}.{key}") for name, key in convs.items()}
        | {"final": load.linear32(f"{audio}.final_linear")},
        audio_padding=load.float32(f"{audio}.padding_tokens", (1, config.dim)),
    )


def timestep_tables(weights: DiTWeights, config: DiTConfig, timestep: float) -> TimestepTables:
    """Modulation vectors of all layers at one noise level, in float32 (spec dit.md section 5, 'Time')."""
    half = config.freq_dim // 2
    angle = timestep * 10000.0 ** (-np.arange(half, dtype=np.float64) / half)
    wave = np.concatenate([np.cos(angle), np.sin(angle)]).astype(np.float32)
    first, second, projection = weights.time

    def linear32(x: Tensor, layer: Linear) -> Tensor:
        return F.linear(x, layer.weight.float(), layer.bias.float())

    x = torch.from_numpy(wave).to(first.weight.device)
    embedded = linear32(F.silu(linear32(x, first)), second)
    six = linear32(F.silu(embedded), projection).view(6, config.dim)
    layers = torch.stack([layer.modulation + six for layer in weights.layers])
    return TimestepTables(layers, weights.head_modulation + embedded)


def attention_scales(weights: DiTWeights, config: DiTConfig) -> list[Scales]:
    """For each layer, what one unit of an e4m3 code of q, k and v stands for in FP8 attention.

    A norm's result is no longer than sqrt(D): x of norm_q and norm_k, and what v is projected from. RoPE turns pairs,
    which leaves no element of a head above sqrt(D) max |w| over the head's weights w of the norm. And |v_j| <= sqrt(D)
    |W_j (1 + scale)| + |W_j shift + b_j|, over noise levels from 0 to 1000, because sink and ring share one arena.
    With these bounds at 448 nothing saturates (the roundings on the way add up to half a percent, and e4m3 takes what
    is below 464 for 448); usual values lie near 448 / sqrt(D), in the middle of e4m3's range.
    """

    def of_heads(norms: list[Tensor]) -> Tensor:  # [L, H]
        largest = torch.stack(norms).float().abs().view(len(norms), config.num_heads, -1).amax(2)
        return largest.clamp_min(1e-12) * (config.dim**0.5 / 448)

    q, k = (of_heads([getattr(layer.self_attn, name) for layer in weights.layers]) for name in ("norm_q", "norm_k"))
    tables = torch.stack([timestep_tables(weights, config, float(t)).layers[:, :2] for t in range(0, 1001, 125)])
    scales = []
    for i, layer in enumerate(weights.layers):
        weight = layer.v.weight.float()
        if layer.v.scale is not None:
            weight = weight * layer.v.scale.unsqueeze(1)
        shift, factor = tables[:, i, 0], 1 + tables[:, i, 1]
        longest = config.dim**0.5 * (weight.square() @ factor.square().t()).sqrt()
        bound = longest + (weight @ shift.t() + layer.v.bias.float().unsqueeze(1)).abs()
        scales.append(Scales(q[i], k[i], max(float(bound.max()), 1e-20) / 448))
    return scales


def encode_audio(weights: DiTWeights, config: DiTConfig, audio: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Audio tokens [F, tokens + 1, D] and global vectors [F, D] of one block, in the dtype of `audio`.

    audio [states, A, 4 F] (working dtype): wav2vec2 states of the block's own video frames. The published code puts
    73 copies of the first frame in front and drops 19 of 22 latent frames; 5 copies and unpadded convolutions give
    the same numbers (spec dit.md section 5, 'Audio encoder').
    """
    expected = (config.audio_states, config.audio_dim, 4 * frames)
    if tuple(audio.shape) != expected:
        raise InputError(f"the audio features of a block have shape {list(audio.shape)}, expected {list(expected)}")
    mix = F.silu(weights.audio_mix)
    padded = torch.cat([audio[..., :1].expand(-1, -1, 5), audio], dim=-1)
    mixed = (padded * mix.view(-1, 1, 1)).float().sum(0) / mix.float().sum()

    def conv(x: Tensor, name: str, stride: int) -> Tensor:
        # x [heads, channels, time]; LN over channels without parameters, then SiLU.
        layer = weights.audio_convs[name]
        y = convolve(x, layer.weight, layer.bias, stride=stride).transpose(1, 2)  # float32 in bfloat16 too
        if name == "local":
            y = y.view(y.shape[1], config.num_audio_tokens, -1).transpose(0, 1)
        return F.silu(F.layer_norm(y, y.shape[-1:], eps=config.eps)).transpose(1, 2)

    def branch(name: str) -> Tensor:
        x = conv(conv(conv(mixed.unsqueeze(0), name, 1), "conv2", 2), "conv3", 2)
        return x.permute(2, 0, 1)  # [F, heads, D]

    local = branch("local")
    tokens = torch.cat([local, weights.audio_padding.expand(frames, 1, -1)], dim=1)
    final = weights.audio_convs["final"]
    overall = F.linear(branch("global").squeeze(1), final.weight, final.bias)
    return tokens.to(audio.dtype), overall.to(audio.dtype)
