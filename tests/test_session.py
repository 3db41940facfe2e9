"""Sessions: frames and sound in step, live equal to at once, reproducible, several at a time, the sink replaced."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from liverelay.engine.config import StreamConfig
from liverelay.engine.engine import Engine
from liverelay.engine.errors import BusyError, InputError, LiveRelayError
from liverelay.engine.models.sampler import block_noise, relative_distance
from liverelay.engine.models.text import TextEncoder
from liverelay.engine.session import Session
from liverelay.engine.stream import Chunk

for library in ("transformers", "PIL", "ftfy"):
    pytest.importorskip(library)
RATE, SAMPLES = 16000, 640  # of sound: a second, and a frame of video
Numbers, Array, Patch = np.random.Generator, np.ndarray, pytest.MonkeyPatch


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    before, stream = torch.get_num_threads(), StreamConfig(motion_pixel_frames=25)  # 73 take longer to open
    torch.set_num_threads(1)
    yield Engine.load(checkpoint, device="cpu", dtype=torch.float32, stream=stream)
    torch.set_num_threads(before)


def picture(numbers: Numbers) -> Array:
    return numbers.integers(0, 256, (64, 64, 3), dtype=np.uint8)


def sound(numbers: Numbers, samples: int) -> Array:
    return (0.1 * numbers.standard_normal(samples)).astype(np.float32)


def start(engine: Engine, image: Array, audio: Array | None = None, prompt: str = "Hi.", **options: int) -> Session:
    return engine.open(image, prompt, audio=audio, size=(64, 64), **options)


def joined(chunks: list[Chunk]) -> tuple[Array, Array]:
    return np.concatenate([chunk.frames for chunk in chunks]), np.concatenate([chunk.audio for chunk in chunks])


def video(session: Session) -> Array:
    return joined(list(session.frames()))[0]


def in_step(chunks: list[Chunk], waveform: Array) -> None:
    frame = 0
    for number, chunk in enumerate(chunks):
        assert (chunk.block, chunk.first_frame) == (number, frame)
        assert chunk.frames.dtype == np.uint8 and chunk.frames.shape[1:] == (64, 64, 3)
        assert len(chunk.audio) == SAMPLES * len(chunk.frames) and chunk.audio.dtype == np.float32
        frame += len(chunk.frames)
    assert frame == -(-len(waveform) // SAMPLES)
    assert np.array_equal(joined(chunks)[1], np.pad(waveform, (0, frame * SAMPLES - len(waveform))))


@pytest.mark.parametrize("samples", [1, 9 * SAMPLES, 9 * SAMPLES + 1, None])
def test_a_whole_file_gives_as_much_video_as_sound(engine: Engine, numbers: Numbers, samples: int | None) -> None:
    waveform = sound(numbers, samples or int(numbers.integers(RATE // 2, 2 * RATE)))
    with start(engine, picture(numbers), waveform) as session:
        assert session.size == (64, 64) and session.total_frames == -(-len(waveform) // SAMPLES)
        chunks = list(session.frames())
        assert not list(session.frames())
    in_step(chunks, waveform)
    assert all(len(chunk.frames) == (9 if chunk.block == 0 else 12) for chunk in chunks[:-1])


def test_the_caller_may_use_its_array_for_something_else(engine: Engine, numbers: Numbers) -> None:
    given = sound(numbers, 2 * SAMPLES)
    session, waveform = start(engine, picture(numbers), given), given.copy()
    given[:] = 9
    in_step(list(session.frames()), waveform)


@pytest.mark.parametrize("rate", [RATE, 22050])
def test_live_sound_in_pieces_equals_the_same_at_once(engine: Engine, numbers: Numbers, rate: int) -> None:
    pytest.importorskip("soxr")
    whole = 1 if rate == RATE else 441  # 441 samples become 320
    image, waveform = picture(numbers), sound(numbers, int(numbers.integers(rate, 2 * rate)) // whole * whole)
    once = start(engine, image)
    once.push_audio(waveform, rate)
    once.end_audio()
    expected = list(once.frames())
    live, chunks = start(engine, image), []
    for piece in np.split(waveform.copy(), np.sort(numbers.integers(0, len(waveform), 12))):
        live.push_audio(piece, rate)
        piece[:] = 9
        chunks += live.frames()
    assert live.total_frames is None and 0 < len(chunks) < len(expected)
    live.end_audio()
    chunks += live.frames()
    in_step(chunks, waveform if rate == RATE else joined(expected)[1][: len(waveform) * RATE // rate])
    assert all(map(np.array_equal, joined(chunks), joined(expected))) and not list(live.frames())


def test_live_frames_come_with_the_first_sample_that_completes_a_block(engine: Engine, numbers: Numbers) -> None:
    session, needed = start(engine, picture(numbers)), 9 * SAMPLES + RATE // 5  # look-ahead: 0.2 s
    session.push_audio(sound(numbers, needed - 1), RATE)
    assert not list(session.frames())
    session.push_audio(sound(numbers, 1), RATE)
    assert [len(chunk.frames) for chunk in session.frames()] == [9]
    empty = start(engine, picture(numbers))
    assert empty.end_audio() is None and empty.total_frames == 0 and not list(empty.frames())


def test_without_sound_an_idle_session_goes_on_in_silence(engine: Engine, numbers: Numbers) -> None:
    session = start(engine, picture(numbers))
    idle, speech = list(itertools.islice(session.frames(idle=True), 2)), sound(numbers, RATE)
    assert [len(chunk.frames) for chunk in idle] == [9, 12] and not joined(idle)[1].any()
    session.push_audio(speech, RATE)
    session.end_audio()
    rest = list(session.frames())
    assert rest[0].first_frame == 21 and speech.tobytes() in joined(rest)[1].tobytes()


def test_seed_and_session_decide_the_video(engine: Engine, numbers: Numbers) -> None:
    image, waveform, seed = picture(numbers), sound(numbers, 9 * SAMPLES), int(numbers.integers(1, 1 << 40))
    keys = [(seed, 0), (seed, 0), (seed + 1, 0), (seed, 1)]
    videos = [video(start(engine, image, waveform, seed=a, session_id=b)) for a, b in keys]
    for i, j in itertools.combinations(range(len(keys)), 2):
        assert np.array_equal(videos[i], videos[j]) == (keys[i] == keys[j])


def test_sessions_that_take_turns_equal_each_alone(engine: Engine, numbers: Numbers) -> None:
    speakers = [(picture(numbers), sound(numbers, seconds * RATE), f"Person {seconds}.") for seconds in (2, 3)]
    alone = [list(start(engine, *given, seed=seed).frames()) for seed, given in enumerate(speakers)]
    turns = itertools.zip_longest(*(start(engine, *given, seed=seed).frames() for seed, given in enumerate(speakers)))
    for expected, chunks in zip(alone, zip(*turns, strict=True), strict=True):
        done = [chunk for chunk in chunks if chunk]
        assert len(expected) > 4 and all(map(np.array_equal, joined(done), joined(expected)))
    assert not np.array_equal(alone[0][0].frames, alone[1][0].frames)


def test_sessions_in_threads_equal_each_alone(engine: Engine, numbers: Numbers) -> None:
    inputs = [(picture(numbers), sound(numbers, 30 * SAMPLES), seed) for seed in (1, 2)]
    alone = [video(start(engine, image, audio, seed=seed)) for image, audio, seed in inputs]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda each: video(start(engine, each[0], each[1], seed=each[2])), inputs))
    assert all(np.array_equal(*pair) for pair in zip(alone, together, strict=True))


def test_a_block_that_fails_half_way_ends_the_session(engine: Engine, numbers: Numbers, monkeypatch: Patch) -> None:
    session = start(engine, picture(numbers), sound(numbers, 300 * SAMPLES))
    chunks = session.frames()
    next(chunks)
    with monkeypatch.context() as patch:
        patch.setattr(engine.vae, "decode", lambda *_: (_ for _ in ()).throw(RuntimeError("lost")))
        with pytest.raises(RuntimeError, match="lost"):
            list(chunks)
    with pytest.raises(LiveRelayError, match="open a new session"):
        next(session.frames())


@pytest.mark.parametrize("constant", [None, 0, 29, 700])
def test_reference_distance(engine: Engine, numbers: Numbers, monkeypatch: Patch, constant: int | None) -> None:
    monkeypatch.setattr(engine, "stream", StreamConfig(relative_distance=constant, motion_pixel_frames=25))
    seed, name = (int(n) for n in numbers.integers(0, 1 << 31, 2))
    session, asked = start(engine, picture(numbers), sound(numbers, 93 * SAMPLES), seed=seed, session_id=name), []
    request = session.line.request
    monkeypatch.setattr(session.line, "request", lambda *a, **k: asked.append((a[1], a[3])) or request(*a, **k))
    assert len(list(session.frames())) == 8 == len(asked)
    for block, distances in asked:
        for step, distance in enumerate(distances):
            assert distance == (relative_distance(seed, name, block, step) if constant is None else constant)


def test_an_interrupt_while_a_block_is_waited_for_loses_nothing(
    engine: Engine, numbers: Numbers, monkeypatch: Patch
) -> None:
    image, waveform = picture(numbers), sound(numbers, 40 * SAMPLES)
    whole, session = video(start(engine, image, waveform)), start(engine, image, waveform)
    first = next(session.frames())

    def interrupted(self: Future[Array], timeout: float | None = None) -> Array:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(session.frames())
    assert np.array_equal(np.concatenate([first.frames, video(session)]), whole)


def test_a_session_closed_by_another_thread_just_after_a_result_says_so(
    engine: Engine, numbers: Numbers, monkeypatch: Patch
) -> None:
    session, result = start(engine, picture(numbers), sound(numbers, 40 * SAMPLES)), Future.result

    def closed(self: Future[Array], timeout: float | None = None) -> Array:
        found = result(self, timeout)
        session.close()
        return found

    monkeypatch.setattr(Future, "result", closed)
    with pytest.raises(LiveRelayError, match="the session is closed"):
        next(session.frames())


@pytest.mark.parametrize(
    ("wrong", "text"),
    [({"max_area": "x"}, "whole"), ({"max_area": 64.5 * 64}, "whole"), ({"size": 64}, "whole"),
     ({"size": "64x64"}, "whole"), ({"image": torch.zeros(64, 64, 3)}, "a Tensor is no picture"),
     ({"live": "x"}, "not a str")],
)  # fmt: skip
def test_what_is_of_another_kind_is_one_line(engine: Engine, wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text) as told:
        engine.open(**{"image": np.zeros((64, 64, 3), np.uint8), "prompt": "Hi.", **wrong})
    assert "\n" not in str(told.value)
    for options in ({"device": 1}, {"device": "cpu", "dtype": "bfloat16"}):
        with pytest.raises(InputError, match="not "):
            Engine.load(engine.loader.files.folder, **options)  # type: ignore[arg-type]


def test_no_more_sessions_than_places(engine: Engine, numbers: Numbers, monkeypatch: Patch) -> None:
    monkeypatch.setattr(engine, "sessions", 2)
    image = np.zeros((64, 128, 3), np.uint8)
    kept = [engine.open(image, "Hi.", size=(128, 64)) for _ in range(2)]
    with pytest.raises(BusyError, match="all 2 places are taken"):
        engine.open(image, "Hi.", size=(128, 64))
    kept.pop()  # nobody holds it any more
    gc.collect()
    engine.open(image, "Hi.", size=(128, 64)).close()


def test_live_sessions_the_line_has_no_time_for_are_refused(
    engine: Engine, numbers: Numbers, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(engine, "admit_by_rate", True)
    session = start(engine, picture(numbers))
    monkeypatch.setattr(session.line.scheduler, "blocks_per_s", 4.0)
    with pytest.raises(BusyError, match="no session can be opened: the line makes"):
        start(engine, picture(numbers))
    start(engine, picture(numbers), sound(numbers, SAMPLES)).close()  # a file takes what is left
    session.close()
    start(engine, picture(numbers)).close()


def test_random_numbers_repeat_and_depend_on_every_key(numbers: Numbers) -> None:
    key, shape = [int(n) for n in numbers.integers(0, 1 << 31, 3)], (16, 3, 32, 32)
    noise, count = block_noise(*key, shape), 16 * 3 * 32 * 32
    assert np.array_equal(noise, block_noise(*key, shape))
    assert abs(noise.mean()) < 6 / count**0.5 and abs(noise.var() - 1) < 6 * (2 / count) ** 0.5
    others = [block_noise(*(n + (i == place) for i, n in enumerate(key)), shape) for place in range(3)]
    assert all(abs((noise * other).mean()) < 6 / count**0.5 for other in others)

    def draw(seed: int, name: int) -> Array:
        return np.array([[relative_distance(seed, name, block, step) for step in range(4)] for block in range(1000)])

    draws = draw(*key[:2])
    assert np.array_equal(draws, draw(*key[:2])) and draws.min() == 4 and draws.max() == 30
    seen, mean = np.bincount(draws.ravel() - 4, minlength=27), 4000 / 27
    assert ((seen - mean) ** 2 / mean).sum() < 90  # 26 degrees of freedom
    for other in (draw(key[0] + 1, key[1]), draw(key[0], key[1] + 1), np.roll(draws, 1, 0), np.roll(draws, 1, 1)):
        assert abs(np.corrcoef(draws.ravel(), other.ravel())[0, 1]) < 0.1


def test_a_prompt_is_encoded_once_and_changes_the_video(engine: Engine, numbers: Numbers, monkeypatch: Patch) -> None:
    image, waveform = picture(numbers), sound(numbers, 9 * SAMPLES)
    calm, wild = (video(start(engine, image, waveform, prompt)) for prompt in ("Calm.", "Wild!"))
    assert not np.array_equal(calm, wild)
    monkeypatch.setattr(TextEncoder, "encode", None)
    assert np.array_equal(wild, video(start(engine, image, waveform, "Wild!")))
    assert np.array_equal(calm, video(start(engine, image, waveform, "Calm.")))
    with pytest.raises(TypeError):
        engine.encode_text("Another.")


def test_the_first_frame_is_heard_three_times_more(engine: Engine, numbers: Numbers, monkeypatch: Patch) -> None:
    waveform, blocks, condition = sound(numbers, 20 * SAMPLES), list[torch.Tensor](), engine.dit.audio_condition
    monkeypatch.setattr(engine.dit, "audio_condition", lambda a, n: blocks.append(a[0].clone()) or condition(a, n))
    assert len(video(start(engine, picture(numbers), waveform))) == 20
    features = engine.audio.encode_file(waveform)[:, :, :21]
    assert torch.equal(torch.cat(blocks, dim=2), torch.cat([features[:, :, [0, 0, 0]], features], dim=2))


def test_what_cannot_be_used_is_refused(engine: Engine, numbers: Numbers) -> None:
    for name, value in (("relative_distance", -1), ("relative_distance", 1001), ("ring_frames", 10)):
        with pytest.raises(InputError, match=f" {value}( |$)"):
            StreamConfig(**{name: value})
    image, waveform = picture(numbers), sound(numbers, SAMPLES)
    for size, near in (((100, 64), "128x64"), ((64, 700), "64x704"), ((0, 64), "64x64"), ((-64, 1), "64x64")):
        with pytest.raises(InputError, match=f"{size[0]}x{size[1]} .*{near}"):
            engine.open(image, audio=waveform, size=size)
    with pytest.raises(InputError, match="4095 pixels"):
        engine.open(image, audio=waveform, max_area=4095)
    for wrong in (image[..., 0], image[..., :2], image[:0], image / 255):
        with pytest.raises(InputError, match="uint8"):
            engine.open(wrong, audio=waveform, size=(64, 64))
    spoilt = waveform.copy()
    spoilt[int(numbers.integers(SAMPLES))] = numbers.choice([np.nan, np.inf])
    for wrong in (spoilt, waveform[:0], waveform[:, None]):
        with pytest.raises(InputError, match="finite"):
            start(engine, image, wrong)
    with pytest.raises(InputError, match="finite"):
        start(engine, image).push_audio(spoilt, RATE)
    with pytest.raises(InputError, match="whole sound"):
        start(engine, image, waveform).push_audio(waveform, RATE)


def test_an_array_without_a_size_gets_one_by_the_published_rule(engine: Engine, numbers: Numbers) -> None:
    session = engine.open(picture(numbers), "Hi.", audio=sound(numbers, SAMPLES), max_area=64 * 64)
    assert session.size == (64, 64) and len(video(session)) == 1
    with pytest.raises(InputError, match="uint8"):
        engine.open(picture(numbers)[:0], "Hi.")


@pytest.mark.parametrize("use", [lambda s: list(s.frames()), lambda s: s.size, lambda s: s.push_audio([0.0], RATE)])
def test_a_closed_session_says_so(engine: Engine, numbers: Numbers, use: Callable[[Session], object]) -> None:
    with start(engine, picture(numbers)) as session:
        assert session.next_frame == 0
    with pytest.raises(LiveRelayError, match="closed"):
        use(session)


def test_an_interrupted_avatar_says_what_is_pushed_next(engine: Engine, numbers: Numbers) -> None:
    image, speech = picture(numbers), sound(numbers, 4 * RATE)
    session = start(engine, image)
    session.push_audio(speech, RATE)
    stream = session.frames()
    said = [next(stream)]
    session.interrupt()
    said += list(stream)  # what was under way
    heard = sum(len(chunk.audio) for chunk in said)
    assert heard == session.heard_samples < len(speech)
    other = sound(numbers, RATE)
    session.push_audio(other, RATE)
    session.end_audio()
    said += list(session.frames())
    in_step(said, np.concatenate([speech[:heard], other]))
    session.close()
    with pytest.raises(InputError, match="only a live session"):
        start(engine, image, speech).interrupt()


def test_an_interrupt_waits_for_the_block_that_is_being_asked_for(
    engine: Engine, numbers: Numbers, monkeypatch: Patch
) -> None:
    session, speech, other = start(engine, picture(numbers)), sound(numbers, RATE), sound(numbers, RATE)
    session.push_audio(speech, RATE)
    features, hearing = engine.audio.hidden_states, threading.Event()
    interrupt = threading.Thread(target=session.interrupt)

    def slow(window: Array) -> torch.Tensor:
        if not hearing.is_set():
            hearing.set()
            interrupt.start()
            interrupt.join(0.3)
        return features(window)

    monkeypatch.setattr(engine.audio, "hidden_states", slow)
    first = next(session.frames())
    interrupt.join(60)
    assert hearing.is_set() and np.array_equal(first.audio, speech[: len(first.audio)])
    heard = session.heard_samples
    session.push_audio(other, RATE)
    session.end_audio()
    in_step([first, *session.frames()], np.concatenate([speech[:heard], other]))
    session.close()
