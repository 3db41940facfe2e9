"""Flow matching: the bidirectional teacher, then the causal student by diffusion forcing at one level for all blocks.

`python -m distill.pretrain --data DIR --out DIR` trains a teacher; with `--from DIR` a causal student that
begins with that run's weights. Goes on where an earlier call stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.data import Examples, Sequence
from distill.flow import SCHEDULE, flow_loss, random_distances, random_starts, shifted
from distill.muon import LAYERS, Optimisers
from distill.run import (
    STUDENT,
    TEACHER,
    Average,
    Recipe,
    Run,
    cosine,
    fast_precision,
    finite,
    load_into,
    load_run,
    run_program,
    there,
)
from distill.sample import Drawing
from distill.toon import DIT
from distill.video_dit import Span, VideoDiT
from liverelay.engine.models.weights import save_tensors

BLOCKS = 5
SHORT = 3  # times as many rows in a step of single blocks: more people for the same work


def layout(step: int, batch: int) -> tuple[int, int]:
    """Rows and blocks of a teacher's step: mostly single blocks, in which everything but time can be learned."""
    return (batch, BLOCKS) if step % 4 == 3 else (SHORT * batch, 1)


def noise_levels(rng: np.random.Generator, count: int, causal: bool) -> Tensor:
    """Anywhere; for a student half of them are those of its steps."""
    anywhere = shifted(there(rng.random(count, dtype=np.float32)))
    if not causal:
        return anywhere
    steps = torch.tensor(SCHEDULE.sigmas[:-1])[there(rng.integers(0, 4, count))]
    return torch.where(there(rng.random(count)) < 0.5, anywhere, steps)


def random_span(
    rng: np.random.Generator, count: int, causal: bool, corruption: float = 0.0, blocks: int = BLOCKS
) -> Span:
    """A teacher sees the whole sequence as one block; a student block by block, through a ring with a little noise."""
    starts = random_starts(rng, count, blocks)
    if not causal:
        return Span(starts, random_distances(rng, count, 1), frames=3 * blocks, ring=1)
    noise = corruption * float(rng.random()) if rng.random() < 0.5 else 0.0
    return Span(starts, random_distances(rng, count, blocks), corruption=noise)


def sequences(examples: Examples, rng: np.random.Generator, count: int, span: Span) -> Sequence:
    """Random pieces of clips; a stream past its first clip mostly has its replaced sink."""
    replaced = (span.start > 0) & (there(rng.random(count)) < 0.75)
    return examples.sample(rng, count, span.frames * span.distance.shape[1], replaced)


def train(
    examples: Examples, out: Path, recipe: Recipe, begin: Path | None = None, start: Path | None = None
) -> None:
    """begin: the teacher's run; the model is then a causal student. start: weights to begin with instead.

    Leaves the averaged weights beside the state, `average.safetensors`.
    """
    torch.manual_seed(recipe.seed)
    causal = begin is not None
    model = VideoDiT(DIT)
    if not (out / "state.pt").exists():
        if start is not None:
            load_into(model, start)
        elif begin is not None:
            load_run(model, begin, TEACHER)
    optimiser = Optimisers(model, recipe.rate, LAYERS)
    average = Average(model, 0.999)
    run = Run(out, STUDENT if causal else TEACHER, minutes=recipe.minutes, seed=recipe.seed)
    run.keep(model=model, optimiser=optimiser, average=average)
    places, losses = examples.liveliness(), list[float]()
    draw = Drawing(recipe)

    def keep_average() -> None:
        average.copy_to(model)
        weights = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
        save_tensors(out / "average.safetensors", weights)

    for step in run.steps(recipe.steps, keep_average):
        rng = np.random.default_rng([recipe.seed, causal, step])
        batch, blocks = (recipe.batch, BLOCKS) if causal else layout(step, recipe.batch)
        span = random_span(rng, batch, causal, recipe.corruption, blocks)
        given = sequences(examples, rng, batch, span)
        with fast_precision():
            loss = flow_loss(model, given.latents, noise_levels(rng, batch, causal), given.condition, span, places)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step(recipe.rate * cosine(step, recipe.steps))
        average.update(model, step)
        losses.append(finite(loss, step))
        if step % 50 == 49:
            run.log(loss=np.mean(losses))
            losses.clear()
        draw(run, step, average, teacher=not causal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder written by distill.data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--from", dest="begin", type=Path, help="the teacher's run: train a causal student")
    parser.add_argument("--start", type=Path, metavar="FILE", help="average.safetensors of another run to begin with")
    Recipe.add(parser, steps=6000, batch=4, rate=2e-3)
    given = parser.parse_args()
    train(Examples.open(given.data), given.out, Recipe.of(given), given.begin, given.start)


if __name__ == "__main__":
    run_program(main)
