"""The VAE streams exactly, keeps its memory still, equals a plain float64 twin, and refuses what does not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from liverelay.engine.errors import CheckpointError, InputError
from liverelay.engine.models.geometry import Geometry
from liverelay.engine.models.sizes import decode_flops, prime_flops
from liverelay.engine.models.vae import VAE
from liverelay.engine.models.vae_config import FIRST, LATENT_MEAN, LATENT_STD, SECOND, VAEConfig, expected_shapes
from tests.compare import psnr_db, relative

Weights = dict[str, Tensor]
CONFIG = VAEConfig(base_dim=8)
H, W = 4, 8  # latent positions; unequal, so that a swap of the two is seen


@pytest.fixture
def weights(rng: torch.Generator) -> Weights:
    """Scales that keep activations near one and most pixels off the clamp."""
    weights: Weights = {}
    for key, shape in expected_shapes(CONFIG).items():
        noise = torch.randn(shape, generator=rng)
        scale = 0.02 if key.endswith("bias") else math.prod(shape[1:]) ** -0.5
        weights[key] = 1 + 0.05 * noise if key.endswith("gamma") else noise * scale
    weights["decoder.head.2.weight"] *= 0.5
    return weights


def random_latents(rng: torch.Generator, count: int) -> Tensor:
    return torch.randn(16, count, H, W, generator=rng)


def random_video(rng: torch.Generator, frames: int) -> Tensor:
    return torch.rand(3, frames, 8 * H, 8 * W, generator=rng) * 2 - 1


@pytest.fixture
def vae(weights: Weights) -> VAE:
    return VAE.load(weights, dtype=torch.float32)


class Twin:
    """The VAE over a whole sequence [C, T, h, w] in float64, without chunks or caches."""

    def __init__(self, weights: Weights) -> None:
        self.w = {key: tensor.double() for key, tensor in weights.items()}
        self.mean, self.std = torch.tensor([LATENT_MEAN, LATENT_STD], dtype=torch.float64).view(2, -1, 1, 1, 1)

    def conv(self, name: str, x: Tensor, *, stride: int = 1) -> Tensor:
        return F.conv3d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], (stride, 1, 1))

    def causal(self, name: str, x: Tensor) -> Tensor:
        return self.conv(name, F.pad(x, (1, 1, 1, 1, 2, 0)))

    def image_conv(self, name: str, x: Tensor, *, stride: int = 1) -> Tensor:
        return F.conv2d(x.transpose(0, 1), self.w[f"{name}.weight"], self.w[f"{name}.bias"], stride).transpose(0, 1)

    def norm(self, name: str, x: Tensor) -> Tensor:
        gamma = self.w[f"{name}.gamma"].view(-1, 1, 1, 1)
        return x / x.norm(dim=0).clamp_min(1e-12) * math.sqrt(len(x)) * gamma

    def residual(self, name: str, x: Tensor) -> Tensor:
        y = self.causal(f"{name}.residual.2", F.silu(self.norm(f"{name}.residual.0", x)))
        y = self.causal(f"{name}.residual.6", F.silu(self.norm(f"{name}.residual.3", y)))
        return y + (self.conv(f"{name}.shortcut", x) if f"{name}.shortcut.weight" in self.w else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        q, k, v = self.image_conv(f"{name}.to_qkv", self.norm(f"{name}.norm", x)).flatten(2).chunk(3)
        scores = torch.einsum("ctp,ctq->tpq", q, k) / math.sqrt(len(x))
        y = torch.einsum("tpq,ctq->ctp", scores.softmax(-1), v).reshape(x.shape)
        return x + self.image_conv(f"{name}.proj", y)

    def middle(self, name: str, x: Tensor) -> Tensor:
        return self.residual(f"{name}.2", self.attention(f"{name}.1", self.residual(f"{name}.0", x)))

    def up(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.time_conv.weight" in self.w and x.shape[1] > 1:
            first, later = x[:, :1], x[:, 1:]
            halves = self.conv(f"{name}.time_conv", F.pad(later, (0, 0, 0, 0, 2, 0))).chunk(2)
            x = torch.cat([first, torch.stack(halves, dim=2).flatten(1, 2)], dim=1)
        doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return self.image_conv(f"{name}.resample.1", F.pad(doubled, (1, 1, 1, 1)))

    def down(self, name: str, x: Tensor) -> Tensor:
        x = self.image_conv(f"{name}.resample.1", F.pad(x, (0, 1, 0, 1)), stride=2)
        if f"{name}.time_conv.weight" not in self.w or x.shape[1] == 1:
            return x
        return torch.cat([x[:, :1], self.conv(f"{name}.time_conv", x, stride=2)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        x = self.causal("decoder.conv1", self.conv("conv2", latents.double() * self.std + self.mean))
        x = self.middle("decoder.middle", x)
        for i in range(15):
            x = (self.up if i in (3, 7, 11) else self.residual)(f"decoder.upsamples.{i}", x)
        return self.causal("decoder.head.2", F.silu(self.norm("decoder.head.0", x))).clamp(-1, 1)

    def encode(self, video: Tensor) -> Tensor:
        x = self.causal("encoder.conv1", video.double())
        for i in range(11):
            x = (self.down if i in (2, 5, 8) else self.residual)(f"encoder.downsamples.{i}", x)
        x = self.causal("encoder.head.2", F.silu(self.norm("encoder.head.0", self.middle("encoder.middle", x))))
        return (self.conv("conv1", x)[:16] - self.mean) / self.std


# Float32 rounding through some 35 convolutions is measured at 1e-6; a wrong tap, pad or order costs 1e-2 and more.
@pytest.mark.parametrize("count", [1, 2, 5])
def test_decoder_equals_a_plain_twin(vae: VAE, weights: Weights, rng: torch.Generator, count: int) -> None:
    latents = random_latents(rng, count)
    assert relative(vae.decode(latents, vae.new_decoder(H, W)), Twin(weights).decode(latents)) <= 1e-5


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_encoder_equals_a_plain_twin(vae: VAE, weights: Weights, rng: torch.Generator, frames: int) -> None:
    video = random_video(rng, frames)
    assert relative(vae.encode(video), Twin(weights).encode(video)) <= 1e-5


def random_vae(rng: torch.Generator, depth: int) -> VAE:
    """With so many residual blocks a level."""
    config = VAEConfig(base_dim=4, num_res_blocks=depth)
    weights = {}
    for key, shape in expected_shapes(config).items():
        scale = 0.3 if len(shape) < 3 else torch.Size(shape[1:]).numel() ** -0.5
        weights[key] = torch.randn(shape, generator=rng) * scale + float(key.endswith("gamma"))
    return VAE.load(weights, config=config, dtype=torch.float32)


@pytest.mark.parametrize("frames", [1, 5, 73, 150])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_still_picture_is_coded_as_if_every_frame_were_looked_at(
    rng: torch.Generator, depth: int, frames: int
) -> None:
    vae = random_vae(rng, depth)
    picture = torch.rand(3, 1, 32, 48, generator=rng) * 2 - 1
    still = vae.encode(picture.expand(-1, frames, -1, -1))
    assert torch.equal(still, vae.encode(picture.repeat(1, frames, 1, 1)))
    assert frames < 9 or not torch.equal(still[:, 1], still[:, 2])  # what is remembered shows


def test_decoding_in_pieces_equals_decoding_at_once(vae: VAE, rng: torch.Generator) -> None:
    latents = random_latents(rng, 5)
    whole = vae.decode(latents, vae.new_decoder(H, W))
    for split in ([1, 1, 1, 1, 1], [3, 2], [1, 4], [2, 2, 1]):
        cache = vae.new_decoder(H, W)
        parts = [vae.decode(part, cache) for part in latents.split(split, dim=1)]
        assert torch.equal(torch.cat(parts, dim=1), whole), split


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 4, 7])
def test_a_primed_decoder_has_seen_all_latents(rng: torch.Generator, depth: int, count: int) -> None:
    vae = random_vae(rng, depth)
    latents = random_latents(rng, count)
    seen, primed = vae.new_decoder(H, W), vae.new_decoder(H, W)
    vae.decode(latents, seen)
    vae.prime(primed, latents)
    first = vae.new_decoder(H, W, FIRST)
    vae.prime(first, latents, FIRST)
    for name, buffer in first.buffers.items():
        assert torch.equal(buffer[:2], primed.buffers[name][:2]), name
    following = random_latents(rng, 2)
    assert torch.equal(vae.decode(following, primed), vae.decode(following, seen))


def test_priming_leaves_out_what_only_frames_need() -> None:
    counts = {step.name: latents for step, latents in VAEConfig().primed_steps()}
    assert counts["decoder.head"] == 1
    assert counts["decoder.upsamples.12"] == 4  # three residual blocks at full size: 14 frames of 28


def test_operations_are_counted_as_they_are_done(rng: torch.Generator) -> None:
    geometry = Geometry(8, 16, head_dim=128)
    vae = random_vae(rng, 2)
    cache, motion, block = vae.new_decoder(8, 16), torch.zeros(16, 7, 8, 16), torch.zeros(16, 3, 8, 16)
    with FlopCounterMode(display=False) as priming:
        vae.prime(cache, motion)
    with FlopCounterMode(display=False) as decoding:
        vae.decode(block, cache)
    counted = prime_flops(vae.config, geometry, 7), decode_flops(vae.config, geometry)
    assert priming.get_total_flops() == pytest.approx(counted[0], rel=0.06)  # the very first latent is one frame
    assert decoding.get_total_flops() == pytest.approx(counted[1], rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("split", [[1, 3, 3], [3, 3, 1]], ids=str)
def test_two_pieces_equal_the_whole_decoder(
    weights: Weights, rng: torch.Generator, dtype: torch.dtype, split: list[int]
) -> None:
    vae, latents = VAE.load(weights, dtype=dtype), random_latents(rng, 7)
    whole = vae.decode(latents, vae.new_decoder(H, W))
    memory = torch.full(vae.config.handoff(3, H, W), math.nan, dtype=vae.features_dtype)
    first, second, frames = vae.new_decoder(H, W, FIRST), vae.new_decoder(H, W, SECOND), []
    for part in latents.split(split, dim=1):
        vae.decode_first(part, first, vae.as_features(memory))
        frames.append(vae.decode_second(vae.as_features(memory), part.shape[1], second))
    assert torch.equal(torch.cat(frames, dim=1), whole)  # the very first latent gives one frame of features, too
    names = [set(cache.buffers) for cache in (first, second, vae.new_decoder(H, W))]
    assert not names[0] & names[1] and names[0] | names[1] == names[2]
    assert first.nbytes + second.nbytes == vae.new_decoder(H, W).nbytes


def test_encoding_and_other_streams_do_not_disturb_a_stream(vae: VAE, rng: torch.Generator) -> None:
    latents, others, video = random_latents(rng, 4), random_latents(rng, 4), random_video(rng, 9)
    whole, other_whole = (vae.decode(each, vae.new_decoder(H, W)) for each in (latents, others))
    encoded = vae.encode(video)
    cache, other_cache, parts, other_parts = vae.new_decoder(H, W), vae.new_decoder(H, W), [], []
    for piece, other in zip(latents.split(2, dim=1), others.split(2, dim=1), strict=True):
        parts.append(vae.decode(piece, cache))
        assert torch.equal(vae.encode(video), encoded)
        other_parts.append(vae.decode(other, other_cache))
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert torch.equal(torch.cat(other_parts, dim=1), other_whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cache_stays_where_it_is_and_starts_anew(weights: Weights, rng: torch.Generator, dtype: torch.dtype) -> None:
    vae, latents = VAE.load(weights, dtype=dtype), random_latents(rng, 4)
    cache = vae.new_decoder(H, W)
    size, places = cache.nbytes, {name: buffer.data_ptr() for name, buffer in cache.buffers.items()}
    assert size > 0
    frames = []
    for latent in latents.split(1, dim=1):
        frames.append(vae.decode(latent, cache))
        assert {name: buffer.data_ptr() for name, buffer in cache.buffers.items()} == places
        assert cache.nbytes == size
    cache.reset()
    assert torch.equal(vae.decode(latents, cache), torch.cat(frames, dim=1))


def test_first_latent_gives_one_frame_and_each_later_one_four(vae: VAE, rng: torch.Generator) -> None:
    cache = vae.new_decoder(H, W)
    for expected in (1, 4, 4):
        frames = vae.decode(random_latents(rng, 1), cache)
        assert frames.shape == (3, expected, 8 * H, 8 * W)
        assert frames.dtype == torch.float32 and frames.abs().max() <= 1


def test_left_over_frames_are_ignored(vae: VAE, rng: torch.Generator) -> None:
    video = random_video(rng, 10)
    longest = vae.encode(video)
    assert longest.shape == (16, 3, H, W) and longest.dtype == torch.float32
    for frames in range(1, 10):
        count = 1 + (frames - 1) // 4
        assert torch.equal(vae.encode(video[:, :frames]), longest[:, :count]), frames


def test_a_later_latent_does_not_change_earlier_frames(vae: VAE, rng: torch.Generator) -> None:
    latents = random_latents(rng, 4)
    changed, at = latents.clone(), int(torch.randint(1, 4, (), generator=rng))
    changed[:, at] += 1
    before, after = (vae.decode(each, vae.new_decoder(H, W)) for each in (latents, changed))
    first = 4 * at - 3
    assert torch.equal(before[:, :first], after[:, :first])
    assert all(not torch.equal(before[:, i], after[:, i]) for i in range(first, before.shape[1]))


def test_a_later_frame_does_not_change_earlier_latents(vae: VAE, rng: torch.Generator) -> None:
    video = random_video(rng, 9)
    changed, at = video.clone(), int(torch.randint(1, 9, (), generator=rng))
    changed[:, at] *= -1
    before, after, first = vae.encode(video), vae.encode(changed), (at + 3) // 4
    assert torch.equal(before[:, :first], after[:, :first])
    assert all(not torch.equal(before[:, i], after[:, i]) for i in range(first, 3))


def test_bfloat16_frames_are_close_to_float32(vae: VAE, weights: Weights, rng: torch.Generator) -> None:
    latents = random_latents(rng, 4)
    rounded = VAE.load(weights, dtype=torch.bfloat16)
    got, exact = (each.decode(latents, each.new_decoder(H, W)) for each in (rounded, vae))
    assert psnr_db(got, exact) >= 40  # the published arithmetic itself is at 47 dB
    assert not torch.equal(got, exact)


def test_full_size_has_the_published_parameters_and_history() -> None:
    shapes, slots = expected_shapes(VAEConfig()), VAEConfig().decoder_slots()
    assert VAEConfig.from_shapes(shapes) == VAEConfig()
    assert sum(math.prod(shape) for shape in shapes.values()) == 126_892_531
    history = sum(2 * channels * 48 * scale * 88 * scale for channels, _, scale in slots.values())
    assert len(slots) == 32 and round(history / 1e6, 1) == 639.2


def test_full_size_keys_are_the_published_ones(golden: Path) -> None:
    keys = json.loads((golden / "vae_tiny" / "full_size_keys.json").read_text())["keys"]
    assert expected_shapes(VAEConfig()) == {key: tuple(shape) for key, shape in keys.items()}


@pytest.mark.parametrize("damage", ["missing", "misshapen", "unknown"])
def test_a_key_that_does_not_fit_is_named(weights: Weights, numbers: np.random.Generator, damage: str) -> None:
    key = str(numbers.choice(sorted(weights)))
    if damage == "missing":
        del weights[key]
    elif damage == "misshapen":
        weights[key] = weights[key].unsqueeze(0)
    else:
        key = f"{key}.more"
        weights[key] = torch.zeros(1)
    for config in (CONFIG, None):
        with pytest.raises(CheckpointError, match=f"'{key}'"):
            VAE.load(weights, config=config)


@pytest.mark.parametrize(
    "shape", [(3, 0, 8, 8), (4, 1, 8, 8), (3, 1, 12, 8), (3, 1, 8, 20), (1, 3, 1, 8, 8), (3, 8, 8)], ids=str
)
def test_video_of_another_shape_is_refused(vae: VAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="multiples of 8"):
        vae.encode(torch.zeros(shape))


def test_latents_of_another_shape_are_refused(vae: VAE) -> None:
    for shape in ((16, 0, 4, 4), (15, 1, 4, 4), (16, 4, 4)):
        with pytest.raises(InputError, match="cannot decode"):
            vae.decode(torch.zeros(shape), vae.new_decoder(4, 4))


def test_bytes_are_truncated_and_clamped(vae: VAE, rng: torch.Generator) -> None:
    ends = torch.tensor([-3.0, -1.0, 0.0, 0.999, 1.0, 7.0]).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    assert vae.to_uint8(ends)[0, 0, :, 1].tolist() == [0, 0, 127, 254, 255, 255]
    frames = torch.randn(3, 2, 5, 7, generator=rng)
    expected = np.trunc((frames.numpy().clip(-1, 1) + 1) / 2 * 255).transpose(1, 2, 3, 0)
    got = vae.to_uint8(frames).numpy()
    assert got.dtype == np.uint8 and np.array_equal(got, expected)
