"""Noise levels, flow matching and rollouts: what teacher, student and scores have in common.

A latent at noise level s is (1 - s) * clean + s * noise, the flow is noise - clean. Source: spec dit.md section 8.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from distill.run import there
from distill.video_dit import Condition, Span, VideoDiT
from liverelay.engine.models.sampler import TRAIN_STEPS, make_schedule

SCHEDULE = make_schedule()
FARTHEST = 75000  # latent frames: 12,000 s of video
Flow = Callable[[Tensor, Tensor, Condition, Span], Tensor]


def mixed(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """sigma [B]."""
    s = sigma.view(-1, 1, 1, 1, 1)
    return (1 - s) * clean + s * noise


def shifted(uniform: Tensor, shift: float = 3.0) -> Tensor:
    """Uniform numbers 0..1 -> noise levels, more of them high, as in the schedule."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def flow_loss(
    model: Flow, clean: Tensor, sigma: Tensor, condition: Condition, span: Span, places: Tensor | None = None
) -> Tensor:
    """Mean square error of the flow at these noise levels.

    places [h, w]: weights of the picture's places; what the model tends to is the same for any, how fast is not.
    """
    noise = torch.randn_like(clean)
    flow = model(mixed(clean, noise, sigma), TRAIN_STEPS * sigma, condition, span)
    error = (flow - (noise - clean)).square()
    return (error if places is None else error * places).mean()


def random_starts(rng: np.random.Generator, count: int, blocks: int) -> Tensor:
    """Where in a stream sequences lie: at its start, or anywhere in the first hours, near ones more often."""
    far = 3 * np.exp(rng.uniform(np.log(4), np.log(FARTHEST / 3 - blocks), count)).astype(np.int64)
    return there(np.where(rng.random(count) < 0.4, 0, far))


def random_distances(rng: np.random.Generator, count: int, blocks: int) -> Tensor:
    return there(rng.integers(4, 31, (count, blocks)))


def rollout(
    model: VideoDiT | Flow, noise: Tensor, condition: Condition, spans: Sequence[Span], *, upto: int = 4
) -> Tensor:
    """Denoise whole sequences from noise: the latent before step `upto` (4: clean), as the timestep-forced pipeline
    does it with a ring for each step. spans: one for each step; they differ in the drawn distances."""
    latents = noise
    for step in range(upto):
        timestep = torch.full((len(noise),), SCHEDULE.timesteps[step])
        latents = latents + SCHEDULE.step_size(step) * model(latents, timestep, condition, spans[step])
    return latents


def many_steps(model: Flow, noise: Tensor, condition: Condition, span: Span, steps: int) -> Tensor:
    """Euler steps of a teacher that was not distilled."""
    latents = noise
    for high, low in itertools.pairwise(make_schedule(steps).sigmas):
        timestep = torch.full((len(noise),), TRAIN_STEPS * high)
        latents = latents + (low - high) * model(latents, timestep, condition, span)
    return latents
