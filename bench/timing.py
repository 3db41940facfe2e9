"""Times of single calls, the machine that they were taken on, and how they are shown and kept. Only torch is needed."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.clocks import watched

if TYPE_CHECKING:
    from bench.ceilings import Ceilings

Call = Callable[[], Any]
COLD_BYTES = 1 << 28  # several times the L2 cache of any GPU: what has to pass until old data has left it
MIN_SAMPLES, MAX_SAMPLES = 5, 200


@dataclass(frozen=True)
class Timing:
    """Median seconds of one call; spread: (90th - 10th percentile) / median; how: graph, events or clock.

    note: why a graph was asked for and could not be had; clocks: median clock and power of the GPU meanwhile.
    """

    seconds: float
    spread: float
    samples: int
    how: str
    note: str = ""
    clocks: dict[str, float] = field(default_factory=dict)


class TimeBoxError(Exception):
    """What ran within `time_box` took too long."""


@contextlib.contextmanager
def time_box(seconds: float) -> Iterator[None]:
    """TimeBoxError in the main thread when the body runs longer. A call into C++ is left only when it returns."""

    def stop(signum: int, frame: Any) -> None:
        raise TimeBoxError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def one_line(error: BaseException, limit: int = 160) -> str:
    """An error as a short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:limit].rstrip(": ")


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(samples: Sequence[float], how: str, note: str = "") -> Timing:
    """Median and spread of seconds."""
    ordered = sorted(samples)
    median = statistics.median(ordered)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.9))
    return Timing(median, (high - low) / median if median else 0.0, len(ordered), how, note)


@lru_cache(maxsize=2)
def _cold_buffer(device: torch.device) -> Tensor:
    return torch.empty(COLD_BYTES, dtype=torch.uint8, device=device)


def capture(calls: Sequence[Call], device: torch.device, repeat: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of the calls in turn, `repeat` times over. RuntimeError where they cannot be captured."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # libraries make plans and workspaces on first use, which capture forbids
        for call in calls:
            call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeat):
            for call in calls:
                call()
    torch.cuda.synchronize(device)
    return graph


def measure(
    call: Call | Sequence[Call], *, device: torch.device, seconds: float = 0.3, graph: bool = True, cold: bool = True
) -> Timing:
    """Median time of one call over about `seconds` of repetitions, after a warm-up.

    Several calls that do the same on different data are taken in turn, so that no call finds its data in the cache; a
    single call finds the cache overwritten (`cold`). On a GPU the calls are captured in a CUDA graph (`graph`), which
    leaves the host's launch times out; where that fails they are launched one by one, and the note says why.
    """
    calls = [call] if callable(call) else list(call)
    if device.type == "cuda":
        return _measure_cuda(calls, device, seconds, graph, cold)
    for one in calls[:2]:
        one()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < MAX_SAMPLES and (len(samples) < 3 or time.perf_counter() < end):
        for one in calls:
            started = time.perf_counter()
            one()
            samples.append(time.perf_counter() - started)
    return summary(samples, "clock")


def _timed_cuda(run: Call, before: Call | None) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if before:
        before()
    start.record()
    run()
    end.record()
    return start, end


def _measure_cuda(calls: list[Call], device: torch.device, seconds: float, graph: bool, cold: bool) -> Timing:
    def eager() -> None:
        for call in calls:
            call()

    eager()  # compiles
    torch.cuda.synchronize(device)
    start, end = _timed_cuda(eager, None)
    torch.cuda.synchronize(device)
    guess = max(start.elapsed_time(end) / 1e3, 1e-6)
    run, count, how, note, captured = eager, len(calls), "events", "", None
    if graph:
        repeat = 1 if len(calls) == 1 else max(1, min(20, round(2e-3 / guess)))
        try:
            captured = capture(calls, device, repeat)
            run, count, how = captured.replay, len(calls) * repeat, "graph"
        except Exception as error:  # whatever a library does not allow while a stream is captured
            note = f"not captured: {one_line(error)}"
            torch.cuda.synchronize(device)
    buffer = _cold_buffer(device) if cold and len(calls) == 1 else None
    before = buffer.zero_ if buffer is not None else None
    run()
    pairs, begun = [], time.perf_counter()
    with watched(device) as clocks:
        while len(pairs) < MAX_SAMPLES and (len(pairs) < MIN_SAMPLES or time.perf_counter() - begun < seconds):
            pairs += [_timed_cuda(run, before) for _ in range(max(1, min(20, round(0.05 / guess))))]
            torch.cuda.synchronize(device)
    taken = summary([first.elapsed_time(last) / 1e3 / count for first, last in pairs], how, note)
    result = replace(taken, clocks=clocks)
    if captured is not None:
        captured.reset()
    return result


class Stopwatch:
    """Wraps functions so that it keeps when each call began and ended: (label, begin, end) in `spans`."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []

    def mark(self) -> Any:
        """Now, on the device's own clock."""
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Seconds between two marks, once the device has passed them."""
        return begin.elapsed_time(end) / 1e3 if self._gpu else end - begin

    def wrap(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self.mark()
            result = function(*args, **kwargs)
            self.spans.append((label, begin, self.mark()))
            return result

        return timed


# -- the machine -------------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on: versions, processor, and the GPU with its clocks and power limit."""
    found: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": str(device),
    }  # fmt: skip
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name, "arch": f"sm_{properties.major}{properties.minor}",
            "processors": properties.multi_processor_count, "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
        }  # fmt: skip
        found["nvml"] = _nvml(device.index or 0)
    return found


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _nvml(index: int) -> dict[str, Any]:
    """Driver, clocks in MHz and power in watts, each where NVML gives it."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    except Exception as error:  # not installed, or no access to the driver
        return {"error": one_line(error)}
    graphics, memory = pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM
    asked: dict[str, Call] = {
        "driver": pynvml.nvmlSystemGetDriverVersion,
        "sm_clock_max": lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, graphics),
        "sm_clock": lambda: pynvml.nvmlDeviceGetClockInfo(handle, graphics),
        "memory_clock": lambda: pynvml.nvmlDeviceGetClockInfo(handle, memory),
        "power_limit": lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "power": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "temperature": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
    }
    found: dict[str, Any] = {}
    for name, ask in asked.items():
        try:
            value = ask()
            found[name] = value.decode() if isinstance(value, bytes) else value
        except Exception as error:
            found[name] = f"unknown ({one_line(error, 60)})"
    return found


# -- what all benchmarks print and write -------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text columns; the first is aligned to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first, *others = row
        return "  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]).rstrip()

    return "\n".join(line(row) for row in [head, *rows])


def roofline(points: Sequence[tuple[str, str, float, float]], limits: Ceilings, path: Path) -> str:
    """Picture of (label, kind, FLOP/byte, FLOP/s); kind is kernel or plain. Returns what became of it, in words."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 6))
    numbers = {label: at for at, label in enumerate(dict.fromkeys(label for label, *_ in points), start=1)}
    intensities = [2.0**power for power in range(-4, 15)]
    axes.loglog(intensities, [min(limits.copy * x, limits.matmul) / 1e12 for x in intensities], color="black")
    for label, kind, x, y in points:
        ours = kind == "kernel"
        axes.plot(x, y / 1e12, "o" if ours else "x", color="tab:blue" if ours else "tab:gray")
        if ours:
            axes.annotate(str(numbers[label]), (x, y / 1e12), fontsize=7, xytext=(4, -3), textcoords="offset points")
    names = "\n".join(f"{number:2d} {label}" for label, number in numbers.items())
    axes.text(1.02, 1.0, names, transform=axes.transAxes, fontsize=7, family="monospace", va="top")
    axes.set(xlabel="FLOP for each byte that has to move", ylabel="TFLOP/s (o: kernel, x: plain PyTorch)")
    axes.set_title(limits.text, fontsize=9)
    axes.grid(True, which="both", alpha=0.2)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    return f"plot: {path}"


def save(path: Path | None, content: Any) -> None:
    """Write JSON beside and rename, so that a program killed in the middle leaves the last whole version."""
    if path is None:
        return
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def pick_device(name: str | None) -> torch.device:
    """The device asked for, else the GPU where there is one."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
