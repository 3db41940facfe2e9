"""Whether a kernel is right on this device, one verdict for each size: a fault at one size hides no other."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bench import timing
from bench.timing import one_line
from liverelay.kernels.spec import Case, Dims, KernelSpec

ROOT = Path(__file__).resolve().parents[1]
CHECK_SECONDS = 120  # bounds one process, compilation included
VERDICT, SEPARATOR = "check: ", ";"  # a size has commas in its name
BROKEN = ("CUDA error", "illegal", "misaligned", "unspecified launch failure")  # the process can do no more


class Checks(Protocol):
    """What of the command line matters here."""

    device: torch.device
    dims: str
    isolate: bool

    def left(self) -> float: ...


def working_dtype(spec: KernelSpec) -> torch.dtype:
    return torch.bfloat16 if torch.bfloat16 in spec.dtypes else spec.dtypes[-1]


def sizes(spec: KernelSpec, dims: str) -> list[tuple[str, Dims]]:
    """Named dims to time: all production ones, or the first small one."""
    return list(spec.production.items()) if dims == "production" else list(spec.small.items())[:1]


def checked(spec: KernelSpec, dims: str) -> list[tuple[str, Dims]]:
    """Named dims to check: those to be timed first, then all small ones."""
    return list({**dict(sizes(spec, dims)), **spec.small}.items())


def make_case(spec: KernelSpec, dims: Dims, device: torch.device, seed: int = 0) -> Case:
    """Inputs; large ones are drawn on the GPU itself where the maker allows it, which takes the host seconds."""
    if device.type == "cuda":
        try:
            with torch.device(device):
                return spec.make(dims, working_dtype(spec), torch.Generator(device).manual_seed(seed), device)
        except (RuntimeError, ValueError, TypeError):
            torch.cuda.empty_cache()
    return spec.make(dims, working_dtype(spec), torch.Generator().manual_seed(seed), device)


def outputs(case: Case) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in case.outputs.items()}


def fault_of(got: Tensor, plain: Tensor, exact: Tensor) -> str:
    """Why `got` is not the result: more than twice the error of plain PyTorch, largest or on average. '' if it is."""
    eps = torch.finfo(got.dtype).eps if got.dtype.is_floating_point else 0.0
    found, other, exact = (tensor.double() for tensor in (got, plain, exact))
    if found.shape != exact.shape or not bool(found.isfinite().all()):
        return "shape or unwritten elements"
    error, eager = (found - exact).abs(), (other - exact).abs()
    for name, size in (("largest", torch.Tensor.amax), ("mean", torch.Tensor.norm)):
        e, allowed = float(size(error)), 2 * float(size(eager)) + eps * float(size(exact.abs())) + 1e-9
        if not e <= allowed:
            return f"{name} error {e:.2g}, allowed {allowed:.2g}"
    return ""


def check(spec: KernelSpec, name: str, dims: Dims, device: torch.device) -> str:
    """Why the kernel is red at one size; '' when it is right. Small sizes are held against the float64 reference, the
    large ones against plain PyTorch."""
    seed = int.from_bytes(os.urandom(3))
    try:
        case = make_case(spec, dims, device, seed)
        exact = spec.reference(*case.args, **case.kwargs) if name in spec.small else {}
        spec.launch(*case.args, **case.kwargs)
        got = outputs(case)
        spec.plain(*case.args, **case.kwargs)
        timing.wait(device)  # a fault belongs to this size
        for output, tensor in outputs(case).items():
            if exact:
                fault = fault_of(got[output], tensor, exact[output])
            else:
                ours, plain = got[output].double(), tensor.double()
                difference = float((ours - plain).norm() / plain.norm().clamp_min(1e-12))  # one GELU may be 0
                near = difference <= (0.1 if tensor.dtype.itemsize == 1 else 0.02)  # a NaN is not
                fault = "" if near else f"differs from plain PyTorch by {difference:.2g}"
            if fault:
                return f"{output}: {fault} (seed {seed})"
    except Exception as error:
        return one_line(error, 300)
    return ""


def check_here(spec: KernelSpec, dims: str, device: torch.device, only: str | None = None) -> int:
    """A verdict on each size, printed as soon as it is known; 1 where one is red. only: names of sizes.

    Ends at a fault that leaves the process of no use: whoever started it goes on with the next size in a new one.
    """
    known = dict(checked(spec, dims))
    names, red = only.split(SEPARATOR) if only else list(known), False
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"{spec.name} has no size '{unknown[0]}'; there is: {', '.join(known)}")
    for name in names:
        size = known[name]
        fault = check(spec, name, size, device)
        print(f"{VERDICT}{name}: {fault or 'ok'}", flush=True)
        red |= bool(fault)
        if device.type == "cuda" and any(word in fault for word in BROKEN):
            return 1
    return int(red)


def check_isolated(spec: KernelSpec, plan: Checks) -> dict[str, str]:
    """Faults by size, '' for none, each from a process that no other size has broken. What there is no time for is left
    out."""
    left, faults = [name for name, _ in checked(spec, plan.dims)], dict[str, str]()
    while left and plan.left() > 0:
        verdicts, ended = _check_process(spec, plan, left)
        faults |= {name: verdicts[name] for name in left if name in verdicts}
        left = [name for name in left if name not in verdicts]
        if left and (not verdicts or not _broken(list(verdicts.values())[-1])):
            faults[left.pop(0)] = f"its check {ended}"  # the size under way, which told nothing
    return faults


def _broken(fault: str) -> bool:
    return any(word in fault for word in BROKEN)


def _check_process(spec: KernelSpec, plan: Checks, names: list[str]) -> tuple[dict[str, str], str]:
    """What a process told of these sizes, and how it ended."""
    command = [sys.executable, "-m", "bench.micro", "--check", spec.name, "--dims", plan.dims]
    command += ["--device", plan.device.type, "--sizes", SEPARATOR.join(names)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [*sys.path, str(ROOT)]))}
    limit = max(1.0, min(CHECK_SECONDS, plan.left()))
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=limit, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL
        )
        out, ended = done.stdout, f"ended with {done.returncode}: {done.stderr.decode(errors='replace').strip()[-200:]}"
    except subprocess.TimeoutExpired as error:
        out, ended = error.stdout or b"", f"was not done after {limit:.0f} s"
    return dict(_verdicts(out.decode(errors="replace"))), ended


def _verdicts(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        if line.startswith(VERDICT):
            name, _, fault = line.removeprefix(VERDICT).partition(": ")
            yield name, "" if fault == "ok" else fault


def check_all(specs: list[KernelSpec], plan: Checks) -> dict[tuple[str, str], str]:
    """Faults by kernel and size, '' for none."""
    if plan.isolate:
        with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
            found = list(pool.map(lambda spec: check_isolated(spec, plan), specs))
    else:
        found = [
            {name: check(spec, name, dims, plan.device) for name, dims in checked(spec, plan.dims)} for spec in specs
        ]
    return {(spec.name, name): fault for spec, faults in zip(specs, found, strict=True)
            for name, fault in faults.items()}  # fmt: skip
