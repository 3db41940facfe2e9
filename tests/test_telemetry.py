"""Telemetry: figures of known events are known, files hold what happened, nothing grows with the stream."""

from __future__ import annotations

import itertools
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from liverelay.engine.config import StreamConfig
from liverelay.engine.errors import InputError, MissingExtraError, OutputError
from liverelay.engine.relay.messages import Done, Finished
from liverelay.engine.relay.plan import parse_plan
from liverelay.engine.telemetry import LAST_BLOCKS, GpuMeter, Telemetry, percentiles, table, watched

PLAN = parse_plan("0+1,2+3+vae", ["cpu", "cpu"])


def relay(watch: Telemetry, blocks: int, *, fast_s: float = 0.1, slow_s: float = 0.2, handoff_s: float = 0.01) -> None:
    """A line of two stages, the second of which is the slower one: its queue holds one block from the second on."""
    free = [0.0, 0.0]
    for block in range(blocks):
        asked = free[0]
        computed = asked + fast_s
        watch.observe(Done(0, 5, block, asked, asked, computed, computed))
        begun = max(free[1], computed + handoff_s)
        watch.observe(Done(1, 5, block, free[1], begun, begun + slow_s, begun + slow_s))
        watch.observe(Finished(1, 5, block, None))
        free = [computed, begun + slow_s]


def test_figures_are_those_of_the_events() -> None:
    watch = Telemetry(PLAN)
    relay(watch, 50)
    first, second = watch.figures().stages
    assert (first.name, second.name, first.blocks, second.blocks) == ("0+1", "2+3+vae", 50, 50)
    assert first.compute_ms == pytest.approx((100, 100, 100)) and second.compute_ms == pytest.approx((200, 200, 200))
    assert second.wait_in_ms[:2] == (0, 0) and second.wait_in_ms[2] == pytest.approx(110)  # for the first block alone
    assert second.handoff_ms[:2] == (0, 0) and second.handoff_ms[2] == pytest.approx(10)
    assert second.busy == pytest.approx(1, abs=1e-6) and first.busy == pytest.approx(1, abs=1e-6)


def test_a_handoff_is_seen_where_a_stage_waits_for_it() -> None:
    watch = Telemetry(PLAN)
    relay(watch, 50, fast_s=0.2, slow_s=0.1)
    second = watch.figures().stages[1]
    assert second.handoff_ms == pytest.approx((10, 10, 10))
    assert second.wait_in_ms[0] == pytest.approx(100)
    assert second.busy == pytest.approx(0.5, abs=0.01)


def test_files_hold_every_block_and_the_figures(tmp_path: Path) -> None:
    watch = Telemetry(PLAN, lines=tmp_path / "lines", trace=tmp_path / "trace")
    relay(watch, 20)
    figures = watch.close()
    *records, last = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert len(records) == 40 and {record["stage"] for record in records} == {"0+1", "2+3+vae"}
    assert [r["block"] for r in records if r["stage"] == "0+1"] == list(range(20))
    assert last["line"]["blocks"] == figures.blocks == 20
    events = json.loads((tmp_path / "trace").read_text())
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == 40 and {event["args"]["name"] for event in events if event["ph"] == "M"} == {
        "stage 0+1 on cpu", "stage 2+3+vae on cpu"}  # fmt: skip
    second = sorted((span["ts"], span["dur"]) for span in spans if span["pid"] == 1)
    assert all(start + length <= after + 1 for (start, length), (after, _) in itertools.pairwise(second))


def test_memory_does_not_grow_with_the_stream() -> None:
    watch = Telemetry(PLAN)
    relay(watch, 3 * LAST_BLOCKS)
    assert watch.figures().blocks == 3 * LAST_BLOCKS
    assert all(len(window.done) == LAST_BLOCKS for window in watch._windows) and len(watch._ends) == 0


def test_blocks_of_lines_that_were_closed_are_forgotten() -> None:
    watch = Telemetry(PLAN)
    for serial in range(5 * LAST_BLOCKS):
        watch.observe(Done(0, serial, 0, 0.0, 0.0, 1.0, 1.0))
    assert len(watch._ends) <= LAST_BLOCKS


def test_percentiles(numbers: np.random.Generator) -> None:
    values = numbers.permutation(1001) / 1e3
    assert percentiles(list(values)) == (500, 950, 990) and percentiles([]) == (0, 0, 0)


def test_gpu_figures_come_from_nvml_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda n: n, NVMLError=RuntimeError,
        nvmlDeviceGetMemoryInfo=lambda n: types.SimpleNamespace(used=(n + 1) * 2**30),
        nvmlDeviceGetUtilizationRates=lambda n: types.SimpleNamespace(gpu=50 + n),
        nvmlDeviceGetPowerUsage=lambda n: 350_000,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert GpuMeter(["cuda", "cuda:1", "cuda:1"]).read() == [
        {"utilisation": 50.0, "power_w": 350.0, "memory_gib": 1.0},
        {"utilisation": 51.0, "power_w": 350.0, "memory_gib": 2.0},
    ]
    assert GpuMeter(["cpu"]).read() == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert GpuMeter(["cuda"]).read() == []


def test_the_table_has_a_row_for_each_stage() -> None:
    watch = Telemetry(PLAN)
    assert "first frame after -" in table(watch.figures())
    relay(watch, 3)
    rows = table(watch.figures()).splitlines()
    assert len(rows) == 4 and rows[1].startswith("0+1") and "100.0/100.0/100.0" in rows[1]


def test_what_cannot_be_written_or_shown_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        Telemetry(PLAN, lines=tmp_path / "nowhere" / "lines")
    monkeypatch.setitem(sys.modules, "rich.live", None)
    with pytest.raises(MissingExtraError, match="rich is needed"), watched(None, None, None, True):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("which", ["lines", "trace"])
def test_a_full_disk_ends_the_file_and_not_the_line(which: str) -> None:
    if not Path("/dev/full").is_char_device():
        pytest.skip("no /dev/full here")
    watch = Telemetry(PLAN, **{which: Path("/dev/full")})  # type: ignore[arg-type]
    relay(watch, 500)
    assert watch.close().blocks == 500
    relay(watch, 1)  # what comes later is not written
    with pytest.raises(OutputError, match="cannot write /dev/full: No space"):
        watch.check()


def test_what_went_wrong_is_told_before_a_file_that_could_not_be_written() -> None:
    if not Path("/dev/full").is_char_device():
        pytest.skip("no /dev/full here")
    engine = types.SimpleNamespace(plan=PLAN, stream=StreamConfig(), observe=None)
    with pytest.raises(InputError, match="the cause"), watched(engine, Path("/dev/full"), None, False):  # type: ignore[arg-type]
        raise InputError("the cause")
    with pytest.raises(OutputError, match="cannot write /dev/full"), watched(engine, Path("/dev/full"), None, False):  # type: ignore[arg-type]
        pass


def test_the_view_leaves_standard_output_to_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    engine = types.SimpleNamespace(plan=PLAN, stream=StreamConfig(), observe=None)
    with watched(engine, None, None, True):  # type: ignore[arg-type]
        engine.observe(Finished(1, 5, 0, None))
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("real time") == 1
