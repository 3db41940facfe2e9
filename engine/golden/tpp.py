"""`golden tpp`: the rollout of several clips with given noise and relative distances.

Given: meta.json, inputs.safetensors, the DiT's weights. Results: latent.{clip}.{block}.{rank}, new_ref.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from liverelay.engine.config import RankEnvironment, StreamConfig
from liverelay.engine.devices import numbered
from liverelay.engine.errors import InputError
from liverelay.engine.golden import GoldenOptions, given, read_json, read_tensors
from liverelay.engine.golden.dit import load_dit, read_geometry, unbatched
from liverelay.engine.launch import LineOptions, join, make_plan
from liverelay.engine.models.dit import DiT
from liverelay.engine.models.sampler import Schedule
from liverelay.engine.relay.messages import Event, Stepped
from liverelay.engine.relay.pipeline import Observer, Pipeline, local_pipeline
from liverelay.engine.relay.ranks import Leader, RankServer
from liverelay.engine.relay.stage import LineSpec, Stage


def run(folder: Path, options: GoldenOptions) -> dict[str, Tensor] | None:
    where, inputs_file = folder / "meta.json", folder / "inputs.safetensors"
    meta, inputs = read_json(where), read_tensors(inputs_file)
    dit = load_dit(given(meta, "config", where), options.weights or folder / given(meta, "weights", where), options)
    geometry = read_geometry(meta, dit.config.head_dim, where)
    frames, per_clip = geometry.frames_per_block, int(given(meta, "blocks_per_clip", where))
    stream = StreamConfig(frames_per_block=frames, ring_frames=geometry.ring_frames, blocks_per_clip=per_clip)
    schedule = Schedule(tuple(given(meta, "timesteps", where)), tuple(given(meta, "sigmas", where)))
    distances = given(meta, "relative_distance_by_rank_and_global_block", where)
    audio, poses = given(inputs, "audio", inputs_file), given(inputs, "cond_states", inputs_file)
    given_tensors = {"text": given(inputs, "context", inputs_file)}
    for name, key in (("reference", "ref_latents"), ("motion", "motion_latents")):
        given_tensors[name] = unbatched(inputs, key, 4, inputs_file)
    sound = (*audio.shape[:-1], stream.block_frames)
    spec = LineSpec.make(geometry, stream, sound, schedule=schedule, pose=True, channels=dit.config.in_channels)
    results: dict[str, Tensor] = {}

    def keep(event: Event) -> None:
        if isinstance(event, Stepped):
            clip, block = divmod(event.block, per_clip)
            results[f"latent.{clip}.{block}.{event.step}"] = event.latent

    made = make_line(dit, spec, options, keep)
    if made is None:
        return None
    line, end = made
    try:
        serial, blocks = line.open(given_tensors), []
        for clip in range(int(given(meta, "clips", where))):
            noise = given(inputs, f"noise.{clip}", inputs_file)
            for block in range(per_clip):
                index, first = clip * per_clip + block, block * frames
                columns = slice(index * stream.block_frames, (index + 1) * stream.block_frames)
                parts = {"latent": noise[:, first : first + frames], "audio": audio[..., columns]}
                parts["pose"] = poses[clip, :, first : first + frames]
                drawn = [by_rank[index] for by_rank in distances]
                blocks.append(line.request(serial, index, parts, drawn, keep=True))
        for future in blocks:
            future.result()
        reference = line.reference(serial)
    finally:
        end()
    if reference is not None:
        results["new_ref"] = reference.unsqueeze(0)
    return results


def make_line(
    dit: DiT, spec: LineSpec, options: GoldenOptions, observe: Observer
) -> tuple[Pipeline, Callable[[], None]] | None:
    """Stages in this process or over several, and what ends them; None where this one has served."""
    ranks, asked = RankEnvironment.read(), options.line or LineOptions(options.device)
    plan = make_plan(asked, ranks, len(spec.schedule.timesteps))
    if any(numbered(device) != dit.device for device in plan.devices):
        raise InputError(f"given tensors are computed on one device; give {dit.device} as often as there are stages")
    if ranks is None:
        stages = [Stage(part, spec, dit, None, dit.dtype) for part in plan.stages]
        line = local_pipeline(plan, spec, stages, observe=observe)
        return line, line.close
    group = join(asked, ranks, plan)
    if ranks.rank:
        RankServer(group, plan, lambda spec: Stage(plan.stages[ranks.rank], spec, dit, None, dit.dtype)).run()
        return None
    leader = Leader(group, plan)
    built = leader.build(spec, Stage(plan.stages[0], spec, dit, None, dit.dtype), places=1, observe=observe)
    return built, leader.close
