"""`golden text`: umT5 states of given token ids (given: config.json, weights.safetensors, inputs.safetensors)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from liverelay.engine.golden import GoldenOptions, given, read_tensors
from liverelay.engine.models.text import TextEncoder
from liverelay.engine.models.weights import TensorSource


def run(folder: Path, options: GoldenOptions) -> dict[str, Tensor]:
    inputs_file = folder / "inputs.safetensors"
    inputs = read_tensors(inputs_file)
    source = TensorSource([options.weights or folder / "weights.safetensors"])
    encoder = TextEncoder.load(source, None, device=options.device, dtype=options.dtype)
    return {"output": encoder.encode_ids(given(inputs, "ids", inputs_file), given(inputs, "mask", inputs_file))}
