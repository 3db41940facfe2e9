"""Muon: momentum whose matrices are made orthogonal before they are applied, beside AdamW for all other weights.

torch.optim.Muon computes in bfloat16, which CPUs without instructions for it do four times slower than float32.
Source: arXiv 2502.16982 (with its scale of the update, so that both optimisers take the same learning rate).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LAYERS = ("blocks.",)  # of the transformer
QUINTIC = (3.4445, -4.775, 2.0315)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U V' of matrix = U S V', by Newton-Schulz iterations: singular values end between 0.7 and 1.2."""
    a, b, c = QUINTIC
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """For matrices, and for convolutions, whose filters are the rows of one."""

    def __init__(self, weights: list[Tensor], rate: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        super().__init__(weights, {"lr": rate, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["mean"] = torch.zeros_like(weight)
                mean = state["mean"].lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonal(weight.grad.lerp(mean, group["momentum"]).flatten(1))
                weight.mul_(1 - group["lr"] * group["decay"])
                weight.add_(update.view(weight.shape), alpha=-group["lr"] * 0.2 * max(update.shape) ** 0.5)


class Optimisers:
    """Muon for the matrices inside (names with one of these parts), AdamW for the rest, as one."""

    def __init__(self, model: nn.Module, rate: float, inside: tuple[str, ...], *, momentum: float = 0.95) -> None:
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for name, weight in model.named_parameters():
            matrix = weight.dim() in (2, 4, 5) and weight[0].numel() > 1
            if weight.requires_grad:
                parts[matrix and any(part in name for part in inside)].append(weight)
        self._both = (
            torch.optim.AdamW(parts[0], rate, betas=(momentum, 0.99), weight_decay=0.01),
            Muon(parts[1], rate, momentum),
        )

    def step(self, rate: float | None = None) -> None:
        """Apply the gradients, at this learning rate if it is given, and drop them."""
        for optimiser in self._both:
            for group in optimiser.param_groups:
                group["lr"] = group["lr"] if rate is None else rate
            optimiser.step()
            optimiser.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {str(i): optimiser.state_dict() for i, optimiser in enumerate(self._both)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, optimiser in enumerate(self._both):
            optimiser.load_state_dict(state[str(i)])
