"""LoRA merged into the base weights at load: W' = R(float(W) + scale * (float(B) @ float(A))) (spec dit.md 2.1)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch

from liverelay.engine.errors import CheckpointError

PUBLISHED_ALPHA = 64.0
_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")


class MergedSource(Mapping[str, torch.Tensor]):
    """A source of base weights in which every weight that the LoRA names comes out merged.

    `shapes` are the base's. CheckpointError when a LoRA key has an unknown spelling, fits no base weight, lacks its
    other half or has a shape that does not fit: nothing of a LoRA is ever ignored silently.
    """

    def __init__(
        self,
        base: Mapping[str, torch.Tensor],
        lora: Mapping[str, torch.Tensor],
        *,
        alpha: float = PUBLISHED_ALPHA,
        device: torch.device | str = "cpu",
        what: str = "the LoRA file",
    ) -> None:
        self.base, self.lora, self.alpha, self.device = base, lora, alpha, device
        self.shapes: dict[str, tuple[int, ...]] = getattr(base, "shapes", None) or {
            key: tuple(tensor.shape) for key, tensor in base.items()
        }
        self._pairs: dict[str, dict[str, str]] = {}
        lora_shapes = getattr(lora, "shapes", None) or {key: tuple(tensor.shape) for key, tensor in lora.items()}
        for key in lora:
            match = _KEY.match(key)
            if match is None:
                raise CheckpointError(f"{what} holds '{key}', which is no lora_A or lora_B weight")
            weight = f"{match['module']}.weight"
            if weight not in self.shapes:
                raise CheckpointError(f"{what} holds '{key}', which fits no weight of the base model")
            if match["side"] in self._pairs.setdefault(weight, {}):
                raise CheckpointError(f"{what} names lora_{match['side']} of '{match['module']}' twice")
            self._pairs[weight][match["side"]] = key
        for weight, pair in self._pairs.items():
            if len(pair) < 2:
                raise CheckpointError(f"{what} holds only half of a pair: '{next(iter(pair.values()))}'")
            a, b, base_shape = lora_shapes[pair["A"]], lora_shapes[pair["B"]], self.shapes[weight]
            if len(base_shape) != 2 or a != (b[-1], base_shape[1]) or b != (base_shape[0], a[0]):
                fault = f"'{pair['A']}' {list(a)} and its B {list(b)} do not fit {list(base_shape)}"
                raise CheckpointError(f"{what}: {fault}")

    @property
    def merged_keys(self) -> list[str]:
        """Base keys that the LoRA changes."""
        return list(self._pairs)

    def __getitem__(self, key: str) -> torch.Tensor:
        weight = self.base[key]
        pair = self._pairs.get(key)
        if pair is None:
            return weight
        a = self.lora[pair["A"]].to(self.device, torch.float32)
        b = self.lora[pair["B"]].to(self.device, torch.float32)
        merged = weight.to(self.device, torch.float32) + (self.alpha / a.shape[0]) * (b @ a)
        return merged.to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)
