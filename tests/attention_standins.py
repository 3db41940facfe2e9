"""Candidates for the trial of attentions that do what kernels can do; the trial's other process imports this module."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from liverelay.kernels import attention_trials, torch_ops
from liverelay.kernels.attention_backends import Attention
from liverelay.kernels.contract import Place

right = torch_ops.attention


def slow(q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None = None, **more: Tensor) -> Tensor:
    time.sleep(0.05)
    return right(q, k, v, out, place, **more)  # type: ignore[arg-type]


def wrong(q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None = None, **more: Tensor) -> Tensor:
    return right(q, k, v, out, place, **more).mul_(1.01)  # type: ignore[arg-type]


def noisy(q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None = None, **more: Tensor) -> Tensor:
    os.write(1, b'{"trial": "a library prints"}\n')
    return right(q, k, v, out, place, **more)  # type: ignore[arg-type]


def deaf(q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None = None, **more: Tensor) -> Tensor:
    return right(q, k, v, out, place)


def doing(act: Callable[[], object]) -> Attention:
    """A candidate that does this instead of attention."""

    def attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None = None, **more: Tensor) -> Tensor:
        act()
        return out

    return attention


def refuse(error: Exception) -> None:
    raise error


def poison() -> None:
    attention_trials.alive = lambda like: "CUDA error: an illegal instruction was encountered"
    refuse(RuntimeError("CUDA error"))


def kill(number: int) -> Attention:
    return doing(lambda: os.kill(os.getpid(), number))


def deaf_and_slow(device: torch.device, triton_works: bool) -> dict[str, Attention]:
    return {"deaf": deaf, "slow": slow}


def mixed(device: torch.device, triton_works: bool) -> dict[str, Attention]:
    """Everything that can happen."""
    return {
        "right": right, "wrong": wrong, "noisy": noisy, "slow": slow, "aborting": doing(os.abort),
        "raising": doing(lambda: refuse(RuntimeError("no kernel for this head size\nand a long story"))),
        "illegal": kill(signal.SIGILL), "killed": kill(signal.SIGKILL), "leaving": doing(lambda: sys.exit(3)),
        "hanging": doing(lambda: time.sleep(3600)), "poisoning": doing(poison), "last": right,
        "hungry": doing(lambda: refuse(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"))),
    }  # fmt: skip


def usual(device: torch.device, triton_works: bool) -> dict[str, Attention]:
    """As on a GPU where one kernel crashes."""
    found = mixed(device, triton_works)
    return {name: found[name] for name in ("slow", "right", "aborting", "wrong")}


def harmless(device: torch.device, triton_works: bool) -> dict[str, Attention]:
    return {"slow": slow, "right": right}


def hopeless(device: torch.device, triton_works: bool) -> dict[str, Attention]:
    found = mixed(device, triton_works)
    return {name: found[name] for name in ("wrong", "raising")}


def without_room(device: torch.device, triton_works: bool) -> dict[str, Attention]:
    found = mixed(device, triton_works)
    return {name: found[name] for name in ("hungry", "raising")}


def short_of_memory(device: torch.device, triton_works: bool) -> dict[str, Attention]:
    found = mixed(device, triton_works)
    return {name: found[name] for name in ("hungry", "right")}


def absent(device: torch.device, triton_works: bool) -> dict[str, Attention]:
    raise RuntimeError("CUDA error: no device")
