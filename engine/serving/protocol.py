"""What is said over the control socket of `liverelay serve` (csrc/control.h is the same in C++). Data goes by rings.

A message is a header of 16 bytes (magic, version, kind, serial, bytes that follow) and fields (tag, zero, bytes,
value), all little-endian. Integers are signed, of 8 bytes; texts are UTF-8. Each request gets one reply with its serial
number: its own kind with REPLY set, or ERROR. Serial 0 is an error of the whole connection, which ends it. Everything
has a limit that is known before anything is read; unknown, doubled and missing fields are refused.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from liverelay.engine.errors import LiveRelayError

MAGIC, VERSION = b"LRLC", 1
HEADER, FIELD, INTEGER = struct.Struct("<4sHHII"), struct.Struct("<HHI"), struct.Struct("<q")
REPLY = 0x8000  # set in the kind of an answer
IMAGE_BYTES, TEXT_BYTES = 32 << 20, 64 << 10


class Code(IntEnum):
    """Error codes, those of csrc/include/liverelay.h."""

    ARGUMENT = -1
    VERSION = -3
    LOST = -5
    INPUT = -6
    BUSY = -7
    STATE = -8
    ENGINE = -9
    PROTOCOL = -10
    SYSTEM = -11


class Kind(IntEnum):
    HEALTH = 1
    OPEN = 2
    RESUME = 3
    INTERRUPT = 4
    SNAPSHOT = 5
    FORGET = 6
    CLOSE = 7
    ERROR = 0x7FFF


class Tag(IntEnum):
    TEXT = 1
    CODE = 2
    IMAGE = 3  # a whole picture file
    PROMPT = 4
    WIDTH = 5
    HEIGHT = 6
    MAX_AREA = 7
    SEED = 8
    STREAM = 9  # with the seed the key of all randomness
    PIXELS = 10  # 1 rgb24, 2 nv12 (BT.709, limited range)
    POLICY = 11  # 0 block, 1 drop the oldest
    SLOTS = 12
    IDLE = 13
    TOKEN = 14
    FRAMES = 15  # names of the two rings
    SOUND = 16
    FPS = 17
    SAMPLE_RATE = 18
    SOUND_RATE = 19  # of the sound that the session has been given, 0 before there was any
    NEXT_FRAME = 20
    STATE = 21  # 0 no session, 1 runs, 2 ended, 3 failed
    SESSIONS = 22
    PLACES = 23
    MADE = 24
    DROPPED = 25
    HEARD = 26  # samples at 16 kHz
    BUSY_MS = 27  # how long the block under way has taken until now
    UPTIME_MS = 28


ANY = (-(1 << 63), (1 << 63) - 1)
COUNT = (0, (1 << 63) - 1)
INTEGERS: dict[Tag, tuple[int, int]] = {
    Tag.CODE: (min(Code), -1), Tag.WIDTH: (0, 16384), Tag.HEIGHT: (0, 16384), Tag.MAX_AREA: (0, 1 << 28), Tag.SEED: ANY,
    Tag.STREAM: ANY, Tag.PIXELS: (1, 2), Tag.POLICY: (0, 1), Tag.SLOTS: (2, 256), Tag.IDLE: (0, 1),
    Tag.FPS: (1, 1000), Tag.SAMPLE_RATE: (1000, 384000), Tag.SOUND_RATE: (0, 384000), Tag.NEXT_FRAME: COUNT,
    Tag.STATE: (0, 3), Tag.SESSIONS: COUNT, Tag.PLACES: COUNT, Tag.MADE: COUNT, Tag.DROPPED: COUNT, Tag.HEARD: COUNT,
    Tag.BUSY_MS: COUNT, Tag.UPTIME_MS: COUNT,
}  # fmt: skip
BYTES: dict[Tag, tuple[int, int]] = {Tag.IMAGE: (1, IMAGE_BYTES)}
TEXTS: dict[Tag, tuple[int, int]] = {
    Tag.TEXT: (0, 4096), Tag.PROMPT: (0, TEXT_BYTES), Tag.TOKEN: (32, 32), Tag.FRAMES: (1, 64), Tag.SOUND: (1, 64),
}  # fmt: skip

OUTPUT = (Tag.PIXELS, Tag.POLICY, Tag.SLOTS, Tag.IDLE)
OPENED = (
    Tag.FRAMES, Tag.SOUND, Tag.WIDTH, Tag.HEIGHT, Tag.FPS, Tag.SAMPLE_RATE, Tag.SOUND_RATE, Tag.NEXT_FRAME, *OUTPUT[:3],
)  # fmt: skip
# The fields of each kind of message; all of them are there, in any order, but for those in OPTIONAL.
MESSAGES: dict[int, tuple[Tag, ...]] = {
    Kind.HEALTH: (),
    Kind.OPEN: (
        Tag.IMAGE, Tag.PROMPT, Tag.WIDTH, Tag.HEIGHT, Tag.MAX_AREA, Tag.SEED, Tag.STREAM, *OUTPUT,
    ),
    Kind.RESUME: (Tag.TOKEN, *OUTPUT),
    Kind.INTERRUPT: (),
    Kind.SNAPSHOT: (),
    Kind.FORGET: (Tag.TOKEN,),
    Kind.CLOSE: (),
    Kind.HEALTH | REPLY: (
        Tag.STATE, Tag.SESSIONS, Tag.PLACES, Tag.MADE, Tag.DROPPED, Tag.HEARD, Tag.BUSY_MS, Tag.UPTIME_MS, Tag.CODE,
        Tag.TEXT,
    ),
    Kind.OPEN | REPLY: OPENED,
    Kind.RESUME | REPLY: OPENED,
    Kind.INTERRUPT | REPLY: (Tag.NEXT_FRAME,),
    Kind.SNAPSHOT | REPLY: (Tag.TOKEN, Tag.NEXT_FRAME),
    Kind.FORGET | REPLY: (),
    Kind.CLOSE | REPLY: (),
    Kind.ERROR | REPLY: (Tag.CODE, Tag.TEXT),
}  # fmt: skip
OPTIONAL: dict[int, frozenset[Tag]] = {Kind.HEALTH | REPLY: frozenset({Tag.CODE, Tag.TEXT})}

Fields = dict[Tag, int | str | bytes]


class ProtocolError(LiveRelayError):
    """The other side does not speak this protocol, or not this version of it."""

    def __init__(self, text: str, code: Code = Code.PROTOCOL) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Head:
    """The header of a message; length: bytes of its fields."""

    kind: int
    serial: int
    length: int

    @classmethod
    def parse(cls, text: bytes, *, reply: bool = False) -> Head:
        """ProtocolError for another protocol or version, an unknown kind, or more bytes than the kind can have."""
        magic, version, kind, serial, length = HEADER.unpack(text)
        if magic != MAGIC:
            raise ProtocolError("that is not liverelay's control protocol")
        if version != VERSION:
            raise ProtocolError(
                f"the other side speaks version {version} of the control protocol, this one {VERSION}; "
                "use the same version of liverelay on both",
                Code.VERSION,
            )
        if kind not in MESSAGES or bool(kind & REPLY) != reply:
            raise ProtocolError(f"{kind} is no kind of message that is expected here")
        if length > longest(kind):
            raise ProtocolError(f"a message of {length} bytes is longer than {Kind(kind & ~REPLY).name} can be")
        return cls(kind, serial, length)


def longest(kind: int) -> int:
    """Bytes that the fields of a message can have."""
    return sum(FIELD.size + (BYTES | TEXTS).get(tag, (0, INTEGER.size))[1] for tag in MESSAGES[kind])


def encode(kind: int, serial: int, fields: Mapping[Tag, int | str | bytes]) -> bytes:
    """A whole message."""
    parts = []
    for tag, value in fields.items():
        if isinstance(value, int):
            value = INTEGER.pack(value)
        text = value.encode() if isinstance(value, str) else value
        parts += [FIELD.pack(tag, 0, len(text)), text]
    length = sum(map(len, parts))
    return b"".join([HEADER.pack(MAGIC, VERSION, kind, serial, length), *parts])


def decode(kind: int, payload: bytes) -> Fields:
    """The fields of a message, all within their limits. ProtocolError otherwise."""
    fields: Fields = {}
    at, expected = 0, MESSAGES[kind]
    while at < len(payload):
        if len(payload) - at < FIELD.size:
            raise ProtocolError("the message ends within a field")
        tag, zero, size = FIELD.unpack_from(payload, at)
        at += FIELD.size
        if tag not in expected or tag in fields or zero:
            raise ProtocolError(f"field {tag} is unknown, doubled or misplaced in {Kind(kind & ~REPLY).name}")
        if size > len(payload) - at:
            raise ProtocolError("the message ends within a field")
        fields[Tag(tag)] = _value(Tag(tag), payload[at : at + size])
        at += size
    missing = set(expected) - fields.keys() - OPTIONAL.get(kind, frozenset())
    if missing:
        raise ProtocolError(f"{Kind(kind & ~REPLY).name} lacks {', '.join(sorted(tag.name for tag in missing))}")
    return fields


def _value(tag: Tag, text: bytes) -> int | str | bytes:
    if tag in INTEGERS:
        if len(text) != INTEGER.size:
            raise ProtocolError(f"{tag.name} is no integer of {INTEGER.size} bytes")
        number: int = INTEGER.unpack(text)[0]
        low, high = INTEGERS[tag]
        if not low <= number <= high:
            raise ProtocolError(f"{tag.name} is {number}, not within {low}..{high}")
        return number
    low, high = (BYTES | TEXTS)[tag]
    if not low <= len(text) <= high:
        raise ProtocolError(f"{tag.name} has {len(text)} bytes, not {low}..{high}")
    if tag in BYTES:
        return text
    try:
        decoded = text.decode()
    except UnicodeDecodeError:
        raise ProtocolError(f"{tag.name} is not UTF-8", Code.INPUT) from None
    if "\0" in decoded:
        raise ProtocolError(f"{tag.name} holds a zero byte")
    return decoded
