"""Pixels and latents: bit equality with the plain operators, odd values, known colours, views, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from liverelay.kernels import latent as fused
from liverelay.kernels import pixels, torch_ops, vae_ops

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
CHANNELS_LAST = torch.channels_last


def same(got: Tensor, expected: Tensor) -> bool:
    """Equal to the bit."""
    return got.dtype == expected.dtype and torch.equal(
        got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    )


def picture(*colours: tuple[float, float, float], size: int = 4) -> Tensor:
    """Frames [3, T, size, size] of one colour each, given in 0..1."""
    return (torch.tensor(colours, dtype=torch.float32).t() * 2 - 1)[:, :, None, None].repeat(1, 1, size, size)


# -- bytes ------------------------------------------------------------------------------------------------------------


def test_to_uint8_equals_the_definition_to_the_bit(device: torch.device, rng: torch.Generator) -> None:
    frames = torch.randn(3, 2, 37, 41, generator=rng).to(device)
    assert torch.equal(pixels.to_uint8(frames), vae_ops.to_uint8(frames))
    steps = torch.arange(256, dtype=torch.float64) / 127.5 - 1  # where the byte changes, and one unit to either side
    grid = steps.float().view(1, 16, 16)
    down, up = grid.nextafter(torch.tensor(-2.0)), grid.nextafter(torch.tensor(2.0))
    edges = torch.stack((down, grid, up)).to(device)
    assert torch.equal(pixels.to_uint8(edges), vae_ops.to_uint8(edges))


def test_to_uint8_of_odd_values(device: torch.device) -> None:
    values = [float("nan"), float("inf"), float("-inf"), 1.0, -1.0, 1.5, -3e38, 3e38, 0.0, -0.0, 1e-42, 254 / 127.5 - 1]
    expected = [0, 255, 0, 255, 0, 255, 0, 255, 127, 127, 127, 254]
    frames = torch.tensor(values, device=device).repeat(3, 1, 1, 1)
    got = pixels.to_uint8(frames)
    assert got.shape == (1, 1, len(values), 3)
    assert got[0, 0].tolist() == [[byte] * 3 for byte in expected]
    assert torch.equal(vae_ops.to_uint8(frames), got)


@pytest.mark.parametrize("name", ["to_uint8", "to_nv12"])
@BOTH
def test_bytes_of_views(name: str, dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> None:
    """Channels-last frames, slices in time and in space, an output inside of a larger buffer."""
    fused_op, plain = getattr(pixels, name), getattr(vae_ops, name)
    whole = torch.randn(4, 12, 14, 3, generator=rng).to(dtype).to(device).permute(3, 0, 1, 2)
    for view in (whole, whole[:, 1:3], whole[:, ::2, 2:10, 4:12], whole.contiguous()[:, :3, :6, :10]):
        expected = plain(view.float())
        buffer = torch.full((view.shape[1] + 2, *expected.shape[1:]), 0xA5, dtype=torch.uint8, device=device)
        inner = buffer[1:-1]
        assert fused_op(view, inner) is inner
        assert torch.equal(inner, expected)
        assert (buffer[0] == 0xA5).all() and (buffer[-1] == 0xA5).all()
    assert fused_op(whole[:, :0]).shape[0] == 0


def test_to_nv12_of_known_colours(device: torch.device) -> None:
    """ITU-R BT.709, 8 bit, limited range."""
    known = {
        (1, 1, 1): (235, 128, 128), (0, 0, 0): (16, 128, 128), (1, 0, 0): (63, 102, 240), (0, 1, 0): (173, 42, 26),
        (0, 0, 1): (32, 240, 118), (0, 1, 1): (188, 154, 16), (1, 1, 0): (219, 16, 138),
        (0.5, 0.5, 0.5): (126, 128, 128),
    }  # fmt: skip
    frames = picture(*known).to(device)
    for got in (pixels.to_nv12(frames), vae_ops.to_nv12(frames)):
        assert got.shape == (len(known), 6, 4) and got.dtype == torch.uint8
        for frame, (y, cb, cr) in zip(got.int().cpu(), known.values(), strict=True):
            assert (frame[:4] - y).abs().max() <= 1
            assert (frame[4:, 0::2] - cb).abs().max() <= 1 and (frame[4:, 1::2] - cr).abs().max() <= 1


def test_to_nv12_averages_chroma_over_its_own_four_pixels(device: torch.device) -> None:
    frames = picture((0, 0, 0))
    frames[0, 0, 2:, :2] = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])  # half red at the lower left
    got = pixels.to_nv12(frames.to(device))[0].int().cpu()
    assert got[:4].tolist() == [[16] * 4, [16] * 4, [63, 63, 16, 16], [16] * 4]
    assert got[4:].tolist() == [[128, 128, 128, 128], [115, 184, 128, 128]]


@BOTH
def test_to_nv12_agrees_with_its_twin(dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> None:
    frames = torch.randn(3, 2, 46, 50, generator=rng).to(dtype)
    odd = torch.tensor([float("nan"), float("inf"), float("-inf"), 7.0, -7.0, 3e38])
    frames.view(-1)[torch.randperm(frames.numel(), generator=rng)[:60]] = odd.repeat(10).to(dtype)
    frames = frames.to(device)
    assert torch.equal(pixels.to_nv12(frames), vae_ops.to_nv12(frames))


def test_nv12_of_bytes_is_the_kernels_of_the_same_colours(device: torch.device, rng: torch.Generator) -> None:
    rgb = torch.randint(0, 256, (2, 46, 50, 3), generator=rng, dtype=torch.uint8).to(device)
    rgb[0, :6, :6] = torch.tensor([255, 0, 0])  # as far from grey as it goes
    frames = rgb.permute(3, 0, 1, 2).double() / 127.5 - 1
    exact = pixels.reference_to_nv12(frames, frames)["out"]
    buffer = torch.full((4, 69, 50), 0xA5, dtype=torch.uint8, device=device)
    for got in (vae_ops.bytes_to_nv12(rgb), vae_ops.bytes_to_nv12(rgb, buffer[1:3]), pixels.to_nv12(frames.float())):
        assert got.dtype == torch.uint8 and (got - exact).abs().max() <= 1
    assert (buffer[0] == 0xA5).all() and (buffer[3] == 0xA5).all()


# -- the VAE's norm ---------------------------------------------------------------------------------------------------


@BOTH
def test_norm_into_a_slice_leaves_the_rest(dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> None:
    """The chunk of a [history | chunk] buffer, of more channels, rows and columns than are written."""
    x = torch.randn(3, 24, 5, 6, generator=rng).to(dtype).to(device, memory_format=CHANNELS_LAST)
    gamma = torch.randn(24, generator=rng).to(device)
    buffer = torch.full((6, 32, 7, 8), 9.0, device=device).to(dtype).contiguous(memory_format=CHANNELS_LAST)
    pixels.vae_norm_silu(x, gamma, buffer[2:5, 4:28, 1:6, :6])
    expected = vae_ops.vae_norm_silu(x, gamma, torch.empty_like(x))
    torch.testing.assert_close(buffer[2:5, 4:28, 1:6, :6], expected)
    buffer[2:5, 4:28, 1:6, :6] = 9.0
    assert (buffer == 9.0).all()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, in the interpreter
@BOTH
def test_norm_of_extreme_values(dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> None:
    x = torch.randn(1, 96, 4, 5, generator=rng)
    x[..., 0] = 0
    x[..., 1] *= 1e4
    x[..., 2] *= 1e-20  # shorter than the smallest length
    x[..., 3] = 0
    x[:, 7, :, 3] = -1e4
    x = x.to(dtype).to(device, memory_format=CHANNELS_LAST)
    gamma = torch.full((96,), 50.0, device=device)
    out = pixels.vae_norm_silu(x, gamma, torch.empty_like(x))
    assert out.isfinite().all() and not out[..., 0].any()
    torch.testing.assert_close(out, vae_ops.vae_norm_silu(x, gamma, torch.empty_like(x)))


def test_norm_rounds_once_to_another_dtype(device: torch.device, rng: torch.Generator) -> None:
    x = torch.randn(1, 16, 3, 4, generator=rng).to(device, memory_format=CHANNELS_LAST)
    gamma = torch.ones(16, device=device)
    out = pixels.vae_norm_silu(x, gamma, torch.empty_like(x, dtype=torch.bfloat16))
    torch.testing.assert_close(out, vae_ops.vae_norm_silu(x, gamma, torch.empty_like(out)))


# -- latents ----------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("shape", [(16, 3, 4, 6), (3, 1, 6, 70), (16, 1, 2, 2)])
def test_euler_step_equals_the_definition_to_the_bit(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, rng: torch.Generator
) -> None:
    c, f, h, w = shape
    latent = torch.randn(c, f + 2, h, w, generator=rng).to(dtype).to(device)[:, 1:-1]
    flow = torch.randn(f * h * w // 4, 4 * c, generator=rng).to(dtype).to(device)
    for step_size in (-0.142307698726654053, -0.59322202205657959, 0.0):
        expected = torch_ops.euler_step(latent, flow, step_size, torch.empty_like(latent))
        assert same(fused.euler_step(latent, flow, step_size, torch.empty_like(latent)), expected)
    before, whole = latent.clone(), latent._base
    assert whole is not None
    ends = whole[:, [0, -1]].clone()
    assert fused.euler_step(latent, flow, -0.25, latent) is latent
    assert same(latent, torch_ops.euler_step(before, flow, -0.25, torch.empty_like(before)))
    assert same(whole[:, [0, -1]], ends)


@BOTH
def test_embed_of_views(dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> None:
    """A slice of the clip's noise, rows of a wider output, the pose's bias in place of equal rows."""
    latent = torch.randn(16, 4, 6, 10, generator=rng).to(dtype).to(device)[:, 1:3, 2:, :8]
    weight = torch.randn(40, 64, generator=rng).to(dtype).to(device) / 8
    bias, pose, kind = (part.to(dtype).to(device) for part in torch.randn(3, 40, generator=rng))
    wide = torch.full((16, 48), 9.0, device=device).to(dtype)
    fused.embed(latent, (weight, bias), pose, kind, wide[:, :40])
    expected = torch_ops.embed(latent, (weight, bias), pose, kind, torch.empty(16, 40, dtype=dtype, device=device))
    torch.testing.assert_close(wide[:, :40], expected)
    assert (wide[:, 40:] == 9.0).all()
    rows = fused.embed(latent, (weight, bias), pose.repeat(16, 1), kind, torch.empty_like(expected))
    assert same(rows, wide[:, :40])


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_pixels_refuse(device: torch.device) -> None:
    frames, gamma = torch.zeros(3, 1, 4, 6, device=device), torch.ones(3, device=device)
    byte = torch.zeros(1, 4, 6, 3, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match=r"to_uint8: frames .* expected floating point \[3, T, H, W\]"):
        pixels.to_uint8(frames[:2])
    with pytest.raises(ValueError, match=r"to_uint8: out has shape \[1, 4, 5, 3\]"):
        pixels.to_uint8(frames, byte[:, :, :5])
    with pytest.raises(ValueError, match=r"to_uint8: out is torch\.int8"):
        pixels.to_uint8(frames, byte.to(torch.int8))
    with pytest.raises(ValueError, match="to_uint8: the pixels of out are not packed"):
        pixels.to_uint8(frames, byte.new_zeros(1, 4, 8, 3)[:, :, :6])
    with pytest.raises(ValueError, match="to_nv12: frames has odd height or width"):
        pixels.to_nv12(frames[:, :, :3])
    with pytest.raises(ValueError, match=r"to_nv12: out has shape \[1, 4, 6\], expected \[1, 6, 6\]"):
        pixels.to_nv12(frames, byte.new_zeros(1, 4, 6))
    x = frames.transpose(0, 1).contiguous()
    last = x.contiguous(memory_format=CHANNELS_LAST)
    for arguments, fault in {
        (x, gamma, last): "x is not channels last", (last, gamma, x): "out is not channels last",
        (last, gamma, last[:, :2]): "out has shape", (last, gamma[:2], last): "gamma has shape",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"vae_norm_silu: {fault}"):
            pixels.vae_norm_silu(*arguments)


def test_latents_refuse(device: torch.device) -> None:
    latent, flow = torch.zeros(16, 1, 4, 4, device=device), torch.zeros(4, 64, device=device)
    weight, bias, out = (torch.zeros(shape, device=device) for shape in ((8, 64), (8,), (4, 8)))
    with pytest.raises(ValueError, match="euler_step: latent has odd height"):
        fused.euler_step(latent[:, :, :3], flow, 1.0, latent)
    with pytest.raises(ValueError, match="euler_step: flow has shape"):
        fused.euler_step(latent, flow[:3], 1.0, latent)
    with pytest.raises(ValueError, match="euler_step: the last dimension of out is not contiguous"):
        fused.euler_step(latent, flow, 1.0, latent.transpose(2, 3))
    with pytest.raises(ValueError, match="embed: latent has odd height"):
        fused.embed(latent[..., :3], (weight, bias), bias, bias, out)
    with pytest.raises(ValueError, match="embed: weight has shape"):
        fused.embed(latent, (weight[:, :32], bias), bias, bias, out)
    with pytest.raises(ValueError, match="embed: pose has shape"):
        fused.embed(latent, (weight, bias), out[:2], bias, out)
    with pytest.raises(ValueError, match="embed: out has shape"):
        fused.embed(latent, (weight, bias), bias, bias, out[:3])
    with pytest.raises(ValueError, match=r"embed: weight is torch\.bfloat16"):
        fused.embed(latent, (weight.bfloat16(), bias), bias, bias, out)
