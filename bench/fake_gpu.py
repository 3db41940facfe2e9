"""Compiles what a launch would run for a GPU that is not there, and reads what became of it.

Launchers run unchanged inside `launch.compile_only` under a driver that only names an architecture, so that tiles,
warps and the specialisation on argument values are those of a real launch. Registers and spills come from ptxas' own
log (Triton keeps none); the log is kept in Triton's cache, because assembling is half of the work. Triton is imported
inside the functions: the gate's logic is tested without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from liverelay.kernels.spec import GFX942, arch_name

AMD_NAMES = ("vgpr_count", "private_segment_fixed_size")  # accumulation registers are among the vector registers
LARGE = 1 << 16  # elements from which an input is left unfilled


@dataclass(frozen=True)
class Limits:
    """What one streaming multiprocessor holds; shared memory in KiB, of an SM and at most of one block; 32-bit
    registers; threads of a warp and the registers that it gets at a time."""

    threads: int
    blocks: int
    shared: int
    shared_block: int
    registers: int = 65536
    warp: int = 32
    unit: int = 256


LIMITS = {
    80: Limits(2048, 32, 164, 163),
    89: Limits(1536, 24, 100, 99),
    90: Limits(2048, 32, 228, 227),
    100: Limits(2048, 32, 228, 227),
    GFX942: Limits(2048, 32, 64, 64, 131072, 64, 512),
}


@dataclass(frozen=True)
class Job:
    """One launch to compile; `hot` and `dot` are those of its KernelSpec."""

    kernel: str
    dims: str
    dtype: str
    arch: int
    hot: bool = True
    dot: bool = False
    production: bool = True

    @property
    def name(self) -> str:
        return f"{self.kernel} [{self.dims}] {self.dtype} {arch_name(self.arch)}"


@dataclass(frozen=True)
class Row:
    """One compiled kernel. Spills in bytes for each thread, shared memory in bytes, occupancy in percent.

    On AMD registers are vector registers, `mma` counts mfma, and all scratch memory is held to be stores of spills.
    """

    kernel: str
    dims: str
    dtype: str
    arch: int
    function: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    warps: int
    ctas: int
    limit: str
    occupancy: int
    wgmma: int = 0
    tcgen05: int = 0
    mma: int = 0
    tma: int = 0
    cp_async: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        return self.kernel, self.dims, self.dtype, self.arch, self.function

    @property
    def name(self) -> str:
        """As Job.name, and the function, because a launch may start several kernels."""
        return f"{self.kernel} [{self.dims}] {self.dtype} {arch_name(self.arch)} ({self.function})"


@dataclass(frozen=True)
class Result:
    """What became of a job: rows (a Row of each kernel, or what else `read_job` makes), or the error in one line."""

    job: Job
    rows: tuple[Any, ...] = ()
    error: str = ""
    seconds: float = field(default=0.0, compare=False)


class Driver:
    """Stands in for the driver of a GPU: names the target, and can launch nothing."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32) if self.arch > 0 else GPUTarget("hip", arch_name(self.arch), 64)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps a compiler for each device number, so each target needs its own

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return self.arch // 10, self.arch % 10


def activate(arch: int) -> None:
    """From now on Triton compiles for this architecture; it launches nothing more in this process."""
    from triton.runtime import driver

    driver.set_active(Driver(arch))


@contextlib.contextmanager
def cheap_inputs() -> Iterator[None]:
    """Input makers leave large tensors unfilled: only shapes, strides and alignment reach the compiler."""
    from liverelay.kernels import spec

    random, poisoned = spec.random, spec.poisoned

    def quick_random(shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator, device: Any) -> Tensor:
        large = torch.Size(shape).numel() >= LARGE
        return torch.empty(shape, dtype=dtype, device=device) if large else random(shape, dtype, rng, device)

    def quick_poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("liverelay.kernels"):
                for attribute, old, new in (("random", random, quick_random), ("poisoned", poisoned, quick_poisoned)):
                    if getattr(module, attribute, None) is old:  # the files import the functions themselves
                        stack.enter_context(mock.patch.object(module, attribute, new))
        yield


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """No output, C++'s included: a failing compiler pass prints hundreds of kilobytes before its exception."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as sink:
        try:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
            yield
        finally:
            for at, old in enumerate(kept, start=1):
                os.dup2(old, at)
                os.close(old)


def occupancy(arch: int, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> tuple[int, str, int]:
    """Blocks that fit on one SM at a time, what limits them, and the percentage of the SM's threads they fill."""
    limits = LIMITS[arch]
    reserved = 1024 if arch > 0 else 0  # bytes of shared memory of every block
    warp_registers = -(-max(registers, 1) * limits.warp // limits.unit) * limits.unit
    fits = {
        "threads": limits.threads // (limits.warp * warps),
        "blocks": limits.blocks,
        "registers": limits.registers // warp_registers // 4 * 4 // warps,  # 4 parts of an SM, each with its own file
        "shared": limits.shared * 1024 // max(shared + reserved, 1) if shared <= limits.shared_block * 1024 else 0,
    }
    if tensor_memory:
        fits["tmem"] = 512 // tensor_memory
    blocks = min(fits.values())
    limiting = [name for name, count in fits.items() if count == blocks]
    return blocks, "+".join(limiting), round(100 * blocks * warps * limits.warp / limits.threads)


def read_log(log: str) -> dict[str, Any]:
    """Registers, spilled bytes and performance warnings from the output of `ptxas -v`."""
    spills = [(int(a), int(b)) for a, b in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)]
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    if not registers or not spills:
        raise RuntimeError(f"no registers or spills in the log of ptxas: {log.strip()[-200:]!r}")
    return {
        "registers": max(registers),
        "spill_stores": sum(stores for stores, _ in spills),
        "spill_loads": sum(loads for _, loads in spills),
        "warnings": tuple(sorted(set(re.findall(r"\bC75\d\d\b", log)))),
    }


def assemble(ptx: str, arch: int, options: Any) -> str:
    """The log of ptxas, called as Triton calls it; from Triton's cache where it was made before."""
    from triton.backends.nvidia.compiler import get_ptxas, get_ptxas_version
    from triton.runtime.cache import get_cache_manager

    named = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    command = [get_ptxas(arch).path, "-lineinfo", "-v", f"--gpu-name={named[1] if named else f'sm_{arch}'}"]
    command += [] if getattr(options, "enable_fp_fusion", True) else ["--fmad=false"]
    command += (getattr(options, "ptx_options", None) or "").split()
    identity = "\n".join([get_ptxas_version(arch), *command[1:], ptx])
    cache = get_cache_manager(hashlib.sha256(identity.encode()).hexdigest())
    if found := cache.get_file("ptxas.log"):
        return Path(found).read_text()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        run = subprocess.run([*command, str(source), "-o", f"{folder}/kernel.cubin"], capture_output=True, text=True)
    log = run.stdout + run.stderr
    if run.returncode:
        raise RuntimeError(f"ptxas: {log.strip()[-500:]}")
    cache.put(log, "ptxas.log", binary=False)
    return log


def measure_amd(job: Job, function: str, compiled: Any) -> Row:
    """The figures of one kernel compiled for AMD, whose assembly names them."""
    text, metadata = compiled.asm["amdgcn"], compiled.metadata
    found = {name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in AMD_NAMES}  # type: ignore[index]
    registers, scratch = found["vgpr_count"], found["private_segment_fixed_size"]
    blocks, limit, percent = occupancy(job.arch, registers, metadata.shared, metadata.num_warps)
    return Row(
        job.kernel, job.dims, job.dtype, job.arch, function, registers, scratch, 0, metadata.shared, metadata.num_warps,
        blocks, limit, percent, mma=len(re.findall(r"\bv_mfma", text)),
    )  # fmt: skip


def measure(job: Job, function: str, compiled: Any) -> Row:
    """The figures of one compiled kernel."""
    if job.arch < 0:
        return measure_amd(job, function, compiled)
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    read = read_log(assemble(ptx, job.arch, metadata))
    tensor_memory = getattr(metadata, "tmem_size", 0) or 0
    blocks, limit, percent = occupancy(job.arch, read["registers"], metadata.shared, metadata.num_warps, tensor_memory)
    return Row(
        job.kernel, job.dims, job.dtype, job.arch, function, **read, shared=metadata.shared, warps=metadata.num_warps,
        ctas=blocks, limit=limit, occupancy=percent, wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        tcgen05=len(re.findall(r"tcgen05\.mma", ptx)), mma=len(re.findall(r"\bmma\.sync", ptx)),
        tma=len(re.findall(r"cp\.async\.bulk\.tensor", ptx)), cp_async=len(re.findall(r"cp\.async\.c[ag]\b", ptx)),
    )  # fmt: skip


def check_descriptors(launch: Any) -> None:
    """ValueError where TMA would refuse a launch's tensor descriptors, in the boxes and swizzles that were compiled.

    A launch that its own launcher refuses does not come here. Where single copies start is known in the kernel alone:
    the interpreters check that (kernels/tma.py).
    """
    from liverelay.kernels.tma import compiled_faults

    maps = getattr(launch.compiled.metadata, "tensordesc_meta", None) or []
    if fault := next(compiled_faults(launch.arguments, maps), ""):
        raise ValueError(f"{launch.name}: {fault}")


def spec_of(job: Job) -> Any:
    """The job's row of the registry."""
    from liverelay.kernels.registry import KERNELS

    return next(spec for spec in KERNELS if spec.name == job.kernel)


def compile_job(job: Job) -> Result:
    """Compile one launch of the registry and take its figures; never raises, but for an interrupt."""
    return read_job(job, lambda label, launch: measure(job, label, launch.compiled))


def read_job(job: Job, read: Callable[[str, Any], Any]) -> Result:
    """Compile one launch of the registry; `read` makes a row of each kernel's label and `launch.Launch`."""
    from liverelay.kernels.launch import compile_only

    torch.set_num_threads(1)
    start = time.monotonic()
    try:
        spec = spec_of(job)
        dims = (spec.production | spec.small)[job.dims]
        activate(job.arch)
        with cheap_inputs(), silent():
            case = spec.make(dims, getattr(torch, job.dtype), torch.Generator().manual_seed(0), torch.device("cpu"))
            with compile_only(job.arch) as collected:
                spec.launch(*case.args, **case.kwargs)
            kernels: dict[tuple[str, str], Any] = {}
            for launch in collected.kernels:
                check_descriptors(launch)
                kernels.setdefault((launch.name, launch.compiled.hash), launch)  # launched twice is one row
            names = [name for name, _ in kernels]
            labels = [name if n == names.index(name) else f"{name}#{names[:n].count(name) + 1}"
                      for n, name in enumerate(names)]  # fmt: skip
            rows = [read(label, launch) for label, launch in zip(labels, kernels.values(), strict=True)]
        error = "" if rows else "the launcher started no kernel"
    except Exception as fault:
        rows, error = [], f"{type(fault).__name__}: {' '.join(str(fault).split())[-300:]}"
    return Result(job, tuple(rows), error, time.monotonic() - start)
