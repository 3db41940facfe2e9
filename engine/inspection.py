"""`liverelay inspect`: what a checkpoint holds, what is missing or broken, and the memory that serving it needs.

Only headers are read: shapes of safetensors files, and the memory-mapped tables of .pth files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from liverelay.engine.checkpoint import DIT_STEM, CheckpointFiles, find_checkpoint
from liverelay.engine.config import DiTConfig, StreamConfig
from liverelay.engine.errors import CheckpointError, InputError
from liverelay.engine.models.audio import open_wav2vec2
from liverelay.engine.models.geometry import Geometry
from liverelay.engine.models.log_mel import LogMel, is_log_mel
from liverelay.engine.models.lora import MergedSource
from liverelay.engine.models.sizes import (
    arena_bytes,
    dit_bytes,
    text_bytes,
    vae_bytes,
    vae_cache_bytes,
    workspace_bytes,
)
from liverelay.engine.models.text import text_sizes
from liverelay.engine.models.vae_config import VAEConfig, expected_shapes
from liverelay.engine.models.weights import (
    TensorSource,
    check_dit,
    check_shapes,
    is_quantized,
    open_sharded,
    open_tensors,
)

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}
GIB = 1 << 30
STEPS = 4


@dataclass
class Part:
    """One part of a checkpoint: where it lies, its state ('ok', 'missing', 'broken', 'not used') and its size."""

    name: str
    path: str
    state: str
    tensors: int = 0
    parameters: int = 0
    note: str = ""


@dataclass
class Report:
    """What `inspect_checkpoint` found. Memory in bytes; empty where the transformer's files cannot be read."""

    folder: str
    size: tuple[int, int]
    dtype: str
    parts: list[Part] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        return [f"{part.name}: {part.note}" for part in self.parts if part.state in ("missing", "broken")]

    @property
    def complete(self) -> bool:
        """Whether everything needed to generate is there and fits."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"complete": self.complete, "problems": self.problems}


def inspect_checkpoint(
    folder: Path, *, size: tuple[int, int] = (704, 384), dtype: str = "bfloat16", lora: str | None = None
) -> Report:
    """Look at every part of a checkpoint; size (width, height) in pixels for the memory figures.

    A part that is missing or broken is reported, not raised. CheckpointError when `folder` is no checkpoint at all.
    """
    files = find_checkpoint(folder, lora)
    report = Report(str(files.folder), size, dtype)
    sources: dict[str, TensorSource] = {}
    vae_shapes: dict[str, tuple[int, ...]] = {}

    def dit() -> Mapping[str, tuple[int, ...]]:
        source = sources["dit"] = open_sharded(files.folder, DIT_STEM)
        config = DiTConfig.from_published(files.published_config(), source.shapes)
        check_dit(source.shapes, config, "the transformer")
        report.model = asdict(config)
        return source.shapes

    def lora_shapes() -> Mapping[str, tuple[int, ...]]:
        assert files.lora is not None
        source = TensorSource([files.lora])
        if "dit" in sources:
            MergedSource(sources["dit"], source, what=files.lora.name)
        return source.shapes

    def vae() -> Mapping[str, tuple[int, ...]]:
        shapes = _shapes(open_tensors(files.vae))
        check_shapes(shapes, expected_shapes(VAEConfig.from_shapes(shapes)), "the VAE")
        vae_shapes.update(shapes)
        return shapes

    report.parts.append(_look("transformer", files.folder, dit))
    if "dit" in sources and is_quantized(sources["dit"]):
        report.parts.append(Part("LoRA", "-", "not used", note="a LoRA is merged before a transformer is quantised"))
    elif files.lora is None:
        note = "none found: the base model alone is not distilled to 4 steps"
        report.parts.append(Part("LoRA", "-", "not used", note=note))
    else:
        report.parts.append(_look("LoRA", files.lora, lora_shapes))
    report.parts.append(_look("VAE", files.vae, vae))
    report.parts.append(_look("text encoder", files.text, lambda: _text(files)))
    report.parts.append(_look("tokenizer", files.tokenizer, lambda: _tokenizer(files)))
    report.parts.append(_look("audio encoder", files.audio, lambda: _audio(files)))
    if report.model:
        _fill_memory(report, sources["dit"].shapes, vae_shapes)
    return report


def _look(name: str, path: Path, read: Callable[[], Mapping[str, tuple[int, ...]]]) -> Part:
    if not path.exists():
        return Part(name, str(path), "missing", note=f"{path} is missing")
    try:
        shapes = read()
    except CheckpointError as error:
        return Part(name, str(path), "broken", note=str(error))
    return Part(name, str(path), "ok", len(shapes), sum(map(math.prod, shapes.values())))


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    if isinstance(tensors, TensorSource):
        return dict(tensors.shapes)
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _tokenizer(files: CheckpointFiles) -> dict[str, tuple[int, ...]]:
    for name in ("tokenizer_config.json", "tokenizer.json"):
        path = files.tokenizer / name
        if not path.is_file() and not (name == "tokenizer.json" and (files.tokenizer / "spiece.model").is_file()):
            raise CheckpointError(f"{path} is missing")
    return {}


def _audio(files: CheckpointFiles) -> dict[str, tuple[int, ...]]:
    if is_log_mel(files.audio):
        LogMel.load(files.audio)
        return {}
    wav2vec2 = open_wav2vec2(files.audio)
    return {name: wav2vec2.shapes[name] for name in wav2vec2.keys}


def _text(files: CheckpointFiles) -> dict[str, tuple[int, ...]]:
    shapes = _shapes(open_tensors(files.text))
    text_sizes(shapes)
    return shapes


def _fill_memory(
    report: Report, shapes: Mapping[str, tuple[int, ...]], vae_shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Bytes on a device, counted from shapes (tests compare them with real allocations)."""
    width, height = report.size
    config = DiTConfig(**report.model)
    try:
        geometry = Geometry(height // 8, width // 8, config.head_dim)
    except InputError as error:
        raise InputError(f"{width}x{height}: {error}") from None
    element = DTYPE_BYTES[report.dtype]
    memory = report.memory
    memory["transformer"] = dit_bytes(shapes, element)
    memory["workspace"] = workspace_bytes(config, geometry, element, fp8=is_quantized(shapes))
    memory["arena_per_session_and_stage"] = arena_bytes(config, geometry, element)
    memory["the_same_with_fp8_attention"] = arena_bytes(config, geometry, element, fp8=True)
    memory["text_per_session"] = text_bytes(config, element)
    sizes = {part.name: part for part in report.parts}
    if vae_shapes:
        vae = VAEConfig.from_shapes(vae_shapes)
        memory["vae"] = vae_bytes(vae_shapes, element)
        memory["vae_cache_per_session"] = vae_cache_bytes(vae, geometry, element)
    memory["audio_encoder"] = sizes["audio encoder"].parameters * element
    memory["text_encoder_while_encoding_a_prompt"] = sizes["text encoder"].parameters * element
    shared = memory["transformer"] + memory["workspace"]
    session = memory["text_per_session"] + memory["arena_per_session_and_stage"]
    vae_total = memory.get("vae", 0) + memory.get("vae_cache_per_session", 0)
    memory["one_gpu_one_session"] = (
        shared + memory["text_per_session"] + STEPS * memory["arena_per_session_and_stage"] + vae_total
        + memory["audio_encoder"]
    )
    memory["each_of_four_stage_gpus_one_session"] = shared + session + memory["audio_encoder"]
    memory["vae_gpu_one_session"] = vae_total


def render(report: Report) -> None:
    """Print the report as tables."""
    width, height = report.size
    print(f"checkpoint {report.folder}")
    rows = [("part", "state", "tensors", "parameters", "file")]
    for part in report.parts:
        shown = Path(part.path).name if part.path != "-" else "-"
        rows.append((part.name, part.state, f"{part.tensors:,}", f"{part.parameters:,}", shown))
    _table(rows)
    for part in report.parts:
        if part.note:
            print(f"  {part.name}: {part.note}")
    if report.model:
        sizes = ", ".join(f"{key} {value}" for key, value in report.model.items() if isinstance(value, int))
        print(f"\ntransformer: {sizes}")
        print(f"memory at {width}x{height}, {report.dtype}, {StreamConfig().ring_frames} latent frames in the ring:")
        _table([("what", "GiB"), *((key.replace("_", " "), _gib(value)) for key, value in report.memory.items())])
    print("\ncomplete" if report.complete else f"\nnot complete: {len(report.problems)} problem(s)")


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}" if count > GIB // 100 else f"{count / GIB:.5f}"


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
