"""A GPU's clock, power and temperature while something is measured: without them two runs cannot be compared.

NVML is asked through pynvml where that can be imported, else through `nvidia-smi`, in the background of the whole
process. On a CPU, and where neither is there, nothing is said.
"""

from __future__ import annotations

import atexit
import contextlib
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from statistics import median
from typing import Any

import torch

EVERY_S = 0.2
SMI = ("nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader,nounits")
Sample = tuple[float, float, float]  # MHz, watts, degrees Celsius


class Sampler:
    """Keeps the samples of one GPU, each with when it was taken."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, Sample]] = deque(maxlen=20_000)

    def add(self, sample: Sample, at: float | None = None) -> None:
        self._samples.append((time.monotonic() if at is None else at, sample))

    def during(self, begin: float, end: float) -> dict[str, float]:
        """Median clock, median power and highest temperature between two times (time.monotonic); of the sample that is
        nearest to the middle where none was taken between them; nothing where there is none at all."""
        there = list(self._samples)
        chosen = [sample for at, sample in there if begin <= at <= end]
        if not chosen and there:
            chosen = [min(there, key=lambda one: abs(one[0] - (begin + end) / 2))[1]]
        if not chosen:
            return {}
        clock, power, heat = zip(*chosen, strict=True)
        return {"sm_mhz": median(clock), "watts": median(power), "celsius": max(heat), "samples": len(chosen)}


def parse(line: str) -> Sample | None:
    """A line of `nvidia-smi`: `1980, 94.36, 36`; None where it holds no numbers, as for `[N/A]`."""
    try:
        clock, power, heat = map(float, line.split(","))
    except ValueError:
        return None
    return clock, power, heat


@lru_cache(maxsize=8)
def sampler(device: torch.device) -> Sampler:
    """A GPU's sampler, started at the first call."""
    found = Sampler()
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)  # PyTorch may number GPUs otherwise
    name = f"GPU-{uuid}" if uuid else str(device.index or 0)
    ask = _through_nvml(name)
    target: Callable[[], None] = (lambda: _poll(found, ask)) if ask else (lambda: _listen(found, name))
    threading.Thread(target=target, name="clocks", daemon=True).start()
    return found


def _through_nvml(name: str) -> Callable[[], Sample] | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(name)

        def ask() -> Sample:
            return (
                pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
                pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
                pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            )

        ask()
    except Exception:  # not installed, or no access to the driver
        return None
    return ask


def _poll(found: Sampler, ask: Callable[[], Sample]) -> None:
    while True:
        with contextlib.suppress(Exception):  # a single answer may fail
            found.add(ask())
        time.sleep(EVERY_S)


def _listen(found: Sampler, name: str) -> None:
    command = [*SMI, f"--id={name}", f"--loop-ms={round(1e3 * EVERY_S)}"]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return
    atexit.register(process.kill)
    assert process.stdout is not None
    for line in process.stdout:
        if sample := parse(line):
            found.add(sample)


@contextlib.contextmanager
def watched(device: torch.device) -> Iterator[dict[str, Any]]:
    """What the GPU did while the body ran, in a table that is filled at its end: sm_mhz, watts, celsius, samples.

    Empty on a CPU.
    """
    found: dict[str, Any] = {}
    source = sampler(device) if device.type == "cuda" else None
    begin = time.monotonic()
    yield found
    if source is not None:
        found |= source.during(begin, time.monotonic())


def text(found: dict[str, Any]) -> str:
    """`1410 MHz, 694 W, 61 C`, or nothing."""
    return f"{found['sm_mhz']:.0f} MHz, {found['watts']:.0f} W, {found['celsius']:.0f} C" if found else ""
