"""A trained model as a checkpoint that the engine loads: `python -m distill.export --dit RUN --vae FILE --out DIR`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import torch

from distill.clips import VOCABULARY
from distill.run import DISTILLED, STUDENT, TEACHER, load_into, load_run, run_program
from distill.toon import DIT, SIZE, VAE, write_front_ends
from distill.video_dit import VideoDiT
from distill.video_vae import VideoVAE
from liverelay.engine import media
from liverelay.engine.checkpoint import DIT_STEM
from liverelay.engine.errors import OutputError
from liverelay.engine.make_checkpoint import published_config
from liverelay.engine.models.weights import save_tensors


def export(dit: dict[str, torch.Tensor], vae: dict[str, torch.Tensor], out: Path) -> None:
    """Write all parts to the folder `out`, weights in bfloat16; what else lies in an older checkpoint stays.

    OutputError for a folder with other things, or where not all of it can be written.
    """
    out = out.resolve()
    if out.exists() and not (out.is_dir() and ((out / "config.json").exists() or not any(out.iterdir()))):
        raise OutputError(f"{out} exists and is no checkpoint; give a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = media.part_path(out)
    part.mkdir()
    try:
        _write(dit, vae, part)
        out.mkdir(exist_ok=True)
        for path in sorted(part.rglob("*")):
            place = out / path.relative_to(part)
            if path.is_dir():
                place.mkdir(exist_ok=True)
            else:
                os.replace(path, place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(dit: dict[str, torch.Tensor], vae: dict[str, torch.Tensor], out: Path) -> None:
    config = published_config(DIT) | {"video_size": [SIZE, SIZE]}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, weights in ((DIT_STEM, dit), ("Wan2.1_VAE", vae)):
        tensors = {key: weight.bfloat16().contiguous() for key, weight in weights.items()}
        save_tensors(out / f"{name}.safetensors", tensors)
    write_front_ends(
        out / "models_t5_umt5-xxl-enc-bf16.safetensors", out / "google" / "umt5-xxl",
        out / "wav2vec2-large-xlsr-53-english", list(VOCABULARY),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dit", type=Path, required=True, help="the folder of a training run")
    parser.add_argument("--vae", type=Path, required=True, help="vae.safetensors of train_vae")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    dit, vae = VideoDiT(DIT), VideoVAE(VAE)
    load_run(dit, given.dit, DISTILLED, STUDENT, TEACHER)
    load_into(vae, given.vae)
    export(dit.state_dict(), vae.state_dict(), given.out)
    size = sum(path.stat().st_size for path in given.out.rglob("*") if path.is_file())
    print(f"{given.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_program(main)
