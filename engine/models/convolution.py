"""Convolutions that say for themselves whether a GPU may round their float32 operands to TF32.

PyTorch decides that by a switch of the process (`torch.backends.cudnn.allow_tf32`, on by default). A stage must not
turn it: other stages, and other engines, compute in threads of the same process.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0, groups: int = 1, tf32: bool = False,
) -> Tensor:
    """As `F.conv1d`, `conv2d` and `conv3d`, by the weight's dimensions; on a CPU equal to them bit for bit.

    x [n, C, ...], weight [C', C / groups, ...], bias [C'], all of one dtype -> [n, C', ...]. tf32: float32 operands
    may be rounded to TF32, which a GPU multiplies many times faster.
    """
    dims, cudnn = weight.dim() - 2, torch.backends.cudnn
    steps, edges = ([given] * dims if isinstance(given, int) else list(given) for given in (stride, padding))
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    result: Tensor = torch.ops.aten._convolution.default(
        x, weight, bias, steps, edges, [1] * dims, False, [0] * dims, groups, cudnn.benchmark, deterministic,
        cudnn.enabled, tf32,
    )  # fmt: skip
    return result


def make_exact(module: torch.nn.Conv1d) -> None:
    """Let a convolution of somebody else's model compute in float32 where its weights are float32."""
    stride, padding, groups = module.stride, module.padding, module.groups
    if isinstance(padding, str) or module.padding_mode != "zeros" or module.dilation != (1,):
        raise ValueError(f"{module} is none that `convolve` computes")

    def forward(x: Tensor) -> Tensor:
        return convolve(x, module.weight, module.bias, stride=stride, padding=padding, groups=groups)

    module.forward = forward  # type: ignore[method-assign, assignment]
