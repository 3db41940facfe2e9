"""What lies where in a frame ring's shared memory (csrc/ring_segment.h is the same in C++), checked and swept.

    0     Layout   128 bytes that never change
    128   claims (who writes, who reads), heartbeats, counters
    4096  slots    slot_stride apart: word, metadata (at 64), pixels (at 128), sound (at audio_offset)

Segments lie in /dev/shm, mode 0600, under names of our making. Whatever is read from one is checked before use. Same
user, same trust: a process of the same user could still cut a mapped file short, which POSIX offers nothing against.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from liverelay.engine.errors import RingError

FOLDER = Path("/dev/shm")
NAME = re.compile(r"liverelay-ring-[0-9a-f]{16}")
MAGIC, ABI = int.from_bytes(b"LRLYRING", "little"), 1
STATIC = struct.Struct("<Q2IQ2I9Q16xQ")
STATIC_BYTES, HEADER_BYTES, SLOT_HEADER_BYTES = 128, 4096, 128
# Offsets in the header, and of the metadata in a slot.
WRITER_CLAIM, WRITER_BEAT, HEAD, PUSHED, DROPPED, CLOSED = 128, 136, 144, 152, 160, 168
READER_CLAIM, READER_BEAT = 256, 264
META = struct.Struct("<QQqQ6I8x")  # sequence, index, pts_ns, pushed_ns, width, height, format, bytes, bytes, rate
META_OFFSET = 64
FREE, WRITING, FULL, HELD = range(4)  # the state is the low two bits of a slot's word, the position the rest
NO_FRAME, RGB24, NV12 = range(3)  # NV12: BT.709, limited range
SLOTS, MAX_SIDE, MAX_FRAME, MAX_AUDIO, MAX_TOTAL = (2, 1024), 16384, 1 << 28, 1 << 24, 1 << 33
START_BITS = 42
UNFINISHED_S = 60.0  # a segment without a valid header may still be in the making


def picture_bytes(pixel_format: int, width: int, height: int) -> int:
    """Bytes of a picture; 0 where format and sides do not fit together."""
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        return 0
    if pixel_format == RGB24:
        return width * height * 3
    return width * height // 2 * 3 if pixel_format == NV12 and width % 2 == height % 2 == 0 else 0


def checksum(text: bytes) -> int:
    """FNV-1a, 64 bits."""
    value = 0xCBF29CE484222325
    for byte in text:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


@dataclass(frozen=True)
class Layout:
    """The header that never changes. file_lock: made by the Python twin, whose lock the compiled module ignores."""

    slots: int
    frame_bytes: int
    audio_bytes: int
    drop_oldest: bool
    file_lock: bool
    created_ns: int = 0
    creator: int = 0
    pid_namespace: int = 0

    def __post_init__(self) -> None:
        if not SLOTS[0] <= self.slots <= SLOTS[1]:
            raise RingError(f"a ring has {SLOTS[0]} to {SLOTS[1]} slots")
        if self.frame_bytes > MAX_FRAME or self.audio_bytes > MAX_AUDIO or self.audio_bytes % 4:
            raise RingError("a slot holds at most 256 MiB of pixels and 16 MiB of sound, in whole float32 samples")
        if not self.frame_bytes + self.audio_bytes:
            raise RingError("a slot needs room for pixels or sound")
        if self.total_bytes > MAX_TOTAL:
            raise RingError("a ring has at most 8 GiB; use fewer slots")

    @property
    def audio_offset(self) -> int:
        return SLOT_HEADER_BYTES + -(-self.frame_bytes // 64) * 64

    @property
    def slot_stride(self) -> int:
        return -(-(self.audio_offset + self.audio_bytes) // 4096) * 4096

    @property
    def total_bytes(self) -> int:
        return HEADER_BYTES + self.slots * self.slot_stride

    def slot(self, index: int) -> int:
        return HEADER_BYTES + index * self.slot_stride

    def pack(self) -> bytes:
        fields = (
            MAGIC, ABI, self.file_lock, self.total_bytes, self.slots, self.drop_oldest, HEADER_BYTES, self.slot_stride,
            SLOT_HEADER_BYTES, self.frame_bytes, self.audio_offset, self.audio_bytes, self.created_ns, self.creator,
            self.pid_namespace,
        )  # fmt: skip
        text = STATIC.pack(*fields, 0)[:-8]
        return text + checksum(text).to_bytes(8, "little")

    @classmethod
    def parse(cls, text: bytes, file_bytes: int, name: str) -> Layout:
        """RingError unless every field fits the others and the file. `text`: a private copy of the first bytes."""
        if len(text) < STATIC_BYTES:
            raise RingError(f"ring {name} is damaged (shorter than its header)")
        text = text[:STATIC_BYTES]
        (magic, abi, file_lock, _, slots, drop, _, _, _, frame, _, audio, *origin, total) = STATIC.unpack(text)
        if magic != MAGIC:
            raise RingError(f"ring {name} is no frame ring or is damaged (magic number)")
        if abi != ABI:
            raise RingError(f"ring {name} has layout {abi}, this program knows {ABI}; use one version on both sides")
        if total != checksum(text[:-8]):
            raise RingError(f"ring {name} is damaged (checksum of its header)")
        try:
            layout = cls(slots, frame, audio, bool(drop), bool(file_lock), *origin)
        except RingError as error:
            raise RingError(f"ring {name} is damaged ({error})") from None
        if layout.pack() != text or layout.total_bytes != file_bytes:
            raise RingError(f"ring {name} is damaged (its sizes and offsets do not fit)")
        return layout


def open_checked(name: str) -> int:
    """Descriptor of a segment that is this user's alone. RingError otherwise."""
    if not NAME.fullmatch(name):
        raise RingError("that is no name of a ring; give the name that FrameRing.create made")
    try:
        descriptor = os.open(FOLDER / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise RingError(f"there is no ring {name}; whoever made it has closed it") from None
    except OSError as error:
        raise RingError(f"cannot open ring {name}: {error.strerror}") from None
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o177:
        os.close(descriptor)
        raise RingError(f"ring {name} is not this user's own (owner and mode 0600)")
    return descriptor


def pid_namespace() -> int:
    """Number of this process's PID namespace; 0 where it cannot be told."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def identity() -> int:
    """Of this process: its pid (22 bits) and start time (42 bits), so that a pid used again is seen."""
    start = _start_time(os.getpid())
    if not start:
        raise RingError("a frame ring needs /proc to tell live processes from dead ones")
    return os.getpid() << START_BITS | start


def alive(who: int) -> bool:
    """Whether the process of that identity lives; a zombie does not."""
    start = who & (1 << START_BITS) - 1
    return bool(start) and _start_time(who >> START_BITS) == start


def _start_time(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
        return 0 if fields[0] in (b"Z", b"X", b"x") else int(fields[19]) & (1 << START_BITS) - 1
    except (OSError, IndexError, ValueError):
        return 0


def sweep() -> list[str]:
    """Remove the segments of this user whose maker, writer and reader are all dead; their names. Live ones stay.

    So do those of other PID namespaces, whose processes cannot be seen, and for a minute what has no valid header yet.
    """
    removed = []
    for path in sorted(FOLDER.glob("liverelay-ring-*")) if FOLDER.is_dir() else []:
        with suppress(RingError, OSError):
            descriptor = open_checked(path.name)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody takes a role meanwhile
                if _is_stale(descriptor, path.name):
                    path.unlink()
                    removed.append(path.name)
            finally:
                os.close(descriptor)
    return removed


def _is_stale(descriptor: int, name: str) -> bool:
    info, header = os.fstat(descriptor), os.pread(descriptor, HEADER_BYTES, 0)
    try:
        layout = Layout.parse(header, info.st_size, name)
    except RingError:
        return time.time() - info.st_mtime > UNFINISHED_S
    claims = (struct.unpack_from("<Q", header, at)[0] for at in (WRITER_CLAIM, READER_CLAIM))
    return layout.pid_namespace == pid_namespace() and not any(map(alive, (layout.creator, *claims)))
