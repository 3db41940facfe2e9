"""The one seam between the engine and its operators: a backend is a module that holds every operator.

The engine asks once, at start, for a backend by name and calls its functions on static buffers. `torch` (plain
PyTorch, any device) is always there; `triton` needs a GPU, or Triton's interpreter on a CPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType

import torch

# name -> operators of the transformer, operators of the VAE
BACKENDS = {
    "torch": ("liverelay.kernels.torch_ops", "liverelay.kernels.vae_ops"),
    "triton": ("liverelay.kernels.triton_ops", "liverelay.kernels.triton_vae_ops"),
}


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run on a device here, and why not."""

    name: str
    works: bool
    reason: str


def available(name: str, device: torch.device) -> Availability:
    """Look, without importing what is heavy. ValueError for a name that is no backend."""
    if name not in BACKENDS:
        raise ValueError(f"unknown kernel backend '{name}'; there is: {', '.join(sorted(BACKENDS))}")
    if name == "torch":
        return Availability(name, True, "plain PyTorch, any device")
    if importlib.util.find_spec("triton") is None:
        return Availability(name, False, "Triton is not installed; install it with: pip install 'liverelay[triton]'")
    if device.type == "cuda" and torch.version.hip:
        gfx = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return Availability(name, gfx == "gfx942", f"{gfx}; of AMD's GPUs the kernels are compiled for gfx942 alone")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        works = major >= 8
        return Availability(name, works, f"sm_{major}{minor}" + ("" if works else "; the kernels need sm_80 or later"))
    import triton

    if triton.knobs.runtime.interpret:
        return Availability(name, True, "Triton's interpreter: for tests, very slow")
    return Availability(name, False, f"no GPU: device {device.type} (TRITON_INTERPRET=1 runs the kernels for tests)")


def choose(name: str | None, device: torch.device) -> str:
    """`name`, or for None triton on a GPU that has it, else torch. ValueError says why a backend cannot be used."""
    if name is None:
        return "triton" if device.type == "cuda" and available("triton", device).works else "torch"
    found = available(name, device)
    if not found.works:
        raise ValueError(f"kernel backend '{name}' cannot be used: {found.reason}")
    return name


def get(name: str | None, device: torch.device) -> ModuleType:
    """The transformer's operators of a backend (see `choose`)."""
    return importlib.import_module(BACKENDS[choose(name, device)][0])


def get_vae(name: str | None, device: torch.device) -> ModuleType:
    """The VAE's operators of a backend; on a CPU PyTorch's, because activations lie in another layout there."""
    chosen = choose(name, device)
    return importlib.import_module(BACKENDS["torch" if device.type == "cpu" else chosen][1])
