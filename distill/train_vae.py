"""Train the small VAE on rendered portraits: `python -m distill.train_vae --pixels DIR --out DIR`.

An autoencoder rather than a VAE: the engine takes the mean alone, so what matters is that latents are small, smooth
(noise is added to them while training) and, in the end, of zero mean and unit variance in every channel, which is
folded into the two 1x1x1 convolutions around them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from distill.run import Average, Run, cosine, load_average
from distill.toon import VAE
from distill.video_vae import VideoVAE


def loss_of(model: VideoVAE, video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """video [B, 3, T, H, W]; noise like the latents. Returns loss, mean absolute error, mean square of the latents."""
    with torch.autocast(video.device.type, torch.bfloat16):
        latents = model.encode(video)
        out = model.decode(latents + noise)
    error = (out - video).abs()
    # What moves matters more than what stands: eyes and mouth are some hundred pixels.
    moving = (video - video[:, :, :1]).abs().amax(dim=1, keepdim=True)
    weight = 1 + 4 * (moving > 0.08) + 2 * (moving.amax(dim=2, keepdim=True) > 0.08)
    edges = sum(((out - video).diff(dim=dim)).abs().mean() for dim in (3, 4))
    size = latents.square().mean()
    return (error * weight).mean() + edges + 1e-3 * size, error.mean(), size


def crops(pixels: np.ndarray, rng: np.random.Generator, *, batch: int, frames: int, size: int) -> Tensor:
    """Random pieces of clips uint8 [N, T, H, W, 3] -> [batch, 3, frames, size, size] in [-1, 1]."""
    taken = []
    for _ in range(batch):
        n, t = rng.integers(len(pixels)), rng.integers(pixels.shape[1] - frames + 1)
        y, x = (8 * rng.integers((side - size) // 8 + 1) for side in pixels.shape[2:4])
        piece = pixels[n, t : t + frames, y : y + size, x : x + size]
        taken.append(piece[:, :, ::-1] if rng.random() < 0.5 else piece)
    video = torch.from_numpy(np.stack(taken)).permute(0, 4, 1, 2, 3)
    return video.float() / 127.5 - 1


def train(pixels: np.ndarray, out: Path, *, steps: int, minutes: float, compiled: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = VideoVAE(VAE)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    average = Average(model, 0.999)
    run = Run(out, minutes=minutes)
    run.keep(model=model, optimiser=optimiser, average=average)
    measure = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    for step in run.steps(steps):
        rng = np.random.default_rng([seed, step])
        # Mostly small pieces; whole pictures now and then, whose positions the attention must know too.
        whole = step % 16 == 15
        video = crops(pixels, rng, **(dict(batch=1, frames=9, size=128) if whole else dict(batch=4, frames=9, size=64)))
        latent = (len(video), VAE.z_dim, 3, video.shape[3] // 8, video.shape[4] // 8)
        noise = 0.15 * torch.from_numpy(rng.standard_normal(latent, dtype=np.float32))
        loss, error, size = measure(model, video, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * cosine(step, steps)
        optimiser.step()
        optimiser.zero_grad()
        average.update(model, step)
        if step % 50 == 0:
            run.log(loss=loss, error=error, size=size)


@torch.inference_mode()
def whiten(model: VideoVAE, pixels: np.ndarray, count: int = 100) -> None:
    """Change the convolutions around the latents so that each channel has mean 0 and variance 1 over these clips."""
    codes = []
    for i in range(0, len(pixels), max(1, len(pixels) // count)):
        video = torch.from_numpy(np.array(pixels[i])).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
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


def finish(folder: Path, pixels: np.ndarray) -> Path:
    """Write the averaged weights with whitened latents, `vae.safetensors`."""
    model = VideoVAE(VAE)
    model.load_state_dict(load_average(folder))
    model.requires_grad_(False)
    whiten(model, pixels)
    path = folder / "vae.safetensors"
    save_file({name: weight.contiguous() for name, weight in model.state_dict().items()}, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=Path, required=True, help="clips as written by dataset pixels")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    pixels = np.load(given.pixels, mmap_mode="r")
    train(pixels, given.out, steps=given.steps, minutes=given.minutes, compiled=not given.eager, seed=given.seed)
    print(finish(given.out, pixels))


if __name__ == "__main__":
    main()
