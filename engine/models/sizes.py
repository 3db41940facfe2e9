"""How large the model is: shapes of its weights, bytes on a device, operations of its parts. Pure Python, no torch.

Loading checks files against these shapes; `inspect` and the planner count memory with them; the planner scales
measured times to other sizes by the operations. Tests compare bytes with real allocations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from liverelay.engine.config import DiTConfig
from liverelay.engine.models.geometry import Geometry, split_pairs
from liverelay.engine.models.vae_config import WHOLE, VAEConfig

Shapes = Mapping[str, tuple[int, ...]]
SCALE = "_scale"  # follows the key of a weight that is stored in FP8
# Parts of the transformer that are kept in float32 whatever the working dtype (spec dit.md section 3).
_FLOAT32 = ("head.", "casual_audio_encoder.encoder.")
PUBLISHED = DiTConfig(5120, 13824, 40, 40, (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39))  # the 14B model
TEXT_PARAMETERS = 5_680_910_336  # of umT5-xxl's encoder (spec vae_audio_text.md 5)
AUDIO_PARAMETERS = 315_438_720  # of wav2vec2-large


def dit_shapes(c: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Every key of the published DiT with its shape (spec dit.md section 2)."""
    d = c.dim

    def linear(name: str, out: int, inner: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}

    def attention(name: str) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {f"{name}.norm_q.weight": (d,), f"{name}.norm_k.weight": (d,)}
        for part in "qkvo":
            shapes |= linear(f"{name}.{part}", d, d)
        return shapes

    def conv(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    shapes = conv("patch_embedding", d, c.in_channels, 1, 2, 2) | conv("cond_encoder", d, c.cond_channels, 1, 2, 2)
    shapes |= linear("text_embedding.0", d, c.text_dim) | linear("text_embedding.2", d, d)
    shapes |= linear("time_embedding.0", d, c.freq_dim) | linear("time_embedding.2", d, d)
    shapes |= linear("time_projection.1", 6 * d, d) | {"trainable_cond_mask.weight": (3, d)}
    for name, stride in (("proj", 1), ("proj_2x", 2), ("proj_4x", 4)):
        shapes |= conv(f"frame_packer.{name}", d, c.in_channels, stride, 2 * stride, 2 * stride)
    for i in range(c.num_layers):
        block = f"blocks.{i}"
        shapes |= attention(f"{block}.self_attn") | attention(f"{block}.cross_attn")
        shapes |= {f"{block}.modulation": (1, 6, d), f"{block}.norm3.weight": (d,), f"{block}.norm3.bias": (d,)}
        shapes |= linear(f"{block}.ffn.0", c.ffn_dim, d) | linear(f"{block}.ffn.2", d, c.ffn_dim)
    shapes |= {"head.modulation": (1, 2, d)} | linear("head.head", 4 * c.in_channels, d)
    audio = "casual_audio_encoder"
    heads = c.num_audio_tokens
    shapes |= {f"{audio}.weights": (1, c.audio_states, 1, 1), f"{audio}.encoder.padding_tokens": (1, 1, 1, d)}
    shapes |= conv(f"{audio}.encoder.conv1_local.conv", d // 4 * heads, c.audio_dim, 3)
    shapes |= conv(f"{audio}.encoder.conv1_global.conv", d // 4, c.audio_dim, 3)
    shapes |= conv(f"{audio}.encoder.conv2.conv", d // 2, d // 4, 3) | conv(f"{audio}.encoder.conv3.conv", d, d // 2, 3)
    shapes |= linear(f"{audio}.encoder.final_linear", d, d)
    for j in range(len(c.audio_inject_layers)):
        shapes |= attention(f"audio_injector.injector.{j}")
        shapes |= linear(f"audio_injector.injector_adain_layers.{j}.linear", 2 * d, d)
    return shapes


def fp8_modules(c: DiTConfig) -> list[str]:
    """The linear layers that run in FP8: those of the stage loop, but not the small or float32 ones."""
    names = [f"self_attn.{part}" for part in "qkvo"] + ["cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2"]
    modules = [f"blocks.{i}.{name}" for i in range(c.num_layers) for name in names]
    return modules + [f"audio_injector.injector.{j}.{part}" for j in range(len(c.audio_inject_layers)) for part in "qo"]


# -- bytes on a device -------------------------------------------------------------------------------------------------


def dit_bytes(shapes: Shapes, element: int) -> int:
    """Memory of the transformer's weights, quantised ones in one byte; element: bytes of the working dtype."""

    def size(key: str) -> int:
        if f"{key}{SCALE}" in shapes:
            return 1
        return 4 if key.startswith(_FLOAT32) or key.endswith(("modulation", SCALE)) else element

    return sum(math.prod(shape) * size(key) for key, shape in shapes.items())


def fp8_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """As `dit_shapes`, of a transformer whose large products are in FP8: with a scale for each output channel."""
    shapes = dit_shapes(config)
    return shapes | {f"{m}.weight{SCALE}": shapes[f"{m}.weight"][:1] for m in fp8_modules(config)}


def arena_bytes(
    config: DiTConfig, geometry: Geometry, element: int = 2, *, fp8: bool = False, sink_only: bool = False
) -> int:
    """Memory of one arena: what one session needs at one step; sink_only: of the stage's shadow."""
    rows, reference = geometry.arena_tokens, geometry.frame_tokens * config.dim * element
    if sink_only:
        rows = geometry.sink_tokens
    keys = values = rows * config.dim * element
    if fp8:  # codes; a channel's values are padded to 16 bytes
        keys, values = rows * config.dim, -(-rows // 16) * 16 * config.dim
    return config.num_layers * (keys + values + reference)


def text_bytes(config: DiTConfig, element: int) -> int:
    """Keys and values of a session's prompt at one stage."""
    return 2 * config.num_layers * config.text_len * config.dim * element


def workspace_bytes(
    config: DiTConfig, geometry: Geometry, element: int, *, fp8: bool = False, fp8_attention: bool = False
) -> int:
    """Static buffers of `liverelay.engine.models.workspace.Workspace`, RoPE tables included."""
    tokens = max(geometry.block_tokens, geometry.sink_tokens)
    activations = tokens * (config.dim * 9 + config.ffn_dim + 4 * config.in_channels) * element
    if fp8:  # what a product reads in one byte a value: the norm's buffer, the feed-forward's beside it, row scales
        activations += tokens * (config.dim * (1 - element) + config.ffn_dim + 4)
    if fp8_attention:  # queries
        activations += tokens * config.dim * (1 - element)
    head = tokens * (config.dim + 1) * 4  # what the head reads, and the factors of the text's queries
    rope = (geometry.block_tokens + geometry.frame_tokens + geometry.sink_tokens) * config.head_dim * 4
    decided = 4 + 2 * split_pairs(config.head_dim)[0] * (geometry.frames_per_block + 1)  # words: place, RoPE times
    return activations + head + rope + 4 * decided


def vae_bytes(shapes: Shapes, element: int) -> int:
    """Memory of the VAE's weights; the encoder half is kept in float32."""
    return sum(
        math.prod(shape) * (4 if key.startswith(("encoder.", "conv1.")) else element) for key, shape in shapes.items()
    )


def vae_cache_bytes(config: VAEConfig, geometry: Geometry, element: int, piece: str = WHOLE) -> int:
    """Feature cache of one session's decoder, or of a piece of it."""
    return sum(
        channels * (2 + frames) * geometry.latent_h * geometry.latent_w * scale * scale * element
        for channels, frames, scale in config.decoder_slots(piece).values()
    )


def vae_work_bytes(config: VAEConfig, geometry: Geometry) -> int:
    """What the VAE takes besides weights and cache, an estimate: encoding an image, whose activations are float32.

    At the finest level a convolution's input [4 + 2, C, H, W] with its history, what came before and its result.
    """
    pixels = 64 * geometry.latent_h * geometry.latent_w
    return (6 + 4 + 4) * config.base_dim * config.dim_mult[0] * pixels * 4


# -- operations --------------------------------------------------------------------------------------------------------


def block_step_flops(config: DiTConfig, geometry: Geometry) -> tuple[float, float]:
    """Operations of one block-step with a full ring: self-attention, and all others. A multiply-add is two.

    With T tokens of a block, N of the arena, width D: 4 L T N D, which is quadratic in the tokens of a frame; and
    products of T rows, linear in them: 6 D + 2 F columns of D in a layer, the text's 512 keys, the sound's 5. What is
    computed once per prompt or block is left out.
    """
    t, d, c = geometry.block_tokens, config.dim, config
    attention = 4.0 * c.num_layers * t * geometry.arena_tokens * d
    layer = 2.0 * t * d * (6 * d + 2 * c.ffn_dim) + 4.0 * t * d * c.text_len
    injector = 4.0 * t * d * d + 4.0 * t * d * (c.num_audio_tokens + 1)
    return attention, c.num_layers * layer + len(c.audio_inject_layers) * injector


def prefill_flops(config: DiTConfig, geometry: Geometry) -> tuple[float, float]:
    """Of a sink's prefill, as `block_step_flops`: S sink tokens attend to each other and hear no sound."""
    s, d, c = geometry.sink_tokens, config.dim, config
    layer = 2.0 * s * d * (6 * d + 2 * c.ffn_dim) + 4.0 * s * d * c.text_len
    return 4.0 * c.num_layers * s * s * d, c.num_layers * layer


def decode_flops(config: VAEConfig, geometry: Geometry) -> float:
    """Of decoding one block: convolutions, linear in the pixels, and the middle's attention, quadratic in h w."""
    return sum(decode_step_flops(config, geometry))


def prime_flops(config: VAEConfig, geometry: Geometry, latents: int) -> float:
    """Of warming a new stream's decoder up with so many latents: each step sees what its feature caches remember."""
    before, *steps = decode_step_flops(config, geometry)
    seen = [min(latents, count) for _, count in config.primed_steps()]
    work = latents * before + sum(count * flops for count, flops in zip(seen, steps, strict=True))
    return work / geometry.frames_per_block


def decode_step_flops(config: VAEConfig, geometry: Geometry) -> list[float]:
    """Of what comes before the steps of `decoder_steps`, and of each of them."""
    hw, top = geometry.latent_h * geometry.latent_w, config.base_dim * config.dim_mult[-1]

    def conv(inner: int, out: int, taps: int, frames: int = 1, scale: int = 1) -> float:
        return 2.0 * geometry.frames_per_block * inner * out * taps * frames * hw * scale * scale

    flops = [conv(config.z_dim, config.z_dim, 1) + conv(config.z_dim, top, 27) + 4 * conv(top, top, 27)
             + conv(top, 4 * top, 1) + 4.0 * geometry.frames_per_block * hw * hw * top]  # fmt: skip
    for _, kind, inner, out, frames, scale in config.decoder_steps():
        if kind == "head":
            flops.append(conv(inner, out, 27, frames, scale))
        elif kind == "residual":
            shortcut = conv(inner, out, 1, frames, scale) if inner != out else 0.0
            flops.append(conv(inner, out, 27, frames, scale) + conv(out, out, 27, frames, scale) + shortcut)
        else:
            in_time = conv(inner, 2 * inner, 3, frames, scale) if kind == "up3d" else 0.0
            flops.append(in_time + conv(inner, out, 9, frames * (2 if in_time else 1), 2 * scale))
    return flops
