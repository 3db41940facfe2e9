"""`golden lora`: the weights that a LoRA file changes, merged (given: meta.json, lora.safetensors, base weights)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from liverelay.engine.golden import GoldenOptions, given, read_json
from liverelay.engine.models.lora import MergedSource
from liverelay.engine.models.weights import TensorSource


def run(folder: Path, options: GoldenOptions) -> dict[str, Tensor]:
    where = folder / "meta.json"
    meta = read_json(where)
    base = TensorSource([options.weights or folder / given(meta, "base", where)])
    lora = TensorSource([folder / "lora.safetensors"])
    merged = MergedSource(base, lora, alpha=float(given(meta, "alpha", where)), device=options.device)
    return {key: merged[key].cpu() for key in merged.merged_keys}
