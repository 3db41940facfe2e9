"""The engine's own trial of attentions, run on our kernels."""

from __future__ import annotations

import pytest
import torch

from liverelay.kernels import attention
from liverelay.kernels.attention_backends import try_out


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shape", [(70, 150, 2, 64), (33, 16, 1, 32)])
def test_our_attentions_pass_their_trial(shape: tuple[int, int, int, int], fp8: bool, device: torch.device) -> None:
    if fp8 and device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 here")
    found = {"pointer": attention.attention_pointer}
    if device.type == "cpu" or torch.cuda.get_device_capability() >= (9, 0):
        found["descriptor"] = attention.attention_descriptor
    trials = try_out(found, shape, torch.zeros(1, device=device, dtype=torch.bfloat16), fp8=fp8)
    assert [trial.fault for trial in trials] == [""] * len(found)
