"""A session between two blocks as data: all that is needed to go on with it bit for bit, elsewhere and later.

It holds the state of every stage under names that no plan changes, so it can be resumed on another mapping of stages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from liverelay.engine.errors import InputError
from liverelay.engine.models.dit import DiT
from liverelay.engine.models.weights import save_tensors

# The number goes up whenever what is in the tensors means something else. 2: the text's keys carry the weight of the
# queries' norm; in FP8 attention each head has one scale, and queries and keys are transformed.
FORMAT = "liverelay session 2"
GIVEN = ("given.text", "given.reference", "given.motion", "track.sound")


def _is_whole(value: Any) -> bool:
    return type(value) is int


FACTS: dict[str, Callable[[Any], bool]] = {  # what a snapshot says beside its model and stream, and of which form
    "seed": _is_whole,
    "session_id": _is_whole,
    "next": lambda value: _is_whole(value) and value >= 0,
    "latent": lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_whole, value)),
    "numbers": lambda value: isinstance(value, dict) and all(map(_is_whole, value.values())),
    "track": lambda value: isinstance(value, dict) and value.get("kind") in ("file", "live"),
}


@dataclass(frozen=True)
class Snapshot:
    """tensors, on the CPU, by what they are of (`given.`, `stage.`, `frames.`, `sound.`, `track.`); facts: the rest."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        for name, fits in FACTS.items():
            if not fits(self.facts.get(name)):
                raise InputError(f"the snapshot is damaged: its {name} is {self.facts.get(name)!r:.60}")
        sounds = [f"sound.{block}" for block in self.part("frames")]
        for name in (*GIVEN, *sounds):
            if name not in self.tensors:
                raise InputError(f"the snapshot is damaged: it lacks {name}")

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one kind, by the rest of their names."""
        return {key.removeprefix(f"{name}."): t for key, t in self.tensors.items() if key.startswith(f"{name}.")}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; it gets its name when it is whole. OutputError when it cannot be written."""
        save_tensors(Path(path), self.tensors, {"liverelay": json.dumps({"format": FORMAT, **self.facts})})

    @classmethod
    def load(cls, path: str | Path) -> Snapshot:
        """Read a file of `save`. InputError when it is none, or not whole."""
        try:
            with safe_open(str(path), "pt") as file:
                facts = json.loads((file.metadata() or {}).get("liverelay", "{}"))
                written = facts.pop("format", None) if isinstance(facts, dict) else None
                if not isinstance(written, str) or not written.startswith("liverelay session "):
                    raise InputError("this is no snapshot of a session")
                if written != FORMAT:
                    raise InputError(
                        f"another version of liverelay wrote this snapshot ('{written:.60}', here '{FORMAT}'); go on "
                        "with that version, or open a new session"
                    )
                return cls({name: file.get_tensor(name) for name in file.keys()}, facts)  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            if isinstance(error, InputError):
                raise InputError(f"{path}: {error}") from None
            raise InputError(f"{path} cannot be read as a snapshot: {error}") from None

    def check(self, name: str, value: Any) -> None:
        """InputError unless the snapshot was made with this value."""
        if self.facts.get(name) != value:
            raise InputError(f"the snapshot is of another {name}: {self.facts.get(name)}, here it is {value}")


def model_id(dit: DiT) -> str:
    """Tells checkpoints and precisions apart: a digest of sizes and of some weights that every fine-tuning changes."""
    layer, digest = dit.weights.layers[0], hashlib.sha256()
    digest.update(f"{dit.config} {dit.dtype} {dit.weights.fp8} {dit.fp8_attention}".encode())
    for weight in (dit.weights.patch.weight, layer.self_attn.first.weight, layer.ffn_out.weight):
        digest.update(weight[:64].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
