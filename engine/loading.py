"""Which checkpoint, how and where: everything that the parts of a model are loaded by, in whatever process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from liverelay.engine.checkpoint import CheckpointFiles, find_checkpoint
from liverelay.engine.config import DiTConfig
from liverelay.engine.devices import check_device, check_fp8, default_device, default_dtype, fp8_parts
from liverelay.engine.errors import CheckpointError, InputError
from liverelay.engine.models.attention_choice import force_attention
from liverelay.engine.models.audio import AudioEncoder
from liverelay.engine.models.dit import DiT
from liverelay.engine.models.log_mel import load_encoder
from liverelay.engine.models.vae import VAE
from liverelay.engine.models.weights import is_quantized, open_tensors
from liverelay.engine.prompts import check_home
from liverelay.kernels import dispatch
from liverelay.kernels.attention_backends import named

Say = Callable[[str], None]


class LoadOptions(TypedDict, total=False):
    """Of `Engine.load`, which tells what they mean."""

    lora: str | Path | None
    dtype: torch.dtype | None
    backend: str | None
    fp8: bool | str
    text_encoder: str | None
    say: Say | None


@dataclass(frozen=True)
class Loader:
    """Made by `Loader.make`, which checks everything before anything long is read."""

    files: CheckpointFiles
    dtype: torch.dtype
    backend: str | None
    operators: str | None
    fp8: bool | str
    text_encoder: str | None
    say: Say

    @classmethod
    def make(
        cls, checkpoint: str | Path, devices: tuple[str, ...], *, lora: str | Path | None = None,
        dtype: torch.dtype | None = None, backend: str | None = None, fp8: bool | str = False,
        text_encoder: str | None = None, say: Say | None = None,
    ) -> Loader:
        """As `Engine.load`. CheckpointError and InputError say what is missing or cannot be."""
        check_home(text_encoder)
        files = find_checkpoint(Path(checkpoint), lora)
        missing = files.missing()
        if missing:
            more = f" (and {len(missing) - 1} more parts; see liverelay inspect)" if len(missing) > 1 else ""
            raise CheckpointError(f"{missing[0]} is missing{more}")
        device = devices[0]
        try:
            operators = None if named(backend, torch.device(device)) else backend
            dispatch.choose(operators, torch.device(device))
        except ValueError as error:
            raise InputError(str(error)) from None
        dtype = dtype or default_dtype(device)
        if dtype not in (torch.float32, torch.bfloat16):
            raise InputError(f"the engine computes in torch.float32 or torch.bfloat16, not {dtype!r}")
        fp8_parts(fp8)
        return cls(files, dtype, backend, operators, fp8, text_encoder, say or (lambda line: None))

    def open_dit(self, device: str) -> tuple[Mapping[str, Tensor], DiTConfig]:
        source, config = self.files.open_dit(device)
        if any(fp8_parts(self.fp8)) or is_quantized(source):
            check_fp8(device, self.dtype)
        return source, config

    def dit(self, device: str) -> DiT:
        """The transformer on a device, LoRA merged."""
        source, config = self.open_dit(device)
        merged = f"with the LoRA {self.files.lora.name}" if self.files.lora else "without a LoRA"
        self.say("loading the transformer " + ("as it was quantised" if is_quantized(source) else merged))
        products, attention = fp8_parts(self.fp8)
        dit = DiT.load(
            source, config, device=device, dtype=self.dtype, backend=self.operators, fp8=products,
            fp8_attention=attention,
        )
        if self.backend != self.operators:
            force_attention(dit, self.backend)
        return dit

    def vae(self, device: str) -> VAE:
        self.say("loading the VAE")
        return VAE.load(open_tensors(self.files.vae), device=device, dtype=self.dtype, backend=self.operators)

    def audio(self, device: str, config: DiTConfig) -> AudioEncoder:
        """The encoder of sound, which must fit the transformer."""
        self.say("loading the audio encoder")
        audio = load_encoder(self.files.audio, device=device, dtype=self.dtype)
        if (audio.num_states, audio.width) != (config.audio_states, config.audio_dim):
            raise CheckpointError(
                f"{self.files.audio} gives {audio.num_states} states of width {audio.width}, "
                f"the transformer expects {config.audio_states} of {config.audio_dim}"
            )
        return audio


def devices_of(device: str | torch.device | None) -> tuple[str, ...]:
    """`cuda:0,cuda:1` -> two devices, checked; None: a GPU where there is one. InputError else."""
    if not isinstance(device, str | torch.device | None):
        raise InputError(f"a device is a name, as in cuda:1, not {device!r}")
    return tuple(check_device(name.strip()) for name in str(device or default_device()).split(","))
