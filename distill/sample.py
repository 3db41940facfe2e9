"""See what a run has learned: `python -m distill.sample --run DIR --vae FILE --out grid.png`.

For each held-out clip a row of its own frames and a row of frames made from its picture, prompt and sound: by the
student in 4 steps, or with `--teacher` in many, seeing the whole sequence.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from distill.clips import VOCABULARY, Clip, clip
from distill.data import BEFORE, FRAMES, LATENTS, encode, features, motion_of, padded
from distill.flow import many_steps, random_distances, rollout
from distill.run import fast_precision, load_average, run_program, there
from distill.toon import DIT, VAE, text_encoder
from distill.video_dit import Condition, Span, VideoDiT
from distill.video_vae import VideoVAE

BLOCKS = LATENTS // 3


def condition_of(vae: VideoVAE, made: Clip, states: Tensor) -> Condition:
    """What the engine would give the transformer for a clip."""
    _, still = encode(vae, made)
    motion = motion_of(still)
    sound = features(made.sound, FRAMES)[:, BEFORE:]
    return Condition(motion[None, :, :1], motion[None], padded(states)[None], sound[None, None])


@torch.inference_mode()
def sample(model: VideoDiT, condition: Condition, rng: np.random.Generator, *, teacher: bool, steps: int) -> Tensor:
    """Clean latents [1, 16, F, h, w] from the start of a stream."""
    shape = (1, DIT.in_channels, LATENTS, *condition.reference.shape[3:])
    noise = there(rng.standard_normal(shape, dtype=np.float32))
    start = torch.zeros(1, dtype=torch.long)
    if teacher:
        span = Span(start, random_distances(rng, 1, 1), frames=LATENTS, ring=1)
        return many_steps(model, noise, condition, span, steps)
    return rollout(model, noise, condition, [Span(start, random_distances(rng, 1, BLOCKS)) for _ in range(4)])


@torch.inference_mode()
def decoded(vae: VideoVAE, condition: Condition, latents: Tensor) -> np.ndarray:
    """Frames uint8 [4 F, H, W, 3], the decoder primed with the still picture as in the engine."""
    video = vae.decode(torch.cat([condition.motion[:, :, :7], latents], dim=2))[0, :, -4 * latents.shape[2] :]
    frames: np.ndarray = ((video.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 3, 0).cpu().numpy()
    return frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teacher", action="store_true")
    parser.add_argument("--steps", type=int, default=25, help="of the teacher")
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    from PIL import Image

    model, vae = VideoDiT(DIT), VideoVAE(VAE)
    model.load_state_dict(load_average(given.run))
    vae.load_state_dict(load_file(given.vae))
    with tempfile.TemporaryDirectory() as folder:
        encoder = text_encoder(list(VOCABULARY), Path(folder))
    rows = []
    for i in range(given.count):
        made = clip(given.seed + i, FRAMES, held_out=True)
        with fast_precision():
            condition = condition_of(vae, made, encoder.encode(made.prompt))
            rng = np.random.default_rng([given.seed, i])
            latents = sample(model, condition, rng, teacher=given.teacher, steps=given.steps)
            frames = decoded(vae, condition, latents)
        shown = np.linspace(0, len(frames) - 1, 9).round().astype(int)
        truth = made.frames_uint8[BEFORE:]
        rows += [np.concatenate([made.still, *video[shown]], axis=1) for video in (truth, frames)]
        print(f"{i}: {made.prompt or '(no prompt)'}", flush=True)
    Image.fromarray(np.concatenate(rows)).save(given.out)
    print(given.out)


if __name__ == "__main__":
    run_program(main)
