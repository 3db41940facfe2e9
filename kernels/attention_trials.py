"""Attentions tried in a process of their own: one that crashes or hangs costs its own trial and nothing else.

A kernel that fails on the device leaves a process's CUDA context unusable for good, so the process that serves never
runs one that was not tried. The other side of the pipe is `main` below, in a fresh interpreter.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

import torch
from torch import Tensor

from liverelay.kernels.attention_backends import Attention, Trial, failed, try_out

START_SECONDS = 180.0  # from the start of a process until PyTorch and the device are there
TRIAL_SECONDS = 120.0  # of one candidate, compilation included
# Ours or the system's way to end a process; whatever else ends one is the candidate's doing.
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# The same modules in every form of installation; the paths come first, whatever the environment says.
BOOTSTRAP = "import json, sys; given = json.loads(sys.argv[1]); sys.path[:] = given.pop('path'); \
from liverelay.kernels.attention_trials import main; main(given)"

Factory = Callable[[torch.device, bool], Mapping[str, Attention]]


@dataclass(frozen=True)
class Setting:
    """What candidates are tried on.

    factory: gives them by name, from a device and whether Triton works there; a function of a module, because the
    other process imports it too. shape: tokens, rows, heads, head size; fp8: operands are e4m3 codes with scales;
    q_factor: each query has a factor.
    """

    factory: Factory
    triton_works: bool
    shape: tuple[int, int, int, int]
    device: torch.device
    dtype: torch.dtype
    fp8: bool = False
    q_factor: bool = False


def try_apart(
    names: Sequence[str], setting: Setting, *, start_s: float = START_SECONDS, trial_s: float = TRIAL_SECONDS
) -> Iterator[Trial]:
    """Try the named candidates one after the other, in as few other processes as it takes; each trial as it ends.

    A process that dies, or is silent for `trial_s` seconds, is a fault of the candidate that it was trying; the rest
    go on in a new one. Where no process can be started, or the device has no memory left for it, the trials have
    faults that are not `lasting`.
    """
    left = list(names)
    while left:
        before = len(left)
        with _Process(left, setting) as process:
            why = process.wait_until_ready(start_s)
            while why is None and left:
                trial = process.trial(trial_s)
                if trial is None:
                    break
                left.remove(trial.name)
                yield trial
        if len(left) == before:
            yield from (failed(name, f"it could not be tried: {why or 'nothing came of it'}", False) for name in left)
            return


class _Process:
    """The other process as its parent sees it: JSON lines come, and the end of its input tells it to end."""

    def __init__(self, names: Sequence[str], setting: Setting) -> None:
        request = {
            "path": sys.path, "names": list(names), "triton_works": setting.triton_works, "shape": setting.shape,
            "factory": f"{setting.factory.__module__}:{setting.factory.__qualname__}", "fp8": setting.fp8,
            "q_factor": setting.q_factor, "device": str(setting.device),
            "dtype": str(setting.dtype).removeprefix("torch."),
        }  # fmt: skip
        self._running, self._over = "", False
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._errors: IO[bytes] = io.BytesIO()
        self._why = ""
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed at exit)
            self._process = subprocess.Popen(
                [sys.executable, "-c", BOOTSTRAP, json.dumps(request)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self._errors, start_new_session=True,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            self._why = f"no process could be started: {error}"
        else:
            threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        """End it, with whatever it started (a compiler)."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # the driver does not let go of it; we do
                self._process.wait(10)
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._errors.close()

    def _read(self, out: IO[bytes]) -> None:
        with out, contextlib.suppress(ValueError):  # half a line, of a process that died over it
            for line in out:
                self._lines.put(json.loads(line))
        self._lines.put(None)

    def _next(self, seconds: float) -> dict[str, Any] | None:
        """What it says next; None at its end. queue.Empty where it says nothing in time."""
        return None if self._process is None else self._lines.get(timeout=seconds)

    def wait_until_ready(self, seconds: float) -> str | None:
        """Why it cannot try anything; None where it can."""
        try:
            said = self._next(seconds)
        except queue.Empty:
            return f"the process was not ready after {seconds:.0f} s"
        return None if said is not None else self._why or f"the process {self._ending()[0]}"

    def trial(self, seconds: float) -> Trial | None:
        """The next trial; None where the process has ended in order. What it dies or hangs in has a fault."""
        while not self._over:
            try:
                said = self._next(seconds)
            except queue.Empty:
                return self._fault(f"no answer within {seconds:g} s", True)
            if said is None:
                how, lasting = self._ending()
                return self._fault(f"it crashed: {how}", lasting)
            if "trial" in said:
                self._running = ""
                return Trial(**said["trial"])
            self._running = said["begun"]
        return None

    def _fault(self, words: str, lasting: bool) -> Trial | None:
        self._over = True
        return failed(self._running, words, lasting) if self._running else None

    def _ending(self) -> tuple[str, bool]:
        """How it ended, in words, and whether that was its own doing."""
        assert self._process is not None
        try:
            status = self._process.wait(10)
        except subprocess.TimeoutExpired:
            return "closed its output", True
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - 2000))
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        ended = f"ended with status {status}" if status >= 0 else signal.strsignal(-status) or f"signal {-status}"
        return f"{ended}: {last}"[:120] if last else ended, -status not in FROM_OUTSIDE


# -- the other process -------------------------------------------------------------------------------------------------


def alive(like: Tensor) -> str:
    """Why the device's context can no longer be used; '' where it can. Takes no memory."""
    try:
        like.add_(0).cpu()
        return ""
    except Exception as error:  # whatever the runtime raises
        return (str(error).strip() or repr(error)).splitlines()[0]


def main(given: Mapping[str, Any]) -> None:
    """Try what the parent asks for; it reads a line when a trial begins and one when it has ended."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # a crash is expected
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print where they like

    def tell(**what: Any) -> None:
        print(json.dumps(what), file=out, flush=True)

    def end_with_the_parent() -> None:
        while os.read(0, 1):
            pass
        os._exit(0)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    device = torch.device(given["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    like = torch.zeros(1, device=device, dtype=getattr(torch, given["dtype"]))
    module, name = given["factory"].split(":")
    found = getattr(importlib.import_module(module), name)(device, given["triton_works"])
    tell(ready=True)
    for name in given["names"]:
        tell(begun=name)
        if name not in found:
            tell(trial=asdict(failed(name, "it could not be tried: another process does not find it", False)))
            continue
        with torch.inference_mode():
            options = {option: given[option] for option in ("fp8", "q_factor")}
            (trial,) = try_out({name: found[name]}, tuple(given["shape"]), like, **options)
        if broken := alive(like):
            tell(trial=asdict(failed(name, f"it crashed: {broken}"[:120], True)))
            break
        tell(trial=asdict(trial))
    out.close()
    os._exit(0)  # a library's clean-up must not spoil what was said
