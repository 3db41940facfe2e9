"""Snapshots: a session goes on bit for bit, in another engine with another plan, from memory or from a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from liverelay.engine.config import StreamConfig
from liverelay.engine.engine import Engine
from liverelay.engine.errors import InputError, LiveRelayError, OutputError
from liverelay.engine.models.weights import save_tensors
from liverelay.engine.relay.plan import Plan, parse_plan
from liverelay.engine.session import Session
from liverelay.engine.snapshot import FORMAT, Snapshot
from liverelay.engine.stream import Chunk

for library in ("transformers", "PIL", "ftfy", "soxr"):
    pytest.importorskip(library)
STREAM = StreamConfig(motion_pixel_frames=25)  # 73 take longer to open
Engines = tuple[Engine, Engine]


def load(checkpoint: Path, device: str | Plan, stream: StreamConfig = STREAM) -> Engine:
    return Engine.load(checkpoint, device=device, dtype=torch.float32, stream=stream)


@pytest.fixture(scope="module")
def engines(checkpoint: Path) -> Iterator[Engines]:
    """The same model on lines of one stage and of three, two of which share the VAE."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    both = load(checkpoint, "cpu"), load(checkpoint, parse_plan("0+1,2+3+vae1,vae2", ["cpu"] * 3))
    yield both
    for engine in both:
        engine.close()
    torch.set_num_threads(before)


def start(engine: Engine, numbers: np.random.Generator, audio: np.ndarray | None) -> Session:
    picture = numbers.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return engine.open(picture, "Hi.", audio=audio, size=(64, 64), seed=int(numbers.integers(1000)))


def same(chunks: list[Chunk], others: list[Chunk]) -> bool:
    return len(chunks) == len(others) and all(
        a.block == b.block and a.first_frame == b.first_frame and np.array_equal(a.frames, b.frames)
        and np.array_equal(a.audio, b.audio) for a, b in zip(chunks, others, strict=True)
    )  # fmt: skip


@pytest.mark.parametrize(("first", "blocks"), [(0, 1), (1, 3), (0, 5)])
def test_a_file_session_goes_on_in_another_engine(
    engines: Engines, numbers: np.random.Generator, tmp_path: Path, first: int, blocks: int
) -> None:
    here, there = engines[first], engines[1 - first]
    waveform = (0.1 * numbers.standard_normal(round(16000 * 0.48 * 7))).astype(np.float32)
    session = start(here, numbers, waveform)
    stream = session.frames()
    for _ in range(blocks):
        next(stream)
    session.snapshot().save(tmp_path / "state")  # blocks that were asked for ahead are in it
    rest = list(stream)
    assert [chunk.block for chunk in rest] == list(range(blocks, 8))
    for engine in (there, here):
        with engine.resume(tmp_path / "state") as resumed:
            assert resumed.next_block == blocks and resumed.total_frames == session.total_frames
            assert same(list(resumed.frames()), rest)
    session.close()


@pytest.mark.parametrize("rate", [16000, 44100])
def test_a_live_session_goes_on_with_the_sound_that_comes_after(
    engines: Engines, numbers: np.random.Generator, rate: int
) -> None:
    pieces = [0.1 * numbers.standard_normal(int(numbers.integers(1, rate))) for _ in range(8)]
    session = start(engines[0], numbers, None)

    def hear(listener: Session, sound: list[np.ndarray]) -> list[Chunk]:
        found = []
        for piece in sound:
            listener.push_audio(piece, rate)
            found += list(listener.frames())
        listener.end_audio()
        return found + list(listener.frames())

    for piece in pieces[:4]:
        session.push_audio(piece, rate)
        list(session.frames())
    session.push_audio(pieces[4], rate)
    next(session.frames(), None)
    snapshot = session.snapshot()
    with engines[1].resume(snapshot) as resumed:
        rest = hear(session, pieces[5:])
        assert rest and same(hear(resumed, pieces[5:]), rest)
    session.close()


def test_many_snapshots_do_not_shift_the_sound(engines: Engines, numbers: np.random.Generator) -> None:
    rate, seconds = 44100, 6
    session = start(engines[0], numbers, None)
    for _ in range(20 * seconds):
        session.push_audio(np.zeros(rate // 20), rate)
        session.snapshot()
    session.end_audio()
    assert session.total_frames in (25 * seconds, 25 * seconds + 1)
    session.close()


def test_what_does_not_fit_is_refused(
    engines: Engines, checkpoint: Path, numbers: np.random.Generator, tmp_path: Path
) -> None:
    session = start(engines[0], numbers, np.zeros(16000, dtype=np.float32))
    snapshot = session.snapshot()
    session.close()
    with pytest.raises(LiveRelayError, match="closed"):
        session.snapshot()
    with pytest.raises(InputError, match="another model"):
        engines[0].resume(Snapshot(snapshot.tensors, {**snapshot.facts, "model": "0123"}))
    with pytest.raises(InputError, match="another stream"):
        load(checkpoint, "cpu", StreamConfig(relative_distance=7)).resume(snapshot)
    with pytest.raises(OutputError, match="cannot write"):
        snapshot.save(tmp_path / "nowhere" / "state")
    with pytest.raises(OutputError, match="it is a folder"):
        snapshot.save(tmp_path)
    path = tmp_path / "state"
    snapshot.save(path)
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-1000])
    (tmp_path / "empty").write_bytes(b"")
    for name in ("cut", "empty", "missing"):
        with pytest.raises(InputError, match=f"{name} cannot be read as a snapshot"):
            engines[0].resume(tmp_path / name)
    lost = {name: tensor for name, tensor in snapshot.tensors.items() if name != "stage.arena.2.k"}
    with pytest.raises(InputError, match=r"has nothing for arena\.2\.k"):
        list(engines[0].resume(Snapshot(lost, snapshot.facts)).frames())


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", None), ("session_id", "1"), ("next", -1), ("latent", [8]), ("latent", [8, 800000]),
     ("numbers", {"a": "b"}), ("numbers", {}), ("track", []), ("track", {"kind": "live"}), ("run_start", "soon")],
)  # fmt: skip
def test_doctored_facts_are_one_line(
    engines: Engines, numbers: np.random.Generator, tmp_path: Path, name: str, value: object
) -> None:
    live = name in ("track", "run_start")
    session = start(engines[0], numbers, None if live else np.zeros(16000, dtype=np.float32))
    path, places, snapshot = tmp_path / "state", session.line.sessions, session.snapshot()
    facts = {**snapshot.facts, name: value}
    if name == "run_start":
        facts["track"] = {**snapshot.facts["track"], name: value}
    save_tensors(path, snapshot.tensors, {"liverelay": json.dumps({"format": FORMAT, **facts})})
    with pytest.raises(InputError) as told, engines[0].resume(path) as resumed:
        list(resumed.frames())
    assert "\n" not in str(told.value)
    assert session.line.sessions == places
    session.close()


@pytest.mark.parametrize("number", [1, 3])
def test_a_snapshot_of_another_version_is_refused(
    engines: Engines, numbers: np.random.Generator, tmp_path: Path, number: int
) -> None:
    """Its tensors have the same names and shapes, and mean something else."""
    session = start(engines[0], numbers, np.zeros(16000, dtype=np.float32))
    snapshot = session.snapshot()
    session.close()
    facts = {"format": f"liverelay session {number}", **snapshot.facts}
    save_tensors(tmp_path / "state", snapshot.tensors, {"liverelay": json.dumps(facts)})
    with pytest.raises(InputError, match="another version of liverelay wrote") as told:
        engines[0].resume(tmp_path / "state")
    assert "open a new session" in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("facts", [[], "text", {"format": FORMAT}, {"format": 2}, {"format": "another"}])
def test_a_file_without_facts_is_no_snapshot(engines: Engines, tmp_path: Path, facts: object) -> None:
    save_tensors(tmp_path / "state", {"a": torch.zeros(1)}, {"liverelay": json.dumps(facts)})
    with pytest.raises(InputError, match="snapshot"):
        engines[0].resume(tmp_path / "state")
