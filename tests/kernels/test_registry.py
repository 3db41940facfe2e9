"""Every kernel of the registry against its float64 reference and against unfused PyTorch, with poisoned outputs."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor

from liverelay.kernels.launch import INTERPRETED
from liverelay.kernels.registry import KERNELS
from liverelay.kernels.spec import Case, KernelSpec

ROWS = [
    pytest.param(spec, dims, dtype, id=f"{spec.name}-{name}-{str(dtype).removeprefix('torch.')}")
    for spec in KERNELS
    for name, dims in spec.small.items()
    for dtype in spec.dtypes
]


def skip_where_missing(spec: KernelSpec) -> None:
    """Not every GPU has every kernel; the interpreter has all."""
    major, minor = (0, 0) if INTERPRETED else torch.cuda.get_device_capability()
    if not spec.on(10 * major + minor):
        pytest.skip(f"{spec.name} is not for sm_{major}{minor}")


def outputs(case: Case) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in case.outputs.items()}


def compare(name: str, got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most twice the error of unfused PyTorch in the same dtype, and on average no more than it (plus rounding)."""
    assert got.shape == exact.shape and got.float().isfinite().all(), name
    error, eager = (part.double() - exact for part in (got, plain))
    if got.dtype == torch.float8_e4m3fn:
        assert float(eager.norm()) <= 0.04 * float(exact.norm()), name  # kernels are measured against it
    if not got.dtype.is_floating_point:
        assert error.abs().max() <= eager.abs().max() + 1e-9, name
        return
    eps = min(torch.finfo(got.dtype).eps, 2**-8)  # e4m3's own step is in the eager error already
    if got.dtype == torch.float32:
        eps *= 8  # with few elements the eager error may be next to nothing by luck
    scale = float(exact.abs().max())
    assert float(error.abs().max()) <= 2 * float(eager.abs().max()) + eps * scale, name
    wide = 1.5 if got.dtype == torch.float32 else 1.1
    assert float(error.norm()) <= wide * float(eager.norm()) + eps * float(exact.norm()), name


@pytest.mark.parametrize(("spec", "dims", "dtype"), ROWS)
def test_kernel_equals_its_reference(
    spec: KernelSpec, dims: dict[str, int], dtype: torch.dtype, device: torch.device, seed: int
) -> None:
    skip_where_missing(spec)
    case = spec.make(dims, dtype, torch.Generator().manual_seed(seed), device)
    exact = spec.reference(*case.args, **case.kwargs)
    spec.launch(*case.args, **case.kwargs)
    got = outputs(case)
    spec.plain(*case.args, **case.kwargs)
    plain = outputs(case)
    assert set(exact) == set(got)
    for name in exact:
        compare(f"{spec.name}.{name}", got[name], plain[name], exact[name])


@pytest.mark.parametrize("spec", KERNELS, ids=lambda spec: spec.name)
def test_kernel_is_repeatable_to_the_bit(spec: KernelSpec, device: torch.device, seed: int) -> None:
    skip_where_missing(spec)
    results = []
    for _ in range(2):
        rng = torch.Generator().manual_seed(seed)
        case = spec.make(next(iter(spec.small.values())), spec.dtypes[-1], rng, device)
        spec.launch(*case.args, **case.kwargs)
        results.append(outputs(case))
    for name, tensor in results[0].items():
        assert torch.equal(tensor.view(torch.uint8), results[1][name].view(torch.uint8)), name


@pytest.mark.parametrize("spec", KERNELS, ids=lambda spec: spec.name)
def test_costs_and_docstrings_are_there(spec: KernelSpec) -> None:
    assert spec.summary
    for dims in (*spec.small.values(), *spec.production.values()):
        cost = spec.cost(dims, spec.dtypes[-1])
        assert cost.bytes > 0 and cost.flops >= 0


def test_every_jit_function_belongs_to_a_kernel_of_the_registry() -> None:
    folder = Path(inspect.getfile(KERNELS[0].launch)).parent
    modules = {inspect.getfile(spec.launch) for spec in KERNELS}
    for path in folder.glob("*.py"):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        if any("jit" in ast.unparse(decorator) for node in functions for decorator in node.decorator_list):
            assert any(Path(module).name == path.name for module in modules), path.name
    assert len({spec.name for spec in KERNELS}) == len(KERNELS)
