"""The frame ring without the compiled module: same layout, same behaviour, slower.

Python has no atomic compare-and-swap, so every move of a slot's word happens under a lock on the segment's file, which
the kernel takes from a dead process. Waiting is polling. The compiled module knows nothing of that lock: a ring of one
kind refuses the other. A process that is stopped (not killed) within the lock stops its peer until it goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from liverelay.engine import frame_ring_layout as at
from liverelay.engine.errors import RingClosedError, RingError, RingPeerError
from liverelay.engine.frame_ring_layout import FREE, FULL, HELD, WRITING, Layout

T = TypeVar("T")
POLL_S, CHECK_S = (0.0001, 0.002), 0.05


def ring_create(slots: int, frame_bytes: int, audio_bytes: int, drop_oldest: bool, writer: bool) -> RingEnd:
    """A new ring, this process being its writer or its reader."""
    origin = (time.time_ns(), at.identity(), at.pid_namespace())
    layout = Layout(slots, frame_bytes, audio_bytes, drop_oldest, True, *origin)
    name = f"liverelay-ring-{secrets.token_hex(8)}"
    try:
        descriptor = os.open(at.FOLDER / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
            os.posix_fallocate(descriptor, 0, layout.total_bytes)  # a full /dev/shm is an error now, not a SIGBUS later
            os.pwrite(descriptor, layout.pack(), 0)
        except OSError:
            os.unlink(at.FOLDER / name)
            os.close(descriptor)
            raise
    except OSError as error:
        size = layout.total_bytes >> 20
        raise RingError(f"no {size} MiB of shared memory for the ring: {error.strerror}") from None
    return (RingWriter if writer else RingReader)(name, layout, descriptor, maker=True)


def ring_attach(name: str, writer: bool) -> RingEnd:
    """The other end of a ring, by its name."""
    descriptor = at.open_checked(name)
    try:
        layout = Layout.parse(os.pread(descriptor, at.STATIC_BYTES, 0), os.fstat(descriptor).st_size, name)
        if not layout.file_lock:
            raise RingError(f"ring {name} belongs to the compiled module; use that on both sides or on none")
        if layout.pid_namespace != at.pid_namespace():
            raise RingError(f"ring {name} was made in another PID namespace, whose processes cannot be seen")
        return (RingWriter if writer else RingReader)(name, layout, descriptor, maker=False)
    except RingError:
        os.close(descriptor)
        raise


class RingEnd:
    """What both sides share. Slots are counted while this side has them; the last one gives the role back."""

    _role, _claim, _other_claim, _beat, _other_beat = "", 0, 0, 0, 0

    def __init__(self, name: str, layout: Layout, descriptor: int, *, maker: bool) -> None:
        self.name, self._layout, self._maker = name, layout, maker
        self.slots, self.frame_bytes, self.audio_bytes = layout.slots, layout.frame_bytes, layout.audio_bytes
        self.drop_oldest = layout.drop_oldest
        mapping = mmap.mmap(descriptor, layout.total_bytes)
        self._memory, self._words = np.frombuffer(mapping, np.uint8), memoryview(mapping).cast("Q")
        self.address: int = self._memory.__array_interface__["data"][0]
        self._descriptor, self._pid, self._identity = descriptor, os.getpid(), at.identity()
        self._thread_lock, self._depth = threading.RLock(), 0
        self._taken, self._closed, self._claimed, self._checked = 0, False, False, 0.0
        with self._locked():
            if not os.fstat(descriptor).st_nlink:
                raise RingError(f"ring {name} has just been removed")
            holder = self._get(self._claim)
            if at.alive(holder):
                pid = holder >> at.START_BITS
                raise RingError(f"ring {name} has a live {self._role} already (process {pid})")
            self._set(self._claim, self._identity)
            self._claimed = self._made = True
            self._repair()
            self._set(self._beat, time.monotonic_ns())

    def __del__(self) -> None:
        if self.__dict__.get("_made"):  # else whoever opened the descriptor closes it
            self.close()
            self._let_go()
            os.close(self._descriptor)

    def _get(self, offset: int) -> int:
        return self._words[offset // 8]

    def _set(self, offset: int, value: int) -> None:
        self._words[offset // 8] = value & 0xFFFFFFFFFFFFFFFF

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # Reentrant: a frame may be collected, and so given back, at any point of the code below.
        with self._thread_lock:
            self._depth += 1
            try:
                if self._depth == 1:
                    fcntl.flock(self._descriptor, fcntl.LOCK_EX)
                yield
            finally:
                if self._depth == 1:
                    fcntl.flock(self._descriptor, fcntl.LOCK_UN)
                self._depth -= 1

    def _repair(self) -> None:
        raise NotImplementedError

    @property
    def pushed(self) -> int:
        return self._get(at.PUSHED)

    @property
    def dropped(self) -> int:
        return self._get(at.DROPPED)

    @property
    def unread(self) -> int:
        return sum(self._get(self._layout.slot(i)) & 3 == FULL for i in range(self.slots))

    @property
    def peer(self) -> int:
        """0: nobody, 1: alive, 2: dead."""
        holder = self._get(self._other_claim)
        return 0 if not holder else 1 if at.alive(holder) else 2

    @property
    def peer_silent_ns(self) -> int:
        beat = self._get(self._other_beat)
        return max(0, time.monotonic_ns() - beat) if beat else 0

    def close(self) -> None:
        if self._closed or not self._ours():
            return
        self._closed = True
        with self._locked():
            if self._role == "writer":
                self._set(at.CLOSED, 1)
        if self._maker:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(at.FOLDER / self.name)
        if not self._taken:
            self._let_go()

    def _let_go(self) -> None:
        if not self._ours():  # a forked child shares the lock's owner
            return
        with self._locked():
            if self._claimed and self._get(self._claim) == self._identity:
                self._set(self._claim, 0)
            self._claimed = False

    def _ours(self) -> bool:
        return os.getpid() == self._pid

    def give_back(self, slot: int, position: int) -> None:
        if not self._ours():
            return
        with self._locked():
            self._set(self._layout.slot(slot), position << 2 | FREE)
            self._taken -= 1
        if self._closed and not self._taken:
            self._let_go()

    def window(self, owner: object, offset: int, size: int, typestr: str) -> NDArray[Any]:
        """[size / itemsize] over the shared memory; the array keeps `owner`, and with it the slot."""
        return np.asarray(_Window(owner, self.address + offset, size // np.dtype(typestr).itemsize, typestr))

    def _wait(self, timeout_s: float, look: Callable[[], T | None], died: str) -> T | None:
        if self._closed:
            raise RingError("this end of the ring is closed")
        if not self._ours():
            raise RingError("this ring was opened before a fork; attach to it anew here")
        deadline, pause = time.monotonic() + timeout_s, POLL_S[0]
        while True:
            now = time.monotonic()
            self._set(self._beat, int(now * 1e9))
            due = now - self._checked >= CHECK_S
            dead = due and self.peer == 2  # before the look: what it left is found
            if due and not dead:
                self._checked = now
            with self._locked():
                found = look()
            if found is not None:
                return found
            if dead:
                raise RingPeerError(f"the {died} of ring {self.name} died")
            if now >= deadline:
                return None
            time.sleep(min(pause, max(0.0, deadline - now)))
            pause = min(2 * pause, POLL_S[1])


class RingWriter(RingEnd):
    _role, _claim, _other_claim = "writer", at.WRITER_CLAIM, at.READER_CLAIM
    _beat, _other_beat = at.WRITER_BEAT, at.READER_BEAT

    def _repair(self) -> None:
        self._head, self._sequence, self._open = self._get(at.HEAD), self._get(at.PUSHED), False
        for slot in map(self._layout.slot, range(self.slots)):
            word = self._get(slot)
            if word & 3 == WRITING or (word & 3 == FULL and word >> 2 >= self._head):
                self._set(slot, word & ~3)
        self._set(at.CLOSED, 0)

    def reserve(self, timeout_s: float) -> RingSlot | None:
        if self._open:
            raise RingError("a slot is reserved already; publish or abandon it first")
        if not self.drop_oldest:
            return self._wait(timeout_s, self._take, "reader")
        slot = self._wait(0.0, self._take, "reader")
        if slot is None:
            self._set(at.DROPPED, self.dropped + 1)
        return slot

    def _take(self) -> RingSlot | None:
        for position in range(self._head, self._head + self.slots):
            offset = self._layout.slot(position % self.slots)
            state = self._get(offset) & 3
            if state == FULL and not self.drop_oldest:
                return None
            if state != HELD:
                self._set(offset, position << 2 | WRITING)
                if state == FULL:
                    self._set(at.DROPPED, self.dropped + 1)
                self._taken, self._open = self._taken + 1, True
                return RingSlot(self, position)
        return None

    def publish(self, position: int, meta: tuple[int, ...]) -> None:
        offset = self._layout.slot(position % self.slots)
        text = at.META.pack(self._sequence, *meta[:2], time.monotonic_ns(), *meta[2:])
        self._memory[offset + at.META_OFFSET :][: at.META.size] = np.frombuffer(text, np.uint8)
        with self._locked():
            self._sequence, self._head = self._sequence + 1, position + 1
            self._set(offset, position << 2 | FULL)
            self._set(at.PUSHED, self._sequence)
            self._set(at.HEAD, self._head)
            self._taken, self._open = self._taken - 1, False

    def abandon(self, slot: int, position: int) -> None:
        self._open = False
        self.give_back(slot, position)


class RingReader(RingEnd):
    _role, _claim, _other_claim = "reader", at.READER_CLAIM, at.WRITER_CLAIM
    _beat, _other_beat = at.READER_BEAT, at.WRITER_BEAT

    def _repair(self) -> None:
        self._next = max(0, self._get(at.HEAD) - self.slots)
        for slot in map(self._layout.slot, range(self.slots)):
            if self._get(slot) & 3 == HELD:
                self._set(slot, self._get(slot) & ~3)

    def pop(self, timeout_s: float) -> RingHeld | None:
        if not self._closed and self._taken + 1 >= self.slots:
            raise RingError("all frames but one are held; drop some of them (and arrays made of them) first")
        return self._wait(timeout_s, self._take, "writer")

    def _take(self) -> RingHeld | None:
        head = self._get(at.HEAD)
        if head < self._next:
            raise RingError(f"ring {self.name} holds a damaged frame")
        self._next = max(self._next, head - self.slots)
        while self._next < head:
            position, self._next = self._next, self._next + 1
            offset = self._layout.slot(position % self.slots)
            if self._get(offset) == (position << 2 | FULL) & 0xFFFFFFFFFFFFFFFF:
                self._set(offset, position << 2 | HELD)
                self._taken += 1
                meta = self._memory[offset + at.META_OFFSET :][: at.META.size].tobytes()  # a copy: then it is checked
                held = RingHeld(self, position, meta)
                if not held.fits(self._layout):
                    raise RingError(f"ring {self.name} holds a damaged frame")
                return held
        if self._get(at.CLOSED) & 0xFFFFFFFF:
            raise RingClosedError(f"the writer of ring {self.name} has ended the stream")
        return None


class _Window:
    def __init__(self, owner: object, address: int, items: int, typestr: str) -> None:
        self.owner = owner
        self.__array_interface__ = {"version": 3, "shape": (items,), "typestr": typestr, "data": (address, False)}


class RingSlot:
    """A slot that the writer fills."""

    def __init__(self, writer: RingWriter, position: int) -> None:
        self._writer, self._position, self._open = writer, position, True
        self._offset = writer._layout.slot(position % writer.slots)

    @property
    def frame(self) -> NDArray[np.uint8]:
        return self._writer.window(self, self._offset + at.SLOT_HEADER_BYTES, self._writer.frame_bytes, "|u1")

    @property
    def audio(self) -> NDArray[np.float32]:
        layout = self._writer._layout
        return self._writer.window(self, self._offset + layout.audio_offset, layout.audio_bytes, "<f4")

    def publish(
        self, index: int, pts_ns: int, width: int, height: int, format: int, samples: int, sample_rate: int
    ) -> None:
        if not self._open:
            raise RingError("this slot is published or abandoned already")
        pixels = at.picture_bytes(format, width, height)
        if bool(format) != bool(pixels) or pixels > self._writer.frame_bytes or samples * 4 > self._writer.audio_bytes:
            raise RingError("the picture or its sound does not fit into the ring's slots")
        meta = (index, pts_ns, width, height, format, pixels, samples * 4, sample_rate)
        self._writer.publish(self._position, meta)
        self._open = False

    def abandon(self) -> None:
        if self._open:
            self._open = False
            self._writer.abandon(self._position % self._writer.slots, self._position)

    def __del__(self) -> None:
        self.abandon()


class RingHeld:
    """A frame that the reader holds until this object and every array made of it are gone."""

    def __init__(self, reader: RingReader, position: int, meta: bytes) -> None:
        self._reader, self._position = reader, position
        (self.sequence, self.index, self.pts_ns, self.pushed_ns, self.width, self.height, self.format,
         self._frame_bytes, self._audio_bytes, self.sample_rate) = at.META.unpack(meta)  # fmt: skip
        self._offset = reader._layout.slot(position % reader.slots)

    def fits(self, layout: Layout) -> bool:
        pixels = at.picture_bytes(self.format, self.width, self.height) if self.format else 0
        sound = self._audio_bytes % 4 == 0 and self._audio_bytes <= layout.audio_bytes
        return self._frame_bytes == pixels <= layout.frame_bytes and bool(pixels) == bool(self.format) and sound

    @property
    def frame(self) -> NDArray[np.uint8]:
        return self._reader.window(self, self._offset + at.SLOT_HEADER_BYTES, self._frame_bytes, "|u1")

    @property
    def audio(self) -> NDArray[np.float32]:
        return self._reader.window(self, self._offset + self._reader._layout.audio_offset, self._audio_bytes, "<f4")

    def __del__(self) -> None:
        self._reader.give_back(self._position % self._reader.slots, self._position)
