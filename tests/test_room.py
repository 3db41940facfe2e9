"""Sessions that do not fit are refused with the numbers, before any of their memory is allocated."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from liverelay.engine.checkpoint import find_checkpoint
from liverelay.engine.config import StreamConfig
from liverelay.engine.engine import Engine
from liverelay.engine.errors import BusyError
from liverelay.engine.models.dit import DiT
from liverelay.engine.models.geometry import Geometry
from liverelay.engine.models.vae import VAE
from liverelay.engine.models.weights import open_tensors
from liverelay.engine.relay import stage as stages
from liverelay.engine.relay.group import Ready
from liverelay.engine.relay.pipeline import local_pipeline
from liverelay.engine.relay.plan import parse_plan
from liverelay.engine.relay.ranks import Leader
from liverelay.engine.relay.room import (
    GIB,
    SPARE_BYTES,
    Room,
    available_host_bytes,
    check_room,
    free_bytes,
    refused_when_full,
)
from liverelay.engine.relay.stage import LineSpec, Place, Stage
from liverelay.engine.steps import StageSet

CPU = "cpu"


def make_stages(checkpoint: Path, plan: str, dtype: torch.dtype = torch.float32, *, fp8: bool = False) -> list[Stage]:
    files = find_checkpoint(checkpoint)
    source, config = files.open_dit()
    dit = DiT.load(source, config, dtype=dtype, fp8_attention=fp8)
    vae = VAE.load(open_tensors(files.vae), dtype=dtype)
    stream = StreamConfig()
    audio = (1, config.audio_states, config.audio_dim, stream.block_frames)
    spec = LineSpec.make(Geometry(8, 16, config.head_dim), stream, audio, vae=vae.config)
    return [Stage(part, spec, dit, vae, dtype) for part in parse_plan(plan, [CPU] * (plan.count(",") + 1)).stages]


def given(stage: Stage, rng: torch.Generator) -> dict[str, torch.Tensor]:
    config, (h, w) = stage.dit.config, (8, 16)  # type: ignore[union-attr]
    latents = {name: torch.randn(16, n, h, w, generator=rng) for name, n in (("reference", 1), ("motion", 19))}
    return latents | {"text": torch.randn(3, config.text_dim, generator=rng)}


@pytest.mark.parametrize(("dtype", "fp8"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("plan", ["0+1+2+3+vae", "0,1+2,3+vae1,vae2"])
def test_a_stage_knows_the_memory_of_a_session(checkpoint: Path, plan: str, dtype: torch.dtype, fp8: bool) -> None:
    for stage in make_stages(checkpoint, plan, dtype, fp8=fp8):
        place = Place(stage)
        real = sum(tensor.untyped_storage().nbytes() for tensor in place.tensors().values())
        if place.text is not None:
            real += place.text.k.nbytes + place.text.v.nbytes
        assert stage.place_bytes == real
        assert stage.room().places == frozenset()


@pytest.mark.parametrize("free", [0, 1, 2, 3])
def test_as_many_sessions_are_let_in_as_fit(checkpoint: Path, rng: torch.Generator, free: int,
                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Two stages share the device; a third session would fit by either stage's own count alone."""
    both = make_stages(checkpoint, "0+1,2+3+vae")
    one = sum(stage.place_bytes for stage in both)
    def free_bytes(device: torch.device) -> int:  # of a device with room for `free` sessions and nearly one more
        return free * one + one - 1 - sum(stage.place_bytes * len(stage.places) for stage in both)

    monkeypatch.setattr(stages, "free_bytes", free_bytes)
    line = local_pipeline(parse_plan("0+1,2+3+vae", [CPU, CPU]), both[0].spec, both, places=5)
    tensors = given(both[0], rng)
    serials = [line.open(tensors) for _ in range(free)]
    with pytest.raises(BusyError, match=r"no session can be opened: one needs 0\.\d\d GiB on cpu"):
        line.open(tensors)
    assert line.sessions == free and len(line.scheduler._clients) == free
    if serials:
        line.close_session(serials[0])
        line.open(tensors)  # in the place, and the memory, of the one that was closed
    line.close()
    assert all(len(stage.places) <= free for stage in both)


def test_a_place_that_could_not_be_allocated_is_asked_for_anew(
    checkpoint: Path, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others took the memory between the question and the allocation, and have it for a while."""
    both, free = make_stages(checkpoint, "0+1,2+3+vae"), [1 << 40]
    monkeypatch.setattr(stages, "free_bytes", lambda device: free[0])
    line = local_pipeline(parse_plan("0+1,2+3+vae", [CPU, CPU]), both[0].spec, both, places=2)
    make_place, tensors = stages.Place, given(both[0], rng)

    def none_left(stage: Stage) -> Place:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(stages, "Place", none_left)
    serial, deadline = line.open(tensors), time.monotonic() + 60
    while line._clients[serial].error is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert isinstance(line._clients[serial].error, torch.OutOfMemoryError)
    line.close_session(serial)
    monkeypatch.setattr(stages, "Place", make_place)
    free[0] = 0
    with pytest.raises(BusyError, match="GiB are free"):
        line.open(tensors)
    free[0] = 1 << 40
    serial = line.open(tensors)
    assert set(line.save(serial).result(timeout=60)) == {0, 1}  # its memory is there by now
    line.close_session(serial)
    free[0] = 0
    line.open(tensors)  # in the memory that the place has
    line.close()


def test_who_cannot_be_asked_for_its_room_leaves_no_session_behind(
    checkpoint: Path, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(device: torch.device) -> int:
        raise RuntimeError("CUDA error: an illegal instruction was encountered")

    (only,) = make_stages(checkpoint, "0+1+2+3+vae")
    line = local_pipeline(parse_plan("0+1+2+3+vae", [CPU]), only.spec, [only])
    with monkeypatch.context() as patch:
        patch.setattr(stages, "free_bytes", lost)
        with pytest.raises(RuntimeError, match="illegal instruction"):
            line.open(given(only, rng))
    line.open(given(only, rng))
    line.close()


def test_memory_of_cuda_graphs_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 1)

    def segment(at: int, pool: tuple[int, int], held: int, used: int) -> dict[str, Any]:
        return {"device": at, "segment_pool_id": pool, "total_size": held * GIB, "allocated_size": used * GIB}

    segments = [segment(1, (0, 0), 9, 5), segment(1, (0, 3), 4, 1), segment(0, (0, 4), 7, 0)]
    for name, value in (
        ("mem_get_info", (10 * GIB, 80 * GIB)), ("memory_reserved", 13 * GIB), ("memory_allocated", 6 * GIB)
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert free_bytes(device) == (10 + 4) * GIB - SPARE_BYTES


@pytest.mark.parametrize("driven", [False, True], ids=["a line", "from outside"])
def test_a_place_whose_memory_could_not_be_had_is_looked_at_again(
    checkpoint: Path, rng: torch.Generator, driven: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory may be gone between the look and the allocation; places that have theirs are taken in any case."""
    (only,) = make_stages(checkpoint, "0+1+2+3+vae")
    line = local_pipeline(parse_plan("0+1+2+3+vae", [CPU]), only.spec, [only], places=2)
    tensors, outside, free = given(only, rng), StageSet([only], 2), [2 * only.place_bytes]
    monkeypatch.setattr(stages, "free_bytes", lambda device: free[0])
    made, no_memory = {0: Place(only)}, torch.OutOfMemoryError("out of memory")
    monkeypatch.setattr(stages, "Place", mock.Mock(side_effect=no_memory))
    take, give_back = (outside.take_place, outside.give_back) if driven else (
        lambda: line.open(tensors), line.close_session)  # fmt: skip
    give_back(take())
    free[0] = 0
    with pytest.raises(BusyError, match="GiB are free"):
        take()
    only.places = made
    take()
    line.close()


def test_a_session_driven_from_outside_is_refused_as_well(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("transformers", "ftfy", "PIL"):
        pytest.importorskip(library)
    engine = Engine.load(checkpoint, device=CPU, dtype=torch.float32)
    monkeypatch.setattr(stages, "free_bytes", lambda device: 1000)
    picture = torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()
    with pytest.raises(BusyError, match="GiB are free"):
        engine.open_steps(picture, "someone", size=(64, 64))
    with pytest.raises(BusyError, match="GiB are free"):
        engine.open(picture, "someone", size=(64, 64))
    engine.close()


def test_a_rank_says_what_room_it_has_when_its_stage_is_built() -> None:
    over = threading.Event()
    messages = iter([Ready(), Ready("", Room("cuda:0", 6 * GIB, 10 * GIB))])

    def get(timeout_s: float) -> Ready:
        message = next(messages, None)
        if message is None:
            over.wait(60)
            raise EOFError
        return message

    channel = SimpleNamespace(put=lambda message: None, get=get)
    group: Any = SimpleNamespace(rank=0, world=2, timeout_s=1.0, channels=[channel])
    leader = Leader(group, parse_plan("0+1,2+3+vae", [CPU, CPU]))
    (rank,) = leader.workers
    assert not rank.ready.get(timeout=60).fault
    check([rank.room()], {0})
    with pytest.raises(BusyError, match=r"one needs 6\.00 GiB on cuda:0 of stage 2\+3\+vae, 2 are coming"):
        check([rank.room()], {0, 1})
    rank.over = True
    over.set()


def test_a_gpu_whose_memory_is_full_refuses_who_comes_and_says_what_helps() -> None:
    with pytest.raises(BusyError, match="no session can be opened: CUDA out of memory; close a session"), \
            refused_when_full():  # fmt: skip
        raise torch.OutOfMemoryError("CUDA out of memory\nTried to allocate 20 MiB")
    with pytest.raises(ValueError, match="other"), refused_when_full():
        raise ValueError("other")


def check(rooms: list[Room], places: set[int]) -> None:
    """The last of the places is the one that a session is asked for."""
    last = max(places)
    check_room([lambda room=room: room for room in rooms], places - {last}, last)  # type: ignore[misc]


def test_devices_are_counted_apart_and_unknown_memory_refuses_nobody() -> None:
    first, second = Room("cuda:0", 6 * GIB, 10 * GIB), Room("cuda:1", GIB, 2 * GIB, frozenset({0}))
    check([first, second], {0})
    check([Room("cpu", 6 * GIB, None)], set(range(100)))
    with pytest.raises(BusyError, match=r"one needs 6\.00 GiB on cuda:0, 2 are coming, and 10\.00 GiB are free"):
        check([first, second], {0, 1})
    with pytest.raises(BusyError, match="cuda:1"):
        check([Room("cuda:0", 1, 1000), second], {0, 1, 2, 3})


def test_host_memory_is_known_on_linux() -> None:
    found = available_host_bytes()
    assert found is None or 1 << 20 < found < 1 << 50
