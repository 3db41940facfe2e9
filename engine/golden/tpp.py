"""`golden tpp`: the rollout of several clips with given noise and relative distances.

Given: meta.json, inputs.safetensors, the DiT's weights. Results: latent.{clip}.{block}.{rank}, new_ref.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from liverelay.engine.config import StreamConfig
from liverelay.engine.golden import GoldenOptions, given, read_json, read_tensors
from liverelay.engine.golden.dit import load_dit, read_geometry, unbatched
from liverelay.engine.models.sampler import Schedule
from liverelay.engine.relay.rollout import Rollout
from liverelay.engine.relay.stage import StageLine


def run(folder: Path, options: GoldenOptions) -> dict[str, Tensor]:
    where, inputs_file = folder / "meta.json", folder / "inputs.safetensors"
    meta, inputs = read_json(where), read_tensors(inputs_file)
    dit = load_dit(given(meta, "config", where), options.weights or folder / given(meta, "weights", where), options)
    geometry = read_geometry(meta, dit.config.head_dim, where)
    frames, per_clip = geometry.frames_per_block, int(given(meta, "blocks_per_clip", where))
    stream = StreamConfig(frames_per_block=frames, ring_frames=geometry.ring_frames, blocks_per_clip=per_clip)
    schedule = Schedule(tuple(given(meta, "timesteps", where)), tuple(given(meta, "sigmas", where)))
    distances = given(meta, "relative_distance_by_rank_and_global_block", where)
    audio, poses = given(inputs, "audio", inputs_file), given(inputs, "cond_states", inputs_file)
    text = dit.text_condition(given(inputs, "context", inputs_file))
    references = [unbatched(inputs, name, 4, inputs_file) for name in ("ref_latents", "motion_latents")]
    rollout = Rollout(StageLine(dit, geometry, stream, schedule), text, *references)
    results: dict[str, Tensor] = {}
    for clip in range(int(given(meta, "clips", where))):
        noise = given(inputs, f"noise.{clip}", inputs_file)
        for block in range(per_clip):
            index, first = clip * per_clip + block, block * frames
            columns = slice(index * stream.block_frames, (index + 1) * stream.block_frames)

            def keep(rank: int, latent: Tensor, at: str = f"latent.{clip}.{block}") -> None:
                results[f"{at}.{rank}"] = latent.clone()

            rollout.run_block(
                noise[:, first : first + frames].to(dit.device, dit.dtype).clone(),
                dit.audio_condition(audio[..., columns], frames),
                dit.pose_condition(poses[clip, :, first : first + frames]),
                [by_rank[index] for by_rank in distances],
                keep,
            )
    if rollout.new_reference is not None:
        results["new_ref"] = rollout.new_reference.unsqueeze(0)
    return results
