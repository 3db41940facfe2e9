"""One client of a server: its requests, one after the other, and its session. Its end is the end of the session."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from liverelay.engine.errors import BusyError, InputError, LiveRelayError, OutputError, RingError
from liverelay.engine.frame_ring import PixelFormat, Policy
from liverelay.engine.models.audio import SAMPLE_RATE
from liverelay.engine.models.image import decode_image
from liverelay.engine.serving import sockets
from liverelay.engine.serving.protocol import REPLY, Code, Fields, Kind, ProtocolError, Tag, encode
from liverelay.engine.serving.worker import FAILED, Output, StateError, Worker
from liverelay.engine.session import Session

if TYPE_CHECKING:
    from liverelay.engine.serving.server import Server

FIRST_S = 10.0  # a connection that says nothing is closed
PIXELS: dict[int, PixelFormat] = {1: "rgb24", 2: "nv12"}
POLICIES: dict[int, Policy] = {0: "block", 1: "drop_oldest"}


class Connection:
    """Runs in a thread of its own until the client closes, breaks the protocol, or the server stops it."""

    def __init__(self, server: Server, connection: socket.socket) -> None:
        self._server, self._socket = server, connection
        self._worker: Worker | None = None
        self._answers: dict[int, Callable[[Fields], Fields]] = {
            Kind.HEALTH: self._health, Kind.OPEN: self._open, Kind.RESUME: self._resume,
            Kind.INTERRUPT: self._interrupt, Kind.SNAPSHOT: self._snapshot, Kind.FORGET: self._forget,
            Kind.CLOSE: self._close,
        }  # fmt: skip

    def run(self) -> None:
        """Answer until the end."""
        first_within: float | None = FIRST_S
        try:
            while True:
                head, fields = sockets.receive(self._socket, first_within=first_within)
                first_within = None
                sockets.send(self._socket, self._reply(head.kind, head.serial, fields))
                if self._worker is not None:
                    self._worker.begin()
        except ProtocolError as error:
            self.refuse(error.code, str(error))
        except sockets.Disconnected:
            pass
        finally:
            self._end_session()
            self._socket.close()

    def close(self) -> None:
        """Hang up, instead of `run`."""
        self._socket.close()

    def stop(self) -> None:
        """End it from another thread."""
        if self._worker is not None:
            self._worker.stop()
        with contextlib.suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)

    def refuse(self, code: Code, text: str) -> None:
        """Say why the connection ends."""
        with contextlib.suppress(sockets.Disconnected):
            sockets.send(self._socket, encode(Kind.ERROR | REPLY, 0, {Tag.CODE: code, Tag.TEXT: text}))

    def _reply(self, kind: int, serial: int, fields: Fields) -> bytes:
        try:
            return encode(kind | REPLY, serial, self._answers[kind](fields))
        except (LiveRelayError, MemoryError, RuntimeError, OSError) as error:
            text = " ".join(str(error).split())[:1000] or type(error).__name__
            if not isinstance(error, LiveRelayError):
                self._server.say(f"{Kind(kind).name}: {type(error).__name__}: {text}")
            return encode(Kind.ERROR | REPLY, serial, {Tag.CODE: _code(error), Tag.TEXT: text})

    # -- requests --------------------------------------------------------------------------------------------------

    def _health(self, _: Fields) -> Fields:
        server, worker, now = self._server, self._worker, time.monotonic()
        facts: Fields = {
            Tag.STATE: 0, Tag.SESSIONS: server.sessions, Tag.PLACES: server.engine.sessions, Tag.MADE: 0,
            Tag.DROPPED: 0, Tag.HEARD: 0, Tag.BUSY_MS: 0, Tag.UPTIME_MS: round((now - server.started) * 1000),
        }  # fmt: skip
        if worker is not None:
            since = worker.busy_since
            facts |= {
                Tag.STATE: worker.state, Tag.MADE: worker.made, Tag.DROPPED: worker.frames.dropped,
                Tag.HEARD: worker.heard, Tag.BUSY_MS: round((now - since) * 1000) if since else 0,
            }  # fmt: skip
            if worker.state == FAILED:
                facts |= {Tag.CODE: worker.fault[0], Tag.TEXT: " ".join(worker.fault[1].split())[:1000]}
        return facts

    def _open(self, fields: Fields) -> Fields:
        def session() -> Session:
            size, area = (_int(fields, Tag.WIDTH), _int(fields, Tag.HEIGHT)), _int(fields, Tag.MAX_AREA)
            most, image = self._server.max_area, fields[Tag.IMAGE]
            if size[0] * size[1] > most:
                raise InputError(f"{size[0]}x{size[1]} is more than the {most} pixels that this server allows")
            assert isinstance(image, bytes)
            return self._server.engine.open(
                decode_image(image), str(fields[Tag.PROMPT]), size=size if any(size) else None,
                max_area=min(area or most, most), seed=_int(fields, Tag.SEED), session_id=_int(fields, Tag.STREAM),
            )  # fmt: skip

        return self._begin(session, fields, 0)

    def _resume(self, fields: Fields) -> Fields:
        snapshot = self._server.states.get(str(fields[Tag.TOKEN]))
        rate = snapshot.facts["track"].get("rate") or 0
        return self._begin(lambda: self._server.engine.resume(snapshot), fields, rate)

    def _begin(self, make: Callable[[], Session], fields: Fields, sound_rate: int) -> Fields:
        if self._worker is not None:
            raise StateError("this connection has a session already; open another connection")
        self._server.take_place()
        session: Session | None = None
        try:
            session = make()
            output = Output(
                PIXELS[_int(fields, Tag.PIXELS)], POLICIES[_int(fields, Tag.POLICY)], _int(fields, Tag.SLOTS),
                bool(fields[Tag.IDLE]),
            )  # fmt: skip
            worker = self._worker = Worker(session, output, self._server.states)
        except BaseException:
            if session is not None:
                session.close()
            self._server.give_place()
            raise
        return {
            Tag.FRAMES: worker.frames.name, Tag.SOUND: worker.sound.name, Tag.WIDTH: worker.size[0],
            Tag.HEIGHT: worker.size[1], Tag.FPS: worker.fps, Tag.SAMPLE_RATE: SAMPLE_RATE, Tag.SOUND_RATE: sound_rate,
            Tag.NEXT_FRAME: worker.next_frame, **{tag: fields[tag] for tag in (Tag.PIXELS, Tag.POLICY, Tag.SLOTS)},
        }  # fmt: skip

    def _interrupt(self, _: Fields) -> Fields:
        return {Tag.NEXT_FRAME: self._own().interrupt()}

    def _snapshot(self, _: Fields) -> Fields:
        token, frame = self._own().snapshot()
        return {Tag.TOKEN: token, Tag.NEXT_FRAME: frame}

    def _forget(self, fields: Fields) -> Fields:
        self._server.states.forget(str(fields[Tag.TOKEN]))
        return {}

    def _close(self, _: Fields) -> Fields:
        self._end_session()
        return {}

    def _own(self) -> Worker:
        if self._worker is None:
            raise StateError("this connection has no session")
        return self._worker

    def _end_session(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()
            worker.join()
            self._server.give_place()
            if worker.state == FAILED and worker.fault[0] == Code.ENGINE:
                self._server.say("a session failed: " + " ".join(worker.fault[1].split()))


def _int(fields: Fields, tag: Tag) -> int:
    value = fields[tag]
    assert isinstance(value, int)
    return value


def _code(error: BaseException) -> Code:
    if isinstance(error, BusyError):
        return Code.BUSY
    if isinstance(error, StateError):
        return Code.STATE
    if isinstance(error, InputError):
        return Code.INPUT
    engine = isinstance(error, LiveRelayError) and not isinstance(error, OutputError | RingError)
    return Code.ENGINE if engine else Code.SYSTEM
