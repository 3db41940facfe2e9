"""Kernels that keep rows in registers as chunks: numbers where a row is hard, and which chunks there are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from liverelay.kernels import launch, torch_ops, values
from liverelay.kernels.contract import FP8, Norm, Place, transposed
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


@pytest.mark.parametrize("of_rows", [inverse_rms, torch_ops.inverse_rms])
@pytest.mark.parametrize("factor", [1e-20, 1e-3, 1.0, 1e16])
def test_inverse_rms_holds_for_small_and_large_rows(
    of_rows: Callable[..., Tensor], factor: float, device: torch.device, rng: torch.Generator
) -> None:
    x = (torch.randn(3, 1500, generator=rng) * factor).to(device)
    got = of_rows(x, torch.empty(3, device=device), eps=1e-6)
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


@pytest.mark.parametrize("frame", [16, 48, 1056])
def test_stores_of_values_are_aligned_in_every_slot_whatever_the_host_believes(
    frame: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch is captured once for all slots. frame: tokens of a latent frame; 64-pixel sizes have multiples of 16."""
    sink, block, promised = frame * 5 // 2, 3 * frame, list[int]()
    monkeypatch.setattr(values, "run", lambda *_, ALIGNED, **__: promised.append(ALIGNED))
    arena, place = transposed((sink + 4 * block, 1, 8), device), Place.make(device)
    for tokens, rows in ((sink, [0]), (block, [sink + slot * block for slot in range(4)])):
        for row in (0, *rows):
            v = torch.zeros(tokens, 1, 8, device=device)
            values.store_values(v, arena, place.fill(row, sink + 4 * block, False), 1.0)
            assert all(real % promised[-1] == 0 for real in rows)
    assert promised[-1] == (16 if frame == 1056 else 8)
