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
from distill.run import Average, Run, cosine, load_average
from distill.toon import DIT
from distill.video_dit import Span, VideoDiT

BLOCKS = 5
CORRUPTION = 0.1


def noise_levels(rng: np.random.Generator, count: int, causal: bool) -> Tensor:
    """Anywhere; for a student half of them are those of its steps."""
    anywhere = shifted(torch.from_numpy(rng.random(count, dtype=np.float32)))
    if not causal:
        return anywhere
    steps = torch.tensor(SCHEDULE.sigmas[:-1])[torch.from_numpy(rng.integers(0, 4, count))]
    return torch.where(torch.from_numpy(rng.random(count)) < 0.5, anywhere, steps)


def random_span(rng: np.random.Generator, count: int, causal: bool, corruption: float = 0.0) -> Span:
    """A teacher sees the whole sequence as one block; a student block by block, through a ring with a little noise."""
    starts = random_starts(rng, count, BLOCKS)
    if not causal:
        return Span(starts, random_distances(rng, count, 1), frames=3 * BLOCKS, ring=1)
    noise = corruption * float(rng.random()) if rng.random() < 0.5 else 0.0
    return Span(starts, random_distances(rng, count, BLOCKS), corruption=noise)


def sequences(examples: Examples, rng: np.random.Generator, count: int, span: Span) -> Sequence:
    """Random pieces of clips; a stream past its first clip mostly has its replaced sink."""
    replaced = (span.start > 0) & (torch.from_numpy(rng.random(count)) < 0.75)
    return examples.sample(rng, count, 3 * BLOCKS, replaced)


def train(
    examples: Examples, out: Path, *, begin: Path | None, steps: int, minutes: float, batch: int, rate: float,
    seed: int, corruption: float = CORRUPTION,
) -> None:
    torch.manual_seed(seed)
    causal = begin is not None
    model = VideoDiT(DIT)
    if begin is not None and not (out / "state.pt").exists():
        model.load_state_dict(load_average(begin))
    optimiser = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = Average(model, 0.999)
    run = Run(out, minutes=minutes)
    run.keep(model=model, optimiser=optimiser, average=average)
    total = 0.0
    for step in run.steps(steps):
        rng = np.random.default_rng([seed, causal, step])
        span = random_span(rng, batch, causal, corruption)
        given = sequences(examples, rng, batch, span)
        with torch.autocast("cpu", torch.bfloat16):
            loss = flow_loss(model, given.latents, noise_levels(rng, batch, causal), given.condition, span)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = rate * cosine(step, steps)
        optimiser.step()
        optimiser.zero_grad()
        average.update(model, step)
        total += float(loss.detach())
        if step % 50 == 49:
            run.log(loss=total / 50)
            total = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder written by dataset latents")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--from", dest="begin", type=Path, help="the teacher's run: train a causal student")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    train(
        Examples.open(given.data), given.out, begin=given.begin, steps=given.steps, minutes=given.minutes,
        batch=given.batch, rate=given.rate, seed=given.seed,
    )  # fmt: skip


if __name__ == "__main__":
    main()
