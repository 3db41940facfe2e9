"""`liverelay quantize`: a checkpoint with its large products in FP8: half the size, and nothing to do at load.

Keys and layout stay the published ones: a quantised `X.weight` is e4m3, and `X.weight_scale` [out] float32 goes with
it. A LoRA is merged before. Large files of the other models are hard links, or copies where links are not possible.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from liverelay.engine.checkpoint import DIT_STEM, find_checkpoint
from liverelay.engine.errors import CheckpointError, OutputError
from liverelay.engine.media import part_path
from liverelay.engine.models.sizes import SCALE, fp8_modules
from liverelay.engine.models.weights import is_quantized, quantize_weight, save_tensors

SHARD_BYTES = 4 << 30
COPIED_BYTES = 4 << 20
Say = Callable[[str], None]


@dataclass(frozen=True)
class WeightError:
    """What quantisation did to one weight: ||dequantised - W|| / ||W||, and the same for one scale a tensor."""

    key: str
    rows: float
    tensor: float


def quantize_checkpoint(
    folder: Path, out: Path, *, lora: str | None = None, device: str = "cpu", say: Say | None = None
) -> list[WeightError]:
    """Write a quantised copy of a checkpoint to the new folder `out`; returns the error of every quantised weight.

    CheckpointError where the source does not fit or is quantised already; OutputError where `out` cannot be written.
    """
    files = find_checkpoint(folder, lora)
    source, config = files.open_dit(device)
    if is_quantized(source):
        raise CheckpointError(f"{files.folder} is quantised already")
    lacking = [path for path in files.missing() if path != files.dit_index]
    if lacking:
        raise CheckpointError(f"{lacking[0]} is missing; the copy would not be whole")
    if os.path.lexists(out):
        raise OutputError(f"{out} exists already; give a new folder")
    if out.resolve().is_relative_to(files.folder.resolve()):
        raise OutputError(f"{out} lies inside the checkpoint; give a folder beside it")
    tell, modules = say or (lambda line: None), {f"{module}.weight" for module in fp8_modules(config)}
    part, errors = part_path(out.absolute()), list[WeightError]()
    try:
        part.mkdir()
        writer = _Shards(part)
        for key in source:
            if key not in modules:
                writer.add(key, source[key])
                continue
            weight = source[key].to(device)
            codes, scale = quantize_weight(weight)
            writer.add(key, codes)
            writer.add(key + SCALE, scale)
            errors.append(_error(key, weight, codes, scale))
            if len(errors) % 50 == 0:
                tell(f"{len(errors)} of {len(modules)} weights")
        writer.finish()
        for path in (files.config, files.vae, files.text, files.tokenizer.parent, files.audio):
            _link(path, part / path.name)
        os.replace(part, out)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return errors


def write_errors(path: Path, errors: list[WeightError]) -> None:
    """The error of every weight as json, written aside and renamed."""
    part = part_path(path)
    try:
        part.write_text(json.dumps([vars(error) for error in errors], indent=1))
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(f"the checkpoint is written, but {path} cannot be: {error.strerror}") from None


def _error(key: str, weight: Tensor, codes: Tensor, scale: Tensor) -> WeightError:
    wide = weight.float()
    norm = wide.norm().clamp_min(1e-30)
    one = wide.abs().max().clamp_min(1e-30) / 448
    tensor = (wide / one).clamp(-448, 448).to(torch.float8_e4m3fn).float() * one
    rows = codes.float() * scale.to(codes.device).unsqueeze(1)
    return WeightError(key, float((rows - wide).norm() / norm), float((tensor - wide).norm() / norm))


def _link(source: Path, target: Path) -> None:
    """The file or folder again: small files copied, because people edit them, large ones as hard links if possible."""

    def one(a: str, b: str) -> str:
        try:
            if os.path.getsize(a) < COPIED_BYTES:
                shutil.copy2(a, b)
            else:
                os.link(os.path.realpath(a), b)
        except OSError:
            shutil.copy2(a, b)
        return b

    if source.is_dir():
        shutil.copytree(source, target, copy_function=one)
    else:
        one(str(source), str(target))


class _Shards:
    """Writes tensors into numbered safetensors files of a few GB, and their index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._files: list[list[str]] = []
        self._bytes = 0

    def add(self, key: str, tensor: Tensor) -> None:
        self._pending[key] = tensor.cpu()
        self._bytes += tensor.nbytes
        self._pending_bytes += tensor.nbytes
        if self._pending_bytes >= SHARD_BYTES:
            self._write()

    def _name(self, index: int) -> str:
        return f"{DIT_STEM}-{index + 1:05d}.safetensors"

    def _write(self) -> None:
        save_tensors(self._folder / self._name(len(self._files)), self._pending)
        self._files.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> None:
        if self._pending:
            self._write()
        places = {key: self._name(i) for i, keys in enumerate(self._files) for key in keys}
        index = {"metadata": {"total_size": self._bytes}, "weight_map": places}
        (self._folder / f"{DIT_STEM}.safetensors.index.json").write_text(json.dumps(index, indent=1))
