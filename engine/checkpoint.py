"""Finding the published files on disk: the base model's folder and the LoRA beside or inside it.

Layout of the base model, as published: config.json, diffusion_pytorch_model*.safetensors (+ index), Wan2.1_VAE.pth,
models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/, wav2vec2-large-xlsr-53-english/. The two pickled files may be
safetensors instead.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liverelay.engine.config import DiTConfig
from liverelay.engine.errors import CheckpointError
from liverelay.engine.models.lora import MergedSource
from liverelay.engine.models.weights import TensorSource, check_dit, is_quantized, open_sharded

DIT_STEM = "diffusion_pytorch_model"
BUNDLED = Path(__file__).parent / "bundled"  # small checkpoints that come with the package, by name
LORA_FOLDERS = ("LiveAvatar", "Live-Avatar", "lora")


@dataclass(frozen=True)
class CheckpointFiles:
    """Where the parts of one checkpoint lie."""

    folder: Path
    lora: Path | None
    lora_given: bool = False  # by name, not found

    @property
    def config(self) -> Path:
        return self.folder / "config.json"

    @property
    def vae(self) -> Path:
        return self._table("Wan2.1_VAE")

    @property
    def text(self) -> Path:
        return self._table("models_t5_umt5-xxl-enc-bf16")

    def _table(self, stem: str) -> Path:
        safe = self.folder / f"{stem}.safetensors"
        return safe if safe.is_file() else self.folder / f"{stem}.pth"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "google" / "umt5-xxl"

    @property
    def audio(self) -> Path:
        return self.folder / "wav2vec2-large-xlsr-53-english"

    @property
    def dit_index(self) -> Path:
        return self.folder / f"{DIT_STEM}.safetensors.index.json"

    def missing(self) -> list[Path]:
        """Parts that are not there (shards are checked when the weights are opened)."""
        parts = [self.config, self.vae, self.text, self.tokenizer / "tokenizer_config.json", self.audio / "config.json"]
        lacking = [path for path in parts if not path.is_file()]
        if not self.dit_index.is_file() and not (self.folder / f"{DIT_STEM}.safetensors").is_file():
            lacking.append(self.dit_index)
        return lacking

    def published_config(self) -> dict[str, Any]:
        """The content of config.json."""
        try:
            content: dict[str, Any] = json.loads(self.config.read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{self.config} is missing") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.config} is not readable as json: {error}") from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{self.config} does not hold a table of names")
        return content

    def open_dit(self, device: str = "cpu") -> tuple[TensorSource | MergedSource, DiTConfig]:
        """The DiT's tensors, with the LoRA merged when there is one, and its configuration."""
        base = open_sharded(self.folder, DIT_STEM)
        config = DiTConfig.from_published(self.published_config(), base.shapes)
        check_dit(base.shapes, config, "the transformer's checkpoint")
        if is_quantized(base.shapes):  # its LoRA was merged before
            if self.lora is not None and self.lora_given:
                raise CheckpointError(f"{self.folder} is quantised; give --lora to liverelay quantize instead")
            return base, config
        if self.lora is None:
            return base, config
        return MergedSource(base, TensorSource([self.lora]), device=device, what=str(self.lora)), config


def bundled_names() -> list[str]:
    """Small checkpoints that come with the package; `find_checkpoint` takes their names."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))


def find_checkpoint(folder: Path, lora: Path | str | None = None) -> CheckpointFiles:
    """Locate the parts. `folder` is the base model's folder, or one that holds it, or the name of a bundled model.

    lora: a file, "none", or None to look for the one safetensors file in a folder called LiveAvatar inside or beside
    the base model's. CheckpointError when the folder is no checkpoint or the choice is not clear.
    """
    if not folder.is_dir() and len(folder.parts) == 1 and (BUNDLED / folder / "config.json").is_file():
        folder = BUNDLED / folder
    if not folder.is_dir():
        bundled = "".join(f", or {name} for the bundled model" for name in bundled_names())
        raise CheckpointError(f"{folder} is not a folder; give the one with config.json and the weights{bundled}")
    base = folder
    if not (folder / "config.json").is_file():
        inner = sorted(
            path.parent for path in folder.glob("*/config.json") if any(path.parent.glob(f"{DIT_STEM}*.safetensors*"))
        )
        if len(inner) != 1:
            found = f"{len(inner)} folders below it do" if inner else "no folder below it does"
            raise CheckpointError(f"{folder} does not hold config.json and {DIT_STEM}*.safetensors, and {found}")
        base = inner[0]
    return CheckpointFiles(base, _find_lora(base, lora), lora is not None)


def _find_lora(base: Path, lora: Path | str | None) -> Path | None:
    if lora is not None:
        if str(lora) == "none":
            return None
        path = Path(lora)
        if not path.is_file():
            fault = "is not a file" if path.exists() else "is missing"
            raise CheckpointError(f"the LoRA file {path} {fault}; give an existing file, or 'none'")
        return path
    for parent in (base, base.parent):
        for name in LORA_FOLDERS:
            found = sorted((parent / name).glob("*.safetensors"))
            if len(found) > 1:
                raise CheckpointError(f"{parent / name} holds {len(found)} LoRA files; name one with --lora")
            if found:
                return found[0]
    return None
