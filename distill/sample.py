"""See what a run has learned: `python -m distill.sample --run DIR --vae FILE --out grid.png`.

For each held-out clip a row of its own frames and a row of frames made from its picture, prompt and sound: by the
student in 4 steps, or with `--teacher` in many, seeing the whole sequence.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.clips import VOCABULARY, Clip, clip
from distill.data import BEFORE, FRAMES, LATENTS, encode, features, motion_of, padded
from distill.flow import many_steps, random_distances, rollout
from distill.run import (
    DISTILLED,
    STUDENT,
    TEACHER,
    Average,
    Recipe,
    Run,
    add_device,
    fast_precision,
    load_into,
    load_run,
    run_program,
    there,
)
from distill.toon import DIT, VAE, text_encoder
from distill.video_dit import Condition, Span, VideoDiT
from distill.video_vae import VideoVAE
from liverelay.engine import media
from liverelay.engine.arguments import number, positive
from liverelay.engine.errors import MissingExtraError

BLOCKS = LATENTS // 3


def condition_of(vae: VideoVAE, made: Clip, states: Tensor) -> Condition:
    """What the engine would give the transformer for a clip."""
    _, still = encode(vae, made)
    motion = motion_of(still)
    with torch.device("cpu"):
        sound = features(made.sound, FRAMES)[:, BEFORE:]
    text, sound = (part.to(motion.device) for part in (padded(states), sound))
    return Condition(motion[None, :, :1], motion[None], text[None], sound[None, None])


@torch.no_grad()
def sample(model: VideoDiT, condition: Condition, rng: np.random.Generator, *, teacher: bool, steps: int) -> Tensor:
    """Clean latents [1, 16, F, h, w] from the start of a stream."""
    shape = (1, DIT.in_channels, LATENTS, *condition.reference.shape[3:])
    noise = there(rng.standard_normal(shape, dtype=np.float32))
    start = torch.zeros(1, dtype=torch.long)
    if teacher:
        span = Span(start, random_distances(rng, 1, 1), frames=LATENTS, ring=1)
        return many_steps(model, noise, condition, span, steps)
    return rollout(model, noise, condition, [Span(start, random_distances(rng, 1, BLOCKS)) for _ in range(4)])


@torch.no_grad()
def decoded(vae: VideoVAE, condition: Condition, latents: Tensor) -> np.ndarray:
    """Frames uint8 [4 F, H, W, 3], the decoder primed with the still picture as in the engine."""
    video = vae.decode(torch.cat([condition.motion[:, :, :7], latents], dim=2))[0, :, -4 * latents.shape[2] :]
    frames: np.ndarray = ((video.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 3, 0).cpu().numpy()
    return frames


class Grids:
    """Pictures of what a model makes of held-out clips: their stills, prompts, sounds and frames are made once."""

    def __init__(self, vae: Path, count: int = 5, seed: int = 0) -> None:
        self.vae, self.seed = VideoVAE(VAE), seed
        load_into(self.vae, vae)
        with tempfile.TemporaryDirectory() as folder, torch.device("cpu"):
            encoder = text_encoder(list(VOCABULARY), Path(folder))
            self.clips = [clip(seed + i, FRAMES, held_out=True) for i in range(count)]
            states = [encoder.encode(one.prompt) for one in self.clips]
        with fast_precision():
            self.conditions = [condition_of(self.vae, *pair) for pair in zip(self.clips, states, strict=True)]

    def draw(self, model: VideoDiT, path: Path, *, teacher: bool, steps: int = 25) -> None:
        """Write the grid: for each clip its still and frames, and those that the model makes."""
        from PIL import Image

        rows = []
        for i, (made, condition) in enumerate(zip(self.clips, self.conditions, strict=True)):
            with fast_precision():
                rng = np.random.default_rng([self.seed, i])
                frames = decoded(self.vae, condition, sample(model, condition, rng, teacher=teacher, steps=steps))
            shown = np.linspace(0, len(frames) - 1, 9).round().astype(int)
            truth = made.frames_uint8[BEFORE:]
            rows += [np.concatenate([made.still, *video[shown]], axis=1) for video in (truth, frames)]
            print(f"{i}: {made.prompt or '(no prompt)'}", flush=True)
        Image.fromarray(np.concatenate(rows)).save(path)
        print(path, flush=True)


def check_pictures() -> None:
    """MissingExtraError before a long work that ends in a picture."""
    if importlib.util.find_spec("PIL") is None:
        raise MissingExtraError("Pillow", "to draw sample grids", "media")


class Drawing:
    """Sample grids of a training run, `grid-STEP.png` in its folder, from its averaged weights."""

    def __init__(self, recipe: Recipe) -> None:
        self._every = recipe.grid_every
        if recipe.vae is not None:
            check_pictures()
        self._grids = None if recipe.vae is None else Grids(recipe.vae)

    def __call__(self, run: Run, step: int, average: Average, *, teacher: bool) -> None:
        if self._grids is None or step % self._every != self._every - 1:
            return
        model = VideoDiT(DIT)
        average.copy_to(model)
        self._grids.draw(model, run.folder / f"grid-{step + 1}.png", teacher=teacher)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teacher", action="store_true")
    parser.add_argument("--steps", type=positive(int, "steps"), default=25, help="of the teacher")
    parser.add_argument("--count", type=positive(int, "clips"), default=5)
    parser.add_argument("--seed", type=number(int, "seeds"), default=0)
    add_device(parser)
    given = parser.parse_args()
    check_pictures()
    media.picture_format(given.out)
    media.check_writable(given.out)
    model = VideoDiT(DIT)
    load_run(model, given.run, DISTILLED, STUDENT, TEACHER)
    Grids(given.vae, given.count, given.seed).draw(model, given.out, teacher=given.teacher, steps=given.steps)


if __name__ == "__main__":
    run_program(main)
