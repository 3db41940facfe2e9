"""The trainable twins compute what the engine computes: VAE, transformer, and a whole rollout in four passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distill.flow import rollout
from distill.video_dit import Condition, Span, VideoDiT
from distill.video_vae import VideoVAE
from liverelay.engine.config import DiTConfig
from liverelay.engine.make_checkpoint import random_dit
from liverelay.engine.models.dit import DiT
from liverelay.engine.models.geometry import Geometry, reference_position
from liverelay.engine.models.sampler import make_schedule
from liverelay.engine.models.vae import VAE
from liverelay.engine.models.vae_config import VAEConfig, expected_shapes

CONFIG = DiTConfig(128, 256, 4, 3, (0, 2), text_dim=32, text_len=16, audio_dim=24, audio_states=1)
HEIGHT, WIDTH, BLOCKS = 8, 16, 6


def relative(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize("depth", [1, 2])
def test_the_trainable_vae_equals_the_streaming_one(rng: torch.Generator, depth: int) -> None:
    config = VAEConfig(base_dim=4, num_res_blocks=depth)
    model = VideoVAE(config).requires_grad_(False)
    assert {name: tuple(weight.shape) for name, weight in model.state_dict().items()} == expected_shapes(config)
    for weight in model.parameters():
        scale = 0.3 if weight.dim() < 3 else weight[0].numel() ** -0.5
        weight.copy_(torch.randn(weight.shape, generator=rng) * scale + float(weight.dim() == 4))
    video = torch.rand(3, 13, 48, 64, generator=rng) * 2 - 1
    engine = VAE.load(model.state_dict(), config=config, dtype=torch.float32)
    latents = engine.encode(video)
    assert relative(model.encode(video[None])[0], latents) < 1e-5
    frames = engine.decode(latents, engine.new_decoder(6, 8))
    assert relative(model.decode(latents[None])[0].clamp(-1, 1), frames) < 1e-4  # random weights sharpen roundings


class Stream:
    """A random model, and blocks of one random stream."""

    def __init__(self, rng: torch.Generator, start: int) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng)

        self.weights = {key: value.float() for key, value in random_dit(CONFIG, rng).items()}
        self.start, self.noise = start, random(16, 3 * BLOCKS, HEIGHT, WIDTH)
        self.reference, self.motion = random(16, 1, HEIGHT, WIDTH), random(16, 19, HEIGHT, WIDTH)
        self.text, self.audio = random(5, CONFIG.text_dim), random(1, CONFIG.audio_dim, 12 * BLOCKS)
        self.distances = torch.randint(4, 31, (4, BLOCKS), generator=rng)

    def spans(self) -> list[Span]:
        return [Span(torch.tensor([self.start]), distances[None]) for distances in self.distances]

    def condition(self) -> Condition:
        return Condition(self.reference[None], self.motion[None], self.text[None], self.audio[None])

    def by_engine(self) -> Tensor:
        """Clean latents [16, F, h, w], block after block through the rings of the four steps."""
        dit = DiT.load(self.weights, CONFIG, dtype=torch.float32)
        geometry, schedule = Geometry(HEIGHT, WIDTH, CONFIG.head_dim), make_schedule()
        workspace, text = dit.make_workspace(geometry), dit.text_condition(self.text)
        arenas = [dit.make_arena(geometry) for _ in schedule.timesteps]
        tables = [dit.timestep_tables(timestep) for timestep in schedule.timesteps]
        for arena in arenas:
            tokens = dit.sink_tokens(self.reference, self.motion)
            dit.prefill(workspace, arena, dit.timestep_tables(0.0), text, tokens)
        made = []
        for block in range(BLOCKS):
            latent = self.noise[:, 3 * block : 3 * block + 3].clone()
            audio = dit.audio_condition(self.audio[None, :, :, 12 * block : 12 * block + 12], 3)
            for step in range(len(arenas)):
                place = self.start + 3 * block
                position = reference_position(place, int(self.distances[step, block]))
                flow = dit.block_step(
                    workspace, arenas[step], tables[step], latent, place, position,
                    (text, audio, dit.pose_condition(None)),
                )  # fmt: skip
                latent = dit.ops.euler_step(latent, flow, schedule.step_size(step), torch.empty_like(latent))
            made.append(latent)
        return torch.cat(made, dim=1)


@torch.no_grad()
def test_four_passes_over_a_sequence_equal_the_engines_rollout(rng: torch.Generator) -> None:
    stream = Stream(rng, 0)
    model = VideoDiT(CONFIG).load(stream.weights)
    out = rollout(model, stream.noise[None], stream.condition(), stream.spans())[0]
    assert relative(out, stream.by_engine()) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("change", ["distance", "rolling", "corruption", "ring"])
def test_what_a_span_says_matters(rng: torch.Generator, change: str) -> None:
    """The equality above would not notice a part of the span that nothing reads.

    Late in the stream: at its start the reference stands at its first place for any short distance.
    """
    stream = Stream(rng, 300)
    model = VideoDiT(CONFIG).load(stream.weights)
    changes = {"distance": {"distance": stream.distances[:1] + 9}, "rolling": {"rolling": False},
               "corruption": {"corruption": 0.1}, "ring": {"ring": 3}}  # fmt: skip
    span = stream.spans()[0]
    noise, timestep = stream.noise[None], torch.tensor([600.0])
    flow = model(noise, timestep, stream.condition(), span)
    other = model(noise, timestep, stream.condition(), replace(span, **changes[change]))
    assert relative(other, flow) > 1e-3


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other(rng: torch.Generator) -> None:
    streams = [Stream(rng, 0), Stream(rng, 300)]
    model = VideoDiT(CONFIG).load(streams[0].weights)
    parts = [stream.condition() for stream in streams]
    both = Condition(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))
    span = Span(torch.tensor([0, 300]), torch.cat([stream.distances[:1] for stream in streams]))
    noise, timestep = torch.stack([stream.noise for stream in streams]), torch.tensor([600.0, 20.0])
    out = model(noise, timestep, both, span)
    for i, stream in enumerate(streams):
        alone = model(noise[i : i + 1], timestep[i : i + 1], stream.condition(), stream.spans()[0])
        assert relative(out[i], alone[0]) < 1e-5
