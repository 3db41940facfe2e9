"""The native stage loop's Python face: what is told, how it ends, and that a busy Python thread does not hold it up."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import stage_loop as bench
from liverelay.engine.relay.messages import Block, Clean, Done, Event, Failed, Stop
from liverelay.engine.relay.native_loop import NativeLink, NativeStageLoop, native_fault
from liverelay.engine.relay.pipeline import LocalWorker

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(bool(native_fault(CPU)), reason="the compiled module was not built")
WAIT_S = 60


class Bench:
    """A stage between two links, whose work is a function of the test."""

    def __init__(self, **options: Any) -> None:
        self.stage: Any = bench.FixedStage(0.0)
        self.source, self.target = (NativeLink(bench.SHAPES, CPU, torch.bfloat16) for _ in range(2))
        self.events: list[Event] = []
        self.told = threading.Condition()
        self.loop = NativeStageLoop(0, self.stage, self.source, self.target, self.take, **options)
        self.worker: LocalWorker | None = None

    def start(self, work: Callable[[int], object] = lambda block: None) -> None:
        self.stage.denoise = lambda place, command, keep: work(command.block)
        self.worker = LocalWorker(self.loop)

    def take(self, event: Event) -> None:
        with self.told:
            self.events.append(event)
            self.told.notify()

    def ask(self, block: int) -> None:
        self.loop.put(Block(0, 7, block, ()))
        self.source.send(self.stage.parcel)

    def wait(self, kind: type[Event], count: int = 1) -> list[Any]:
        def found() -> list[Event]:
            return [event for event in self.events if isinstance(event, kind)]

        with self.told:
            assert self.told.wait_for(lambda: len(found()) >= count, WAIT_S)
            return found()

    def end(self, *, broken: bool = False) -> None:
        assert self.worker is not None
        self.loop.put(Stop())
        self.worker.close(broken=broken)
        self.target.close()


@pytest.fixture
def line() -> Iterator[Bench]:
    made = Bench()
    yield made
    for link in (made.source, made.target):
        link.close()


def test_a_block_that_fails_goes_on_and_the_next_one_is_computed(line: Bench) -> None:
    def work(block: int) -> None:
        if block == 1:
            raise RuntimeError("lost")

    line.start(work)
    for block in range(4):
        line.ask(block)
        line.target.receive(line.stage.parcel)
    assert [event.block for event in line.wait(Done, 4)] == [0, 1, 2, 3]
    assert [(event.serial, str(event.error)) for event in line.wait(Failed)] == [(7, "lost")]
    line.end()


def test_an_interrupt_in_the_work_ends_the_stage(line: Bench) -> None:
    def work(block: int) -> None:
        raise KeyboardInterrupt

    line.start(work)
    line.ask(0)
    line.ask(1)
    failed = line.wait(Failed)[0]
    assert failed.serial == -1 and isinstance(failed.error, KeyboardInterrupt)
    line.end(broken=True)


@pytest.mark.parametrize("blocks", [0, 1, 5])
def test_a_line_that_is_closed_in_the_middle_ends(line: Bench, blocks: int) -> None:
    line.start(lambda block: time.sleep(0.01))
    for block in range(min(blocks, 2)):
        line.ask(block)
    for block in range(2, blocks):  # their parcels never come
        line.loop.put(Block(0, 7, block, ()))
    line.end()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stage fixed")]
    assert line.loop.working_since is None and not any(isinstance(event, Failed) for event in line.events)


def test_a_closed_stage_lets_go_of_what_it_was_given(line: Bench) -> None:
    line.loop.put(Stop())
    line.start()
    line.end()
    before = sys.getrefcount(line.loop)
    for block in range(10):
        line.loop.put(Block(0, 7, block, ()))
    after = sys.getrefcount(line.loop)
    assert after == before


def test_somebody_who_is_told_may_close_the_stage(line: Bench) -> None:
    closed = threading.Event()

    def take(event: Event) -> None:
        line.end()
        closed.set()

    line.loop._tell = take
    line.start()
    line.ask(0)
    assert closed.wait(WAIT_S)


def test_somebody_who_cannot_be_told_is_the_end_of_the_stage(line: Bench) -> None:
    def take(event: Event) -> None:
        line.take(event)
        if isinstance(event, Done):
            raise ValueError("no room")

    line.loop._tell = take
    line.start()
    line.ask(0)
    assert [(event.serial, str(event.error)) for event in line.wait(Failed)] == [(-1, "no room")]
    line.end(broken=True)


def test_telling_holds_up_nobody(line: Bench) -> None:
    go_on, computed = threading.Event(), []

    def take(event: Event) -> None:
        assert go_on.wait(WAIT_S)
        line.take(event)

    line.loop._tell = take
    line.start(computed.append)
    for block in range(4):
        line.ask(block)
        line.target.receive(line.stage.parcel)
    assert computed == [0, 1, 2, 3] and not line.events
    go_on.set()
    line.wait(Done, 4)
    line.end()


def test_a_job_that_hangs_is_seen_and_told() -> None:
    line, go_on = Bench(bound_s=0.1), threading.Event()
    line.start(lambda block: go_on.wait(WAIT_S))
    assert line.loop.working_since is None
    asked = time.monotonic()
    line.ask(0)
    failed = line.wait(Failed)[0]
    since = line.loop.working_since
    assert since is not None and asked <= since <= time.monotonic() - 0.1
    assert failed.serial == -1 and str(failed.error) == "stage fixed has been at one block for more than 0.1 s"
    go_on.set()
    line.wait(Done)
    line.end()


def test_answers_come_before_the_block_is_done_and_in_order(line: Bench) -> None:
    line.stage.last_step = True
    line.stage.parcel.parts["latent"].fill_(3)
    line.start()
    for block in range(3):
        line.ask(block)
        line.target.receive(line.stage.parcel)
    line.wait(Done, 3)
    assert [type(event) for event in line.events] == [Clean, Done, Done, Done]
    assert bool((line.events[0].reference == 3).all())  # type: ignore[attr-defined]
    line.end()


SCRIPT = """
import sys, time
from tests.test_stage_loop import Bench
line, mode = Bench(), sys.argv[1]

def work(block):
    while mode == "work":
        pass

line.start(work)
for block in range(2):
    line.ask(block)
time.sleep(0.05)
if mode == "raise":
    raise SystemExit(3)
if mode == "interrupt":
    import _thread, threading
    threading.Timer(0.2, _thread.interrupt_main).start()
    line.source.receive(line.stage.parcel)  # nothing will come
"""


@pytest.mark.parametrize(("mode", "code"), [("idle", 0), ("raise", 3), ("work", 0), ("interrupt", -2)])
def test_the_interpreter_ends_whatever_a_stage_is_at(mode: str, code: int) -> None:
    command = [sys.executable, "-c", SCRIPT, mode]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[1], capture_output=True, timeout=WAIT_S)
    assert done.returncode == code, done.stderr.decode()[-2000:]


@pytest.mark.slow
def test_a_busy_thread_does_not_hold_up_the_native_loop() -> None:
    ratios = []
    for _ in range(3):  # the machine may be busy with something else
        ratios.append(bench.measure(60, 0.005)["gap_ratio_busy"])
        if ratios[-1] >= 5:
            return
    raise AssertionError(f"Python to C++, p99 of the gap: {ratios}")
