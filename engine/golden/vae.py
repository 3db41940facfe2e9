"""`golden vae`: encode, decode from an empty cache, and the streaming decode of the pipeline.

Given: config.json (vae, latent_mean, latent_std), weights.safetensors, inputs.safetensors (video_9, z, ref_image,
block_latents). Results: latent_1/5/9/73rep, frames_1, frames_N, ref_latent, motion_latents, primed_frames, video_kept.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from liverelay.engine.config import StreamConfig
from liverelay.engine.errors import InputError
from liverelay.engine.golden import GoldenOptions, given, read_json, read_tensors
from liverelay.engine.models.vae import VAE
from liverelay.engine.models.vae_config import VAEConfig
from liverelay.engine.models.weights import TensorSource


def run(folder: Path, options: GoldenOptions) -> dict[str, Tensor]:
    where, inputs_file = folder / "config.json", folder / "inputs.safetensors"
    meta, stream = read_json(where), StreamConfig()
    source = TensorSource([options.weights or folder / "weights.safetensors"])
    constants = {name: tuple(given(meta, name, where)) for name in ("latent_mean", "latent_std")}
    config = VAEConfig.from_shapes(source.shapes, **constants)
    vae = VAE.load(source, config=config, device=options.device, dtype=options.dtype, backend=options.backend)
    inputs = read_tensors(inputs_file)
    video, z, image, blocks = (
        given(inputs, name, inputs_file).to(options.device, options.dtype)
        for name in ("video_9", "z", "ref_image", "block_latents")
    )

    if video.shape[1] < 9:
        raise InputError(f"video_9 of {inputs_file} has {video.shape[1]} frames")
    if not all(config.latent_std):
        raise InputError(f"latent_std of {where} holds a zero")

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents, vae.new_decoder(*latents.shape[2:]))

    def repeated(frame: Tensor) -> Tensor:
        return vae.encode(frame.expand(-1, stream.motion_pixel_frames, -1, -1))

    results = {f"latent_{frames}": vae.encode(video[:, :frames]) for frames in (1, 5, 9)}
    results["latent_73rep"] = repeated(video[:, :1])
    results |= {"frames_1": decode(z[:, :1]), f"frames_{z.shape[1]}": decode(z)}
    results["ref_latent"] = vae.encode(image.unsqueeze(1))
    motion = results["motion_latents"] = repeated(image.unsqueeze(1))
    cache = vae.new_decoder(*motion.shape[2:])
    results["primed_frames"] = decode(motion[:, : stream.prime_latents])
    vae.prime(cache, motion[:, : stream.prime_latents])
    video_frames = [vae.decode(block, cache) for block in blocks]
    results["video_kept"] = torch.cat(video_frames, dim=1)[:, stream.dropped_frames :]
    return results
