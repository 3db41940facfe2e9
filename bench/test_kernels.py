"""`make bench-kernels`: every kernel of the registry under pytest-benchmark, whose runs can be kept and compared.

On a GPU the kernels at production dims; without one plain PyTorch at small dims, which shows only that all of it runs.
`python -m bench.micro` measures with more care (cold caches, CUDA graphs, ceilings); `--benchmark-compare` is what
this adds.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark: pip install pytest-benchmark")
pytest.importorskip("triton")

import torch

from bench import micro, timing
from liverelay.kernels.launch import arch
from liverelay.kernels.registry import KERNELS
from liverelay.kernels.spec import Dims, KernelSpec, arch_name

DEVICE = timing.pick_device(None)
GPU = DEVICE.type == "cuda"
ROWS = [
    pytest.param(spec, dims, id=f"{spec.name}-{name}")
    for spec in KERNELS for name, dims in micro.sizes(spec, "production" if GPU else "small")
]  # fmt: skip


@pytest.mark.parametrize(("spec", "dims"), ROWS)
def test_speed(spec: KernelSpec, dims: Dims, benchmark: Any) -> None:
    if GPU and not spec.on(arch(torch.empty(0, device=DEVICE))):
        pytest.skip(f"{spec.name} is not for {arch_name(arch(torch.empty(0, device=DEVICE)))}")
    case, call = micro.make_case(spec, dims, DEVICE), spec.launch if GPU else spec.plain

    def run() -> None:
        call(*case.args, **case.kwargs)
        timing.wait(DEVICE)

    cost = spec.cost(dims, micro.working_dtype(spec))
    benchmark.extra_info.update(bytes=cost.bytes, flops=cost.flops, what="kernel" if GPU else "plain PyTorch")
    with torch.inference_mode():
        run()  # compiles
        benchmark(run)
