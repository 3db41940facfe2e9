"""Frames and their sound from one process to another through shared memory; the reader copies nothing.

    with FrameRing.create(frame_bytes=384 * 704 * 3, audio_samples=640) as ring:     # this process writes
        start_a_reader(ring.name)
        ring.push(frame, audio, index=0, pts_ns=0)

    with FrameRing.attach(name) as ring:                                             # another one reads
        for item in ring:                                                            # until the writer closes
            show(item.frame, item.audio)

One writer, one reader. When the reader is behind, "block" makes the writer wait and "drop_oldest" gives up the oldest
unread frame. A frame that the reader holds is never overwritten: its slot goes back when the item and every array or
DLPack tensor made of it are gone. A killed process frees its role: another one attaches and goes on.

The compiled module does the work (lock-free, futexes); without it a Python twin does (a file lock, polling). Both sides
need the same of the two. Names are made here; the other side gets them over a channel of yours.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from liverelay.engine import frame_ring_twin, native
from liverelay.engine.errors import InputError, RingClosedError, RingError
from liverelay.engine.frame_ring_layout import NO_FRAME, NV12, RGB24, sweep

if TYPE_CHECKING:
    from liverelay.engine.frame_ring_twin import RingEnd, RingHeld, RingReader, RingSlot, RingWriter

__all__ = ["FrameRing", "RingFrame", "sweep"]

T = TypeVar("T")
Policy = Literal["block", "drop_oldest"]
Role = Literal["writer", "reader"]
PixelFormat = Literal["rgb24", "nv12"]
SLICE_S = 0.1  # the compiled module waits in pieces of this, so that Ctrl-C and close are seen
PEERS = ("none", "alive", "dead")


class RingFrame:
    """A frame in the ring's memory. frame: uint8 [H, W, 3] ("rgb24"), [3/2 H, W] ("nv12") or None; audio: float32 [n].

    The engine's NV12 is BT.709 in limited range, as its video files are.
    sequence counts the writer's pushes, so a gap is what was dropped. index, pts_ns (presentation time): the writer's.
    pushed_ns: time.monotonic_ns() when it was published. Arrays are writable views, valid as long as they exist.
    """

    def __init__(self, held: RingHeld) -> None:
        self.sequence, self.index, self.pts_ns, self.pushed_ns = held.sequence, held.index, held.pts_ns, held.pushed_ns
        self.sample_rate = held.sample_rate
        self.pixel_format: PixelFormat | None = None
        self.frame: NDArray[np.uint8] | None = None
        self.audio: NDArray[np.float32] = held.audio
        if held.format == RGB24:
            self.pixel_format, self.frame = "rgb24", held.frame.reshape(held.height, held.width, 3)
        elif held.format == NV12:
            self.pixel_format, self.frame = "nv12", held.frame.reshape(held.height * 3 // 2, held.width)

    def release(self) -> None:
        """Forget the arrays; the slot goes back unless arrays or tensors made of them are still in use elsewhere."""
        self.frame, self.audio = None, np.empty(0, np.float32)

    def __enter__(self) -> RingFrame:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class FrameRing:
    """One end of a ring, made by `create` or `attach`. Safe to use from several threads; they take turns."""

    def __init__(self, end: RingEnd, role: Role) -> None:
        self._end, self.role = end, role
        self.kind = "python" if isinstance(end, frame_ring_twin.RingEnd) else "native"
        self.name, self.slots, self.frame_bytes = end.name, end.slots, end.frame_bytes
        self.audio_samples = end.audio_bytes // 4
        self.policy: Policy = "drop_oldest" if end.drop_oldest else "block"
        self._lock = threading.Lock()
        self._finalize = weakref.finalize(self, end.close)  # also when the program ends without close

    @classmethod
    def create(
        cls, *, frame_bytes: int, audio_samples: int = 0, slots: int = 8, policy: Policy = "block",
        role: Role = "writer",
    ) -> FrameRing:  # fmt: skip
        """A new ring; each slot has room for frame_bytes of pixels and audio_samples float32. Sweeps stale ones first.

        InputError: a wrong argument; RingError: out of bounds, or too little shared memory.
        """
        for label, value in (("frame_bytes", frame_bytes), ("audio_samples", audio_samples), ("slots", slots)):
            if not 0 <= value < 1 << 30:
                raise InputError(f"{label} is {value}; give a number from 0 to 2^30 - 1")
        _choice("policy", policy, ("block", "drop_oldest"))
        _choice("role", role, ("writer", "reader"))
        sweep()
        drop_oldest, writer = policy == "drop_oldest", role == "writer"
        return cls(_module().ring_create(slots, frame_bytes, audio_samples * 4, drop_oldest, writer), role)

    @classmethod
    def attach(cls, name: str, role: Role = "reader") -> FrameRing:
        """The other end. Takes the place of a dead process of that role. RingError: no such ring, damaged, or taken."""
        _choice("role", role, ("writer", "reader"))
        return cls(_module().ring_attach(name, role == "writer"), role)

    def push(
        self, frame: ArrayLike | None, audio: ArrayLike | None = None, *, index: int = 0, pts_ns: int = 0,
        pixel_format: PixelFormat = "rgb24", sample_rate: int = 16000, timeout: float | None = None,
    ) -> bool:  # fmt: skip
        """Copy a frame (uint8, see RingFrame), its sound (float32 [n]) or both into the ring.

        False when there was no room within `timeout` seconds; with "drop_oldest" it never waits, and False means that
        the reader holds every slot. RingPeerError: no room, and the reader is dead.
        """
        pixels, width, height, number = _picture(frame, pixel_format)
        sound = np.empty(0, np.float32) if audio is None else np.asarray(audio)
        if sound.ndim != 1 or sound.dtype != np.float32:
            raise InputError(f"sound is {sound.dtype} {list(sound.shape)}; give float32 [samples]")
        size = 0 if pixels is None else pixels.size
        if size > self.frame_bytes or sound.size > self.audio_samples:
            room = f"{self.frame_bytes} bytes of pixels and {self.audio_samples} samples of sound"
            raise InputError(f"a slot holds {room}; got {size} and {sound.size}")
        with self._lock:
            end = cast("RingWriter", self._of_role("writer"))
            slot: RingSlot | None = self._wait(end.reserve, 0.0 if self.policy == "drop_oldest" else timeout)
            if slot is None:
                return False
            try:
                if pixels is not None:
                    np.copyto(slot.frame[: pixels.size].reshape(pixels.shape), pixels)
                np.copyto(slot.audio[: sound.size], sound)
                slot.publish(index, pts_ns, width, height, number, sound.size, sample_rate)
            except BaseException:
                slot.abandon()
                raise
        return True

    def pop(self, timeout: float | None = None) -> RingFrame | None:
        """The oldest unread frame; None when there was none within `timeout` seconds.

        Once all is read: RingClosedError when the writer has closed, RingPeerError when it died.
        """
        with self._lock:
            end = cast("RingReader", self._of_role("reader"))
            held: RingHeld | None = self._wait(end.pop, timeout)
            return None if held is None else RingFrame(held)

    def __iter__(self) -> Iterator[RingFrame]:
        """Every frame until the writer closes; RingPeerError when it dies. The loop's variable holds one meanwhile."""
        while True:
            try:
                item = self.pop()
            except RingClosedError:
                return
            if item is not None:
                yield item
            del item

    @property
    def pushed(self) -> int:
        """Frames that were ever published."""
        return self._end.pushed

    @property
    def dropped(self) -> int:
        """Frames that nobody will read: given up for newer ones, or without a place."""
        return self._end.dropped

    @property
    def unread(self) -> int:
        """Frames that wait for the reader."""
        return self._end.unread

    @property
    def peer(self) -> str:
        """The other side: "none" (never came, or left), "alive" or "dead" (by process id and start time)."""
        return PEERS[self._end.peer]

    @property
    def peer_silent_s(self) -> float:
        """Seconds since the other side last used the ring: large for a live peer that hangs or has nothing to do."""
        return self._end.peer_silent_ns / 1e9

    def close(self) -> None:
        """End this side. The writer's close ends the stream (what is unread can still be read); the maker's close also
        removes the name. Arrays in use stay valid, and their slots taken, until they are gone."""
        self._finalize.detach()
        self._closing = True
        with self._lock:
            self._end.close()

    def __enter__(self) -> FrameRing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    _closing = False

    def _of_role(self, role: Role) -> RingEnd:
        if self.role != role:
            raise RingError(f"this end of the ring is its {self.role}; a {role} is needed here")
        return self._end

    def _wait(self, attempt: Callable[[float], T | None], timeout: float | None) -> T | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._closing:
                raise RingError("this end of the ring is closed")
            left = SLICE_S if deadline is None else max(0.0, deadline - time.monotonic())
            found = attempt(min(left, SLICE_S))
            if found is not None or left == 0.0:
                return found


def _module() -> Any:
    """The compiled module, unless it is not there or older than this file."""
    compiled = native.module()
    return compiled if hasattr(compiled, "ring_create") else frame_ring_twin


def _choice(label: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{label} is {value!r}; give {' or '.join(choices)}")


def _picture(frame: ArrayLike | None, pixel_format: PixelFormat) -> tuple[NDArray[Any] | None, int, int, int]:
    """Pixels, width, height, number of the format."""
    _choice("pixel_format", pixel_format, ("rgb24", "nv12"))
    if frame is None:
        return None, 0, 0, NO_FRAME
    pixels = np.asarray(frame)
    shape = list(pixels.shape)
    if pixels.dtype == np.uint8 and pixels.size:
        if pixel_format == "rgb24" and pixels.ndim == 3 and shape[2] == 3:
            return pixels, shape[1], shape[0], RGB24
        if pixel_format == "nv12" and pixels.ndim == 2 and shape[0] % 3 == 0 and shape[1] % 2 == 0:
            return pixels, shape[1], shape[0] // 3 * 2, NV12
    wanted = "uint8 [H, W, 3]" if pixel_format == "rgb24" else "uint8 [3/2 H, W] with even H and W"
    raise InputError(f"the frame is {pixels.dtype} {shape}; for {pixel_format} give {wanted}")
