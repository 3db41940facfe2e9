"""The sequential rollout of one session: block after block, stage after stage, each stage with its own arena.

It computes exactly what the pipeline of stages computes, because block b at stage k needs only block b's latent from
stage k-1 and the ring of stage k (spec dit.md section 9). Every other way to run a session must equal it bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from liverelay.engine.errors import InputError
from liverelay.engine.models.geometry import reference_position
from liverelay.engine.models.layers import AudioCondition, TextCondition
from liverelay.engine.relay.stage import StageLine

OnStep = Callable[[int, Tensor], None]


class Rollout:
    """Arenas, sink and place in the stream of one session.

    reference [16, 1, h, w] and motion [16, <= 19, h, w]: VAE latents of the reference image (spec 6.3 of
    vae_audio_text.md). `next_block` counts from the start of the stream and is never reset.
    """

    def __init__(self, line: StageLine, text: TextCondition, reference: Tensor, motion: Tensor) -> None:
        shape = (line.geometry.latent_h, line.geometry.latent_w)
        for name, latent in (("reference", reference), ("motion", motion)):
            if latent.dim() != 4 or tuple(latent.shape[2:]) != shape:
                raise InputError(f"the {name} latents have shape {list(latent.shape)}, expected [16, frames, *{shape}]")
        self.line, self.text, self.motion = line, text, motion
        self.arenas = [line.dit.make_arena(line.geometry) for _ in line.stages]
        self.next_block = 0
        self.new_reference: Tensor | None = None
        self._fill_sink(reference)

    def _fill_sink(self, reference: Tensor) -> None:
        line = self.line
        tokens = line.dit.sink_tokens(reference, self.motion)
        line.dit.prefill(line.workspace, self.arenas[0], line.sink_tables, self.text, tokens)
        for arena in self.arenas[1:]:
            arena.copy_sink(self.arenas[0])

    def run_block(
        self,
        latent: Tensor,
        audio: AudioCondition,
        pose: Tensor,
        distances: Sequence[int],
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Denoise the next block in place: latent [16, F, h, w] noise in, clean latent out.

        audio: the block's sound; pose: embedded pose; distances: the sink's relative distance for every step.
        on_step(step, latent) sees the latent after each step.
        """
        stream = self.line.stream
        if self.next_block == stream.blocks_per_clip and self.new_reference is not None:
            # Adaptive attention sink: from the second clip on, the model's own first latent frame is the reference.
            self._fill_sink(self.new_reference)
        start = self.next_block * stream.frames_per_block
        conditions = (self.text, audio, pose)
        for stage, arena, distance in zip(self.line.stages, self.arenas, distances, strict=True):
            stage.run(arena, latent, start, reference_position(start, distance), conditions)
            if on_step:
                on_step(stage.step, latent)
        if self.next_block == 0:
            self.new_reference = latent[:, :1].clone()
        self.next_block += 1
        return latent
