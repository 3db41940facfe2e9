"""Parts of the method taken away, one at a time, in a plain rollout over the engine's own transformer and VAE.

Every step has its own arena, as in the engine's stages, unless the history is clean: then all steps share one, and a
further pass at timestep 0 writes the finished block's keys and values for the blocks to come.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.quality_measures import Array
from bench.quality_stream import SIZE, WINDOW
from distill.clips import Clip
from distill.motion import RATE
from liverelay.engine import Engine
from liverelay.engine.models.geometry import REFERENCE_POSITION, reference_position
from liverelay.engine.stream import BlockInput, Stream


@dataclass(frozen=True)
class Variant:
    """rolling: the reference's position goes along with the video; replace: the model's own first latent becomes the
    reference after a clip; clean: history from finished blocks instead of from the same noise level."""

    rolling: bool = True
    replace: bool = True
    clean: bool = False


VARIANTS = {
    "as published": Variant(), "without rolling RoPE": Variant(rolling=False),
    "without sink replacement": Variant(replace=False), "clean history": Variant(clean=True),
}  # fmt: skip


class Rollout:
    """A live stream without the engine's pipeline: block after block, step after step.

    windows: those to look at, None: all. Blocks outside of them are not decoded, and the decoder is warmed up anew with
    the latents before a window, as many as the engine takes when a stream begins.
    """

    def __init__(
        self, engine: Engine, of: Clip, seed: int, variant: Variant, windows: set[int] | None = None
    ) -> None:
        given, track, latent = engine._prepare(of.still, of.prompt, size=SIZE)
        geometry = engine._geometry(*latent)
        self.engine, self.dit, self.vae, self.variant, self.geometry = engine, engine.dit, engine.vae, variant, geometry
        self.stream = Stream(engine, engine._spec(geometry), track, seed=seed)
        self.schedule = self.stream.spec.schedule
        steps = len(self.schedule.timesteps)
        self.workspace, self.still = self.dit.make_workspace(geometry), self.dit.timestep_tables(0.0)
        self.tables = [self.dit.timestep_tables(timestep) for timestep in self.schedule.timesteps]
        arenas = [self.dit.make_arena(geometry) for _ in range(1 if variant.clean else steps)]
        self.arenas = arenas * steps if variant.clean else arenas
        self.text, self.reference, self.motion = (
            self.dit.text_condition(given["text"]), given["reference"], given["motion"],
        )  # fmt: skip
        self.decoder, self.block, self.windows = self.vae.new_decoder(*latent), 0, windows
        self._before = self.motion[:, : engine.stream.prime_latents]  # latents before this block
        self._warm = False

    @torch.inference_mode()
    def say(self, sound: Array) -> Iterator[Array | int]:
        self.stream.push_audio(sound, RATE)
        while self.stream.has_sound(self.block):
            latent = self._denoise(self.stream.block_input(self.block))
            if self.block == 0 and self.variant.replace:
                self.reference = latent[:, :1].clone()
            first, end = (self.stream.frames_before(block) for block in (self.block, self.block + 1))
            if self.windows is not None and self.windows.isdisjoint(range(first // WINDOW, (end - 1) // WINDOW + 1)):
                self._warm = False
                yield end - first
            else:
                yield self._frames(latent)[first - end :]
            self._before = torch.cat([self._before, latent], dim=1)[:, -self.engine.stream.prime_latents :]
            self.block += 1

    def _frames(self, latent: Tensor) -> Array:
        if not self._warm:
            self.decoder.reset()
            self.vae.prime(self.decoder, self._before)
            self._warm = True
        frames: Array = self.vae.to_uint8(self.vae.decode(latent, self.decoder)).numpy(force=True)
        return frames

    def _denoise(self, made: BlockInput) -> Tensor:
        """The clean latent of a block."""
        dit, stream = self.dit, self.engine.stream
        if made.block == 0 or (made.block == stream.blocks_per_clip and self.variant.replace):
            tokens = dit.sink_tokens(self.reference, self.motion)
            for arena in dict.fromkeys(self.arenas):
                dit.prefill(self.workspace, arena, self.still, self.text, tokens)
        start, latent = made.block * stream.frames_per_block, made.parts["latent"].to(dit.device, dit.dtype)
        heard = dit.audio_condition(made.parts["audio"], stream.frames_per_block)
        conditions = (self.text, heard, dit.pose_condition(None))

        def step(number: int, tables: object) -> Tensor:
            position = REFERENCE_POSITION
            if self.variant.rolling:
                position = reference_position(start, made.distances[number])
            return dit.block_step(self.workspace, self.arenas[number], tables, latent, start, position, conditions)

        for number, tables in enumerate(self.tables):
            flow = step(number, tables)
            latent = dit.ops.euler_step(latent, flow, self.schedule.step_size(number), torch.empty_like(latent))
        if self.variant.clean:
            step(len(self.tables) - 1, self.still)
        return latent

    def close(self) -> None:
        """Nothing is held."""
