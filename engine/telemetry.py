"""What the stages do with their time: figures, JSON lines, a view in the terminal, and a timeline as a picture.

Every stage tells when it asked for a block, got it, had computed it and had handed it on (messages.Done). Times are of
the stage's own clock, which processes on one machine share. Memory does not grow with the stream: percentiles are
over the last blocks, and the timeline is written as it comes.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liverelay.engine.errors import MissingExtraError, OutputError
from liverelay.engine.relay.messages import Done, Event, Finished
from liverelay.engine.relay.plan import Plan

if TYPE_CHECKING:
    from liverelay.engine.engine import Engine

LAST_BLOCKS = 1000
PARTS = ("wait_in", "compute", "wait_out", "handoff")
VIEWS_PER_S = 2


@dataclass(frozen=True)
class StageFigures:
    """Of one stage over its last blocks. Milliseconds at the 50th, 95th and 99th percentile; busy: share of time."""

    name: str
    device: str
    blocks: int
    wait_in_ms: tuple[float, float, float]
    compute_ms: tuple[float, float, float]
    wait_out_ms: tuple[float, float, float]
    handoff_ms: tuple[float, float, float]
    busy: float
    queue: float


@dataclass(frozen=True)
class LineFigures:
    """Of the whole line. fps: frames it makes in a second; real_time: that over the video's rate, for all sessions."""

    stages: tuple[StageFigures, ...]
    blocks: int
    fps: float
    real_time: float
    first_frame_s: float | None
    gpus: tuple[dict[str, float], ...] = ()


class _Window:
    """The last blocks of a stage."""

    def __init__(self) -> None:
        self.done: deque[Done] = deque(maxlen=LAST_BLOCKS)
        self.handoffs: deque[float] = deque(maxlen=LAST_BLOCKS)  # seconds of waiting for a block that was on its way
        self.queued: deque[int] = deque(maxlen=LAST_BLOCKS)  # blocks between the two at that time
        self.blocks = 0


class Telemetry:
    """Sees every event of a line. Give its `observe` to the engine before a session is opened.

    lines: a file that gets a line of JSON for each block and stage; trace: one that gets the timeline in Chrome's
    trace format (chrome://tracing, Perfetto). block_frames, fps: of the video. clock: of the events; the simulator has
    its own.
    """

    def __init__(
        self, plan: Plan, *, block_frames: int = 12, fps: int = 25, lines: Path | None = None,
        trace: Path | None = None, clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.plan, self._block_frames, self._fps, self._clock = plan, block_frames, fps, clock
        self._started = clock()
        self._first_frame: float | None = None
        self._finished: deque[float] = deque(maxlen=LAST_BLOCKS)
        self._windows = [_Window() for _ in plan.stages]
        self._ends: dict[tuple[int, int, int], float] = {}  # when a stage was done with a block the next has not begun
        self._lock = threading.Lock()
        self._lines, self._trace = _open(lines), _open(trace)
        self._gpus = GpuMeter(plan.devices)
        if self._trace is not None:
            labels = [f"stage {stage.name} on {stage.device}" for stage in plan.stages]
            names = [{"name": "process_name", "ph": "M", "pid": i, "args": {"name": label}}
                     for i, label in enumerate(labels)]  # fmt: skip
            self._trace.write("[\n" + ",\n".join(json.dumps(name) for name in names))

    def observe(self, event: Event) -> None:
        """Take an event; called from any thread."""
        with self._lock:
            if isinstance(event, Finished):
                now = self._clock()
                self._finished.append(now)
                if self._first_frame is None:
                    self._first_frame = now - self._started
            elif isinstance(event, Done):
                self._take(event)

    def _take(self, done: Done) -> None:
        window = self._windows[done.stage]
        window.done.append(done)
        window.blocks += 1
        before = self._ends.pop((done.stage - 1, done.serial, done.block), None)
        # What the stage waited for a block that was on its way: time in the queue is not the transport's.
        handoff = 0.0 if before is None else max(0.0, done.begun - max(before, done.asked))
        if done.stage:
            window.handoffs.append(handoff)
            window.queued.append(sum(stage == done.stage - 1 for stage, _, _ in self._ends))
        if done.stage + 1 < len(self._windows):
            self._ends[done.stage, done.serial, done.block] = done.computed
            if len(self._ends) > LAST_BLOCKS:  # a line that is closed leaves blocks half-way
                self._ends.pop(next(iter(self._ends)))
        if self._lines is not None:
            record = {"stage": self.plan.stages[done.stage].name, "session": done.serial, "block": done.block,
                      "wait_in_ms": _ms(done.begun - done.asked), "compute_ms": _ms(done.computed - done.begun),
                      "wait_out_ms": _ms(done.ended - done.computed), "handoff_ms": _ms(handoff),
                      "at_s": round(done.begun - self._started, 6)}  # fmt: skip
            self._lines.write(json.dumps(record) + "\n")
        if self._trace is not None:
            spans = ((f"block {done.block}", "compute", done.begun, done.computed), ("hand on", "wait", done.computed,
                     done.ended))  # fmt: skip
            for name, kind, start, end in spans:
                if kind == "compute" or end - start > 1e-4:
                    self._span(done, name, kind, start, end)

    def _span(self, done: Done, name: str, kind: str, start: float, end: float) -> None:
        assert self._trace is not None
        span = {"name": name, "cat": kind, "ph": "X", "pid": done.stage, "tid": done.serial,
                "ts": round(1e6 * (start - self._started), 1), "dur": round(1e6 * (end - start), 1),
                "args": {"session": done.serial, "block": done.block}}  # fmt: skip
        self._trace.write(",\n" + json.dumps(span))

    def figures(self) -> LineFigures:
        """What the line has done over its last blocks."""
        with self._lock:
            stages = tuple(self._stage(i) for i in range(len(self._windows)))
            times = list(self._finished)
            span = times[-1] - times[0] if len(times) > 1 else 0.0
            rate = (len(times) - 1) / span * self._block_frames if span else 0.0
            blocks = self._windows[-1].blocks
            return LineFigures(stages, blocks, rate, rate / self._fps, self._first_frame, tuple(self._gpus.read()))

    def _stage(self, index: int) -> StageFigures:
        stage, window = self.plan.stages[index], self._windows[index]
        done = list(window.done)
        span = done[-1].ended - done[0].begun if done else 0.0
        busy = sum(d.computed - d.begun for d in done) / span if span else 0.0
        return StageFigures(
            stage.name, stage.device, window.blocks, percentiles([d.begun - d.asked for d in done]),
            percentiles([d.computed - d.begun for d in done]), percentiles([d.ended - d.computed for d in done]),
            percentiles(list(window.handoffs)), min(1.0, busy),
            sum(window.queued) / len(window.queued) if window.queued else 0.0,
        )  # fmt: skip

    def close(self) -> LineFigures:
        """End the files; the last line of JSON holds the figures of the line. `check` tells what they lack."""
        figures = self.figures()
        with self._lock:
            if self._lines is not None:
                self._lines.write(json.dumps({"line": asdict(figures)}) + "\n")
                self._lines.close()
            if self._trace is not None:
                self._trace.write("\n]\n")
                self._trace.close()
        return figures

    def check(self) -> None:
        """OutputError when a file could not be written to its end."""
        for report in (self._lines, self._trace):
            if report is not None and report.fault:
                raise OutputError(report.fault)


class GpuMeter:
    """Utilisation, power and memory of the line's GPUs through NVML, where that is installed and there are any."""

    def __init__(self, devices: Sequence[str]) -> None:
        self._handles: list[Any] = []
        numbers = sorted({int(name.partition(":")[2] or 0) for name in devices if name.startswith("cuda")})
        if numbers:
            try:
                import pynvml

                pynvml.nvmlInit()
                self._handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in numbers]
                self._nvml = pynvml
            except Exception:  # no library, no driver, no right to look: the figures are left out
                self._handles = []

    def read(self) -> list[dict[str, float]]:
        """One row for each GPU; empty where nothing can be read."""
        rows = []
        for handle in self._handles:
            try:
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
                rows.append({
                    "utilisation": float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
                    "power_w": self._nvml.nvmlDeviceGetPowerUsage(handle) / 1e3, "memory_gib": memory.used / 2**30,
                })  # fmt: skip
            except self._nvml.NVMLError:
                continue
        return rows


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Seconds -> milliseconds at 50, 95 and 99 percent; zeros where there are none."""
    if not values:
        return 0.0, 0.0, 0.0
    ordered = sorted(values)
    at = [ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))] for share in (0.5, 0.95, 0.99)]
    return _ms(at[0]), _ms(at[1]), _ms(at[2])


def table(figures: LineFigures) -> str:
    """The figures as text, a row for each stage."""
    rows = [f"{'stage':<12} {'device':<8} {'blocks':>6} {'compute ms p50/p95/p99':>24} {'wait in':>8} {'wait out':>8} "
            f"{'handoff':>8} {'queue':>6} {'busy':>5}"]  # fmt: skip
    for s in figures.stages:
        compute = "/".join(f"{value:.1f}" for value in s.compute_ms)
        rows.append(
            f"{s.name:<12} {s.device:<8} {s.blocks:>6} {compute:>24} {s.wait_in_ms[0]:>8.1f} {s.wait_out_ms[0]:>8.1f} "
            f"{s.handoff_ms[0]:>8.1f} {s.queue:>6.1f} {100 * s.busy:>4.0f}%"
        )
    first = "-" if figures.first_frame_s is None else f"{figures.first_frame_s:.2f} s"
    rows.append(f"{figures.fps:.1f} FPS, {figures.real_time:.2f}x real time, first frame after {first}")
    for number, gpu in enumerate(figures.gpus):
        rows.append(f"GPU {number}: {gpu['utilisation']:.0f}% {gpu['power_w']:.0f} W {gpu['memory_gib']:.1f} GiB")
    return "\n".join(rows)


@contextlib.contextmanager
def watched(engine: Engine, lines: Path | None, trace: Path | None, view: bool) -> Iterator[None]:
    """Within this, the engine's line is watched as asked for; the figures are printed in the end."""
    if lines is None and trace is None and not view:
        yield
        return
    live = _live_view() if view else None
    stream = engine.stream
    watch = Telemetry(engine.plan, block_frames=stream.block_frames, fps=stream.fps, lines=lines, trace=trace)
    engine.observe = watch.observe
    try:
        with live(lambda: table(watch.figures())) if live else contextlib.nullcontext():
            yield
    finally:
        print(table(watch.close()), file=sys.stderr)
    watch.check()  # unless there is worse to tell


def _live_view() -> Callable[[Callable[[], str]], contextlib.AbstractContextManager[Any]]:
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        raise MissingExtraError("rich", "for the view in the terminal", "view") from None
    console = Console(stderr=True)  # where the figures are printed in the end, in place of the view
    return lambda text: Live(get_renderable=text, console=console, refresh_per_second=VIEWS_PER_S, transient=True)


class _Report:
    """A file that is written as the work goes on. When it cannot be written any more it ends, and the work goes on."""

    def __init__(self, path: Path) -> None:
        self._path, self.fault = path, ""
        try:
            self._file = path.open("w")
        except OSError as error:
            raise self._cannot(error) from None

    def _cannot(self, error: OSError) -> OutputError:
        return OutputError(f"cannot write {self._path}: {error.strerror}")

    def write(self, text: str) -> None:
        self._try(lambda: self._file.write(text))

    def close(self) -> None:
        self._try(self._file.flush)
        with contextlib.suppress(OSError):  # told by then
            self._file.close()

    def _try(self, act: Callable[[], object]) -> None:
        try:
            if not self.fault and not self._file.closed:
                act()
        except OSError as error:
            self.fault = str(self._cannot(error))


def _open(path: Path | None) -> _Report | None:
    return None if path is None else _Report(path)


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
