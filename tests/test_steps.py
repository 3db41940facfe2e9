"""The step API: equal to a session on a line, whoever else works in between; what is discarded leaves no trace."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from liverelay.engine.config import StreamConfig
from liverelay.engine.engine import Engine
from liverelay.engine.errors import InputError, LiveRelayError
from liverelay.engine.relay.plan import parse_plan
from liverelay.engine.steps import Job, SteppedSession
from liverelay.engine.stream import Chunk

for library in ("transformers", "PIL", "ftfy"):
    pytest.importorskip(library)
ROOT = Path(__file__).resolve().parents[1]
BLOCK = 0.48
Numbers = np.random.Generator


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    before, stream = torch.get_num_threads(), StreamConfig(motion_pixel_frames=25)
    torch.set_num_threads(1)
    engine = Engine.load(checkpoint, device="cpu,cpu", dtype=torch.float32, stream=stream)
    engine.sessions = 3
    yield engine
    engine.close()
    torch.set_num_threads(before)


class Person:
    """What a session is opened with."""

    def __init__(self, numbers: Numbers, blocks: float = 6) -> None:
        self.image = numbers.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        self.sound = (0.1 * numbers.standard_normal(round(16000 * BLOCK * blocks))).astype(np.float32)
        self.seed = int(numbers.integers(1 << 20))

    def steps(self, engine: Engine, *, live: bool = False) -> SteppedSession:
        return engine.open_steps(self.image, audio=None if live else self.sound, size=(64, 64), seed=self.seed)

    def expected(self, engine: Engine) -> list[Chunk]:
        """Of a session on the line."""
        with engine.open(self.image, audio=self.sound, size=(64, 64), seed=self.seed) as session:
            return list(session.frames())


def run(session: SteppedSession, job: Job) -> Chunk:
    for stage in range(job.stages, session.stages):
        session.run_stage(job, stage)
    session.commit(job)
    return session.decode_block(job)


def same(chunks: list[Chunk], others: list[Chunk]) -> bool:
    return len(chunks) == len(others) and all(
        a.block == b.block and np.array_equal(a.frames, b.frames) and np.array_equal(a.audio, b.audio)
        for a, b in zip(chunks, others, strict=True)
    )


def test_stages_in_any_interleaving_equal_the_line(engine: Engine, numbers: Numbers) -> None:
    people = [Person(numbers), Person(numbers, 4.5)]
    sessions = [person.steps(engine) for person in people]
    made: list[list[Chunk]] = [[], []]
    waiting: list[list[Job]] = [[], []]  # blocks under way, a stage apart
    while any(waiting) or any(session.total_frames and not session.past_end(session._next) for session in sessions):
        who = int(numbers.integers(2))
        session, jobs = sessions[who], waiting[who]
        if jobs and numbers.random() < 0.7:
            job = jobs[int(numbers.integers(len(jobs)))]
            if job.stages < session.stages and session._next_in[job.stages] == job.number:
                if job.number < 4 or session._reference is not None:
                    session.run_stage(job, job.stages)
            elif job is jobs[0] and job.stages == session.stages:
                session.commit(job)
                made[who].append(session.decode_block(jobs.pop(0)))
        elif len(jobs) < 3 and (found := session.prepare_block()) is not None:
            jobs.append(found)
    for session in sessions:
        session.close()
    assert all(same(made[i], people[i].expected(engine)) for i in range(2))


def test_a_vae_in_two_stages_decodes_the_same(engine: Engine, checkpoint: Path, numbers: Numbers) -> None:
    plan, person = parse_plan("0+1+2,3+vae1,vae2", ["cpu"] * 3), Person(numbers)
    split = Engine.load(checkpoint, device=plan, dtype=torch.float32, stream=engine.stream)
    made, session = list[Chunk](), person.steps(split)
    while (job := session.prepare_block()) is not None:
        made.append(run(session, job))
    session.close()
    split.close()
    assert len(made) > 5 and same(made, person.expected(engine))


def test_a_discarded_block_leaves_no_trace(engine: Engine, numbers: Numbers) -> None:
    person = Person(numbers, 5)
    session, line = person.steps(engine, live=True), engine.open(person.image, size=(64, 64), seed=person.seed)
    made, exact = list[Chunk](), list[Chunk]()
    session.push_audio(person.sound, 16000)
    line.push_audio(person.sound, 16000)
    exact += line.frames()
    while (job := session.prepare_block()) is not None:
        for stage in range(int(numbers.integers(session.stages + 1))):  # some way, then thrown away
            session.run_stage(job, stage)
        session.discard(job)
        again = session.prepare_block()
        assert again is not None and again.number == job.number
        made.append(run(session, again))
    # The next block is begun with loud sound, and interrupted: it is made of other sound than was heard by then.
    session.push_audio(0.9 * numbers.standard_normal(16000), 16000)
    job = session.prepare_block()
    assert job is not None
    session.run_stage(job, 0)
    session.discard(job)
    other = 0.2 * numbers.standard_normal(round(16000 * BLOCK * 4))
    for speaker in (session, line):
        speaker.interrupt()
        speaker.push_audio(other, 16000)
        speaker.end_audio()
    while (job := session.prepare_block()) is not None:
        made.append(run(session, job))
    exact += line.frames()
    session.close()
    line.close()
    assert len(exact) > 7 and same(made, exact)


def test_a_wrong_order_is_refused_and_changes_nothing(engine: Engine, numbers: Numbers) -> None:
    person = Person(numbers, 5.5)
    session = person.steps(engine)
    first, second = session.prepare_block(), session.prepare_block()
    assert first is not None and second is not None
    for wrong, text in (
        (lambda: session.run_stage(first, 1), "goes through stage 0 next"),
        (lambda: session.run_stage(second, 0), "stage 0 takes block 0 next"),
        (lambda: session.commit(first), "cannot be committed: 0 of 2"),
        (lambda: session.decode_block(first), "is prepared, not committed"),
        (lambda: session.discard(first), "block 1 came after it"),
    ):
        with pytest.raises(LiveRelayError, match=text):
            wrong()
    made = [run(session, first), run(session, second)]
    with pytest.raises(LiveRelayError, match="is decoded, not prepared"):
        session.run_stage(first, 0)
    jobs = []
    while (job := session.prepare_block()) is not None:
        jobs.append(job)
    made += [run(session, job) for job in jobs]
    session.close()
    assert same(made, person.expected(engine))
    with pytest.raises(LiveRelayError, match="closed"):
        session.prepare_block()


def test_block_four_waits_for_the_reference(engine: Engine, numbers: Numbers) -> None:
    session = Person(numbers).steps(engine)
    jobs = [session.prepare_block() for _ in range(5)]
    for job in jobs[:4]:
        assert job is not None
        session.run_stage(job, 0)
    assert jobs[4] is not None
    with pytest.raises(LiveRelayError, match="needs the result of block 0"):
        session.run_stage(jobs[4], 0)
    session.close()


def test_places_are_limited_and_given_back(engine: Engine, numbers: Numbers) -> None:
    person = Person(numbers)
    sessions = [person.steps(engine) for _ in range(3)]
    with pytest.raises(InputError, match="all places are taken"):
        person.steps(engine)
    sessions.pop().close()
    sessions.pop()  # left to the garbage collector
    gc.collect()
    again = [person.steps(engine) for _ in range(2)]
    assert same([run(again[0], job) for job in [again[0].prepare_block()] if job], person.expected(engine)[:1])
    for session in [*again, *sessions]:
        session.close()


def test_a_place_is_given_back_in_the_middle_of_a_stage(engine: Engine, numbers: Numbers) -> None:
    session = Person(numbers).steps(engine)
    given_back = threading.Thread(target=session.close, daemon=True)
    with session._set.lock:  # as the garbage collector may, in the thread that runs a stage
        given_back.start()
        given_back.join(10)
        assert not given_back.is_alive()


def test_a_job_of_another_session_is_refused(engine: Engine, numbers: Numbers) -> None:
    own, other = Person(numbers).steps(engine), Person(numbers).steps(engine)
    job = other.prepare_block()
    assert job is not None
    calls: list[Callable[[], object]] = [
        lambda: own.run_stage(job, 0), lambda: own.commit(job), lambda: own.discard(job), lambda: own.decode_block(job)
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(LiveRelayError, match="another session"):
            call()
    run(other, job)
    for session in (own, other):
        session.close()


def test_the_example_makes_two_videos(checkpoint: Path, numbers: Numbers, tmp_path: Path) -> None:
    pytest.importorskip("av")
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "sound.wav", 0.1 * numbers.standard_normal(16000), 16000)
    command = [sys.executable, ROOT / "examples" / "two_sessions.py", "--checkpoint", checkpoint, "--image",
               ROOT / "samples" / "portrait.png", "--audio", tmp_path / "sound.wav",
               "--out", tmp_path / "out"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from liverelay.engine.media import probe

    assert [probe(tmp_path / "out" / f"{name}.mp4").frames for name in ("anna", "ben")] == [25, 25]
    order = [line.partition(":")[0] for line in done.stdout.splitlines()[:6]]
    assert order == ["anna", "ben"] * 3
