"""Kernels that keep rows in registers as chunks: numbers where a row is hard, and which chunks there are."""

from __future__ import annotations

import pytest
import torch

from liverelay.kernels import launch
from liverelay.kernels.contract import FP8, Norm
from liverelay.kernels.feedforward import gelu
from liverelay.kernels.norm import inverse_rms, residual_norm
from tests.compare import relative

WIDTHS = (1, 97, 128, 1000, 1500, 2500, 5120, 13824)


@pytest.mark.parametrize("width", WIDTHS)
def test_chunks_cover_a_row_with_little_padding(width: int) -> None:
    tiles = launch.tiling(width)
    covered = tiles["TILE"] * tiles["CHUNKS"]
    assert width <= covered < width + tiles["TILE"] and tiles["TILE"].bit_count() == 1
    assert covered == launch.next_power_of_two(width) or covered <= width + launch.next_power_of_two(width) // 4
    with launch.padded_rows() as widths:
        assert launch.tiling(width) == tiles | {"TILE": launch.next_power_of_two(width), "CHUNKS": 1}
    assert widths == {width}


@pytest.mark.parametrize("width", [1500, 5120])
def test_a_mean_far_above_the_deviation_leaves_layer_norm_exact(
    width: int, device: torch.device, rng: torch.Generator
) -> None:
    x = (torch.randn(4, width, generator=rng) + 1000).to(device)
    norm = Norm(torch.zeros(width, device=device), torch.zeros(width, device=device))
    out = residual_norm(x, [], norm, torch.empty_like(x), eps=1e-6)
    exact = torch.nn.functional.layer_norm(x.double(), (width,), eps=1e-6)
    assert relative(out, exact) <= 1e-4  # of 1000, float32 has 6e-5


@pytest.mark.parametrize("factor", [1e-20, 1.0, 1e16])
def test_inverse_rms_holds_for_small_and_large_rows(factor: float, device: torch.device, rng: torch.Generator) -> None:
    x = (torch.randn(3, 1500, generator=rng) * factor).to(device)
    got = inverse_rms(x, torch.empty(3, device=device), eps=1e-6)
    assert relative(got, torch.rsqrt(x.double().square().mean(-1) + 1e-6)) <= 1e-6


@pytest.mark.parametrize("quantize", [False, True])
def test_gelu_is_zero_or_its_argument_far_from_zero(quantize: bool, device: torch.device) -> None:
    if quantize and not launch.INTERPRETED and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 here")
    x = torch.tensor([[-3e38, -1e10, -50.0, 0.0, 50.0, 1e10, 448e28]], device=device)
    exact = x.clamp_min(0)
    if not quantize:
        assert torch.equal(gelu(x, torch.empty_like(x)), exact)
        return
    codes, scale = torch.empty(x.shape, dtype=FP8, device=device), torch.empty(1, device=device)
    gelu(x, codes, scale)
    assert relative(scale, x.amax(1).double() / 448) <= 1e-6
    assert torch.equal(codes.float(), torch.where(x == x.amax(), 448.0, 0.0))


def test_padded_rows_give_what_chunks_give(device: torch.device, rng: torch.Generator) -> None:
    x = torch.randn(5, 1500, generator=rng).to(device)
    norm = Norm(*(torch.randn(1500, generator=rng).to(device) for _ in range(2)))
    whole = residual_norm(x, [(x, None)], norm, torch.empty_like(x), eps=1e-6)
    with launch.padded_rows() as widths:
        padded = residual_norm(x, [(x, None)], norm, torch.empty_like(x), eps=1e-6)
    assert widths == {1500} and relative(padded, whole) <= 1e-6
