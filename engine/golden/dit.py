"""`golden dit`: sink prefill, then consecutive blocks at one timestep, with the ring and the rolling reference.

Given: config.json, meta.json, weights.safetensors, inputs.safetensors. Results: cond_k.L, cond_v.L, out.B,
final_cache_k.L, final_cache_v.L (shared contract: spec dit.md section 12).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liverelay.engine.config import DiTConfig
from liverelay.engine.errors import InputError
from liverelay.engine.golden import GoldenOptions, given, read_json, read_tensors
from liverelay.engine.models.dit import DiT
from liverelay.engine.models.geometry import Geometry, reference_position
from liverelay.engine.models.weights import TensorSource
from liverelay.kernels import torch_ops


def load_dit(published: dict[str, Any], weights: Path, options: GoldenOptions) -> DiT:
    """The engine's transformer from a published configuration and a weights file."""
    source = TensorSource([weights])
    config = DiTConfig.from_published(published, source.shapes)
    return DiT.load(source, config, device=options.device, dtype=options.dtype, backend=options.backend)


def read_geometry(meta: dict[str, Any], head_dim: int, where: Path) -> Geometry:
    """The resolution and ring length that a golden's meta.json gives."""
    names = ("latent_h", "latent_w", "frames_per_block", "cache_frames")
    height, width, frames, ring = (int(given(meta, name, where)) for name in names)
    return Geometry(height, width, head_dim, frames, ring)


def unbatched(tensors: dict[str, Tensor], key: str, ndim: int, where: Path) -> Tensor:
    """A given tensor without its batch dimension of one; InputError when it is absent or has another rank."""
    tensor: Tensor = given(tensors, key, where)
    if tensor.dim() == ndim + 1 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.dim() != ndim:
        raise InputError(f"'{key}' in {where} has shape {list(tensors[key].shape)}, expected {ndim} dimensions")
    return tensor


def run(folder: Path, options: GoldenOptions) -> dict[str, Tensor]:
    where = folder / "meta.json"
    meta = read_json(where)
    dit = load_dit(read_json(folder / "config.json"), options.weights or folder / "weights.safetensors", options)
    inputs_file = folder / "inputs.safetensors"
    inputs = read_tensors(inputs_file)
    geometry = read_geometry(meta, dit.config.head_dim, where)
    ws, arena = dit.make_workspace(geometry), dit.make_arena(geometry)
    text = dit.text_condition(given(inputs, "context", inputs_file))
    results: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        if name.startswith("cond_"):
            results[name] = value.unsqueeze(0).clone()

    tokens = dit.sink_tokens(
        unbatched(inputs, "ref_latents", 4, inputs_file), unbatched(inputs, "motion_latents", 4, inputs_file)
    )
    dit.prefill(ws, arena, dit.timestep_tables(0.0), text, tokens, tap=keep)
    tables = dit.timestep_tables(float(given(meta, "timestep", where)))
    starts, distances = given(meta, "start_frame_per_block", where), given(meta, "relative_distance_per_block", where)
    with torch.inference_mode():
        for b in range(int(given(meta, "num_blocks", where))):
            latent = unbatched(inputs, f"x.{b}", 4, inputs_file).to(dit.device, dit.dtype)
            audio = dit.audio_condition(given(inputs, f"audio.{b}", inputs_file), geometry.frames_per_block)
            pose = dit.pose_condition(unbatched(inputs, f"cond_states.{b}", 4, inputs_file))
            position = reference_position(starts[b], distances[b])
            flow = dit.block_step(ws, arena, tables, latent, starts[b], position, (text, audio, pose))
            results[f"out.{b}"] = torch_ops.unpatchify(flow, latent.shape).clone()
    for layer in {0, dit.config.num_layers - 1}:
        for name, cache in (("k", arena.k), ("v", arena.v)):
            results[f"final_cache_{name}.{layer}"] = cache[layer, geometry.sink_tokens :].unsqueeze(0).clone()
    return results
