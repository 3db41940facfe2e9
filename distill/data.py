"""Training examples in latent space: rendered clips, coded by the trained VAE, with sound and prompt beside them.

`python -m distill.data --vae FILE --out DIR --count 2000` writes a folder of arrays, a row a clip.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from distill.clips import VOCABULARY, Clip, clip
from distill.run import add_device, fast_precision, run_program, there
from distill.toon import BANDS, DIT, SIZE, VAE, text_encoder
from distill.video_dit import Condition
from distill.video_vae import VideoVAE
from liverelay.engine.models.audio import normalise
from liverelay.engine.models.audio_live import on_absolute_grid
from liverelay.engine.models.geometry import MOTION_LATENTS
from liverelay.engine.models.log_mel import LogMel

LATENTS = 18  # of a clip
BEFORE = 9  # video frames before them: no latent is that of a first frame, as in the middle of a stream
FRAMES = BEFORE + 4 * LATENTS
STILL_FRAMES = 25  # of the 73 equal frames that the engine codes; later latents are as the last of these


@dataclass(frozen=True)
class Sequence:
    """Clean latents [B, 16, F, h, w] and what they are made from."""

    latents: Tensor
    condition: Condition


@dataclass(frozen=True)
class Examples:
    """Arrays over clips: latents [N, 16, F, h, w], stills [N, 16, 7, h, w], sound [N, BANDS, 4 F]; prompts [N]."""

    latents: np.ndarray
    stills: np.ndarray
    sound: np.ndarray
    text: Tensor

    @classmethod
    def open(cls, folder: Path) -> Examples:
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("latents", "stills", "sound")]
        prompts = json.loads((folder / "prompts.json").read_text())
        with tempfile.TemporaryDirectory() as temporary, torch.device("cpu"):
            encoder = text_encoder(list(VOCABULARY), Path(temporary))
            states = {prompt: padded(encoder.encode(prompt)) for prompt in sorted(set(prompts))}
        return cls(*arrays, torch.stack([states[prompt] for prompt in prompts]))

    def __len__(self) -> int:
        return len(self.text)

    def liveliness(self) -> Tensor:
        """How much more than elsewhere the videos move at a place, [h, w], mean 1: the mouth is a few of its cells."""
        some = self._float(self.latents[:: max(1, len(self) // 200)])
        moving = some.var(dim=2).mean(dim=(0, 1))
        return (moving / moving.mean()).clamp(0.5, 4.0)

    def sample(self, rng: np.random.Generator, count: int, frames: int, replaced: Tensor) -> Sequence:
        """Random pieces of `frames` latents; replaced [B]: whose sink is a latent of the video instead of the still."""
        latents, references, motions, sounds, rows = [], [], [], [], []
        for i in range(count):
            n, start = int(rng.integers(len(self))), int(rng.integers(LATENTS - frames + 1))
            row = self._float(self.latents[n])
            still = motion_of(self._float(self.stills[n]))
            place = int(rng.integers(LATENTS))
            latents.append(row[:, start : start + frames])
            references.append(torch.where(replaced[i], row[:, place : place + 1], still[:, :1]))
            motions.append(still)
            loudness = 0.15 * rng.standard_normal()  # in steps of 20 dB: the loudness of a stream is never quite known
            sounds.append(self._float(self.sound[n, :, 4 * start : 4 * (start + frames)]) + loudness)
            rows.append(n)
        sound = torch.stack(sounds).unsqueeze(1).clamp_min(-1.5)
        condition = Condition(torch.stack(references), torch.stack(motions), self.text[rows].to(sound.device), sound)
        return Sequence(torch.stack(latents), condition)

    @staticmethod
    def _float(array: np.ndarray) -> Tensor:
        return there(np.array(array, dtype=np.float32))


def motion_of(still: Tensor) -> Tensor:
    """The 19 motion latents from the first ones of a still picture [16, 7, h, w]; the later ones are alike."""
    return torch.cat([still, still[:, -1:].expand(-1, MOTION_LATENTS - still.shape[1], -1, -1)], dim=1)


def padded(states: Tensor) -> Tensor:
    """A prompt's states [n, text_dim] with zero rows up to text_len, which take part as published."""
    return F.pad(states, (0, 0, 0, DIT.text_len - len(states)))


def video(frames: np.ndarray) -> Tensor:
    """uint8 [..., T, H, W, 3] -> [..., 3, T, H, W] in [-1, 1]."""
    return there(frames).movedim(-1, -4).float() / 127.5 - 1


def features(sound: np.ndarray, frames: int) -> Tensor:
    """What the engine's front end makes of a clip's sound [n] at 16 kHz: [BANDS, frames]."""
    front_end = LogMel(BANDS, torch.device("cpu"), torch.float32)
    return on_absolute_grid(front_end.hidden_states(normalise(sound)), 0, 0, frames)[0]


@torch.inference_mode()
def encode(vae: VideoVAE, made: Clip) -> tuple[Tensor, Tensor]:
    """Latents of the video after its first frames, and of the still."""
    with fast_precision():
        moving = vae.encode(video(made.frames_uint8)[None])[0]
        still = vae.encode(video(made.still[None]).expand(-1, STILL_FRAMES, -1, -1)[None])[0]
    return moving[:, -LATENTS:], still


def write(vae: VideoVAE, out: Path, seeds: range, *, held_out: bool = False) -> None:
    """Make and code a clip for each seed."""
    out.mkdir(parents=True, exist_ok=True)
    side, prompts = SIZE // 8, []
    shapes = {"latents": (16, LATENTS, side, side), "stills": (16, 7, side, side), "sound": (BANDS, 4 * LATENTS)}
    arrays = {
        name: np.lib.format.open_memmap(out / f"{name}.npy", "w+", np.float16, (len(seeds), *shape))
        for name, shape in shapes.items()
    }
    for i, seed in enumerate(seeds):
        with torch.device("cpu"):
            made = clip(seed, FRAMES, held_out=held_out)
            sound = features(made.sound, FRAMES)[:, BEFORE:]
        latents, still = encode(vae, made)
        for name, value in (("latents", latents), ("stills", still), ("sound", sound)):
            arrays[name][i] = value.cpu().numpy()
        prompts.append(made.prompt)
        if i % 50 == 49:
            print(f"{i + 1} of {len(seeds)} clips", flush=True)
    for array in arrays.values():
        array.flush()
    (out / "prompts.json").write_text(json.dumps(prompts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", type=Path, required=True, help="vae.safetensors of train_vae")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0, help="seed of the first clip")
    parser.add_argument("--count", type=int, default=2000)
    add_device(parser)
    parser.add_argument("--held-out", action="store_true")
    given = parser.parse_args()
    vae = VideoVAE(VAE)
    vae.load_state_dict(load_file(given.vae))
    write(vae, given.out, range(given.first, given.first + given.count), held_out=given.held_out)


if __name__ == "__main__":
    run_program(main)
