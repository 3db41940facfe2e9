"""Kernels run on the GPU where there is one, else in Triton's interpreter, which needs a process of its own."""

from __future__ import annotations

import pytest
import torch

from liverelay.kernels.launch import INTERPRETED


@pytest.fixture
def device() -> torch.device:
    """Where kernels run in this process."""
    return torch.device("cpu" if INTERPRETED else "cuda")
