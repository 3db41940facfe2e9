"""What only a GPU can show of the stage loop: graphs equal launches, steady blocks neither wait nor allocate."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.line_14b import CHECKED, STEADY, Watched
from bench.random_model import Model, counters, launches
from liverelay.engine import Engine
from liverelay.engine.models.workspace import STAGED, Staging
from liverelay.engine.relay.graph import Graphs
from liverelay.engine.relay.handoff import LocalLink
from liverelay.engine.relay.native_loop import native_fault
from liverelay.engine.relay.pipeline import local_pipeline
from liverelay.engine.relay.plan import Plan, StagePlan, parse_plan
from liverelay.engine.relay.remote import self_loop
from liverelay.engine.relay.stage import Stage, set_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
ALL = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def device() -> torch.device:
    found = torch.device("cuda", torch.cuda.current_device())
    set_device(found)
    return found


@pytest.fixture(scope="module", params=["", "products", "all"])
def model(request: pytest.FixtureRequest, device: torch.device) -> Iterator[Model]:
    if request.param and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("this GPU has no FP8")
    with torch.inference_mode():
        yield Model("tiny", device, request.param, CHECKED)


@pytest.fixture
def stage(model: Model) -> Stage:
    return model.stage(StagePlan(ALL, "vae", str(model.device)))


def work(model: Model, stage: Stage, first: int, end: int) -> Iterator[torch.Tensor]:
    """Blocks of the session in place 0; the video of each, on the device."""
    for block in range(first, end):
        stage.parcel.fill(model.sound[block % len(model.sound)])
        stage.denoise(0, model.command(0, block))
        video = stage.decode(0, block)
        assert video is not None
        yield video


@torch.inference_mode()
def videos(model: Model, stage: Stage) -> list[torch.Tensor]:
    stage.open(0, model.given)
    return [video.cpu() for video in work(model, stage, 0, CHECKED)]


@pytest.mark.parametrize("known", [False, True])
def test_captured_blocks_equal_those_launched_one_by_one(model: Model, stage: Stage, known: bool) -> None:
    """known: the place's graphs were made before its first block, or as its blocks came."""
    stage.graphs.enabled = False
    eager = videos(model, stage)
    stage.graphs = Graphs(model.device)
    if known:
        with torch.inference_mode():
            stage.warm_up(0)
    captured, made = videos(model, stage), set(stage.graphs.captured)
    assert stage.graphs.enabled, "the stage could not be captured"
    assert all(map(torch.equal, eager, captured))
    again = videos(model, stage)  # another session in the same place
    assert all(map(torch.equal, eager, again)) and set(stage.graphs.captured) == made
    # Sound; steps x (ring slots and fill levels, but for FP8 arenas, of which all sizes are read on the device); video.
    assert len(made) == 1 + len(ALL) * (1 if model.fp8 == "all" else 7) + 1


@torch.inference_mode()
def test_steady_blocks_neither_wait_nor_allocate(model: Model, stage: Stage) -> None:
    stage.open(0, model.given)
    for _ in work(model, stage, 0, STEADY):
        pass
    given = LocalLink(model.spec.parcel, model.device, model.dtype).prepare(model.sound[0])
    assert all(part.is_pinned() and part.dtype == model.dtype for part in given.values())
    torch.cuda.synchronize(model.device)
    before = counters(model.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for block in range(STEADY, STEADY + 100):
            stage.parcel.fill(given)
            stage.denoise(0, model.command(0, block))
            stage.decode(0, block)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counters(model.device) == before


@torch.inference_mode()
def test_a_captured_block_is_a_few_calls(model: Model, stage: Stage) -> None:
    stage.graphs.enabled = False
    stage.open(0, model.given)

    def block() -> None:
        for _ in work(model, stage, STEADY, STEADY + 1):
            pass

    block()
    eager = launches(block, model.device)
    stage.graphs = Graphs(model.device)
    block()
    captured = launches(block, model.device)
    if not eager["host"]:
        pytest.skip("the profiler sees no calls here")
    # Copies in, a copy and a graph for each step, graphs of sound and video; PyTorch may seed each graph's generator.
    assert captured["host"] <= 40 < eager["host"] / 4


def test_a_whole_line_does_not_allocate_and_neither_nccl_nor_two_pieces_of_the_vae_change_a_thing(model: Model) -> None:
    stages: dict[str, list[Stage]] = {"0+1,2+3,vae": [], "0+1,2+3+vae1,vae2": []}
    frames: list[list[Any]] = []
    for plan, make_link in itertools.product(stages, ({}, {"link": self_loop})):
        watched = Watched(model, plan, stages[plan], **make_link)
        stages[plan] = watched.stages
        try:
            watched.session(1)
            got, found = watched.session(20)
        finally:
            watched.line.close()
        frames.append(got)
        assert not any(found["allocated"].values()), found["allocated"]
    torch.distributed.destroy_process_group()
    assert all(all(map(np.array_equal, frames[0], other)) for other in frames[1:])


def test_a_gpu_without_its_number_is_the_current_one(model: Model) -> None:
    stage = model.stage(StagePlan(ALL, "vae", "cuda"))
    line = local_pipeline(Plan((stage.plan,)), model.spec, [stage])
    serial = line.open(model.given)
    frames = line.request(serial, 0, model.sound[0], model.distances[0]).result(timeout=120)
    line.close()
    assert stage.device == model.device and frames.dtype == np.uint8 and len(frames) == 9


def test_work_that_waits_for_the_device_goes_on_without_graphs(
    device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    value, graphs = torch.zeros(4, device=device), Graphs(device)

    def waits() -> None:
        value.add_(1)
        value.sum().item()

    for _ in range(2):
        graphs.run("waits", waits)
    assert not graphs.enabled and len(caplog.records) == 1 and value.tolist() == [2.0] * 4
    torch.cuda.empty_cache()  # asserts that no capture is under way
    other = Graphs(device)
    for _ in range(3):
        other.run("adds", lambda: value.add_(1).mul_(torch.ones_like(value)))
    assert other.enabled and len(other.captured) == 1 and value.tolist() == [5.0] * 4


def test_the_engine_as_it_comes_makes_the_same_video_twice(checkpoint: Path, numbers: np.random.Generator) -> None:
    for library in ("transformers", "PIL", "ftfy"):
        pytest.importorskip(library)
    engine = Engine.load(checkpoint)
    picture = numbers.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    sound = 0.1 * numbers.standard_normal(3 * 16000).astype(np.float32)
    videos = []
    for _ in range(2):
        with engine.open(picture, "someone speaks", audio=sound, size=(64, 64)) as session:
            videos.append([chunk.frames for chunk in session.frames()])
    engine.close()
    assert sum(map(len, videos[0])) == 75 and all(map(np.array_equal, *videos))


@pytest.mark.parametrize("plan", ["0+1+2+3+vae", "0+1,2+3,vae", "0+1,2+3+vae1,vae2"])
def test_the_loop_in_cpp_gives_the_frames_of_its_twin(model: Model, plan: str) -> None:
    if fault := native_fault(model.device):
        pytest.skip(fault)
    planned = parse_plan(plan, [str(model.device)] * (plan.count(",") + 1))
    stages, frames = [model.stage(part) for part in planned.stages], list[list[Any]]()
    for native in (False, True, True):  # the second time all graphs are there from the start
        line = local_pipeline(planned, model.spec, stages, native=native)
        serial = line.open(model.given)
        futures = [line.request(serial, block, model.sound[block % len(model.sound)],
                                model.distances[block % len(model.distances)]) for block in range(20)]  # fmt: skip
        frames.append([future.result(timeout=300) for future in futures])
        line.close()
    assert all(map(np.array_equal, frames[0], frames[1])) and all(map(np.array_equal, frames[0], frames[2]))


def test_staged_writes_keep_their_order_however_far_the_host_is_ahead(device: torch.device) -> None:
    target = torch.zeros(5, device=device)
    staging, seen = Staging(target), torch.zeros(3 * STAGED, 5, device=device)
    slow = torch.randn(2048, 2048, device=device)
    for number in range(len(seen)):
        for _ in range(3):
            slow = (slow @ slow).clamp_(-1, 1)
        draft = torch.full((5,), float(number))
        staging.write(draft)
        draft.fill_(-1)  # the caller's memory is free again
        seen[number].copy_(target)
    assert torch.equal(seen[:, 0].cpu(), torch.arange(float(len(seen)))) and bool((seen == seen[:, :1]).all())
