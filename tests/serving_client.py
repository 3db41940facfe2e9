"""A client of `liverelay serve` in a few lines of Python, for tests: the C library's counterpart."""

from __future__ import annotations

import io
import socket
from pathlib import Path

import numpy as np

from liverelay.engine.errors import RingClosedError
from liverelay.engine.frame_ring import FrameRing, RingFrame
from liverelay.engine.serving import sockets
from liverelay.engine.serving.protocol import REPLY, Fields, Kind, Tag, encode

Numbers = np.random.Generator


class RefusedError(Exception):
    """An answer with an error: code, text."""


def picture(numbers: Numbers) -> np.ndarray:
    return numbers.integers(0, 256, (64, 64, 3), dtype=np.uint8)


def sound(numbers: Numbers, samples: int) -> np.ndarray:
    return (0.1 * numbers.standard_normal(samples)).astype(np.float32)


def png(pixels: np.ndarray) -> bytes:
    """A picture file of uint8 [H, W, 3]."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def request(image: bytes, /, **changed: object) -> Fields:
    """Fields of OPEN: a video of 64x64."""
    fields: Fields = {
        Tag.IMAGE: image, Tag.PROMPT: "Hi.", Tag.WIDTH: 64, Tag.HEIGHT: 64, Tag.MAX_AREA: 0, Tag.SEED: 5,
        Tag.STREAM: 0, Tag.PIXELS: 1, Tag.POLICY: 0, Tag.SLOTS: 8, Tag.IDLE: 0,
    }  # fmt: skip
    return fields | {Tag[name.upper()]: value for name, value in changed.items()}  # type: ignore[return-value]


class ServingClient:
    """One connection; `opened` joins the rings of its session."""

    def __init__(self, path: Path) -> None:
        self.socket, self._serial = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), 0
        self.socket.connect(str(path))

    def ask(self, kind: Kind, fields: Fields | None = None) -> Fields:
        """The answer's fields; RefusedError for an error."""
        self._serial += 1
        sockets.send(self.socket, encode(kind, self._serial, fields or {}))
        return self.answer(self._serial)

    def answer(self, serial: int) -> Fields:
        """The next answer, which must be of this number."""
        head, fields = sockets.receive(self.socket, first_within=60, reply=True)
        if head.kind == Kind.ERROR | REPLY:
            raise RefusedError(fields[Tag.CODE], fields[Tag.TEXT])
        assert head.serial == serial
        return fields

    def open(self, kind: Kind, fields: Fields) -> Fields:
        """A session, whose rings are `frames` and `sound`."""
        reply = self.ask(kind, fields)
        self.sound = FrameRing.attach(str(reply[Tag.SOUND]), "writer")
        self.frames = FrameRing.attach(str(reply[Tag.FRAMES]))
        return reply

    def push(self, samples: np.ndarray, rate: int = 16000) -> None:
        """float32 [n]."""
        for start in range(0, len(samples), 4096):
            assert self.sound.push(None, samples[start : start + 4096], sample_rate=rate, timeout=60)

    def pop(self) -> RingFrame:
        """The next frame, which must come within a minute."""
        frame = self.frames.pop(60)
        assert frame is not None
        return frame

    def rest(self) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Numbers, pictures and sound of all frames until the end."""
        numbers, pictures, sound = [], [np.empty((0, 64, 64, 3), np.uint8)], [np.empty(0, np.float32)]
        while True:
            try:
                frame = self.pop()
            except RingClosedError:
                return numbers, np.concatenate(pictures), np.concatenate(sound)
            assert frame.frame is not None and frame.pts_ns == frame.index * 40_000_000
            numbers.append(frame.index)
            pictures.append(frame.frame.copy()[None])
            sound.append(frame.audio.copy())
            del frame

    def close(self) -> None:
        """End the connection, as a process that dies would."""
        self.socket.close()
