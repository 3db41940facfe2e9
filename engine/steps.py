"""A session whose blocks somebody else drives: an outer scheduler runs each stage of each block when it sees fit.

    job = session.prepare_block()                  # None while the block's sound has not come
    for stage in range(session.stages):
        session.run_stage(job, stage)              # between these, stages of other sessions may run
    session.commit(job)
    chunk = session.decode_block(job)

Until its commit a block leaves no trace: what it wrote lies in the ring slot that only it reads, and it writes that
anew when it is made again. So a block that has not been followed yet can be discarded, and made again of other sound.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from liverelay.engine.errors import BusyError, LiveRelayError
from liverelay.engine.relay.handoff import Parcel
from liverelay.engine.relay.messages import Block, Tensors
from liverelay.engine.relay.room import check_room
from liverelay.engine.relay.stage import Stage
from liverelay.engine.stream import AudioTrack, BlockInput, Chunk, Stream

if TYPE_CHECKING:
    from liverelay.engine.engine import Engine


class StageSet:
    """The stages of one resolution, without threads; sessions on it share their buffers. places: sessions at a time."""

    def __init__(self, stages: Sequence[Stage], places: int) -> None:
        self.stages, self.lock = stages, threading.Lock()
        self._places = frozenset(range(places))
        self._free = list(range(places))[::-1]  # appended to without the lock, which whoever gives back may hold

    def take_place(self) -> int:
        """BusyError when there is none, or no memory for it."""
        with self.lock:
            if not self._free:
                raise BusyError("no session can be opened: all places are taken; close a session")
            place = self._free.pop()
            try:
                check_room([stage.room for stage in self.stages], self._places - {place, *self._free}, place)
            except BaseException:
                self._free.append(place)
                raise
            return place

    def give_back(self, place: int) -> None:
        """May be called by the garbage collector, in the middle of anything."""
        self._free.append(place)


@dataclass(eq=False)
class Job:
    """A block that is being made. session: whose it is; parcel: its latent and sound; stages: that have run it; state:
    see `SteppedSession`.

    The latent `parcel.parts["latent"]` [16, F, h, w] is noise in the beginning and clean when all stages have run.
    """

    session: SteppedSession
    made: BlockInput
    parcel: Parcel
    stages: int = 0
    state: str = "prepared"

    @property
    def number(self) -> int:
        return self.made.block


class SteppedSession(Stream):
    """One avatar's stream, step by step; opened by `Engine.open_steps`. Equal to `Session` bit for bit.

    Several blocks may be under way: a stage takes them in order. Jobs go from prepared to committed to decoded, or are
    discarded. Calls may come from several threads, one at a time for each session. LiveRelayError for a wrong order.
    """

    def __init__(
        self, engine: Engine, stage_set: StageSet, track: AudioTrack, given: Tensors, **keys: int
    ) -> None:
        super().__init__(engine, stage_set.stages[0].spec, track, **keys)
        self._set = stage_set
        self._steps = [stage for stage in stage_set.stages if stage.plan.steps]
        self._place: int | None = stage_set.take_place()
        self._release = weakref.finalize(self, stage_set.give_back, self._place)
        self._next_in = [0] * len(self._steps)  # block that each stage takes next
        self._committed = self._decoded = 0  # blocks
        self._reference: Tensor | None = None  # the model's own first latent frame
        with stage_set.lock:
            for stage in stage_set.stages:
                stage.open(self._place, given)

    @property
    def stages(self) -> int:
        """How many stages denoise."""
        return len(self._steps)

    def check_open(self) -> None:
        if self._place is None:
            raise LiveRelayError("the session is closed")

    def prepare_block(self) -> Job | None:
        """The next block; None while its sound has not come, or when the video has ended (`total_frames` tells)."""
        self.check_open()
        if self.past_end(self._next) or not self.has_sound(self._next):
            return None
        first = self._steps[0]
        job = Job(self, self.block_input(self._next), Parcel(self.spec.parcel, first.device, first.dtype))
        job.parcel.fill(job.made.parts)
        self._next += 1
        return job

    def run_stage(self, job: Job, stage: int) -> None:
        """Denoise the block by one stage: the one after the last that has run it."""
        self.check_open()
        number, blocks_per_clip = job.number, self.spec.stream.blocks_per_clip
        self._expect(job, "prepared")
        if stage != job.stages or stage >= self.stages:
            raise LiveRelayError(f"block {number} goes through stage {job.stages} next, not {stage}")
        if self._next_in[stage] != number:
            raise LiveRelayError(f"stage {stage} takes block {self._next_in[stage]} next, not {number}")
        if number >= blocks_per_clip and self._reference is None:
            raise LiveRelayError(f"block {number} needs the result of block 0; commit that first")
        work, place = self._steps[stage], self._open_place()
        with self._set.lock:
            if number == blocks_per_clip and self._reference is not None:
                work.prepare_sink(place, self._reference)
            work.parcel.fill(job.parcel.parts)
            work.denoise(place, Block(place, -1, number, job.made.distances))
            job.parcel.parts["latent"].copy_(work.parcel.parts["latent"])
        job.stages += 1
        self._next_in[stage] += 1

    def commit(self, job: Job) -> None:
        """The block is part of the stream; blocks are committed in order, when all stages have run them."""
        self.check_open()
        self._expect(job, "prepared")
        if job.stages < self.stages or job.number != self._committed:
            raise LiveRelayError(
                f"block {job.number} cannot be committed: {job.stages} of {self.stages} stages have run it, and block "
                f"{self._committed} comes next"
            )
        if job.number == 0:
            self._reference = job.parcel.parts["latent"][:, :1].clone()
        self._committed, job.state = self._committed + 1, "committed"

    def discard(self, job: Job) -> None:
        """The block is not wanted; the next `prepare_block` gives its number again. Only the latest one can go."""
        self.check_open()
        self._expect(job, "prepared")
        if job.number != self._next - 1:
            raise LiveRelayError(f"block {job.number} cannot be discarded: block {self._next - 1} came after it")
        self._next, job.state = job.number, "discarded"
        self._next_in = [min(number, job.number) for number in self._next_in]

    def decode_block(self, job: Job) -> Chunk:
        """The video of a committed block, in order, with its sound."""
        self.check_open()
        self._expect(job, "committed")
        if job.number != self._decoded:
            raise LiveRelayError(f"block {job.number} cannot be decoded: block {self._decoded} comes next")
        parts, video = job.parcel.parts, None
        with self._set.lock:
            for stage in self._set.stages:
                if stage.plan.decode:
                    stage.parcel.fill(parts)
                    video, parts = stage.decode(self._open_place(), job.number), stage.outgoing.parts
            assert video is not None
            frames = video.cpu().numpy().copy()
        self._decoded, job.state = self._decoded + 1, "decoded"
        return self.chunk(job.made, frames)

    def _expect(self, job: Job, state: str) -> None:
        if job.session is not self:
            raise LiveRelayError(f"block {job.number} is of another session")
        if job.state != state:
            raise LiveRelayError(f"block {job.number} is {job.state}, not {state}")

    def _open_place(self) -> int:
        assert self._place is not None
        return self._place

    def close(self) -> None:
        """Give the session's place back."""
        self._place = None
        self._release()

    def __enter__(self) -> SteppedSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
