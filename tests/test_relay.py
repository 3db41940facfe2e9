"""The pipeline in threads: equal to the sequential rollout for every plan, whoever else is on the line.

Every test runs with the stages' loops and links in C++, and in Python.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from liverelay.engine.config import StreamConfig
from liverelay.engine.engine import Engine
from liverelay.engine.errors import InputError, LiveRelayError
from liverelay.engine.models.geometry import Geometry
from liverelay.engine.models.vae import VAE
from liverelay.engine.models.weights import open_pth
from liverelay.engine.relay import loop, native_loop
from liverelay.engine.relay.messages import Block, Clean, Done, Event, Tensors
from liverelay.engine.relay.pipeline import Pipeline, local_pipeline
from liverelay.engine.relay.plan import StagePlan, parse_plan
from liverelay.engine.relay.stage import LineSpec, Stage
from tests.rollout_twin import Wanted, random_block, rollout

PLANS = ["0+1+2+3+vae", "0+1,2+3+vae", "0+1,2+3,vae", "0,1,2,3,vae", "0,1,2,3,vae1,vae2", "0+1,2+3+vae1,vae2"]
Parts = tuple[Engine, LineSpec]
KINDS = {"native": native_loop.NativeStageLoop, "python": loop.StageLoop}
kind = "native"  # of the lines that `make_line` makes


@pytest.fixture(scope="module", params=KINDS)
def parts(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Parts]:
    global kind
    kind = request.param
    if kind == "native" and (fault := native_loop.native_fault(torch.device("cpu"))):
        pytest.skip(fault)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    engine = Engine.load(checkpoint, device="cpu", dtype=torch.float32, stream=StreamConfig())
    config, geometry = engine.dit.config, Geometry(8, 8, engine.dit.config.head_dim)
    audio = (1, config.audio_states, config.audio_dim, engine.stream.block_frames)
    yield engine, LineSpec.make(geometry, engine.stream, audio, vae=engine.vae.config)
    torch.set_num_threads(before)


def make_line(parts: Parts, plan: str, **options: Any) -> Pipeline:
    engine, spec = parts
    planned = parse_plan(plan, ["cpu"] * (plan.count(",") + 1))
    stages = [Stage(part, spec, engine.dit, engine.vae, torch.float32) for part in planned.stages]
    line = local_pipeline(planned, spec, stages, native=kind == "native", **options)
    assert all(type(worker.loop) is KINDS[kind] for worker in line.workers)  # type: ignore[attr-defined]
    return line


def stages_of(line: Pipeline) -> list[Stage]:
    return [worker.loop.stage for worker in line.workers]  # type: ignore[attr-defined]


def session(parts: Parts, rng: torch.Generator, blocks: int) -> tuple[Tensors, list[Wanted]]:
    engine, spec = parts
    given = {"text": torch.randn(7, engine.dit.config.text_dim, generator=rng)}
    given |= {"reference": torch.randn(16, 1, 8, 8, generator=rng), "motion": torch.randn(16, 19, 8, 8, generator=rng)}
    return given, [random_block(spec, rng) for _ in range(blocks)]


def ask(line: Pipeline, serial: int, number: int, block: Wanted) -> Future[Any]:
    return line.request(serial, number, {"latent": block.noise, "audio": block.audio}, block.distances)


def videos(line: Pipeline, serial: int, blocks: list[Wanted], first: int = 0) -> list[np.ndarray]:
    futures = [ask(line, serial, first + number, block) for number, block in enumerate(blocks)]
    return [future.result(timeout=120) for future in futures]


def expected(parts: Parts, given: Tensors, blocks: list[Wanted]) -> list[np.ndarray]:
    engine, spec = parts
    return [frames for frames, _ in rollout(spec, engine.dit, engine.vae, given, blocks)]


def equal(got: list[np.ndarray], exact: list[np.ndarray]) -> bool:
    return len(got) == len(exact) and all(map(np.array_equal, got, exact))


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_equals_the_sequential_rollout(parts: Parts, plan: str, rng: torch.Generator) -> None:
    given, blocks = session(parts, rng, 13)
    line = make_line(parts, plan)
    got = videos(line, line.open(given), blocks)
    line.close()
    assert equal(got, expected(parts, given, blocks))


def test_pieces_of_a_vae_hand_over_all_that_they_compute(parts: Parts, rng: torch.Generator) -> None:
    engine, spec = parts
    vae = VAE.load(open_pth(engine.loader.files.vae), dtype=torch.bfloat16)  # rounds less on a CPU than a handoff would
    whole, first, second = (
        Stage(StagePlan((), piece, "cpu"), spec, None, vae, torch.bfloat16) for piece in ("vae", "vae1", "vae2")
    )
    given, blocks = session(parts, rng, 3)
    for stage in (whole, first, second):
        stage.open(0, given)
    for number, block in enumerate(blocks):
        for stage in (whole, first):
            stage.parcel.fill({"latent": block.noise})
        video = whole.decode(0, number)
        assert first.decode(0, number) is None
        second.parcel.fill(first.outgoing.parts)
        got = second.decode(0, number)
        assert video is not None and got is not None and torch.equal(got, video)


def test_sessions_on_one_line_do_not_mix(parts: Parts, rng: torch.Generator) -> None:
    line, speakers = make_line(parts, "0+1,2+3,vae", places=3), [session(parts, rng, 7) for _ in range(3)]
    serials = [line.open(given) for given, _ in speakers]
    futures = [[ask(line, serial, n, blocks[n]) for serial, (_, blocks) in zip(serials, speakers, strict=True)]
               for n in range(7)]  # fmt: skip
    for i, (given, blocks) in enumerate(speakers):
        assert equal([row[i].result(timeout=120) for row in futures], expected(parts, given, blocks))
    line.close()


def test_a_line_whose_end_was_cut_off_can_be_closed_again(
    parts: Parts, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = make_line(parts, "0+1,2+3+vae")
    line.open(session(parts, rng, 0)[0])
    threads = [worker._thread for worker in line.workers]  # type: ignore[attr-defined]

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            line.close()
    line.close()
    assert not any(thread.is_alive() for thread in threads)


def test_a_place_is_used_again_and_holds_nothing_of_the_session_before(parts: Parts, rng: torch.Generator) -> None:
    line = make_line(parts, "0+1,2+3+vae")
    first, second = session(parts, rng, 5), session(parts, rng, 6)
    serial = line.open(first[0])
    with pytest.raises(InputError, match="all 1 places are taken"):
        line.open(second[0])
    videos(line, serial, first[1])
    ask(line, serial, 5, first[1][0])  # left behind
    line.close_session(serial)
    assert equal(videos(line, line.open(second[0]), second[1]), expected(parts, *second))
    with pytest.raises(LiveRelayError, match="closed"):
        ask(line, serial, 6, first[1][0])
    line.close()


@pytest.mark.parametrize(
    ("cut", "here", "there"),
    [(1, "0,1+2,3+vae", "0+1+2,3,vae"), (4, "0,1+2,3+vae", "0+1+2,3,vae"), (7, "0,1+2,3+vae", "0+1+2,3,vae"),
     (3, "0+1,2+3+vae1,vae2", "0+1+2+3+vae"), (5, "0+1,2+3,vae", "0,1+2+3,vae1,vae2")],
)  # fmt: skip
def test_a_saved_session_goes_on_under_another_plan(
    parts: Parts, rng: torch.Generator, cut: int, here: str, there: str
) -> None:
    given, blocks = session(parts, rng, 9)
    line = make_line(parts, here)
    serial = line.open(given)
    before = videos(line, serial, blocks[:cut])
    saved = line.save(serial).result(timeout=60)
    reference = line.reference(serial)
    line.close()
    tensors = {name: tensor for part in saved.values() for name, tensor in part.tensors.items()}
    numbers = {name: number for part in saved.values() for name, number in part.numbers.items()}
    assert reference is not None
    other = make_line(parts, there)
    serial = other.open(given, state=(tensors | {"new_reference": reference}, numbers))
    after = videos(other, serial, blocks[cut:], cut)
    other.close()
    assert equal(before + after, expected(parts, given, blocks))


def test_a_failing_block_ends_its_session_alone(
    parts: Parts, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = make_line(parts, "0+1,2+3+vae", places=2)
    (good, blocks), (bad, others) = session(parts, rng, 6), session(parts, rng, 6)
    well, ill = line.open(good), line.open(bad)
    stage = stages_of(line)[0]
    denoise = stage.denoise

    def fail(place: int, block: Block, on_step: Any = None) -> None:
        if block.serial == ill and block.block == 2:
            raise RuntimeError("lost")
        denoise(place, block, on_step)

    monkeypatch.setattr(stage, "denoise", fail)
    lost = [ask(line, ill, n, block) for n, block in enumerate(others[:4])]
    assert equal(videos(line, well, blocks), expected(parts, good, blocks))
    with pytest.raises(RuntimeError, match="lost"):
        lost[2].result(timeout=60)
    with pytest.raises(RuntimeError, match="lost"):
        ask(line, ill, 4, others[4])
    line.close_session(ill)
    assert equal(videos(line, line.open(bad), others), expected(parts, bad, others))
    line.close()


def test_the_new_reference_is_prefilled_once_and_early(
    parts: Parts, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    line = make_line(parts, "0,1,2,3,vae", observe=events.append)
    calls: list[tuple[str, int]] = []
    for stage in stages_of(line)[:4]:
        prepare, denoise = stage.prepare_sink, stage.denoise
        name = stage.plan.name
        monkeypatch.setattr(stage, "prepare_sink", lambda *a, f=prepare, n=name: (calls.append((n, -1)), f(*a))[1])
        monkeypatch.setattr(stage, "denoise", lambda p, b, k=None, f=denoise, n=name: (
            calls.append((n, b.block)), f(p, b, k))[1])  # fmt: skip
    given, blocks = session(parts, rng, 7)
    videos(line, line.open(given), blocks)
    line.close()
    for name in "0123":
        order = [block for stage, block in calls if stage == name]
        assert [block for block in order if block >= 0] == list(range(7)) and order.count(-1) == 1
        assert 0 < order.index(-1) <= order.index(4), order
    assert sum(isinstance(event, Clean) for event in events) == 1
    done = [event for event in events if isinstance(event, Done)]
    assert len(done) == 7 * 5 and all(d.asked <= d.begun <= d.computed <= d.ended for d in done)


def test_sinks_of_two_sessions_do_not_wait_for_each_other(parts: Parts, rng: torch.Generator) -> None:
    line, speakers = make_line(parts, "0+1,2+3+vae", places=2), [session(parts, rng, 6) for _ in range(2)]
    stopped, going = (line.open(given) for given, _ in speakers)
    before = videos(line, stopped, speakers[0][1][:2])  # its sink is in the shadow, and it stands still
    assert equal(videos(line, going, speakers[1][1]), expected(parts, *speakers[1]))
    assert equal(before + videos(line, stopped, speakers[0][1][2:], 2), expected(parts, *speakers[0]))
    line.close()


def memory(line: Pipeline) -> list[int]:
    """Where everything that a stage keeps lies."""
    pointers = []
    for stage in stages_of(line):
        kept = [stage.parcel.flat, *stage.shadow.tensors().values()] if stage.dit else [stage.parcel.flat]
        kept += [tensor for place in stage.places.values() for tensor in place.tensors().values()]
        pointers += [tensor.data_ptr() for tensor in kept]
    return pointers


def test_a_hundred_blocks_need_no_new_storage(parts: Parts, rng: torch.Generator) -> None:
    line = make_line(parts, "0+1,2+3+vae")
    given, blocks = session(parts, rng, 5)
    serial = line.open(given)
    videos(line, serial, blocks)

    def living() -> int:
        gc.collect()
        tensors = [value for value in gc.get_objects() if type(value) is torch.Tensor]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    places, size = memory(line), living()
    for number in range(5, 105):
        ask(line, serial, number, blocks[number % 5]).result(timeout=60)
    assert memory(line) == places and living() <= size
    line.close()


def test_a_closed_line_says_so_to_everybody(parts: Parts, rng: torch.Generator) -> None:
    line = make_line(parts, "0+1,2+3+vae")
    given, blocks = session(parts, rng, 3)
    serial = line.open(given)
    futures = [ask(line, serial, n, block) for n, block in enumerate(blocks)]
    line.close()
    assert all(future.done() for future in futures)
    with pytest.raises(LiveRelayError, match="closed"):
        line.open(given)
    line.close()


@pytest.mark.parametrize("whole_line", [False, True])
def test_who_waits_for_a_session_that_is_closed_is_told(
    parts: Parts, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, whole_line: bool
) -> None:
    line = make_line(parts, "0+1,2+3+vae", places=2)
    busy, waiting = threading.Event(), threading.Event()
    given, blocks = session(parts, rng, 5)
    asks, saves = line.open(given), line.open(given)

    def save(place: int) -> tuple[Tensors, dict[str, int]]:
        busy.set()
        waiting.wait(60)
        return {}, {}

    monkeypatch.setattr(stages_of(line)[0], "save", save)
    saved = line.save(saves)
    with pytest.raises(LiveRelayError, match="cannot be saved"):
        line.save(saves)
    wanted = [ask(line, asks, n, block) for n, block in enumerate(blocks)]
    assert busy.wait(60)
    closing = threading.Thread(target=line.close)
    if whole_line:
        closing.start()
    else:
        line.close_session(asks)
        line.close_session(saves)
    for future in (saved, *wanted):
        with pytest.raises(LiveRelayError, match="closed"):
            future.result(timeout=30)
    waiting.set()
    if whole_line:
        closing.join(60)
    line.close()


def test_a_stage_that_cannot_begin_says_so(
    parts: Parts, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(device: torch.device) -> None:
        raise ValueError("no such device")

    for module in (loop, native_loop):
        monkeypatch.setattr(module, "set_device", fail)
    line = make_line(parts, "0+1,2+3+vae")
    given, blocks = session(parts, rng, 1)
    with pytest.raises(ValueError, match="no such device"):
        ask(line, line.open(given), 0, blocks[0]).result(timeout=60)
    line.close()


def test_latents_of_another_size_are_refused(parts: Parts, rng: torch.Generator) -> None:
    line = make_line(parts, "0+1+2+3+vae")
    given, _ = session(parts, rng, 0)
    with pytest.raises(InputError, match=r"reference latents have shape \[16, 1, 8, 16\]"):
        line.open(given | {"reference": torch.zeros(16, 1, 8, 16)})
    line.close()
