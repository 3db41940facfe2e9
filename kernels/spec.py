"""One row of the registry: all that tests, the ahead-of-time gate, benchmarks and documentation need of a kernel.

A kernel file defines its launcher, its reference and one `KernelSpec`; `kernels/registry.py` lists the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Dims = Mapping[str, int]
GFX942 = -942  # AMD's MI300; architectures of AMD are negative, so that no bound on NVIDIA's lets them in
MakeCase = Callable[[Dims, torch.dtype, torch.Generator, torch.device], "Case"]
CostOf = Callable[[Dims, torch.dtype], "Cost"]


@dataclass
class Case:
    """One call: launcher(*args, **kwargs) writes into `outputs`, which are tensors among the arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: dict[str, Tensor]


@dataclass(frozen=True)
class Cost:
    """Bytes that have to move between memory and chip, and floating-point operations, of one call."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class KernelSpec:
    """One kernel, or one variant of it.

    launch: the launcher; reference: takes the same arguments and returns the exact outputs by name, in float64 from
    the inputs as they are (outputs among the arguments are ignored); plain: unfused PyTorch with the same arguments,
    the second opinion of tests and the baseline of benchmarks; make(dims, dtype, generator, device): a Case.
    small and production: named dims; dtypes: working dtypes; min_arch, max_arch: the lowest and the highest CUDA
    architecture that has it (0: there is no highest; AMD has what neither bounds); hot: runs in the stage loop, where
    a spill fails the gate; dot: has a matrix product, so wgmma is due on sm_90.
    """

    name: str
    launch: Callable[..., Any]
    reference: Callable[..., dict[str, Tensor]]
    plain: Callable[..., Any]
    make: MakeCase
    cost: CostOf
    small: Mapping[str, Dims]
    production: Mapping[str, Dims]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    min_arch: int = 80
    max_arch: int = 0
    hot: bool = True
    dot: bool = False

    def on(self, arch: int) -> bool:
        """Whether an architecture has it; 0 stands for Triton's interpreter, which has all."""
        if arch < 0:
            return self.min_arch <= 80 and not self.max_arch
        return not arch or self.min_arch <= arch <= (self.max_arch or arch)

    @property
    def family(self) -> str:
        """The file of kernels/ that launches it: on a GPU, tests of each run in a process of their own."""
        return self.launch.__module__.rpartition(".")[2]

    @property
    def summary(self) -> str:
        """First line of the launcher's docstring."""
        return (self.launch.__doc__ or "").strip().splitlines()[0]


def arch_name(arch: int) -> str:
    """`sm_90` for 90, `gfx942` for GFX942."""
    return f"sm_{arch}" if arch >= 0 else f"gfx{-arch}"


def random(shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator, device: torch.device | str) -> Tensor:
    """Standard normal values, the same on every device."""
    return torch.randn(shape, generator=rng).to(dtype).to(device)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """An output buffer full of NaN (of 0xA5 for integers), so that an unwritten element is seen."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), device=device).to(dtype)
    return torch.full(shape, 0xA5, dtype=dtype, device=device)
