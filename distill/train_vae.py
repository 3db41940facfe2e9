"""Train the small VAE on rendered portraits: `python -m distill.train_vae --pixels FILE --out DIR`.

An autoencoder rather than a VAE: the engine takes the mean alone, so what matters is that latents are small, smooth
(noise is added to them while training) and, in the end, of zero mean and unit variance in every channel, which is
folded into the two 1x1x1 convolutions around them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.data import array
from distill.identity import Identity
from distill.measure import wine_red
from distill.motion import random_motion
from distill.muon import Optimisers
from distill.portrait import render
from distill.run import (
    Average,
    Run,
    add_common,
    cosine,
    fast_precision,
    finite,
    load_average,
    load_into,
    run_program,
    there,
)
from distill.toon import SIZE, VAE
from distill.video_vae import VideoVAE
from liverelay.engine.arguments import number, positive
from liverelay.engine.errors import CheckpointError, InputError
from liverelay.engine.models.weights import save_tensors

FRAMES = 17  # of a clip
MOUTH = 10.0  # weight of the mouth's inside beside 1 for what stands still


def loss_of(model: VideoVAE, video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """video [B, 3, T, H, W]; noise like the latents. Returns loss, mean absolute error, mean square of the latents."""
    with fast_precision():
        with torch.set_grad_enabled(model.encoder.training):
            latents = model.encode(video)
        out = model.decode(latents + noise)
    error = (out - video).abs()
    # What moves matters more than what stands: eyes and mouth are some hundred pixels.
    moving = (video - video[:, :, :1]).abs().amax(dim=1, keepdim=True)
    weight = 1 + 4 * (moving > 0.08) + 2 * (moving.amax(dim=2, keepdim=True) > 0.08) + MOUTH * near_mouth(video)
    edges = sum(((out - video).diff(dim=dim)).abs().mean() for dim in (3, 4))
    # Flat colours: an error that is small everywhere is seen at once, and costs little beside that of edges.
    flat = F.avg_pool3d(out - video, (1, 8, 8)).abs().mean()
    size = latents.square().mean()
    return (error * weight).mean() + edges + 2 * flat + 1e-3 * size, error.mean(), size


def near_mouth(video: Tensor) -> Tensor:
    """1 for the inside of an open mouth and the pixels around it, [B, 1, T, H, W]: at most some 300 of 16384."""
    inside = wine_red(*((video + 1) / 2).unbind(1))
    return (F.max_pool3d(inside.unsqueeze(1), (1, 3, 3), 1, (0, 1, 1)) > 0.1).float()


def crops(pixels: np.ndarray, rng: np.random.Generator, *, batch: int, frames: int, size: int) -> Tensor:
    """Random pieces of clips uint8 [N, T, H, W, 3] -> [batch, 3, frames, size, size] in [-1, 1]."""
    taken = []
    for _ in range(batch):
        n, t = rng.integers(len(pixels)), rng.integers(pixels.shape[1] - frames + 1)
        if size < SIZE == pixels.shape[2] and rng.random() < 0.5:  # with the whole mouth
            y, x = 8 * rng.integers(7, 9), 8 * rng.integers(3, 6)
        else:
            y, x = (8 * rng.integers((side - size) // 8 + 1) for side in pixels.shape[2:4])
        piece = pixels[n, t : t + frames, y : y + size, x : x + size]
        taken.append(piece[:, :, ::-1] if rng.random() < 0.5 else piece)
    video = there(np.stack(taken)).permute(0, 4, 1, 2, 3)
    return video.float() / 127.5 - 1


def piece(step: int, images: int) -> dict[str, int]:
    """What a step learns from: pictures at first, since all convolutions begin without a memory; then clips of
    four latents and more. Small pieces, and whole pictures now and then, whose positions the attention
    must know too."""
    whole = step % 8 == 7
    if step < images:
        return {"batch": 4, "frames": 1, "size": 128} if whole else {"batch": 16, "frames": 1, "size": 64}
    return {"batch": 1, "frames": 13, "size": 128} if whole else {"batch": 3, "frames": 17, "size": 64}


@dataclass(frozen=True)
class Plan:
    """images: how many of the steps, the first ones, see single pictures; start: weights of an earlier `finish`;
    decoder_only: latents stay as they are, so that what was trained on them goes on being right."""

    images: int
    steps: int
    minutes: float
    seed: int
    rate: float = 2e-3
    start: Path | None = None
    decoder_only: bool = False


def train(pixels: np.ndarray, out: Path, plan: Plan) -> None:
    """Into a run's folder, whenever it ends with the weights for the engine (`finish`)."""
    torch.manual_seed(plan.seed)
    model = VideoVAE(VAE)
    if plan.start is not None:
        load_into(model, plan.start)
    if plan.decoder_only:
        for part in (model.encoder, model.conv1):
            part.eval().requires_grad_(False)
    optimiser = Optimisers(model, plan.rate, ("encoder.", "decoder."))
    average = Average(model, 0.998)
    kind = "a VAE's decoder" if plan.decoder_only else "a VAE"
    run = Run(out, kind, minutes=plan.minutes, seed=plan.seed)
    run.keep(model=model, optimiser=optimiser, average=average)
    for step in run.steps(plan.steps, lambda: finish(out, pixels, whitened=not plan.decoder_only)):
        rng = np.random.default_rng([plan.seed, step])
        video = crops(pixels, rng, **piece(step, plan.images))
        latent = (len(video), VAE.z_dim, (video.shape[2] + 3) // 4, video.shape[3] // 8, video.shape[4] // 8)
        noise = 0.1 * there(rng.standard_normal(latent, dtype=np.float32))
        loss, error, size = loss_of(model, video, noise)
        finite(loss, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step(plan.rate * cosine(step, plan.steps))
        average.update(model, step)
        if step % 50 == 49:
            run.log(loss=loss, error=error, size=size)


@torch.inference_mode()
def whiten(model: VideoVAE, pixels: np.ndarray, count: int = 100) -> None:
    """Change the convolutions around the latents so that each channel has mean 0 and variance 1 over these clips."""
    codes = []
    for i in range(0, len(pixels), max(1, len(pixels) // count)):
        video = there(np.array(pixels[i])).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with fast_precision():
            codes.append(model.encode(video)[0, :, 1:].flatten(1))
    coded = torch.cat(codes, dim=1)
    shift, scale = coded.mean(1), coded.std(1)
    mean, std = model.mean.flatten(), model.std.flatten()
    z, into, out = VAE.z_dim, model.conv1, model.conv2
    into.weight[:z] /= scale.view(-1, 1, 1, 1, 1)
    into.bias[:z] = (into.bias[:z] - mean - std * shift) / scale + mean
    matrix = out.weight.flatten(1).clone()
    out.weight *= scale.view(1, -1, 1, 1, 1)
    out.bias += matrix @ (shift * std + mean - scale * mean)


def finish(folder: Path, pixels: np.ndarray, *, whitened: bool = True) -> Path:
    """Write the averaged weights, with whitened latents or with those of training, `vae.safetensors`."""
    model = VideoVAE(VAE)
    model.load_state_dict(load_average(folder))
    model.requires_grad_(False)
    if whitened:
        whiten(model, pixels)
    path = folder / "vae.safetensors"
    save_tensors(path, {name: weight.bfloat16() for name, weight in model.state_dict().items()})
    print(path, flush=True)
    return path


def render_clips(path: Path, count: int = 1600, frames: int = FRAMES) -> None:
    """Clips whose mouths move by chance, uint8 [count, frames, SIZE, SIZE, 3]; the file appears when it is whole."""
    part = path.with_suffix(".part.npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _render(array(part, np.uint8, (count, frames, SIZE, SIZE, 3)))
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def _render(pixels: np.ndarray) -> None:
    count, frames = pixels.shape[:2]
    for n in range(count):
        rng = np.random.default_rng([77, n])
        places = np.arange(0, frames + 2, 3)
        opening, spread = (
            np.clip(np.interp(np.arange(frames), places, rng.uniform(low, 1.2, len(places))), floor, 1)
            for low, floor in ((-0.4, 0), (-1.2, -1))
        )
        first = rng.integers(40)
        motion = random_motion(rng, first + frames)[first:].with_mouth(opening, spread)
        pixels[n] = render(Identity.random(rng), motion, SIZE)
        if n % 200 == 199:
            print(f"{n + 1} of {count} clips", flush=True)


def load_clips(path: Path) -> np.ndarray:
    """CheckpointError where it is not as `render_clips` leaves it."""
    try:
        pixels = np.load(path, mmap_mode="r")
        shape = pixels.shape
    except (ValueError, EOFError):
        shape = ()
    if len(shape) != 5 or not shape[0] or shape[1] < FRAMES or shape[2:] != (SIZE, SIZE, 3) or pixels.dtype != np.uint8:
        raise CheckpointError(f"{path} holds no rendered clips; give a name that is free, and they are made")
    return pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=Path, required=True, help="file of rendered clips, made if absent")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=number(int, "steps"), default=6000, help="the first steps, on pictures")
    parser.add_argument("--steps", type=positive(int, "steps"), default=12000, help="steps in all")
    add_common(parser, rate=2e-3)
    parser.add_argument("--start", type=Path, help="weights to begin with, as this program writes them")
    parser.add_argument("--decoder-only", action="store_true", help="keep the latents of --start")
    given = parser.parse_args()
    if given.decoder_only and given.start is None:
        raise InputError("--decoder-only keeps the latents of finished weights; give them with --start")
    if not given.pixels.exists():
        with torch.device("cpu"):
            render_clips(given.pixels)
    pixels = load_clips(given.pixels)
    train(pixels, given.out, Plan(
        given.images, given.steps, given.minutes, given.seed, given.rate, given.start, given.decoder_only,
    ))  # fmt: skip


if __name__ == "__main__":
    run_program(main)
