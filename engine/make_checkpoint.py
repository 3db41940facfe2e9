"""`liverelay make-checkpoint`: a small checkpoint in exactly the published layout, to build and test with.

With random weights its video is moving noise: what it shows is that every file is read and every stage runs. The
bundled models are copied.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from liverelay.engine.checkpoint import BUNDLED, DIT_STEM, LORA_FOLDERS, CheckpointFiles, bundled_names
from liverelay.engine.config import DiTConfig
from liverelay.engine.errors import InputError, MissingExtraError, OutputError
from liverelay.engine.media import part_path
from liverelay.engine.models.sizes import dit_shapes
from liverelay.engine.models.text import text_shapes
from liverelay.engine.models.vae_config import VAEConfig, expected_shapes
from liverelay.engine.models.weights import save_tensors

SHARDS = 2
LORA_TARGETS = (".q", ".k", ".v", ".o", ".ffn.0", ".ffn.2")


@dataclass(frozen=True)
class Preset:
    """Sizes of a small checkpoint."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    audio_inject_layers: tuple[int, ...]
    text_dim: int = 64
    text_layers: int = 2
    audio_dim: int = 32
    audio_layers: int = 24
    vae_dim: int = 8
    lora_rank: int = 4


PRESETS = {
    "tiny": Preset(128, 256, 4, 4, (0, 2)),
    "small": Preset(512, 1408, 4, 8, (0, 2, 4, 7), vae_dim=16),
}


def make_checkpoint(out: Path, *, preset: str = "tiny", seed: int = 0) -> Path:
    """Write a checkpoint to a new folder `out`: random, the same files for the same seed, or a copy of a bundled model.
    Returns `out`.

    InputError for an unknown preset; OutputError when `out` exists and is not empty, or cannot be written.
    """
    bundled = bundled_names()
    if preset not in PRESETS and preset not in bundled:
        raise InputError(f"unknown preset '{preset}'; choose one of {', '.join([*PRESETS, *bundled])}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists already; give a new folder")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"cannot write {out}: the folder {out.parent} does not exist")
    part = part_path(out.absolute())
    try:
        if preset in bundled:
            shutil.copytree(BUNDLED / preset, part)
        else:
            part.mkdir()
            _write_random(CheckpointFiles(part, None), PRESETS[preset], seed)
        if out.exists():
            out.rmdir()
        os.replace(part, out)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise OutputError(f"cannot write {out}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _write_random(files: CheckpointFiles, sizes: Preset, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed & (1 << 63) - 1)
    _write_dit(files, sizes, generator)
    torch.save(_vae_weights(sizes, generator), files.vae)
    torch.save(_text_weights(sizes, generator), files.text)
    _write_tokenizer(files.tokenizer)
    _write_audio(files.audio, sizes, seed)


def _normal(shape: tuple[int, ...], scale: float, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator) * scale


def _dit_tensor(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Scales that keep activations near one in every part of the model."""
    if key.endswith("modulation"):
        return _normal(shape, 0.3, generator)
    if key.endswith("trainable_cond_mask.weight") or "padding_tokens" in key:
        return _normal(shape, 0.1, generator)
    if "norm" in key:
        return _normal(shape, 0.05, generator) + (key.endswith("weight") * 1.0)
    if len(shape) == 1:
        return _normal(shape, 0.02, generator)
    if key.startswith("casual_audio_encoder.weights"):
        return _normal(shape, 0.5, generator)
    fan_in = torch.Size(shape[1:]).numel()
    return _normal(shape, fan_in**-0.5, generator)


def random_dit(config: DiTConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Random bfloat16 weights of the transformer under the published names, scaled so that activations stay near 1."""
    shapes = dit_shapes(config)
    return {key: _dit_tensor(key, shape, generator).bfloat16() for key, shape in shapes.items()}


def published_config(config: DiTConfig) -> dict[str, object]:
    """The content of config.json, in the published names."""
    return {
        "_class_name": "WanModel_S2V", "model_type": "s2v", "dim": config.dim, "ffn_dim": config.ffn_dim,
        "num_heads": config.num_heads, "num_layers": config.num_layers, "freq_dim": config.freq_dim,
        "audio_dim": config.audio_dim, "audio_inject_layers": list(config.audio_inject_layers),
        "num_audio_token": config.num_audio_tokens, "in_dim": config.in_channels, "out_dim": config.in_channels,
        "cond_dim": config.cond_channels, "eps": config.eps, "text_len": config.text_len, "enable_adain": True,
        "adain_mode": "attn_norm", "zero_init": True, "zero_timestep": True, "enable_motioner": False,
        "add_last_motion": True, "enable_tsm": False, "trainable_token_pos_emb": False, "motion_token_num": 1024,
        "enable_framepack": True, "framepack_drop_mode": "padd",
    }  # fmt: skip


def _write_dit(files: CheckpointFiles, sizes: Preset, generator: torch.Generator) -> None:
    config = DiTConfig(
        dim=sizes.dim, ffn_dim=sizes.ffn_dim, num_heads=sizes.num_heads, num_layers=sizes.num_layers,
        audio_inject_layers=sizes.audio_inject_layers, text_dim=sizes.text_dim, audio_dim=sizes.audio_dim,
    )
    files.config.write_text(json.dumps(published_config(config), indent=2) + "\n")
    tensors = random_dit(config, generator)
    keys, weight_map = list(tensors), dict[str, str]()
    for i in range(SHARDS):
        name = f"{DIT_STEM}-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = keys[i * len(keys) // SHARDS : (i + 1) * len(keys) // SHARDS]
        save_tensors(files.folder / name, {key: tensors[key] for key in part})
        weight_map |= dict.fromkeys(part, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    files.dit_index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
    lora = {}
    for key, shape in dit_shapes(config).items():
        module = key.removesuffix(".weight")
        if key.endswith(".weight") and len(shape) == 2 and module.endswith(LORA_TARGETS):
            lora[f"{module}.lora_A.default.weight"] = _normal((sizes.lora_rank, shape[1]), shape[1] ** -0.5, generator)
            lora[f"{module}.lora_B.default.weight"] = _normal((shape[0], sizes.lora_rank), 0.01, generator)
    folder = files.folder / LORA_FOLDERS[0]
    folder.mkdir()
    save_tensors(folder / "liveavatar.safetensors", {key: tensor.bfloat16() for key, tensor in lora.items()})


def _vae_weights(sizes: Preset, generator: torch.Generator) -> dict[str, Tensor]:
    weights = {}
    for key, shape in expected_shapes(VAEConfig(base_dim=sizes.vae_dim)).items():
        if key.endswith("gamma"):
            weights[key] = 1 + _normal(shape, 0.05, generator)
        elif key.endswith("bias"):
            weights[key] = _normal(shape, 0.02, generator)
        else:
            weights[key] = _normal(shape, torch.Size(shape[1:]).numel() ** -0.5, generator)
    weights["decoder.head.2.weight"] *= 0.5  # most pixels stay off the clamp
    return weights


def _text_weights(sizes: Preset, generator: torch.Generator) -> dict[str, Tensor]:
    shapes = text_shapes(300, sizes.text_dim, 2 * sizes.text_dim, 4, sizes.text_dim, sizes.text_layers)
    weights = {}
    for key, shape in shapes.items():
        scale = 1.0 if key.startswith("token") else shape[-1] ** -0.5
        weights[key] = (torch.ones(shape) if len(shape) == 1 else _normal(shape, scale, generator)).bfloat16()
    return weights


def _write_tokenizer(folder: Path) -> None:
    """Our own byte-level tokenizer with umT5's special ids: <pad> 0, </s> 1 (appended), <unk> 2."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise MissingExtraError(error.name or "tokenizers", "to write a tokenizer", "text") from None
    special = ["<pad>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    fast.save_pretrained(str(folder))


def _write_audio(folder: Path, sizes: Preset, seed: int) -> None:
    """A wav2vec2 CTC model of the published form, small."""
    try:
        from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC
    except ImportError:
        raise MissingExtraError("transformers", "to write a wav2vec2 model", "audio") from None
    width = sizes.audio_dim
    config = Wav2Vec2Config(
        hidden_size=width, num_hidden_layers=sizes.audio_layers, num_attention_heads=4, intermediate_size=2 * width,
        conv_dim=(16,) * 7, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, vocab_size=8, initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = Wav2Vec2ForCTC(config).state_dict()
    published = {"original0": "weight_g", "original1": "weight_v"}
    for new, old in published.items():
        key = f"wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.{new}"
        state[f"wav2vec2.encoder.pos_conv_embed.conv.{old}"] = state.pop(key)
    config.architectures = ["Wav2Vec2ForCTC"]
    config.save_pretrained(str(folder))
    save_tensors(folder / "model.safetensors", state)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    extractor.save_pretrained(str(folder))
