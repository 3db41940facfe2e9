"""`liverelay serve`: a client gets the frames of the engine's own session; snapshots, interrupts, refusals."""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from liverelay.engine import native
from liverelay.engine.config import StreamConfig
from liverelay.engine.engine import Engine
from liverelay.engine.errors import InputError, OutputError, RingClosedError, RingError
from liverelay.engine.frame_ring import FrameRing
from liverelay.engine.frame_ring_layout import FOLDER
from liverelay.engine.serving import sockets, worker
from liverelay.engine.serving.protocol import Code, Fields, Kind, Tag
from liverelay.engine.serving.server import Server
from liverelay.engine.serving.states import States
from liverelay.engine.session import Session
from liverelay.engine.stream import Chunk
from tests.colours import exact_nv12
from tests.serving_client import Numbers, RefusedError, ServingClient, picture, png, request, sound

for library in ("transformers", "PIL", "ftfy", "soxr"):
    pytest.importorskip(library)
if not hasattr(native.module(), "ring_create"):
    pytest.skip("the compiled module was not built", allow_module_level=True)
RATE, FRAME = 16000, 640
OUTPUT: Fields = {Tag.PIXELS: 1, Tag.POLICY: 0, Tag.SLOTS: 8, Tag.IDLE: 0}


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    before, stream = torch.get_num_threads(), StreamConfig(motion_pixel_frames=25)
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("serve")
    engine = Engine.load(checkpoint, device="cpu", dtype=torch.float32, stream=stream)
    engine.sessions = 3
    server = Server(engine, folder / "s", States(folder / "state", 2), max_area=128 * 128)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.close()
    thread.join(10)
    assert not thread.is_alive() and not (folder / "s").exists()
    torch.set_num_threads(before)


@pytest.fixture
def client(server: Server) -> Iterator[ServingClient]:
    client = ServingClient(server.path)
    yield client
    client.close()
    within(20, lambda: server.sessions == 0)


def within(seconds: float, holds: object) -> None:
    deadline = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_client_gets_what_the_engine_itself_would_give(
    server: Server, client: ServingClient, numbers: Numbers
) -> None:
    image, waveform = picture(numbers), sound(numbers, int(numbers.integers(RATE, 2 * RATE)))
    with server.engine.open(image, "Hi.", size=(64, 64), seed=5) as session:
        session.push_audio(waveform, RATE)
        session.end_audio()
        chunks = list(session.frames())
    opened = client.open(Kind.OPEN, request(png(image)))
    assert (opened[Tag.WIDTH], opened[Tag.HEIGHT], opened[Tag.FPS], opened[Tag.NEXT_FRAME]) == (64, 64, 25, 0)
    for piece in np.split(waveform, np.sort(numbers.integers(0, len(waveform), 9))):
        client.push(piece)
    client.sound.close()
    indices, frames, heard = client.rest()
    assert indices == list(range(len(frames))) and len(heard) == FRAME * len(frames)
    assert np.array_equal(frames, np.concatenate([chunk.frames for chunk in chunks]))
    assert np.array_equal(heard, np.concatenate([chunk.audio for chunk in chunks]))
    health = client.ask(Kind.HEALTH)
    assert (health[Tag.STATE], health[Tag.MADE], health[Tag.HEARD]) == (2, len(frames), len(waveform))
    with pytest.raises(RefusedError, match="has ended"):
        client.ask(Kind.INTERRUPT)
    client.ask(Kind.CLOSE)
    assert client.ask(Kind.HEALTH)[Tag.SESSIONS] == 0


def test_a_session_goes_on_from_a_token(server: Server, client: ServingClient, numbers: Numbers) -> None:
    client.open(Kind.OPEN, request(png(picture(numbers)), slots=64))
    first, second = sound(numbers, RATE), sound(numbers, RATE)
    client.push(first)
    client.pop()
    saved = client.ask(Kind.SNAPSHOT)
    token, frame = str(saved[Tag.TOKEN]), int(saved[Tag.NEXT_FRAME])
    assert 0 < frame <= 25
    assert stat.S_IMODE((server.path.parent / "state").stat().st_mode) == 0o700
    client.push(second)
    client.sound.close()
    indices, frames, heard = client.rest()
    assert indices == list(range(1, 50))
    client.ask(Kind.CLOSE)
    opened = client.open(Kind.RESUME, OUTPUT | {Tag.TOKEN: token})
    assert opened[Tag.NEXT_FRAME] == frame and opened[Tag.SOUND_RATE] == RATE
    client.push(second)
    client.sound.close()
    again, resumed, resumed_heard = client.rest()
    assert again == list(range(frame, 50))
    assert np.array_equal(resumed, frames[frame - 1 :]) and np.array_equal(resumed_heard, heard[FRAME * (frame - 1) :])
    assert States(server.path.parent / "state").get(token)  # another server of that folder has it too
    client.ask(Kind.FORGET, {Tag.TOKEN: token})
    client.ask(Kind.CLOSE)
    for wrong in (token, "0" * 32, "../" + "0" * 29):
        with pytest.raises(RefusedError, match="no snapshot"):
            client.ask(Kind.RESUME, OUTPUT | {Tag.TOKEN: wrong})


def test_sound_of_another_rate_is_all_heard(client: ServingClient, numbers: Numbers) -> None:
    rate, count = int(numbers.choice([8000, 44100, 48000])), int(numbers.integers(4000, 40000))
    client.open(Kind.OPEN, request(png(picture(numbers)), slots=64))
    for piece in np.split(sound(numbers, count), np.sort(numbers.integers(0, count, 9))):
        client.push(piece, rate)
    client.sound.close()
    indices = client.rest()[0]
    heard = int(client.ask(Kind.HEALTH)[Tag.HEARD])
    assert abs(heard - count * RATE / rate) <= 1 and len(indices) == -(-heard // FRAME)


def test_a_snapshot_that_cannot_be_kept_is_no_fault_of_the_engine(
    client: ServingClient, numbers: Numbers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(states: States, snapshot: object) -> str:
        raise OutputError("the disk is full")

    monkeypatch.setattr(States, "put", put)
    client.open(Kind.OPEN, request(png(picture(numbers))))
    with pytest.raises(RefusedError) as refused:
        client.ask(Kind.SNAPSHOT)
    assert refused.value.args == (Code.SYSTEM, "the disk is full")
    client.push(sound(numbers, RATE))
    client.sound.close()
    assert len(client.rest()[0]) == 25


def test_too_little_shared_memory_is_said_and_takes_no_place(
    client: ServingClient, numbers: Numbers, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[FrameRing] = []

    class Ring(FrameRing):
        @classmethod
        def create(cls, *, slots: int, **options: Any) -> FrameRing:
            if slots == 256:  # that of the sound, the second one
                raise RingError("no 5 MiB of shared memory for the ring")
            made.append(FrameRing.create(slots=slots, **options))
            return made[-1]

    monkeypatch.setattr(worker, "FrameRing", Ring)
    with pytest.raises(RefusedError) as refused:
        client.ask(Kind.OPEN, request(png(picture(numbers))))
    assert refused.value.args == (Code.SYSTEM, "no 5 MiB of shared memory for the ring")
    assert client.ask(Kind.HEALTH)[Tag.SESSIONS] == 0 and not (FOLDER / made[0].name).exists()


def test_a_session_that_there_is_no_time_for_may_come_again(
    server: Server, client: ServingClient, numbers: Numbers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.engine, "admit_by_rate", True)
    monkeypatch.setattr(server.engine.line(8, 8).scheduler, "blocks_per_s", 1.0)
    with pytest.raises(RefusedError) as refused:
        client.ask(Kind.OPEN, request(png(picture(numbers))))
    assert refused.value.args[0] == Code.BUSY and "no session can be opened" in refused.value.args[1]


def test_sessions_of_two_sizes_have_numbers_of_their_own(server: Server, numbers: Numbers) -> None:
    # Telemetry tells them apart by these alone.
    sizes = ((64, 64), (128, 64))
    sessions = [server.engine.open(picture(numbers), size=size) for size in sizes for _ in range(2)]
    assert len({session._serial for session in sessions}) == 4
    for session in sessions:
        session.close()


def test_only_the_latest_snapshots_are_kept(server: Server, numbers: Numbers, tmp_path: Path) -> None:
    with server.engine.open(picture(numbers), size=(64, 64)) as session:
        snapshot = session.snapshot()
    for states in (States(limit=2), States(tmp_path / "new", 2)):
        tokens = [states.put(snapshot) for _ in range(3)]
        with pytest.raises(InputError):
            states.get(tokens[0])
        assert all(states.get(token).facts == snapshot.facts for token in tokens[1:])
    assert sorted(path.stem for path in (tmp_path / "new").iterdir()) == sorted(tokens[1:])
    (tmp_path / "new").chmod(0o755)
    with pytest.raises(InputError, match="mkdir -m 700"):
        States(tmp_path / "new")


def test_an_interrupt_forgets_what_was_pushed_before(client: ServingClient, numbers: Numbers) -> None:
    client.open(Kind.OPEN, request(png(picture(numbers)), slots=64))
    first, second = sound(numbers, 8 * RATE), sound(numbers, RATE)
    client.push(first)
    client.pop()
    free = int(client.ask(Kind.INTERRUPT)[Tag.NEXT_FRAME])
    client.push(second)
    client.sound.close()
    indices, _, heard = client.rest()
    assert indices[-1] == free + 24 < 8 * 25
    expected = np.concatenate([first[: free * FRAME], second])[FRAME:]
    assert np.array_equal(heard, expected)


def test_an_idle_session_goes_on_in_silence_at_the_pace_of_its_video(client: ServingClient, numbers: Numbers) -> None:
    client.open(Kind.OPEN, request(png(picture(numbers)), idle=1, policy=1, slots=128))
    began = time.monotonic()
    while client.pop().index < 40:
        pass
    assert time.monotonic() - began > 0.5  # never faster than it is shown, but for a block ahead
    speech = sound(numbers, RATE)
    client.push(speech)
    client.sound.close()
    _, _, heard = client.rest()
    assert speech.tobytes() in heard.tobytes()


def test_nv12_is_bt709_of_the_rgb_frames(client: ServingClient, server: Server, numbers: Numbers) -> None:
    image, waveform = png(picture(numbers)), sound(numbers, FRAME)
    client.open(Kind.OPEN, request(image, pixels=2))
    other = ServingClient(server.path)
    other.open(Kind.OPEN, request(image))
    for one in (client, other):
        one.push(waveform)
        one.sound.close()
    frame, expected = client.pop(), other.pop()
    other.close()
    assert frame.pixel_format == "nv12" and frame.frame is not None and expected.frame is not None
    assert frame.frame.shape == (96, 64)
    assert np.abs(frame.frame - exact_nv12(expected.frame)).max() <= 0.501


def test_a_slow_client_delays_nobody(server: Server, client: ServingClient, numbers: Numbers) -> None:
    image = png(picture(numbers))
    client.open(Kind.OPEN, request(image, slots=2))
    client.push(sound(numbers, 4 * RATE))
    client.pop()
    other = ServingClient(server.path)
    other.open(Kind.OPEN, request(image))
    other.push(sound(numbers, RATE))
    other.sound.close()
    assert len(other.rest()[0]) == 25
    assert client.ask(Kind.HEALTH)[Tag.SESSIONS] == 2 and client.frames.unread == 2
    other.close()


def test_a_client_that_went_away_frees_its_place(server: Server, numbers: Numbers) -> None:
    image = png(picture(numbers))
    clients = [ServingClient(server.path) for _ in range(4)]
    for one in clients[:3]:
        one.open(Kind.OPEN, request(image))
    with pytest.raises(RefusedError) as refused:
        clients[3].ask(Kind.OPEN, request(image))
    assert refused.value.args[0] == Code.BUSY and "3 sessions" in refused.value.args[1]
    names = [clients[0].frames.name, clients[0].sound.name]
    clients[0].push(sound(numbers, RATE))
    clients[0].close()
    within(20, lambda: server.sessions == 2)
    clients[3].open(Kind.OPEN, request(image))
    assert not any((FOLDER / name).exists() for name in names)
    for one in clients:
        one.close()
    within(20, lambda: server.sessions == 0)


@pytest.mark.parametrize(
    ("changed", "code", "text"),
    [
        ({"image": b"no picture"}, Code.INPUT, "not a readable image"),
        ({"image": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, Code.INPUT, "not a readable image"),
        ({"width": 65}, Code.INPUT, "multiples of 64"),
        ({"width": 1024}, Code.INPUT, "pixels that this server allows"),
        ({"width": 0, "height": 0, "max_area": 7}, Code.INPUT, "too small"),
    ],
)
def test_what_cannot_be_used_is_refused_and_takes_no_place(
    server: Server, client: ServingClient, numbers: Numbers, changed: dict[str, object], code: Code, text: str
) -> None:
    with pytest.raises(RefusedError) as refused:
        client.ask(Kind.OPEN, request(png(picture(numbers)), **changed))
    assert refused.value.args[0] == code and text in refused.value.args[1]
    assert client.ask(Kind.HEALTH)[Tag.SESSIONS] == 0


def test_spoilt_sound_fails_its_own_session_only(client: ServingClient, numbers: Numbers) -> None:
    client.open(Kind.OPEN, request(png(picture(numbers))))
    client.push(np.array([np.nan], np.float32))
    with pytest.raises(RingClosedError):
        client.pop()
    health = client.ask(Kind.HEALTH)
    assert health[Tag.STATE] == 3 and health[Tag.CODE] == Code.INPUT and "finite" in str(health[Tag.TEXT])
    client.ask(Kind.CLOSE)
    client.open(Kind.OPEN, request(png(picture(numbers))))


def test_a_block_that_fails_ends_its_own_session_only(
    server: Server, client: ServingClient, numbers: Numbers, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, fails = png(picture(numbers)), threading.Event()

    good = Session.frames

    def frames(session: Session, *, idle: bool = False) -> Iterator[Chunk]:
        if session.seed == 5:
            yield from good(session, idle=idle)
            return
        fails.wait(20)
        raise RuntimeError("the device\nis gone")

    monkeypatch.setattr(Session, "frames", frames)
    other = ServingClient(server.path)
    other.open(Kind.OPEN, request(image))
    other.push(sound(numbers, RATE))
    client.open(Kind.OPEN, request(image, seed=6))
    within(20, lambda: int(client.ask(Kind.HEALTH)[Tag.BUSY_MS]) > 50)
    fails.set()
    with pytest.raises(RingClosedError):
        client.pop()
    health = client.ask(Kind.HEALTH)
    assert (health[Tag.STATE], health[Tag.CODE], health[Tag.TEXT]) == (3, Code.ENGINE, "the device is gone")
    other.sound.close()
    assert len(other.rest()[0]) == 25
    other.close()


def test_a_client_that_damages_its_rings_harms_itself_only(server: Server, numbers: Numbers) -> None:
    image = png(picture(numbers))
    for _ in range(6):
        bad = ServingClient(server.path)
        bad.open(Kind.OPEN, request(image))
        bad.push(sound(numbers, RATE))
        bad.pop()
        with open(FOLDER / bad.sound.name, "r+b") as heard, open(FOLDER / bad.frames.name, "r+b") as seen:
            for file in (heard, seen):  # the server may give the session up, and both names with it, after the first
                for at in numbers.integers(128, 4096 + 128, 8):
                    file.seek(int(at))
                    file.write(numbers.bytes(8))
        time.sleep(0.1)
        bad.close()
        within(20, lambda: server.sessions == 0)
    good = ServingClient(server.path)
    good.open(Kind.OPEN, request(image))
    good.push(sound(numbers, FRAME))
    good.sound.close()
    assert len(good.rest()[0]) == 1
    good.close()


def test_the_socket_is_its_users_alone(server: Server, tmp_path: Path) -> None:
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
    with pytest.raises(InputError, match="listens on"):
        sockets.listen(server.path)
    dead = sockets.listen(tmp_path / "dead")
    dead.close()
    sockets.listen(tmp_path / "dead").close()  # a dead server's is replaced
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="no socket"):
        sockets.listen(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(InputError, match="107 bytes"):
        sockets.listen(tmp_path / ("x" * 108))
    with pytest.raises(InputError, match="cannot be used"):
        sockets.listen(tmp_path / "nowhere" / "s")
    tmp_path.chmod(0o777)
    with pytest.raises(InputError, match="mkdir -m 700"):
        sockets.listen(tmp_path / "s")
