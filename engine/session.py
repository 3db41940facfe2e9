"""A session on a line of stages: sound goes in, video frames with the sound they belong to come out, block by block."""

from __future__ import annotations

import math
import time
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from liverelay.engine.errors import LiveRelayError
from liverelay.engine.models.audio_live import LiveAudio
from liverelay.engine.models.geometry import check_size
from liverelay.engine.relay.messages import Tensors
from liverelay.engine.relay.pipeline import Pipeline
from liverelay.engine.snapshot import Snapshot
from liverelay.engine.stream import AudioTrack, BlockInput, Chunk, Stream, WholeFile

if TYPE_CHECKING:
    from liverelay.engine.engine import Engine


@dataclass(frozen=True)
class _Wanted:
    """A block that was asked for, and its frames to come."""

    made: BlockInput
    future: Future[Any]


class Session(Stream):
    """One avatar's stream; opened by `Engine.open`.

    `frames` yields what can be made of the sound. Blocks whose sound is there are asked of the line of stages before
    they are wanted, as many as keep all its stages busy.
    """

    def __init__(
        self, engine: Engine, line: Pipeline, serial: int, track: AudioTrack, given: Tensors, **keys: int
    ) -> None:
        super().__init__(engine, line.spec, track, **keys)
        self.line = line
        self._serial: int | None = serial
        self._release = weakref.finalize(self, line.abandon, serial)
        self._broken = False
        self._given = given  # what the line was opened with
        self._wanted: deque[_Wanted] = deque()  # blocks asked for, in order
        self._epoch: float | None = None  # when a live session's first frame was due

    @property
    def next_block(self) -> int:
        """Number of the block that `frames` yields next."""
        self.check_open()
        return self._wanted[0].made.block if self._wanted else self._next

    @property
    def next_frame(self) -> int:
        """Number of the video frame that the next block begins with; frames before it have been yielded."""
        return self.frames_before(self.next_block)

    def frames(self, *, idle: bool = False) -> Iterator[Chunk]:
        """Yield blocks as long as there is sound for them.

        In a live session the iterator ends when the sound that has come is used up (call it again after the next
        push), and for good after `end_audio`. With `idle` it goes on with silence instead and never ends.
        """
        while True:
            self.check_open()
            while len(self._wanted) < self.line.depth and self._ask(idle):
                pass
            if not self._wanted:
                if not idle:
                    return
                with self._asking:
                    self.fill_silence(self._next)
                    self._want_block()
            with self._asking:
                self.check_open()
                wanted = self._wanted[0]
            frames = self._frames_of(wanted)
            with self._asking:
                self._open_serial()
                self._wanted.popleft()
            yield self.chunk(wanted.made, frames, idle=idle)

    def _ask(self, idle: bool) -> bool:
        """Ask for the next block where it can be made now; whether it was."""
        with self._asking:
            if can := self._can_ask(idle):
                self._want_block()
            return can

    def _can_ask(self, idle: bool) -> bool:
        """Whether the block that is asked for next can be made now and is part of the video."""
        if self.past_end(self._next):
            return idle and not self._wanted  # what follows the sound is made when it is wanted
        return self.has_sound(self._next)

    def _want_block(self) -> None:
        """Ask for the next block."""
        made = self.block_input(self._next)
        future = self.line.request(
            self._open_serial(), made.block, made.parts, made.distances, deadline=self._deadline(made.first_frame)
        )
        self._wanted.append(_Wanted(made, future))
        self._next += 1

    def _deadline(self, frame: int) -> float:
        """When a live session's frame is due, by the pace of its video; a session that stood still is not late."""
        if self._live is None:
            return math.inf
        now, offset = time.monotonic(), frame / self.engine.stream.fps
        if self._epoch is None or self._epoch + offset < now:
            self._epoch = now - offset
        return self._epoch + offset

    def _frames_of(self, wanted: _Wanted) -> Any:
        try:
            return wanted.future.result()
        except Exception:
            self._broken = True  # its caches stopped half-way
            raise

    def snapshot(self) -> Snapshot:
        """The session as it is after the last chunk that `frames` gave; `Engine.resume` goes on from there.

        Waits for the blocks that are under way; they are in it. The session itself goes on with the same blocks as
        without it, but for a live one whose sound is not at 16 kHz: a new resampler takes over at this point, here as
        in the resumed session, so both hear the same, and about this moment not quite what one without a snapshot does.
        """
        with self._asking:
            self.check_open()
            under_way = list(self._wanted)
        frames = {wanted.made.block: self._frames_of(wanted) for wanted in under_way}
        saved = self.line.save(self._open_serial()).result()
        kind, (sound, numbers) = "live" if self._live else "file", self._track.state()
        tensors = {f"given.{name}": tensor for name, tensor in self._given.items()} | {"track.sound": _tensor(sound)}
        for part in saved.values():
            tensors |= {f"stage.{name}": tensor for name, tensor in part.tensors.items()}
        reference = self.line.reference(self._open_serial())
        if reference is not None:
            tensors["stage.new_reference"] = reference
        for wanted in under_way:
            block = wanted.made.block
            tensors |= {f"frames.{block}": _tensor(frames[block]), f"sound.{block}": _tensor(wanted.made.sound)}
        geometry = self.spec.geometry
        facts = {
            "model": self.engine.model_id, "stream": asdict(self.engine.stream), "seed": self.seed,
            "session_id": self.session_id, "next": self._next, "latent": [geometry.latent_h, geometry.latent_w],
            "numbers": {name: number for part in saved.values() for name, number in part.numbers.items()},
            "track": {"kind": kind, **numbers},
        }  # fmt: skip
        return Snapshot({name: tensor.detach().cpu() for name, tensor in tensors.items()}, facts)

    def _restore(self, snapshot: Snapshot) -> Session:
        """Take the place in the stream, and the blocks that were done but not given out yet."""
        self._next, sound = snapshot.facts["next"], snapshot.part("sound")
        for block, frames in sorted((int(name), tensor) for name, tensor in snapshot.part("frames").items()):
            future: Future[Any] = Future()
            future.set_result(frames.numpy())
            samples = sound[str(block)].numpy()
            made = BlockInput(block, self.frames_before(block), {}, (), samples, time.perf_counter())
            self._wanted.append(_Wanted(made, future))
        return self

    def _open_serial(self) -> int:
        if self._serial is None:
            raise LiveRelayError("the session is closed")
        return self._serial

    def check_open(self) -> None:
        self._open_serial()
        if self._broken:
            raise LiveRelayError("a block of this session failed; open a new session")

    def close(self) -> None:
        """Give the session's place back; it cannot be used afterwards."""
        with self._asking:  # in `frames` of another thread it comes before or after a block is taken
            if self._serial is None:
                return
            serial, self._serial, self._live = self._serial, None, None
            self._wanted.clear()
        if self._release.detach():
            self.line.close_session(serial)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def resume(engine: Engine, snapshot: Snapshot) -> Session:
    """Go on with a session on a line of its size; see `Engine.resume`."""
    numbers, track = snapshot.facts["numbers"], dict(snapshot.facts["track"])
    live, sound = track.pop("kind") == "live", snapshot.tensors["track.sound"].numpy()
    heard = LiveAudio.restore(engine.audio, sound, track) if live else WholeFile(engine.audio, sound, engine.stream.fps)
    height, width = snapshot.facts["latent"]
    check_size((8 * width, 8 * height))
    given, line = snapshot.part("given"), engine.line(height, width)
    serial = line.open(given, rate=engine.rate(live=live), state=(snapshot.part("stage"), numbers))
    keys = {name: snapshot.facts[name] for name in ("seed", "session_id")}
    return Session(engine, line, serial, heard, given, **keys)._restore(snapshot)


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
