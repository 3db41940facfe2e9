"""The control protocol: whatever comes over the socket is refused, and the server goes on serving others."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from liverelay.engine import native
from liverelay.engine.frame_ring import FrameRing
from liverelay.engine.frame_ring_layout import FOLDER
from liverelay.engine.serving import sockets
from liverelay.engine.serving.protocol import (
    BYTES,
    FIELD,
    HEADER,
    INTEGERS,
    MAGIC,
    MESSAGES,
    OPTIONAL,
    REPLY,
    TEXTS,
    VERSION,
    Code,
    Fields,
    Head,
    Kind,
    ProtocolError,
    Tag,
    decode,
    encode,
    longest,
)
from liverelay.engine.serving.server import Server
from tests.native_build import build_program, run
from tests.serving_client import RefusedError, ServingClient, request

Random = random.Random


@pytest.fixture
def rnd(seed: int) -> Random:
    return Random(seed)


class Refuser:
    """An engine without a model: a session cannot be opened, all else is real."""

    sessions = 2

    def open(self, *_: object, **__: object) -> None:
        raise RuntimeError("there is no model")

    def close(self) -> None:
        """Nothing to end."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(Refuser(), tmp_path_factory.mktemp("control") / "s")  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.close()
    thread.join(10)
    assert not thread.is_alive()


def some(rnd: Random, tag: Tag) -> int | str | bytes:
    if tag in INTEGERS:
        return rnd.randint(*INTEGERS[tag])
    low, high = (BYTES | TEXTS)[tag]
    size = rnd.randint(low, min(high, 300))
    return rnd.randbytes(size) if tag in BYTES else "".join(rnd.choice("abc.0") for _ in range(size))


def fields_of(rnd: Random, kind: int) -> Fields:
    tags = [tag for tag in MESSAGES[kind] if tag not in OPTIONAL.get(kind, ()) or rnd.random() < 0.5]
    return {tag: some(rnd, tag) for tag in rnd.sample(tags, len(tags))}


def test_every_message_comes_out_as_it_went_in(rnd: Random) -> None:
    assert {tag for tags in MESSAGES.values() for tag in tags} == set(Tag) == {*INTEGERS, *BYTES, *TEXTS}
    for kind in MESSAGES:
        fields, serial = fields_of(rnd, kind), rnd.randrange(1 << 32)
        message = encode(kind, serial, fields)
        head = Head.parse(message[: HEADER.size], reply=bool(kind & REPLY))
        assert head == Head(kind, serial, len(message) - HEADER.size) and head.length <= longest(kind)
        assert decode(kind, message[HEADER.size :]) == fields


def wrong_messages(rnd: Random) -> Iterator[bytes]:
    """One of each kind of damage to a request."""
    kind = rnd.choice([kind for kind in MESSAGES if not kind & REPLY])
    fields = fields_of(rnd, kind)
    whole = encode(kind, 1, fields)
    yield HEADER.pack(b"HTTP", VERSION, kind, 1, 0)
    yield HEADER.pack(MAGIC, rnd.choice([0, 2, 65535]), kind, 1, 0)
    yield HEADER.pack(MAGIC, VERSION, rnd.choice([0, 99, kind | REPLY, Kind.ERROR, 65535]), 1, 0)
    yield HEADER.pack(MAGIC, VERSION, kind, 1, rnd.randint(longest(kind) + 1, (1 << 32) - 1))
    yield rnd.randbytes(rnd.randint(16, 400))
    if not fields:
        return
    tag, value = next(iter(fields.items()))
    one = encode(kind, 1, {tag: value})[HEADER.size :]
    yield headed(kind, whole[HEADER.size :][: -rnd.randint(1, 4)])  # ends within a field
    if len(fields) > 1:
        yield headed(kind, one)  # lacks the others
    yield headed(kind, whole[HEADER.size :] + one)
    yield headed(kind, FIELD.pack(tag, 1, 0) + whole[HEADER.size + FIELD.size :])
    yield headed(kind, FIELD.pack(tag, 0, (1 << 32) - 1) + b"x")
    yield headed(kind, FIELD.pack(99, 0, 0) + whole[HEADER.size :])


def headed(kind: int, payload: bytes) -> bytes:
    return HEADER.pack(MAGIC, VERSION, kind, 1, len(payload)) + payload


def test_damaged_requests_are_refused_with_a_reason(server: Server, rnd: Random) -> None:
    for _ in range(20):
        for message in wrong_messages(rnd):
            client = ServingClient(server.path)
            client.socket.sendall(message)
            with pytest.raises(RefusedError) as refused:
                client.answer(0)
            version = struct.unpack_from("<H", message, 4)[0]
            ours = message[:4] == MAGIC
            assert refused.value.args[0] == (Code.VERSION if ours and version != VERSION else Code.PROTOCOL), message
            with pytest.raises(sockets.Disconnected):
                client.answer(0)
            client.close()


@pytest.mark.parametrize(
    ("tag", "value", "text"),
    [
        (Tag.WIDTH, -1, "not within"),
        (Tag.PIXELS, 3, "not within"),
        (Tag.SLOTS, 1 << 40, "not within"),
        (Tag.WIDTH, b"1234", "no integer"),
        (Tag.PROMPT, b"\xff\xfe", "not UTF-8"),
        (Tag.PROMPT, "a\0b", "zero byte"),
        (Tag.IMAGE, b"", "0 bytes"),
        (Tag.PROMPT, "x" * ((64 << 10) + 1), "65537 bytes"),
    ],
)
def test_a_field_out_of_bounds_is_named(tag: Tag, value: int | str | bytes, text: str) -> None:
    with pytest.raises(ProtocolError, match=f"{tag.name} .*{text}"):
        decode(Kind.OPEN, encode(Kind.OPEN, 1, request(b"x") | {tag: value})[HEADER.size :])


def mutated(rnd: Random, message: bytes) -> bytes:
    """A message with random damage."""
    spoilt = bytearray(message)
    for _ in range(rnd.randint(1, 4)):
        kind = rnd.randrange(5)
        at = rnd.randrange(len(spoilt)) if spoilt else 0
        if kind == 0 and spoilt:
            spoilt[at] ^= 1 << rnd.randrange(8)
        elif kind == 1:
            del spoilt[at:]
        elif kind == 2:
            spoilt[at:at] = rnd.randbytes(rnd.randint(1, 20))
        elif kind == 3:
            del spoilt[at : at + rnd.randint(1, 8)]
        elif len(spoilt) >= 16:
            struct.pack_into("<I", spoilt, rnd.choice([12, at // 4 * 4 if at + 4 <= len(spoilt) else 12]), rnd.choice(
                [0, 1, 0x7FFFFFFF, 0xFFFFFFFF, rnd.randrange(1 << 32)]))  # fmt: skip
    return bytes(spoilt)


def test_random_damage_never_stops_the_server(server: Server, rnd: Random) -> None:
    witness = ServingClient(server.path)
    kinds = [kind for kind in MESSAGES if not kind & REPLY]
    for round_ in range(400):
        client = ServingClient(server.path)
        stream = b"".join(encode(k, 1, fields_of(rnd, k)) for k in rnd.choices(kinds, k=rnd.randint(1, 3)))
        try:
            client.socket.sendall(mutated(rnd, stream))
            if rnd.random() < 0.7:
                client.socket.shutdown(socket.SHUT_WR)
                while client.socket.recv(1 << 16):
                    pass
        except OSError:
            pass  # it has closed already
        client.close()
        if round_ % 50 == 0:
            assert witness.ask(Kind.HEALTH)[Tag.STATE] == 0
    assert witness.ask(Kind.HEALTH)[Tag.SESSIONS] == 0
    with pytest.raises(RefusedError, match="no snapshot"):
        witness.ask(Kind.RESUME, {Tag.TOKEN: "a" * 32, Tag.PIXELS: 1, Tag.POLICY: 0, Tag.SLOTS: 2, Tag.IDLE: 0})
    with pytest.raises(RefusedError, match="no session"):
        witness.ask(Kind.SNAPSHOT)
    witness.close()


def test_a_server_that_closes_while_a_client_comes_ends(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, start = threading.Event(), threading.Thread.start

    def slowly(thread: threading.Thread) -> None:
        if thread.name == "client":
            started.set()
            time.sleep(0.2)
        start(thread)

    other = Server(server.engine, tmp_path / "s")
    accepting = threading.Thread(target=other.run)
    accepting.start()
    monkeypatch.setattr(threading.Thread, "start", slowly)
    client = ServingClient(other.path)
    assert started.wait(20)
    other.close()
    accepting.join(20)
    assert not accepting.is_alive()
    client.close()


def test_connections_that_say_nothing_are_bounded_and_closed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from liverelay.engine.serving import connection
    from liverelay.engine.serving import server as module

    monkeypatch.setattr(module, "CONNECTIONS", 3)
    monkeypatch.setattr(connection, "FIRST_S", 0.5)
    monkeypatch.setattr(sockets, "MESSAGE_S", 0.5)
    idle = [ServingClient(server.path) for _ in range(3)]
    idle[0].socket.sendall(MAGIC)  # begins a message and stops
    late = ServingClient(server.path)
    with pytest.raises(RefusedError, match="3 connections"):
        late.answer(0)
    for client in idle:
        with pytest.raises(sockets.Disconnected):
            client.answer(0)
    client = ServingClient(server.path)
    assert client.ask(Kind.HEALTH)[Tag.PLACES] == 2


def test_a_process_of_another_user_is_not_served() -> None:
    import os

    ours, theirs = socket.socketpair()
    assert sockets.peer_is_us(ours)
    fake = SimpleNamespace(getsockopt=lambda *_: struct.pack("3i", 1, os.geteuid() + 1, 1))
    assert not sockets.peer_is_us(fake)  # type: ignore[arg-type]
    ours.close()
    theirs.close()


# -- towards the client library ----------------------------------------------------------------------------------------


class LyingServer:
    """Answers as a server would, but often with damage; its rings are real, and sometimes not what they should be."""

    def __init__(self, path: Path, rnd: Random) -> None:
        self._rnd, self._rings = rnd, list[FrameRing]()
        self._listener = sockets.listen(path)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self.thread.join(20)
        assert not self.thread.is_alive()
        self._drop_rings()

    def _drop_rings(self) -> None:
        while self._rings:
            self._rings.pop().close()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            while True:
                try:
                    head, _ = sockets.receive(connection, first_within=20)
                    whole, reply = self._reply(head)
                    sockets.send(connection, reply)
                except (sockets.Disconnected, ProtocolError):
                    return
                # Half an answer is waited for, in most cases not for long.
                if head.kind == Kind.CLOSE or self._rnd.random() < (0.1 if whole == reply else 0.8):
                    return

    def _reply(self, head: Head) -> tuple[bytes, bytes]:
        """A right answer, and what is sent instead of it."""
        rnd, kind = self._rnd, head.kind
        fields = fields_of(rnd, kind | REPLY)
        if kind in (Kind.OPEN, Kind.RESUME) and rnd.random() < 0.9:
            fields |= self._new_rings()
        whole = encode(kind | REPLY, head.serial, fields)
        choice = rnd.random()
        if choice < 0.5:
            return whole, whole
        if choice < 0.6:
            return whole, encode(Kind.ERROR | REPLY, rnd.choice([0, head.serial]), fields_of(rnd, Kind.ERROR | REPLY))
        if choice < 0.65:
            return whole, encode(kind | REPLY, head.serial - 1, {}) + whole  # a late answer goes before
        if choice < 0.7:
            version = VERSION + rnd.randint(0, 1)
            return whole, HEADER.pack(MAGIC, version, kind | REPLY, head.serial, rnd.randrange(1 << 32))
        return whole, mutated(rnd, whole)

    def _new_rings(self) -> Fields:
        rnd, roles = self._rnd, [("frames", "writer"), ("sound", "reader")]
        self._drop_rings()
        for _, role in roles if rnd.random() < 0.9 else roles[::-1]:
            samples = rnd.choice([0, 1, 640])
            self._rings.append(FrameRing.create(frame_bytes=12288, audio_samples=samples, slots=2, role=role))  # type: ignore[arg-type]
        frames, sound = self._rings
        if frames.role == "writer":
            frames.push(np.zeros((64, 64, 3), np.uint8), index=rnd.randrange(1 << 60), timeout=0)
            if rnd.random() < 0.5:
                frames.close() if rnd.random() < 0.5 else damage(frames.name, rnd)
        return {Tag.FRAMES: frames.name, Tag.SOUND: sound.name}


def damage(name: str, rnd: Random) -> None:
    """Random bytes over a slot's header and metadata, or over the counters of the ring."""
    with open(FOLDER / name, "r+b") as file:
        file.seek(rnd.choice([128, 4096, 4096 + 64]) + rnd.randrange(64))
        file.write(rnd.randbytes(rnd.randint(1, 64)))


@pytest.mark.parametrize("rounds", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_client_library_survives_a_server_that_lies(tmp_path: Path, rnd: Random, rounds: int) -> None:
    if not hasattr(native.module(), "ring_create"):
        pytest.skip("the compiled module was not built")
    program = build_program(tmp_path, "client_test", "address")
    server = LyingServer(tmp_path / "s", rnd)
    picture = tmp_path / "picture"
    picture.write_bytes(b"anything")
    output = run(program, "fuzz", tmp_path / "s", picture, rounds, seconds=600)
    server.close()
    codes = {int(code): int(count) for code, count in (part.split(":") for part in output.split() if ":" in part)}
    assert min(codes) >= min(Code) and max(codes) <= 2, codes
    assert codes[0] > rounds / 2 and codes[int(Code.PROTOCOL)] > rounds / 10 and int(Code.VERSION) in codes, codes
