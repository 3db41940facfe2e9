"""Blocks of a stage without Python: once all graphs of a block are captured, it is copies and launches (csrc/).

What the host decides of a block (ring slot, fill level, positions) is decided when it is asked for, in memory of the
block's own; so a block is prepared only when nothing that Python computes is under way before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from liverelay.engine.models.geometry import reference_position
from liverelay.engine.relay.messages import Block, Event, Finished
from liverelay.engine.relay.stage import Stage

if TYPE_CHECKING:
    from liverelay.engine._C import StageProgram


class Pool:
    """Host memory that a device copies from or to, used again and again; as many as were ever under way at a time."""

    def __init__(self) -> None:
        self._free: deque[Tensor] = deque()

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """shape: the same every time."""
        if self._free:
            return self._free.popleft()
        with torch.inference_mode(False):  # whatever thread is the first to need it, others write it too
            return torch.empty(shape, dtype=like.dtype, pin_memory=like.is_cuda)

    def give_back(self, tensor: Tensor) -> None:
        self._free.append(tensor)


@dataclass
class Prepared:
    """A block's work: what to add to its program, what is told when it is done, what is free again then."""

    adders: list[Callable[[StageProgram], None]] = field(default_factory=list)
    answers: list[Callable[[], Event]] = field(default_factory=list)
    taken: list[tuple[Pool, Tensor]] = field(default_factory=list)

    def add(self, program: StageProgram) -> None:
        for adder in self.adders:
            adder(program)

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.adders.append(lambda program: program.copy(target.data_ptr(), source.data_ptr(), source.nbytes))

    def give_back(self) -> None:
        for pool, tensor in self.taken:
            pool.give_back(tensor)


class Captured:
    """Prepares the blocks of a stage."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._words, self._videos = Pool(), Pool()

    def ready(self, block: Block) -> bool:
        """Whether all graphs are there, and nothing is to be seen or decided between them: the first block tells of
        its latent, a clip's first may take a new sink, a kept one shows its steps."""
        stage, place = self.stage, self.stage.places.get(block.place)
        if place is None or block.keep or block.block in (0, stage.spec.stream.blocks_per_clip):
            return False
        if place.decoder is not None and (place.decoder.first or not stage.graphs.has(self._decode_key(block))):
            return False
        if not place.arenas:
            return place.decoder is not None  # without both there is nothing that could have been captured
        return all(stage.graphs.has(key) for key in (*stage.step_keys(block), "audio"))

    def prepare(self, index: int, block: Block) -> Prepared:
        """A block that is ready, after all that came before it was prepared or done. index: the stage's."""
        stage, place, made = self.stage, self.stage.places[block.place], Prepared()

        def launch(key: Hashable) -> None:
            made.adders.append(lambda program: stage.graphs.add(program, key))

        if stage.dit is not None:
            keys, start, words = stage.step_keys(block), stage.start_of(block), stage.workspace.words
            launch("audio")
            drafts = self._words.take((len(place.arenas), *words.shape), words)
            made.taken.append((self._words, drafts))
            for key, draft, (step, arena) in zip(keys, drafts, place.arenas.items(), strict=True):
                reference = reference_position(start, block.distances[step])
                draft.copy_(stage.dit.draft_block(stage.workspace, arena, start, reference))
                made.copy(words, draft)
                launch(key)
        if place.decoder is not None:
            launch(self._decode_key(block))
        if stage.plan.makes_video and place.decoder is None:
            made.answers.append(lambda: Finished(index, block.serial, block.block, None))
        elif stage.plan.makes_video:
            frames = self._videos.take(tuple(stage.video.shape), stage.video)
            made.taken.append((self._videos, frames))
            made.copy(frames, stage.video)
            made.answers.append(lambda: Finished(index, block.serial, block.block, frames.numpy().copy()))
        return made

    @staticmethod
    def _decode_key(block: Block) -> Hashable:
        return block.place, "decode", False
