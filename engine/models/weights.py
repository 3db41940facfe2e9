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
from liverelay.kernels import torch_ops

Shapes = Mapping[str, tuple[int, ...]]


class TensorSource(Mapping[str, torch.Tensor]):
    """Tensors of one or several safetensors files, read when asked for. CheckpointError names a file that is broken."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._file_of: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.files = list(files)
        for path in self.files:
            try:
                handle = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(f"{path} is missing") from None
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


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file aside and rename it, readable by whom the user's umask says. OutputError in one line."""
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


def dit_shapes(c: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Every key of the published DiT with its shape (spec dit.md section 2)."""
    d = c.dim

    def linear(name: str, out: int, inner: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}

    def attention(name: str) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {f"{name}.norm_q.weight": (d,), f"{name}.norm_k.weight": (d,)}
        for part in "qkvo":
            shapes |= linear(f"{name}.{part}", d, d)
        return shapes

    def conv(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    shapes = conv("patch_embedding", d, c.in_channels, 1, 2, 2) | conv("cond_encoder", d, c.cond_channels, 1, 2, 2)
    shapes |= linear("text_embedding.0", d, c.text_dim) | linear("text_embedding.2", d, d)
    shapes |= linear("time_embedding.0", d, c.freq_dim) | linear("time_embedding.2", d, d)
    shapes |= linear("time_projection.1", 6 * d, d) | {"trainable_cond_mask.weight": (3, d)}
    for name, stride in (("proj", 1), ("proj_2x", 2), ("proj_4x", 4)):
        shapes |= conv(f"frame_packer.{name}", d, c.in_channels, stride, 2 * stride, 2 * stride)
    for i in range(c.num_layers):
        block = f"blocks.{i}"
        shapes |= attention(f"{block}.self_attn") | attention(f"{block}.cross_attn")
        shapes |= {f"{block}.modulation": (1, 6, d), f"{block}.norm3.weight": (d,), f"{block}.norm3.bias": (d,)}
        shapes |= linear(f"{block}.ffn.0", c.ffn_dim, d) | linear(f"{block}.ffn.2", d, c.ffn_dim)
    shapes |= {"head.modulation": (1, 2, d)} | linear("head.head", 4 * c.in_channels, d)
    audio = "casual_audio_encoder"
    heads = c.num_audio_tokens
    shapes |= {f"{audio}.weights": (1, c.audio_states, 1, 1), f"{audio}.encoder.padding_tokens": (1, 1, 1, d)}
    shapes |= conv(f"{audio}.encoder.conv1_local.conv", d // 4 * heads, c.audio_dim, 3)
    shapes |= conv(f"{audio}.encoder.conv1_global.conv", d // 4, c.audio_dim, 3)
    shapes |= conv(f"{audio}.encoder.conv2.conv", d // 2, d // 4, 3) | conv(f"{audio}.encoder.conv3.conv", d, d // 2, 3)
    shapes |= linear(f"{audio}.encoder.final_linear", d, d)
    for j in range(len(c.audio_inject_layers)):
        shapes |= attention(f"audio_injector.injector.{j}")
        shapes |= linear(f"audio_injector.injector_adain_layers.{j}.linear", 2 * d, d)
    return shapes


SCALE = "_scale"  # follows the key of a weight that is stored in FP8


def fp8_modules(c: DiTConfig) -> list[str]:
    """The linear layers that run in FP8: those of the stage loop, but not the small or float32 ones."""
    names = [f"self_attn.{part}" for part in "qkvo"] + ["cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2"]
    modules = [f"blocks.{i}.{name}" for i in range(c.num_layers) for name in names]
    return modules + [f"audio_injector.injector.{j}.{part}" for j in range(len(c.audio_inject_layers)) for part in "qo"]


def is_quantized(shapes: Iterable[str]) -> bool:
    """Whether a checkpoint was written by `liverelay quantize`."""
    return any(key.endswith(f".weight{SCALE}") for key in shapes)


def check_dit(shapes: Shapes, config: DiTConfig, what: str) -> None:
    """CheckpointError that names the first key of a transformer, quantised or not, that does not fit."""
    expected = dit_shapes(config)
    if is_quantized(shapes):
        expected |= {f"{m}.weight{SCALE}": expected[f"{m}.weight"][:1] for m in fp8_modules(config)}
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
