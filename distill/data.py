"""Training examples in latent space: rendered clips, coded by the trained VAE, with sound and prompt beside them.

`python -m distill.data --vae FILE --out DIR --count 2000` writes a folder of arrays, a row a clip.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.clips import VOCABULARY, Clip, clip
from distill.motion import RATE
from distill.run import add_device, fast_precision, load_into, run_program, there
from distill.toon import BANDS, DIT, SIZE, VAE, text_encoder
from distill.video_dit import Condition
from distill.video_vae import VideoVAE
from liverelay.engine import media
from liverelay.engine.arguments import number, positive
from liverelay.engine.errors import CheckpointError, OutputError
from liverelay.engine.models.audio import normalise
from liverelay.engine.models.audio_live import LiveAudio, on_absolute_grid
from liverelay.engine.models.geometry import MOTION_LATENTS
from liverelay.engine.models.log_mel import LogMel

LATENTS = 18  # of a clip
BEFORE = 9  # video frames before them: no latent is that of a first frame, as in the middle of a stream
FRAMES = BEFORE + 4 * LATENTS
SILENT = -1.5  # the least that log-mel features get
SHAPES = {  # of a clip's arrays
    "latents": (16, LATENTS, SIZE // 8, SIZE // 8), "stills": (16, 7, SIZE // 8, SIZE // 8),
    "sound": (BANDS, 4 * LATENTS),
}  # fmt: skip
PROMPTS = "prompts.json"
STILL_FRAMES = 25  # of the 73 equal frames that the engine codes; later latents are as the last of these


@dataclass(frozen=True)
class Sequence:
    """Clean latents [B, 16, F, h, w] and what they are made from."""

    latents: Tensor
    condition: Condition


@dataclass(frozen=True)
class Examples:
    """Arrays over clips: latents [N, 16, F, h, w], stills [N, 16, 7, h, w], sound [N, BANDS, 4 F]; text: states of
    the prompts [N, text_len, text_dim]."""

    latents: np.ndarray
    stills: np.ndarray
    sound: np.ndarray
    text: Tensor

    @classmethod
    def open(cls, folder: Path) -> Examples:
        """CheckpointError where it is not as `write` leaves it."""
        try:
            arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in SHAPES]
            prompts = json.loads((folder / PROMPTS).read_text())
            whole = isinstance(prompts, list) and prompts and all(isinstance(prompt, str) for prompt in prompts)
            shapes = [(len(prompts), *shape) for shape in SHAPES.values()] if whole else None
        except (ValueError, EOFError):  # neither array nor JSON
            shapes = None
        if shapes is None or [values.shape for values in arrays] != shapes:
            raise CheckpointError(f"{folder} is not whole: make it again with distill.data")
        with tempfile.TemporaryDirectory() as temporary, torch.device("cpu"):
            encoder = text_encoder(list(VOCABULARY), Path(temporary))
            states = {prompt: padded(encoder.encode(prompt)) for prompt in sorted(set(prompts))}
        return cls(*arrays, torch.stack([states[prompt] for prompt in prompts]))

    def __len__(self) -> int:
        return len(self.text)

    def liveliness(self) -> Tensor:
        """How much more than elsewhere the videos move at a place, [h, w], about 1: the mouth is a few of its cells."""
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
            place = int(rng.choice([n for n in range(LATENTS) if not start <= n < start + frames]))
            latents.append(row[:, start : start + frames])
            references.append(torch.where(replaced[i], row[:, place : place + 1], still[:, :1]))
            motions.append(still)
            loudness = 0.15 * rng.standard_normal()  # in steps of 20 dB: the loudness of a stream is never quite known
            heard = self._float(self.sound[n, :, 4 * start : 4 * (start + frames)])
            sounds.append(torch.where(heard > SILENT, heard + loudness, SILENT))
            rows.append(n)
        sound = torch.stack(sounds).unsqueeze(1).clamp_min(SILENT)
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


def features(sound: np.ndarray, frames: int, *, live: bool = False) -> Tensor:
    """What the engine's front end makes of a clip's sound [n] at 16 kHz: [BANDS, frames].

    live: block by block as a live session hears it, at the loudness so far; else at the loudness of the whole clip.
    """
    front_end = LogMel(BANDS, torch.device("cpu"), torch.float32)
    if not live:
        return on_absolute_grid(front_end.hidden_states(normalise(sound)), 0, 0, frames)[0]
    heard = LiveAudio(front_end)
    heard.push(sound, RATE)
    heard.finish()
    ends = [0, *range(BEFORE, frames + 1, 12)]  # the first block of a stream is short
    return torch.cat([heard.features(*block)[0] for block in itertools.pairwise(ends)], dim=1)


@torch.inference_mode()
def encode(vae: VideoVAE, made: Clip) -> tuple[Tensor, Tensor]:
    """Latents of the video after its first frames, and of the still."""
    with fast_precision():
        moving = vae.encode(video(made.frames_uint8)[None])[0]
        still = vae.encode(video(made.still[None]).expand(-1, STILL_FRAMES, -1, -1)[None])[0]
    return moving[:, -LATENTS:], still


def write(vae: VideoVAE, out: Path, seeds: range, *, held_out: bool = False) -> None:
    """Make and code a clip for each seed. The folder appears, or takes the place of an older one, when it is whole."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    ours = {PROMPTS, *(f"{name}.npy" for name in SHAPES)}
    if out.exists() and not (out.is_dir() and {path.name for path in out.iterdir()} <= ours):
        raise OutputError(f"{out} exists and holds more than such data; give a new folder")
    part = media.part_path(out)
    part.mkdir()
    try:
        _write(vae, part, seeds, held_out)
        if out.exists():
            shutil.rmtree(out)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """A new array in a file whose room is taken at once: a full disk says so here, later it would kill the process."""
    try:
        made = np.lib.format.open_memmap(path, "w+", dtype, shape)
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None
    return made


def _write(vae: VideoVAE, out: Path, seeds: range, held_out: bool) -> None:
    prompts = []
    arrays = {name: array(out / f"{name}.npy", np.float16, (len(seeds), *shape)) for name, shape in SHAPES.items()}
    for i, seed in enumerate(seeds):
        with torch.device("cpu"):
            made = clip(seed, FRAMES, held_out=held_out)
            sound = features(made.sound, FRAMES, live=seed % 2 == 1)[:, BEFORE:]
        latents, still = encode(vae, made)
        for name, value in (("latents", latents), ("stills", still), ("sound", sound)):
            arrays[name][i] = value.cpu().numpy()
        prompts.append(made.prompt)
        if i % 50 == 49:
            print(f"{i + 1} of {len(seeds)} clips", flush=True)
    for values in arrays.values():
        values.flush()
    (out / PROMPTS).write_text(json.dumps(prompts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", type=Path, required=True, help="vae.safetensors of train_vae")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first", type=number(int, "seeds"), default=0, help="seed of the first clip")
    parser.add_argument("--count", type=positive(int, "clips"), default=2000)
    add_device(parser)
    parser.add_argument("--held-out", action="store_true")
    given = parser.parse_args()
    vae = VideoVAE(VAE)
    load_into(vae, given.vae)
    write(vae, given.out, range(given.first, given.first + given.count), held_out=given.held_out)


if __name__ == "__main__":
    run_program(main)
