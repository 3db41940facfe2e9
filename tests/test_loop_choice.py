"""Which loop a device's stages get, what a rank that ends early says, and when results are told."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import stage_loop as bench
from liverelay.engine import native
from liverelay.engine.engine import Engine
from liverelay.engine.errors import StageLost
from liverelay.engine.relay import loop as loops
from liverelay.engine.relay import native_loop
from liverelay.engine.relay.handoff import LocalLink, Parcel
from liverelay.engine.relay.loop import StageLoop
from liverelay.engine.relay.messages import Block, Done, Event, Failed, Save, Saved, Stop
from liverelay.engine.relay.native_loop import NativeStageLoop, make_loop, native_fault, runs_native
from liverelay.engine.relay.pipeline import LocalWorker
from liverelay.engine.relay.plan import parse_plan
from liverelay.engine.relay.ranks import Leader, portable

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
WAIT_S = 60
needs_native = pytest.mark.skipif(bool(native_fault(CPU)), reason="the compiled module was not built")


# -- which loop --------------------------------------------------------------------------------------------------------


def test_stages_on_a_cpu_run_in_python(checkpoint: Path) -> None:
    for library in ("transformers", "ftfy"):
        pytest.importorskip(library)
    engine = Engine.load(checkpoint, device="cpu,cpu", dtype=torch.float32)
    line: Any = engine.line(8, 8)
    assert [type(worker.loop) for worker in line.workers] == [StageLoop, StageLoop]
    assert type(line.entry) is LocalLink
    engine.close()


@needs_native
@pytest.mark.parametrize("fault", ["", "no CUDA runtime here"])
def test_stages_on_a_gpu_run_in_cpp_where_that_can_be(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(torch.cuda.CUDAGraph, "raw_cuda_graph_exec", None, raising=False)
    monkeypatch.setattr(native, "module", lambda: SimpleNamespace(StageLoop=None, cuda_open=lambda: fault))
    assert native_fault(GPU) == fault and runs_native(GPU) == (not fault)
    assert not runs_native(CPU)


def test_without_the_compiled_module_a_gpu_has_the_loop_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liverelay.engine._C", None)
    assert "was not built" in native_fault(GPU) and not runs_native(GPU)


@needs_native
def test_a_link_in_cpp_is_used_on_its_own_gpu_whatever_the_thread_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the leader, whose thread is on the first GPU: every GPU's default stream has the number 0."""
    current, seen = [0], list[tuple[str, int]]()

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    def noted(name: str) -> Callable[..., int]:
        return lambda *_: seen.append((name, current[0])) or 0  # type: ignore[func-returns-value]

    link: Any = native_loop.NativeLink(bench.SHAPES, CPU, torch.bfloat16)
    names = ("take_free", "give_full", "take_full", "give_free")
    link.device, link.native = torch.device("cuda", 1), SimpleNamespace(**{name: noted(name) for name in names})
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    parcel = Parcel(bench.SHAPES, CPU, torch.bfloat16)
    link.send(parcel)
    link.receive(parcel)
    assert seen == [(name, 1) for name in names] and current == [0]


# -- a rank that ends early --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_rank_that_ends_before_the_leader_knows_all_of_them_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(timeout_s: float) -> Any:
        raise EOFError

    channel = SimpleNamespace(put=lambda message: None, get=gone)
    group: Any = SimpleNamespace(rank=0, world=2, timeout_s=1.0, channels=[channel])
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda self: (start(self), self.join(10)))
    with pytest.raises(StageLost, match="rank 1"):
        Leader(group, parse_plan("0+1+2,3+vae", ["cpu", "cpu"]))


# -- when results are told ---------------------------------------------------------------------------------------------


class DeviceEvent:
    """A point on a device's stream that the test lets the device reach, or fails to."""

    def __init__(self) -> None:
        self.reached, self.error = threading.Event(), ""

    def synchronize(self) -> None:
        assert self.reached.wait(WAIT_S)
        if self.error:
            raise RuntimeError(self.error)

    def elapsed_time(self, other: DeviceEvent) -> float:
        return 1.0


class LaunchingLoop(StageLoop):
    """The loop as it runs on a GPU: work is launched, and the device finishes it some time later."""

    def __init__(self, *way: Any) -> None:
        super().__init__(*way)
        self.events: list[DeviceEvent] = []

    @property
    def _asynchronous(self) -> bool:
        return True

    def _event(self) -> DeviceEvent:
        self.events.append(DeviceEvent())
        return self.events[-1]

    def finished(self, block: int) -> DeviceEvent:
        """Recorded behind a block; the one before it is where the block begins."""
        return self.events[2 * block + 1]


class Launching:
    """A launching loop with its links, and what it told."""

    def __init__(self, work: Callable[[int], object] = lambda block: None) -> None:
        self.stage: Any = bench.FixedStage(0.0)
        self.stage.denoise = lambda place, command, keep: work(command.block)
        self.source = LocalLink(bench.SHAPES, CPU, torch.bfloat16)
        self.told: list[Event] = []
        self.changed = threading.Condition()
        self.loop = LaunchingLoop(0, self.stage, self.source, None, self.take)
        self.worker = LocalWorker(self.loop)

    def take(self, event: Event) -> None:
        with self.changed:
            self.told.append(event)
            self.changed.notify()

    def ask(self, block: int) -> None:
        self.loop.put(Block(0, 7, block, ()))
        self.source.send(self.stage.parcel)

    def wait(self, kind: type[Event], count: int = 1) -> list[Any]:
        def found() -> list[Event]:
            return [event for event in self.told if isinstance(event, kind)]

        with self.changed:
            assert self.changed.wait_for(lambda: len(found()) >= count, WAIT_S)
            return found()


def test_a_result_is_told_when_the_device_has_it_though_the_next_block_is_being_launched() -> None:
    told, launching = threading.Event(), threading.Event()

    def work(block: int) -> None:
        if block == 1:
            launching.set()
            assert told.wait(WAIT_S)

    line = Launching(work)
    line.ask(0)
    line.ask(1)
    assert launching.wait(WAIT_S)
    line.loop.finished(0).reached.set()
    assert [event.block for event in line.wait(Done)] == [0]
    told.set()
    line.loop.put(Stop())
    while len(line.loop.events) < 4:  # until block 1 was launched
        threading.Event().wait(0.001)
    line.loop.finished(1).reached.set()
    line.worker.close(broken=False)
    assert [event.block for event in line.wait(Done, 2)] == [0, 1]


def test_the_loop_is_one_block_ahead_of_the_device() -> None:
    launched = [threading.Event() for _ in range(3)]
    line = Launching(lambda block: launched[block].set())
    for block in range(3):
        line.ask(block)
    assert launched[1].wait(WAIT_S) and line.loop.working_since is not None
    assert not launched[2].wait(0.1) and not line.told
    line.loop.finished(0).reached.set()
    assert launched[2].wait(WAIT_S)
    line.loop.put(Stop())
    while len(line.loop.events) < 6:  # until block 2 was launched
        threading.Event().wait(0.001)
    for event in line.loop.events:
        event.reached.set()
    line.worker.close(broken=False)
    assert [event.block for event in line.wait(Done, 3)] == [0, 1, 2] and line.loop.working_since is None


def test_a_device_that_is_lost_ends_the_line_with_the_name_of_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Launching()
    line.ask(0)
    while len(line.loop.events) < 2:
        threading.Event().wait(0.001)
    monkeypatch.setattr(loops, "device_fault", lambda device: "CUDA error: an illegal instruction was encountered")
    event = line.loop.finished(0)
    event.error = "CUDA error: an illegal instruction was encountered\nCompile with ..."
    event.reached.set()
    failed = line.wait(Failed)[0]
    assert failed.serial == -1 and isinstance(failed.error, StageLost)
    assert str(failed.error) == "stage fixed has lost cpu: CUDA error: an illegal instruction was encountered"
    line.loop.put(Stop())
    line.worker.close(broken=True)


@pytest.mark.parametrize("in_cpp", [False, pytest.param(True, marks=needs_native)])
@pytest.mark.parametrize("fault", ["", "CUDA error: an illegal memory access was encountered"])
def test_an_error_costs_one_session_unless_it_costs_the_device(
    monkeypatch: pytest.MonkeyPatch, in_cpp: bool, fault: str
) -> None:
    def work(*_: object) -> None:
        raise RuntimeError("launch failed")

    for module in (loops, native_loop):
        monkeypatch.setattr(module, "device_fault", lambda device: fault)
    stage: Any = bench.FixedStage(0.0)
    stage.denoise = work
    told, changed = list[Event](), threading.Condition()

    def take(event: Event) -> None:
        with changed:
            told.append(event)
            changed.notify()

    link = native_loop.make_local_link(bench.SHAPES, CPU, torch.bfloat16, [CPU], in_cpp)
    worker = LocalWorker(make_loop(0, stage, link, None, take, native=in_cpp))
    assert isinstance(worker.loop, NativeStageLoop) == in_cpp
    worker.put(Block(0, 7, 0, ()))
    link.send(stage.parcel)
    with changed:
        assert changed.wait_for(lambda: any(isinstance(event, Failed) for event in told), WAIT_S)
    failed = next(event for event in told if isinstance(event, Failed))
    assert failed.serial == (-1 if fault else 7)
    assert str(failed.error) == (f"stage fixed has lost cpu: {fault}" if fault else "launch failed")
    worker.put(Stop())
    worker.close(broken=True)


@needs_native
@pytest.mark.parametrize("where", ["run", "take"])
@pytest.mark.parametrize("fault", ["", "CUDA error: an illegal instruction was encountered"])
def test_a_device_that_is_lost_under_a_loop_in_cpp_ends_the_line_with_the_name_of_its_stage(
    monkeypatch: pytest.MonkeyPatch, where: str, fault: str
) -> None:
    """Where no Python computes: as the loop waits for the device (run), and as it looks what is done (take)."""

    def fails(*_: object) -> None:
        raise RuntimeError("the device: an illegal instruction was encountered")

    monkeypatch.setattr(loops, "device_fault", lambda device: fault)
    told = list[Any]()
    link = native_loop.make_local_link(bench.SHAPES, CPU, torch.bfloat16, [CPU], True)
    stage: Any = bench.FixedStage(0.0)
    loop: Any = make_loop(0, stage, link, None, told.append, native=True)
    does_nothing: dict[str, Any] = dict.fromkeys(("run", "take", "end", "cancel"), lambda *_: None)
    loop._native = SimpleNamespace(**does_nothing | {where: fails})
    loop.run()
    (failed,) = told
    assert failed.serial == -1 and isinstance(failed.error, StageLost if fault else RuntimeError)
    assert str(failed.error).startswith(f"stage fixed has lost cpu: {fault}" if fault else "the device")


@pytest.mark.parametrize("kind", [Failed, Saved])
def test_whoever_is_told_of_a_stage_that_launches_may_close_it(kind: type[Event]) -> None:
    def work(block: int) -> None:
        raise ValueError("no")

    line, closed = Launching(work), threading.Event()

    def take(event: Event) -> None:
        if isinstance(event, kind):
            line.loop.put(Stop())
            line.worker.close(broken=False)
            closed.set()

    def at_once() -> DeviceEvent:
        event = DeviceEvent()
        event.reached.set()
        return event

    made: Any = line.loop
    made.emit, made._event, line.stage.save = take, at_once, lambda place: ({}, {})
    line.loop.put(Save(0, 7)) if kind is Saved else line.ask(0)
    assert closed.wait(WAIT_S)


def test_a_lost_stage_keeps_its_text_on_its_way_to_the_leader() -> None:
    error = StageLost("stage 3+vae has lost cuda:1: CUDA error")
    assert portable(error, "3+vae") is error
    assert str(portable(ValueError("no"), "3+vae")) == "stage 3+vae: ValueError: no"
