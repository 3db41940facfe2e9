"""A training run in a folder: goes on where it was, keeps a log, stops when its minutes are over.

`state.pt` holds everything that training needs to go on; it is replaced as a whole, so an interrupt loses at most what
came after the last save.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import math
import os
import pickle
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from liverelay.engine.arguments import number, positive
from liverelay.engine.devices import check_device
from liverelay.engine.errors import CheckpointError, InputError, LiveRelayError, OutputError

TEACHER, STUDENT, DISTILLED = "a bidirectional teacher", "a causal student", "a distilled student"


@dataclass(frozen=True)
class Recipe:
    """How long and how fast: steps in all, minutes of this call, clips a step, learning rate.

    corruption: most noise on the keys and values of the history, relative to theirs; for causal models; vae: draws
    grids of samples every grid_every steps, None: no grids.
    """

    steps: int
    minutes: float
    batch: int
    rate: float
    seed: int = 0
    corruption: float = 0.1
    vae: Path | None = None
    grid_every: int = 500

    @classmethod
    def add(cls, parser: argparse.ArgumentParser, *, steps: int, batch: int, rate: float) -> None:
        """Its arguments, with defaults."""
        parser.add_argument("--steps", type=positive(int, "steps"), default=steps, help=f"in all ({steps})")
        parser.add_argument("--batch", type=positive(int, "clips"), default=batch, help=f"clips a step ({batch})")
        add_common(parser, rate)
        parser.add_argument("--vae", type=Path, help="vae.safetensors, to draw sample grids while training")
        parser.add_argument("--grid-every", type=positive(int, "steps"), default=500, metavar="STEPS", help="(500)")
        parser.add_argument(
            "--corruption", type=number(float, "parts"), default=0.1, help="most noise on the history (0.1)"
        )

    @classmethod
    def of(cls, given: argparse.Namespace) -> Recipe:
        return cls(
            given.steps, given.minutes, given.batch, given.rate, given.seed, given.corruption, given.vae,
            given.grid_every,
        )  # fmt: skip


class Run:
    """folder: where state and log lie; kind: what is trained, kept in the state; minutes: after which `steps` ends;
    seed: of torch's noise, set anew for each step, so that a run that was cut goes on as if it had not been;
    save_every: seconds between saves."""

    def __init__(self, folder: Path, kind: str, *, minutes: float, seed: int, save_every: float = 120.0) -> None:
        self.folder, self._end, self._save_every = folder, time.monotonic() + 60 * minutes, save_every
        self.kind, self._seed, self._asked_to_stop = kind, seed, False
        self.step, self.seconds, self._saved = 0, 0.0, time.monotonic()
        self._parts: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / ".lock").open("w")  # held while this object lives
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another program trains in {folder}; wait for it, or give another folder") from None

    def keep(self, **parts: Any) -> None:
        """Objects with state_dict and load_state_dict that belong to the run; those of an earlier run are loaded."""
        self._parts = parts
        path = self.folder / "state.pt"
        if path.exists():
            state = load_state(self.folder, torch.get_default_device())
            if (found := state.pop("kind", self.kind)) != self.kind:
                raise InputError(f"{self.folder} holds a run of {found}, not of {self.kind}; give another folder")
            self.step, self.seconds = state.pop("step"), state.pop("seconds")
            self._forget_later()
            try:
                for name, part in parts.items():
                    part.load_state_dict(state[name])
            except (KeyError, ValueError, RuntimeError):
                message = f"{self.folder} was written by another version of this program; give another folder"
                raise CheckpointError(message) from None

    def _forget_later(self) -> None:
        """Lines of the log past the state: the run was killed, and those steps are made again."""
        path = self.folder / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        begins = (re.match(r'{"step": (\d+),.*}\n', line) for line in lines)
        kept = [found[0] for found in begins if found and int(found[1]) <= self.step]
        if kept != lines:
            path.write_text("".join(kept))

    def save(self) -> None:
        state = {name: part.state_dict() for name, part in self._parts.items()}
        part = self.folder / "state.part"
        try:
            torch.save({**state, "kind": self.kind, "step": self.step, "seconds": self.seconds}, part)
        except RuntimeError as error:  # so torch reports a full disk
            part.unlink(missing_ok=True)
            raise OutputError(f"cannot write {part}: {error}; the last state.pt is kept") from None
        os.replace(part, self.folder / "state.pt")
        self._saved = time.monotonic()

    def steps(self, until: int, finish: Callable[[], object] = lambda: None) -> Iterator[int]:
        """The numbers of the steps still to do; saves now and then and at the end. Ctrl-C ends it after a step.

        finish: what else is to be written whenever it ends.
        """
        before = signal.getsignal(signal.SIGINT)
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._stop)
        try:
            yield from self._until(until)
            finish()
        finally:
            signal.signal(signal.SIGINT, before)
        if self._asked_to_stop:
            print(f"stopped after step {self.step}; the same command goes on from there", file=sys.stderr)
            raise KeyboardInterrupt

    def _stop(self, *_: object) -> None:
        self._asked_to_stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the next one ends it at once

    def _until(self, until: int) -> Iterator[int]:
        while self.step < until and time.monotonic() < self._end and not self._asked_to_stop:
            start = time.monotonic()
            torch.manual_seed((self._seed << 32) + self.step)
            yield self.step
            self.step += 1
            self.seconds += time.monotonic() - start
            if time.monotonic() - self._saved > self._save_every:
                self.save()
        self.save()
        print(f"{self.folder}: {self.step} of {until} steps done", flush=True)

    def log(self, **values: float | Tensor) -> None:
        """A line of the log, also printed."""
        line = {"step": self.step, "seconds": round(self.seconds, 1)}
        line |= {name: float(f"{float(torch.as_tensor(value).detach()):.5g}") for name, value in values.items()}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print("  ".join(f"{name} {value}" for name, value in line.items()), flush=True)


class Average(nn.Module):
    """Running mean of a module's weights (EMA): what is shipped."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        for i, weight in enumerate(model.parameters()):
            self.register_buffer(str(i), weight.detach().clone())

    def copy_to(self, model: nn.Module) -> None:
        """Give a model of the same form the averaged weights."""
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), list(self.buffers()))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.buffers()), list(model.parameters()), 1 - decay)


def load_state(folder: Path, device: torch.device | str) -> dict[str, Any]:
    """What a run has saved; CheckpointError where it cannot be read."""
    path = folder / "state.pt"
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location=device)
        whole = {"model", "average", "step", "seconds"} <= state.keys() and len(state["model"]) == len(state["average"])
    except (RuntimeError, ValueError, EOFError, AttributeError, TypeError, pickle.UnpicklingError):
        whole = False
    if not whole:
        raise CheckpointError(f"cannot read {path}: it is damaged, or no state of a training run; give another folder")
    return state


def load_average(folder: Path) -> dict[str, Tensor]:
    """The averaged weights of a run's folder, by the model's names."""
    return _averages(load_state(folder, "cpu"))


def _averages(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: state["average"][str(i)] for i, name in enumerate(state["model"])}


def load_run(model: nn.Module, folder: Path, *kinds: str) -> None:
    """The averaged weights of a run of one of these kinds; InputError for another one."""
    state = load_state(folder, "cpu")
    if (found := state.get("kind")) not in kinds:
        raise InputError(f"{folder} holds a run of {found or 'another program'}, not of {' or '.join(kinds)}")
    weights = _averages(state)
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise CheckpointError(f"{folder} holds weights that are no numbers; train it again with a lower --rate")
    try:
        model.load_state_dict(weights)
    except RuntimeError:  # names and shapes, a page of them
        raise CheckpointError(f"{folder} has no weights for this model, {type(model).__name__}") from None


def finite(loss: Tensor, step: int) -> float:
    """A loss as a number; LiveRelayError before weights that are none are saved."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise LiveRelayError(f"the loss of step {step} is {value}; the last state is kept: go on with a lower --rate")
    return value


def load_into(model: nn.Module, path: Path) -> None:
    """The weights of a safetensors file; CheckpointError where it cannot be read or has those of another model."""
    if not path.is_file():
        raise CheckpointError(f"{path} is no file; give a safetensors file with weights")
    try:
        model.load_state_dict(load_file(path, device=str(torch.get_default_device())))
    except SafetensorError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    except RuntimeError:  # names and shapes, a page of them
        raise CheckpointError(f"{path} has no weights for this model, {type(model).__name__}") from None


def add_common(parser: argparse.ArgumentParser, rate: float) -> None:
    """What every training takes, with the default of its learning rate."""
    parser.add_argument(
        "--minutes", type=positive(float, "minutes"), default=60, help="of this call; another one goes on (60)"
    )
    parser.add_argument("--rate", type=positive(float, "steps"), default=rate, help=f"highest learning rate ({rate})")
    parser.add_argument("--seed", type=number(int, "seeds"), default=0)
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    def take(device: str) -> None:
        try:
            torch.set_default_device(check_device(device))
        except LiveRelayError as error:  # argparse would hide what it says
            raise argparse.ArgumentTypeError(str(error)) from None

    parser.add_argument("--device", type=take, help="cpu, cuda or cuda:N (cpu)")


def there(array: np.ndarray) -> Tensor:
    """An array as a tensor on the device of the training program."""
    return torch.as_tensor(array, device=torch.get_default_device())


def fast_precision() -> torch.autocast:
    """bfloat16 for products on a GPU and on CPUs with instructions for it (others are four times slower with it)."""
    device = torch.get_default_device().type
    able = torch.cpu.get_capabilities()
    enabled = device != "cpu" or bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return torch.autocast(device, torch.bfloat16, enabled=enabled)


def keep_memory() -> None:
    """Let glibc keep freed memory: by default it gives every large tensor back to the kernel, and a third of the time
    goes to clearing the pages of the next one."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        mallopt(parameter, value)


def run_program(main: Callable[[], None]) -> None:
    """What a user can mend is one line and exit code 1, an interrupt 130."""
    keep_memory()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (LiveRelayError, ImportError) as error:
        sys.exit(f"distill: {error}")
    except OSError as error:
        sys.exit(f"distill: {error.filename}: {error.strerror}" if error.filename else f"distill: {error}")


def cosine(step: int, total: int, *, warmup: int = 100, lowest: float = 0.05) -> float:
    """Factor of the learning rate: rises over `warmup` steps, then falls along a cosine to `lowest`."""
    if step < warmup:
        return (step + 1) / warmup
    place = min(1.0, (step - warmup) / max(1, total - warmup))
    return lowest + (1 - lowest) * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * place))))
