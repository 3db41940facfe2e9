"""Which device and dtype the engine computes on."""

from __future__ import annotations

import os

import torch

from liverelay.engine.errors import InputError


def default_device() -> str:
    """The first GPU where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16, the published precision; on a CPU float32, which is faster there and at least as exact."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def check_device(device: str) -> str:
    """The device's name; InputError when there is no such device here."""
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise InputError(f"'{device}' is not a device; give cpu, cuda or cuda:N") from None
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device} was asked for, but PyTorch sees no GPU here; give --device cpu")
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device} was asked for, but there are only {torch.cuda.device_count()} GPUs")
    if kind.type not in ("cpu", "cuda") or (kind.type == "cpu" and kind.index):
        raise InputError(f"device {device} is not supported; give cpu, cuda or cuda:N")
    return device


def numbered(device: str) -> torch.device:
    """The device by name, a GPU with its number: `cuda` is the calling thread's current one, and other threads have
    their own."""
    found = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if found == torch.device("cuda") else found


def device_fault(device: torch.device) -> str:
    """The error that a GPU answers every call with since a kernel of this process failed; empty while it works.

    Such an error (an illegal address or instruction) poisons the process's CUDA context for good.
    """
    if device.type != "cuda":
        return ""
    try:
        torch.cuda.current_stream(device).query()
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return ""


FP8_PARTS = {"products": (True, False), "attention": (False, True), "all": (True, True)}


def fp8_parts(fp8: bool | str) -> tuple[bool, bool]:
    """Whether products and attention are in FP8; InputError for a word that is not in FP8_PARTS."""
    if isinstance(fp8, bool):
        return fp8, False
    if fp8 not in FP8_PARTS:
        raise InputError(f"'{fp8}' cannot be in FP8; there is: {', '.join(FP8_PARTS)}")
    return FP8_PARTS[fp8]


def check_fp8(device: str, dtype: torch.dtype) -> None:
    """InputError where a GPU has no FP8 products, or has them in bfloat16 only. A CPU computes what they would give."""
    kind = torch.device(device)
    if kind.type != "cuda":
        return
    if torch.version.hip:
        raise InputError("FP8 needs a GPU by NVIDIA: AMD's gfx942 has another 8-bit format; leave --fp8 out")
    major, minor = torch.cuda.get_device_capability(kind)
    if (major, minor) < (8, 9):
        raise InputError(f"FP8 needs a GPU of sm_89 or later, {device} is sm_{major}{minor}; leave --fp8 out")
    if dtype != torch.bfloat16:
        raise InputError("FP8 on a GPU goes with bfloat16; leave --dtype float32 or --fp8 out")


def set_threads(threads: int | None) -> None:
    """CPU threads of this process; None leaves them. InputError for more than can be of use."""
    if threads is None:
        return
    most = 4 * (os.cpu_count() or 1)
    if threads > most:
        raise InputError(f"{threads} threads are too many for this machine; at most {most}")
    torch.set_num_threads(threads)
