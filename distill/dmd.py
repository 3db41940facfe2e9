"""Self-Forcing Distribution Matching Distillation: the causal student learns from its own rollouts.

`python -m distill.dmd --data DIR --teacher DIR --student DIR --out DIR`. A rollout runs through the ring and
sink of each step as the pipeline does it, up to a random step, whose prediction of the clean latents is the sample.
The frozen teacher says in which direction real videos lie from it at some noise level, the fake score (a copy of the
teacher that is trained on the student's samples all the while) where the student's lie; the student follows the
difference.
Sources: arXiv 2405.14867 (DMD2), 2506.08009 (Self-Forcing), 2512.04677 (history corruption, random sink distance).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.data import Examples, Sequence
from distill.flow import SCHEDULE, Flow, flow_loss, mixed, random_distances, rollout, shifted
from distill.muon import LAYERS, Optimisers
from distill.pretrain import random_span, sequences
from distill.run import (
    DISTILLED,
    STUDENT,
    TEACHER,
    Average,
    Recipe,
    Run,
    cosine,
    fast_precision,
    finite,
    load_run,
    run_program,
    there,
)
from distill.sample import Drawing
from distill.toon import DIT
from distill.video_dit import Span, VideoDiT
from liverelay.engine.models.sampler import TRAIN_STEPS

EXITS = (0.3, 0.3, 0.35, 0.05)  # how often a rollout ends at a step; the last step changes next to nothing
FAKE_STEPS = 3  # of the fake score for one of the student, on its latest sample
FAKE_RATE = 5.0  # its learning rate beside the student's highest: it must follow


def sample(student: Flow, rng: np.random.Generator, given: Sequence, span: Span) -> Tensor:
    """The student's clean latents as predicted at a random step of a rollout; with gradients only at that step."""
    step = int(rng.choice(4, p=EXITS))
    count, blocks = span.distance.shape
    spans = [replace(span, distance=random_distances(rng, count, blocks)) for _ in range(step + 1)]
    noise = torch.randn_like(given.latents)
    with torch.no_grad():
        latents = rollout(student, noise, given.condition, spans, upto=step)
    timestep = torch.full((count,), SCHEDULE.timesteps[step])
    return latents - SCHEDULE.sigmas[step] * student(latents, timestep, given.condition, spans[-1])


def whole(span: Span) -> Span:
    """The sequence as teacher and fake score see it: one block."""
    blocks = span.distance.shape[1]
    return Span(span.start, span.distance[:, :1], frames=span.frames * blocks, ring=1)


def matching_loss(
    clean: Tensor, teacher: Flow, fake: Flow, given: Sequence, span: Span, sigma: Tensor, places: Tensor | None = None
) -> Tensor:
    """A loss whose gradient at `clean` is the difference of the two scores' predictions, in the scale of DMD2."""
    with torch.no_grad():
        noisy = mixed(clean, torch.randn_like(clean), sigma)
        timestep, s = TRAIN_STEPS * sigma, sigma.view(-1, 1, 1, 1, 1)
        real = noisy - s * teacher(noisy, timestep, given.condition, span)
        ours = noisy - s * fake(noisy, timestep, given.condition, span)
        scale = (clean - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp_min(1e-3)
        target = clean - (ours - real) / scale
    error = 0.5 * (clean - target).square()
    return (error if places is None else error * places).mean()


def train(examples: Examples, out: Path, recipe: Recipe, teacher_run: Path, student_run: Path) -> None:
    """Both runs are those of pretrain, or the student's an earlier one of this program; it goes on from its average."""
    torch.manual_seed(recipe.seed)
    teacher, fake, student = (VideoDiT(DIT) for _ in range(3))
    load_run(teacher, teacher_run, TEACHER)
    fake.load_state_dict(teacher.state_dict())
    load_run(student, student_run, STUDENT, DISTILLED)
    teacher.requires_grad_(False)
    optimisers = {
        "student": Optimisers(student, recipe.rate, LAYERS, momentum=0.0),  # its target moves away from it
        "fake": Optimisers(fake, FAKE_RATE * recipe.rate, LAYERS),
    }
    average = Average(student, 0.99)
    run = Run(out, DISTILLED, minutes=recipe.minutes, seed=recipe.seed)
    run.keep(
        model=student, fake=fake, average=average, optimiser=optimisers["student"], fake_optimiser=optimisers["fake"]
    )
    draw, places = Drawing(recipe), examples.liveliness()
    losses: dict[str, list[float]] = {"student": [], "fake": []}
    for step in run.steps(recipe.steps):
        rng = np.random.default_rng([recipe.seed, 2, step])
        span = random_span(rng, recipe.batch, True, recipe.corruption)
        given = sequences(examples, rng, recipe.batch, span)
        with fast_precision():
            clean = sample(student, rng, given, span)
        for turn in range(FAKE_STEPS + 1):  # the student first: the fake score must not know the very sample it judges
            name = "fake" if turn else "student"
            sigma = shifted(there(rng.uniform(0.02, 0.98, recipe.batch).astype(np.float32)))
            with fast_precision():
                if turn:
                    loss = flow_loss(fake, clean.detach(), sigma, given.condition, whole(span), places)
                else:
                    loss = matching_loss(clean, teacher, fake, given, whole(span), sigma, places)
            loss.backward()
            torch.nn.utils.clip_grad_norm_((fake if turn else student).parameters(), 1.0)
            optimisers[name].step(recipe.rate * (FAKE_RATE if turn else cosine(step, recipe.steps)))
            losses[name].append(finite(loss, step))
        average.update(student, step)
        if step % 20 == 19:
            run.log(matching=np.mean(losses["student"]), fake=np.mean(losses["fake"]))
            losses = {"student": [], "fake": []}
        draw(run, step, average, teacher=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("data", "teacher", "student", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    Recipe.add(parser, steps=2000, batch=4, rate=5e-5)
    given = parser.parse_args()
    train(Examples.open(given.data), given.out, Recipe.of(given), given.teacher, given.student)


if __name__ == "__main__":
    run_program(main)
