"""Published weight files -> tensors on the device, and the one name map of the DiT.

A source is a lazy mapping from checkpoint key to tensor, memory-mapped: reading a key costs one pass over the file's
pages and the copy into its place on the device, so nothing is twice in memory. Loading is strict both ways.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from liverelay.engine.config import DiTConfig
from liverelay.engine.errors import CheckpointError, OutputError
from liverelay.engine.models.sizes import SCALE, Shapes, dit_shapes, fp8_shapes
from liverelay.kernels import torch_ops


class TensorSource(Mapping[str, torch.Tensor]):
    """Tensors of one or several safetensors files, read when asked for. CheckpointError names a file that is broken."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._file_of: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.files = list(files)
        for path in self.files:
            try:
                handle = safe_open(path, framework="pt")
            except FileNotFoundError:  # also where it may not be read
                raise CheckpointError(f"{path} {'may not be read' if path.exists() else 'is missing'}") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from None
            for key in handle.keys():  # noqa: SIM118 (the handle is not a dict)
                if key in self.shapes:
                    raise CheckpointError(f"'{key}' is in two files, {path} is the second")
                self._file_of[key] = handle
                self.shapes[key] = tuple(handle.get_slice(key).get_shape())

    def __getitem__(self, key: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file_of[key].get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def open_sharded(folder: Path, stem: str = "diffusion_pytorch_model") -> TensorSource:
    """The weights `stem` of a folder: the shards that its index names, or the one file when there is no index."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return TensorSource([folder / f"{stem}.safetensors"])
    try:
        weight_map: dict[str, str] = dict(json.loads(index.read_text())["weight_map"].items())
        shards = [folder / name for name in sorted(set(weight_map.values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a readable index of shards: {error!r}") from None
    source = TensorSource(shards)
    lost = sorted(set(weight_map) - set(source))
    if lost:
        raise CheckpointError(f"{index} names '{lost[0]}' ({len(lost)} keys in all), which no shard holds")
    return source


def open_pth(path: Path) -> dict[str, torch.Tensor]:
    """A pickled state dict, memory-mapped and loaded without running code from the file."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a corrupt pickle raises nearly anything
        line = (str(error).strip() or repr(error)).splitlines()[0].split(". ")[0]
        raise CheckpointError(f"{path} is truncated or not a weights-only file: {line}") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path} does not hold a plain table of tensors")
    return state


def open_tensors(path: Path) -> Mapping[str, torch.Tensor]:
    """A file of the published kind (pickled) or the same table as safetensors, by its name's ending."""
    return TensorSource([path]) if path.suffix == ".safetensors" else open_pth(path)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file aside and rename it, readable by whom the user's umask says. OutputError in one line."""
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder")
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        flat = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(flat, part, metadata={"format": "pt", **(metadata or {})})
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


def check_shapes(found: Shapes, expected: Shapes, what: str) -> None:
    """CheckpointError that names the first missing, misshapen or unknown key."""
    for key, shape in expected.items():
        if key not in found:
            missing = [name for name in expected if name not in found]
            raise CheckpointError(f"{what} lacks '{key}' ({len(missing)} keys missing)")
        if tuple(found[key]) != tuple(shape):
            raise CheckpointError(f"{what}: '{key}' has shape {list(found[key])}, expected {list(shape)}")
    unknown = [key for key in found if key not in expected]
    if unknown:
        raise CheckpointError(f"{what} holds '{unknown[0]}', which the model does not have ({len(unknown)} such keys)")


def is_quantized(shapes: Iterable[str]) -> bool:
    """Whether a checkpoint was written by `liverelay quantize`."""
    return any(key.endswith(f".weight{SCALE}") for key in shapes)


def check_dit(shapes: Shapes, config: DiTConfig, what: str) -> None:
    """CheckpointError that names the first key of a transformer, quantised or not, that does not fit."""
    expected = fp8_shapes(config) if is_quantized(shapes) else dit_shapes(config)
    check_shapes(shapes, expected, what)


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [out, in] as e4m3 with one scale per output channel [out] float32."""
    codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scale = torch.empty(weight.shape[0], device=weight.device, dtype=torch.float32)
    return torch_ops.quantize_rows(weight, codes, scale), scale


@dataclass
class Linear:
    """Weight [out, in] and bias [out]; fused projections are stacked along `out`; in FP8 a scale [out] goes with it."""

    weight: torch.Tensor
    bias: torch.Tensor
    scale: torch.Tensor | None = None


class Loader:
    """Copies checkpoint keys to their place on the device, in the working dtype, each exactly once."""

    def __init__(
        self, source: Mapping[str, torch.Tensor], device: torch.device | str, dtype: torch.dtype, *, fp8: bool = False
    ) -> None:
        self.source, self.fp8 = source, fp8
        self.device = torch.device(device)
        self.dtype = dtype

    def tensor(self, key: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """One tensor, reshaped when `shape` is given."""
        # copy=True: never keep a view of the memory-mapped file, whose pages could be slow or go away.
        loaded = self.source[key].to(device=self.device, dtype=self.dtype, copy=True)
        return loaded if shape is None else loaded.reshape(shape)

    def float32(self, key: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """One tensor of an fp32 region: the value in the working dtype, up-cast (spec dit.md section 2)."""
        return self.tensor(key, shape).float()

    def stacked(self, keys: Iterable[str]) -> torch.Tensor:
        """Several tensors, one below the other along the first dimension."""
        names = list(keys)
        first = self.source[names[0]]
        place = torch.empty((len(names) * first.shape[0], *first.shape[1:]), device=self.device, dtype=self.dtype)
        for i, part in enumerate(place.chunk(len(names))):
            part.copy_(self.source[names[i]] if i else first)
        return place

    def linear(self, *modules: str) -> Linear:
        """The linear layer of a module, or several modules with the same input fused into one."""
        return Linear(self.stacked(f"{m}.weight" for m in modules), self.stacked(f"{m}.bias" for m in modules))

    def linear8(self, *modules: str) -> Linear:
        """`linear` in FP8 where the loader quantises, or where the checkpoint is quantised already."""
        if not self.fp8:
            return self.linear(*modules)
        bias = self.stacked(f"{m}.bias" for m in modules)
        parts = []
        for module in modules:
            key = f"{module}.weight"
            weight = self.source[key].to(self.device)
            if f"{key}{SCALE}" in self.source:
                parts.append((weight, self.source[f"{key}{SCALE}"].to(self.device)))
            else:
                parts.append(quantize_weight(weight))
        codes, scales = zip(*parts, strict=True)
        # Bytes are joined as bytes, because FP8 has no concatenation of its own everywhere.
        joined = torch.cat([part.view(torch.uint8) for part in codes]).view(torch.float8_e4m3fn)
        return Linear(joined, bias, torch.cat(scales).float())

    def linear32(self, module: str) -> Linear:
        """The linear (or, flattened, the convolution) layer of an fp32 region."""
        return Linear(self.float32(f"{module}.weight"), self.float32(f"{module}.bias"))

    def patch(self, module: str) -> Linear:
        """A convolution whose stride is its kernel, as a linear layer over flattened patches."""
        weight = self.tensor(f"{module}.weight")
        return Linear(weight.flatten(1), self.tensor(f"{module}.bias"))
