"""The dumb twin of the pipeline: one session, block after block, step after step, each step with its own arena.

Every way to run a session must equal it bit for bit (spec dit.md section 9).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liverelay.engine.models.dit import DiT
from liverelay.engine.models.geometry import reference_position
from liverelay.engine.models.vae import VAE
from liverelay.engine.relay.messages import Tensors
from liverelay.engine.relay.stage import LineSpec


@dataclass(frozen=True)
class Wanted:
    """What a block is made of: noise [16, F, h, w], audio features [1, states, A, 4 F], a distance for each step."""

    noise: Tensor
    audio: Tensor
    distances: Sequence[int]


def random_block(spec: LineSpec, rng: torch.Generator) -> Wanted:
    noise, audio = (torch.randn(spec.parcel[name], generator=rng) for name in ("latent", "audio"))
    distances = torch.randint(4, 31, (len(spec.schedule.timesteps),), generator=rng).tolist()
    return Wanted(noise, audio, distances)


@torch.inference_mode()
def rollout(spec: LineSpec, dit: DiT, vae: VAE, given: Tensors, blocks: Sequence[Wanted]) -> list[tuple[Any, Tensor]]:
    """Frames, bytes [n, H, W, 3], and clean latent of every block."""
    geometry, stream, steps = spec.geometry, spec.stream, range(len(spec.schedule.timesteps))
    workspace, sink_tables = dit.make_workspace(geometry), dit.timestep_tables(0.0)
    tables = [dit.timestep_tables(timestep) for timestep in spec.schedule.timesteps]
    arenas, text = [dit.make_arena(geometry) for _ in steps], dit.text_condition(given["text"])
    decoder = vae.new_decoder(geometry.latent_h, geometry.latent_w)
    vae.prime(decoder, given["motion"][:, : stream.prime_latents])
    reference, results = given["reference"], []
    for number, block in enumerate(blocks):
        if number in (0, stream.blocks_per_clip):
            for arena in arenas:
                tokens = dit.sink_tokens(reference, given["motion"])
                dit.prefill(workspace, arena, sink_tables, text, tokens)
        start, latent = number * geometry.frames_per_block, block.noise.to(dit.dtype)
        audio = dit.audio_condition(block.audio, geometry.frames_per_block)
        for step in steps:
            position = reference_position(start, block.distances[step])
            flow = dit.block_step(workspace, arenas[step], tables[step], latent, start, position,
                                  (text, audio, dit.pose_condition(None)))  # fmt: skip
            latent = dit.ops.euler_step(latent, flow, spec.schedule.step_size(step), torch.empty_like(latent))
        if number == 0:
            reference = latent[:, :1].clone()
        video = vae.decode(latent, decoder)
        video = video[:, stream.dropped_frames :] if number == 0 else video
        results.append((vae.to_uint8(video).numpy(), latent))
    return results
