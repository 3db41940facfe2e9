"""Who computes attention: our kernels or a library's, whatever is fastest on this device and right.

All take the arguments of `torch_ops.attention`, libraries all but scales. Before its first start on a device the
engine runs every candidate on the real shapes (`attention_trials`), drops what fails or differs from float32 PyTorch by
more than its dtype allows, and takes the fastest.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liverelay.kernels import dispatch, torch_ops
from liverelay.kernels.contract import FP8, Place, Scales, transposed

Attention = Callable[..., Tensor]  # see `torch_ops.attention`
NAMES = (
    "sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "flash-attn", "triton-pointer", "triton-descriptor",
    "triton-specialised",
)  # fmt: skip
FLASH_MODULES = ("flash_attn_interface", "flash_attn.cute", "flash_attn")  # third, fourth, second generation
REPEATS = 5
PASSING = ("out of memory", "alloc_failed", "allocation_failed", "ecc error", "busy or unavailable")
ALLOWED_FP8 = 0.06  # e4m3 shares have an error of some 2.6 %, and random values do not average it away


@dataclass(frozen=True)
class Trial:
    """How one candidate did: seconds of a call, relative error, and why it cannot be taken (empty: it can).

    lasting: it would do so again; not where the device was short of memory, or no trial was possible.
    """

    name: str
    seconds: float
    error: float
    fault: str
    lasting: bool = True


def failed(name: str, fault: str, lasting: bool) -> Trial:
    """The trial of a candidate that gave no result."""
    return Trial(name, math.inf, math.nan, fault, lasting)


def library(operator: Callable[..., Any], *arguments: Any) -> Attention:
    """One of PyTorch's attention kernels by its own operator, which is given q, k, v [1, H, n, d] and the arguments.

    `F.scaled_dot_product_attention` decides among them by switches of the process, which other stages depend on.
    """

    def attention(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None = None, *, q_factor: Tensor | None = None
    ) -> Tensor:
        rows = k.shape[0] if place is None else place.valid
        heads_first = (part.transpose(0, 1).unsqueeze(0) for part in (scaled(q, q_factor), k[:rows], v[:rows]))
        attended = operator(*heads_first, *arguments)[0]
        return out.copy_(attended.squeeze(0).transpose(0, 1))

    return attention


def scaled(q: Tensor, q_factor: Tensor | None) -> Tensor:
    """Queries times their factors, for a library that knows none: a pass that our kernels do without."""
    return q if q_factor is None else torch.mul(q, q_factor[:, None, None], out=torch.empty_like(q))


def libraries() -> dict[str, Attention]:
    """PyTorch's kernels for a GPU; those with arguments are told that there is no bias and no log-sum is wanted."""
    aten = torch.ops.aten
    return {
        "sdpa-cudnn": library(aten._scaled_dot_product_cudnn_attention.default, None, False),
        "sdpa-flash": library(aten._scaled_dot_product_flash_attention.default),
        "sdpa-efficient": library(aten._scaled_dot_product_efficient_attention.default, None, False),
    }


def flash_attention() -> Attention | None:
    """The flash-attn package of any generation; None where none can be imported."""
    for name in FLASH_MODULES:
        try:
            return through(importlib.import_module(name).flash_attn_func)
        except (ImportError, AttributeError, OSError):
            continue
    return None


def through(flash_attn_func: Callable[..., Any]) -> Attention:
    """flash-attn's function with our arguments; some generations return the log-sums too."""

    def attention(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, place: Place | None = None, *, q_factor: Tensor | None = None
    ) -> Tensor:
        rows = k.shape[0] if place is None else place.valid
        result = flash_attn_func(scaled(q, q_factor).unsqueeze(0), k[:rows].unsqueeze(0), v[:rows].unsqueeze(0))
        result = result[0] if isinstance(result, tuple) else result
        return out.copy_(result.view(out.shape))

    return attention


def specialised_attention(device: torch.device) -> dict[str, Attention]:
    """Our kernel in Gluon, for sm_90; nothing where this Triton's Gluon is missing or another one."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return {}
    try:
        kernels = importlib.import_module("liverelay.kernels.attention_gluon")
        return {"triton-specialised": kernels.attention_specialised}
    except (ImportError, AttributeError, TypeError):
        return {}


def candidates(device: torch.device, triton_works: bool) -> dict[str, Attention]:
    """Every implementation that may work on the device, by name; only PyTorch's own on a CPU."""
    if device.type != "cuda":
        return {"torch": torch_ops.attention}
    found = libraries()
    flash = flash_attention()
    if flash is not None:
        found["flash-attn"] = flash
    if triton_works:
        kernels = importlib.import_module("liverelay.kernels.attention")
        found["triton-pointer"] = kernels.attention_pointer
        if torch.version.hip:  # AMD's capability is another count, and the rest is made for NVIDIA
            return found
        found |= {"triton-descriptor": kernels.attention_descriptor} | specialised_attention(device)
    return found


def named(name: str | None, device: torch.device) -> Attention | None:
    """The attention of this name; None where it is no attention's. ValueError where it cannot work on the device."""
    if name not in NAMES:
        return None
    found = candidates(device, dispatch.available("triton", device).works)
    if name not in found:
        raise ValueError(f"attention '{name}' cannot be used on {device}; there is: {', '.join(found)}")
    return found[name]


def fp8_candidates(device: torch.device, triton_works: bool) -> dict[str, Attention]:
    """The same for attention in FP8, which takes scales: no library's attention knows ours."""
    if device.type != "cuda" or not triton_works:
        return {"torch": torch_ops.attention}
    kernels = importlib.import_module("liverelay.kernels.attention")
    found: dict[str, Attention] = {"triton-pointer": kernels.attention_pointer}
    if torch.cuda.get_device_capability(device) >= (9, 0):
        found["triton-descriptor"] = kernels.attention_descriptor
    return found | specialised_attention(device)


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Best of a few calls, measured on the device."""
    import time

    best = math.inf
    for _ in range(REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def random_operands(
    shape: tuple[int, int, int, int], like: Tensor, fp8: bool, q_factor: bool
) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    """q, k, v as the kernels take them, the values in float32 that they stand for, and what that takes besides."""
    tokens, rows, heads, head_dim = shape
    rng = torch.Generator(device=like.device).manual_seed(0)

    def noise(count: int) -> Tensor:
        values = torch.randn(count, heads, head_dim, generator=rng, device=like.device)
        return values.to(FP8 if fp8 else like.dtype)

    given = [noise(tokens), noise(rows), noise(rows)]
    values = [tensor.to(torch.float32, copy=True) for tensor in given]
    more: dict[str, Any] = {}
    if q_factor:
        more["q_factor"] = 0.5 + torch.rand(tokens, generator=rng, device=like.device)
        values[0].mul_(more["q_factor"][:, None, None])
    if not fp8:
        return given, values, more
    given[2] = transposed(shape[1:], like.device).copy_(given[2])
    of_q, of_k = (0.5 + torch.rand(heads, generator=rng, device=like.device) for _ in range(2))
    scales = Scales(of_q, of_k, 0.5)
    values[0].mul_(scales.q[:, None])
    values[1].mul_(scales.k[:, None])
    values[2].mul_(scales.v)
    return given, values, more | {"scales": scales}


def try_out(
    found: Mapping[str, Attention], shape: tuple[int, int, int, int], like: Tensor, *, fp8: bool = False,
    q_factor: bool = False,
) -> list[Trial]:
    """Run every candidate on random tensors; shape: tokens, rows, heads, head size; like: gives device and dtype.

    fp8: on codes with their scales; q_factor: each query has a factor, for which a library needs one more pass.
    A library that is missing or does not take the shape raises its own error, which becomes the trial's fault.
    """
    tokens, rows = shape[:2]
    (q, k, v), values, more = random_operands(shape, like, fp8, q_factor)
    valid = max(1, rows - 1)
    k[valid:], v[valid:] = float("nan"), float("nan")  # what lies behind the valid rows must not matter
    place, out = Place.make(like.device).fill(0, valid, False), torch.empty_like(q, dtype=like.dtype)
    # Some queries of the first, a middle and the last tile are enough to see whether it is right.
    part = sorted({i for first in (0, tokens // 2, tokens - 32) for i in range(max(0, first), min(tokens, first + 32))})
    sample, kept = values[0][part], (values[1][:valid], values[2][:valid])
    exact = torch_ops.attention(sample, *kept, torch.empty_like(sample))
    allowed, trials = 2 * torch.finfo(like.dtype).eps if like.dtype != torch.float32 else 1e-4, []
    if fp8:
        allowed = ALLOWED_FP8
    for name, attention in found.items():
        try:
            out.fill_(float("nan"))
            attention(q, k, v, out, place, **more)
            error = float((out[part].float() - exact).norm() / exact.norm())
            fault = "" if error <= allowed else f"its error is {error:.1e}, at most {allowed:.1e} is allowed"
            seconds = seconds_of(functools.partial(attention, q, k, v, out, place, **more), like.device)
            trials.append(Trial(name, seconds, error, fault))
        except Exception as problem:  # of somebody else's library: whatever it raises, we do without it
            line = (str(problem).strip() or repr(problem)).splitlines()[0]
            trials.append(failed(name, line[:120], not _is_passing(problem)))
    return trials


def _is_passing(problem: Exception) -> bool:
    """Whether an error tells of the device's state, not of the candidate."""
    text = str(problem).lower()
    return isinstance(problem, MemoryError) or any(words in text for words in PASSING)


def fastest(trials: list[Trial]) -> Trial | None:
    """The fastest trial without a fault."""
    return min((trial for trial in trials if not trial.fault), key=lambda trial: trial.seconds, default=None)
