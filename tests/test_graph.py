"""Captured stages, with a recorder in the place of CUDA graphs: equal to the rollout, and nothing is captured twice."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Hashable
from types import SimpleNamespace

import pytest
import torch

from liverelay.engine.relay.graph import Graphs
from tests import test_relay
from tests.tape import TapeGraphs
from tests.test_relay import Parts, ask, equal, expected, make_line, parts, session, stages_of, videos

__all__ = ["parts"]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "plan", ["0+1+2+3+vae", pytest.param("0+1,2+3,vae", marks=pytest.mark.slow), "0+1,2+3+vae1,vae2"]
)
def test_replayed_stages_equal_the_rollout(parts: Parts, plan: str, rng: torch.Generator) -> None:
    line, graphs = make_line(parts, plan, places=2), []
    for stage in stages_of(line):
        stage.graphs = TapeGraphs()
        graphs.append(stage.graphs)
    first, second, third = (session(parts, rng, 11) for _ in range(3))
    one, other = line.open(first[0]), line.open(second[0])
    futures = [[ask(line, serial, n, blocks[n]) for serial, blocks in ((one, first[1]), (other, second[1]))]
               for n in range(11)]  # fmt: skip
    for i, (given, blocks) in enumerate((first, second)):
        assert equal([row[i].result(timeout=120) for row in futures], expected(parts, given, blocks))
    line.close_session(one)
    assert equal(videos(line, line.open(third[0]), third[1]), expected(parts, *third))  # in the place of the first
    line.close()
    assert all(graph.replays > len(graph.tapes) for graph in graphs)
    for graph in graphs:  # in C++ blocks whose graphs are all there are programs; how many depends on drawn distances
        assert bool(graph.programmed) == (test_relay.kind == "native")


class Keys(Graphs):
    """Runs everything, and knows what would have been captured."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.enabled, self.met = True, set[Hashable]()

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        self.met.add(key)
        work()

    def has(self, key: Hashable) -> bool:
        return key in self.met and test_relay.kind == "python"  # C++ would replay what was not recorded


@pytest.mark.parametrize(("sizes", "graphs"), [(("row", "valid"), 7), ((), 1)], ids=["on the host", "on the device"])
def test_a_first_session_finds_all_its_graphs(
    parts: Parts, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, sizes: tuple[str, ...], graphs: int
) -> None:
    """sizes: what of a block's place in the arena is in the launches; graphs: of a step, for all of a ring's blocks."""
    line = make_line(parts, "0+1,2+3+vae")
    (first, last), said = stages_of(line), list[str]()
    for stage in (first, last):
        stage.graphs = Keys()
        stage.say = said.append
        monkeypatch.setattr(stage.dit, "variant", lambda place: tuple(getattr(place, name) for name in sizes))
    given, blocks = session(parts, rng, 11)
    serial = line.open(given)
    begun = videos(line, serial, blocks[:1])
    early = [set(stage.graphs.met) for stage in (first, last)]
    assert equal(begun + videos(line, serial, blocks[1:], 1), expected(parts, given, blocks))
    assert [stage.graphs.met for stage in (first, last)] == early
    assert [len(keys) for keys in early] == [1 + 2 * graphs, 1 + 2 * graphs + 1]  # sound; two steps; video
    assert sum("decoder" in line for line in said) == 1
    if test_relay.kind == "python":
        assert sum("of block" in line for line in said) == 2 * graphs
    line.close()


class FakeGraph:
    """A CUDA graph that notes who captures when, and fails where it is told to."""

    under_way, at_once = 0, 0
    fault: Exception | None = None

    def capture_begin(self, **options: object) -> None:
        FakeGraph.under_way += 1
        FakeGraph.at_once = max(FakeGraph.at_once, FakeGraph.under_way)
        time.sleep(0.01)

    def capture_end(self) -> None:
        FakeGraph.under_way -= 1
        if self.fault:
            raise RuntimeError("the capture was spoilt")

    def replay(self) -> None:
        pass


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Graphs]:
    stream = SimpleNamespace(device_index=3, wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(FakeGraph, "at_once", 0)

    def make() -> Graphs:
        made = Graphs(CPU)
        made.enabled, made._stream, made._pool = True, stream, (0, 7)  # type: ignore[assignment]
        return made

    return make


def test_work_that_cannot_be_captured_is_done_and_told_once(
    graphs: Callable[[], Graphs], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, calls = graphs(), []

    def work() -> None:
        calls.append(FakeGraph.under_way)
        if FakeGraph.under_way:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(FakeGraph, "fault", RuntimeError())
    ended: list[object] = []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *where: ended.append(where), raising=False)
    with caplog.at_level(logging.WARNING):
        for key in ("a", "b", "a"):
            made.run(key, work)
    assert ended == [(3, (0, 7))]  # the allocator has to be told
    assert calls == [0, 1, 0, 0] and not made.captured  # once as it stands, once for the capture that failed
    assert [record.message for record in caplog.records] == [
        "cpu: no CUDA graphs, launches one by one: operation not permitted when stream is capturing"
    ]


def test_stages_do_not_capture_at_the_same_time(graphs: Callable[[], Graphs]) -> None:
    def capture(made: Graphs) -> None:
        for key in range(3):
            made.run(key, lambda: None)

    threads = [threading.Thread(target=capture, args=[graphs()]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert FakeGraph.at_once == 1
