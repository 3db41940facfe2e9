"""The one way to start a Triton kernel: on a GPU, in Triton's interpreter, or only compiled for a named architecture.

Launchers call `run`; the ahead-of-time gate calls the same launchers inside `compile_only`, so that it compiles
exactly what a launch would run. TRITON_INTERPRET=1 must be set before the process starts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from liverelay.kernels.spec import GFX942

INTERPRETED = bool(triton.knobs.runtime.interpret)
if INTERPRETED:
    from liverelay.kernels import interpreter  # noqa: F401  (mends Triton's interpreter when imported)


class Launch(NamedTuple):
    """A launch that was only compiled, and what it would have been started with."""

    name: str
    compiled: Any
    programs: int
    arguments: tuple[Any, ...]


@dataclass
class Compiled:
    """What `compile_only` gathers: every launch."""

    arch: int
    kernels: list[Launch] = field(default_factory=list)


_compile_only: list[Compiled] = []


@contextlib.contextmanager
def compile_only(arch: int) -> Iterator[Compiled]:
    """Within this, `run` compiles for the architecture (80, GFX942, ...), launching nothing. Needs an active driver."""
    collected = Compiled(arch)
    _compile_only.append(collected)
    try:
        yield collected
    finally:
        _compile_only.pop()


@lru_cache(maxsize=8)
def _properties(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    arch = GFX942 if torch.version.hip else 10 * properties.major + properties.minor  # dispatch lets no other AMD in
    return arch, properties.multi_processor_count


def arch(tensor: Tensor) -> int:
    """Architecture that a kernel on this tensor runs on: 90 for an H100, negative for AMD, 0 in the interpreter."""
    if _compile_only:
        return _compile_only[-1].arch
    return 0 if INTERPRETED else _properties(tensor.get_device())[0]


def processors(tensor: Tensor) -> int:
    """Streaming multiprocessors of the tensor's device (a small number in the interpreter)."""
    if _compile_only:
        return 132
    return 3 if INTERPRETED else _properties(tensor.get_device())[1]


def run(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
    """Launch `programs` programs of a kernel on the tensors' device."""
    if _compile_only:
        compiled = kernel.warmup(*args, grid=(programs,), **meta)
        _compile_only[-1].kernels.append(Launch(kernel.fn.__name__, compiled, programs, args))
        return
    if INTERPRETED and getattr(kernel, "is_gluon", bool)():  # Triton's interpreter knows no Gluon
        from liverelay.kernels import gluon_interpreter

        gluon_interpreter.run(kernel, programs, args, meta)
        return
    kernel[(programs,)](*args, **meta)


def refuse(kernel: str, fault: str) -> None:
    """ValueError in one line; launchers check before they launch, because a wrong address is silent on a GPU."""
    raise ValueError(f"{kernel}: {fault}")


def check(kernel: str, tensors: Mapping[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    """Every named tensor has its shape, lies on one device, and its last dimension is contiguous."""
    first = next(iter(tensors.values()))[0]
    for name, (tensor, shape) in tensors.items():
        if tuple(tensor.shape) != shape:
            refuse(kernel, f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.device != first.device:
            refuse(kernel, f"{name} is on {tensor.device}, the first argument on {first.device}")
        if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            refuse(kernel, f"the last dimension of {name} is not contiguous (strides {list(tensor.stride())})")


def next_power_of_two(value: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(0, value - 1).bit_length()


ELEMENTS = 8192  # of a program: one row of the 14B model, many of a narrow one
NARROW = 256  # widths up to here are one chunk

_padded: list[set[int]] = []


@contextlib.contextmanager
def padded_rows() -> Iterator[set[int]]:
    """Within this, a row is one chunk, padded to a power of two: what chunks are measured against. Gives a set that
    gets the width of every row kernel started, so that a benchmark sees whether there was one.
    """
    widths: set[int] = set()
    _padded.append(widths)
    try:
        yield widths
    finally:
        _padded.pop()


def tiling(width: int) -> dict[str, int]:
    """Launch constants of a row kernel: rows a program takes, the chunks of a row, threads (up to 64 elements each).

    A chunk is an eighth of the padded width: at most one chunk of eight is padding, and in a wide row each thread has
    8 neighbours of a chunk, which is one access of 128 bits to a 16-bit dtype. Few warps with many elements each are
    fastest on an H100, most of all where rows are quantised: bench/results.
    """
    padded = next_power_of_two(width)
    tile = max(min(padded, NARROW), padded // 8)
    if _padded:
        _padded[-1].add(width)
        tile = padded
    rows = max(1, min(64, ELEMENTS // padded))
    # Elements of a warp; rows that are not aligned spend registers on addresses.
    share = 2048 if width % 8 == 0 else 512
    return {
        "WIDTH": width, "TILE": tile, "CHUNKS": triton.cdiv(width, tile), "ROWS": rows,
        "num_warps": min(16, max(1, rows * padded // share)), "num_stages": 1,
    }  # fmt: skip
