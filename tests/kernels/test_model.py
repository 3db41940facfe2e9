"""The whole transformer on the fused kernels: equal to the published tensors, and to the engine's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from liverelay.engine.checkpoint import find_checkpoint
from liverelay.engine.golden import GoldenOptions, run
from liverelay.engine.models.dit import DiT
from liverelay.engine.models.workspace import Workspace
from liverelay.kernels import torch_ops
from liverelay.kernels.contract import Place
from tests import regression
from tests.compare import relative
from tests.test_fp8 import last_flow
from tests.test_golden import check_transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformer_on_fused_kernels_equals_the_published_one(
    golden: Path, device: torch.device, dtype: torch.dtype
) -> None:
    folder = golden / "dit_tiny"
    got = run("dit", folder, GoldenOptions(dtype=dtype, backend="triton", device=str(device)))
    got = {name: tensor.cpu() for name, tensor in got.items()}
    check_transformer(got, folder, "blocks", dtype, "out.")
    check_transformer(got, folder, "blocks", dtype, "final_cache_")
    check_transformer(got, folder, "sink", dtype, "cond_")


def test_rollout_on_fused_kernels_equals_the_torch_backend(tmp_path: Path, device: torch.device) -> None:
    regression.make_tpp(tmp_path, clips=1, blocks=2)
    got = run("tpp", tmp_path, GoldenOptions(backend="triton", device=str(device)))
    plain = run("tpp", tmp_path, GoldenOptions(backend="torch"))
    for name, tensor in plain.items():
        assert relative(got[name].cpu(), tensor) <= 2e-5, name


def test_fp8_attention_on_fused_kernels_equals_the_torch_backend(
    checkpoint: Path, device: torch.device, seed: int
) -> None:
    source, config = find_checkpoint(checkpoint).open_dit()
    flows = []
    for backend in ("torch", "triton"):
        dit = DiT.load(source, config, device=device, dtype=torch.bfloat16, backend=backend, fp8_attention=True)
        flows.append(last_flow(dit, torch.Generator().manual_seed(seed), blocks=2))
    assert relative(flows[1], flows[0]) <= 2e-2


def test_launches_with_an_fp8_arena_take_no_size_from_the_host(
    checkpoint: Path, device: torch.device, seed: int
) -> None:
    """One graph a step holds for every ring slot and fill level, because the device's own words decide."""
    source, config = find_checkpoint(checkpoint).open_dit()
    dit = DiT.load(source, config, device=device, dtype=torch.bfloat16, backend="triton", fp8_attention=True)
    assert dit.variant(Place(7, 9, True, torch.zeros(3, dtype=torch.int32))) == ()
    right = last_flow(dit, torch.Generator().manual_seed(seed), blocks=2)
    fill_block = dit.fill_block

    def misled(ws: Workspace, *block: Any) -> None:
        fill_block(ws, *block)
        ws.place.row, ws.place.valid, ws.place.moved = 0, 1, False

    dit.fill_block = misled  # type: ignore[method-assign]
    assert torch.equal(last_flow(dit, torch.Generator().manual_seed(seed), blocks=2), right)


def test_plain_attention_over_an_fp8_arena_has_a_graph_for_each_fill_level(
    checkpoint: Path, device: torch.device
) -> None:
    """It takes the valid rows from the host: a graph of one fill level would be wrong at all others."""
    source, config = find_checkpoint(checkpoint).open_dit()
    dit = DiT.load(source, config, device=device, dtype=torch.bfloat16, backend="triton", fp8_attention=True)
    dit.attention_fp8 = torch_ops.attention  # where all of our kernels had a fault
    one, other = (dit.variant(Place(7, valid, False, torch.zeros(3, dtype=torch.int32))) for valid in (9, 12))
    assert one != other


def test_long_positions_on_fused_kernels(tmp_path: Path, device: torch.device) -> None:
    regression.make_dit(tmp_path)
    got = run("dit", tmp_path, GoldenOptions(backend="triton", device=str(device)))
    kept = load_file(regression.DATA / "dit.safetensors")
    for name, value in kept.items():
        assert relative(regression.thin(got[name].cpu()), value) <= 2e-5, name
