"""Kernels run on the GPU where there is one, else in Triton's interpreter, which needs a process of its own.

LIVERELAY_KERNEL_FAMILY=attention_gluon keeps to the tests of one file of kernels/: a fault on a GPU ends everything
that comes after it in the process. A test belongs to its spec's family, else to its file's FAMILY, else to "other".
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from liverelay.kernels.launch import INTERPRETED
from liverelay.kernels.registry import KERNELS
from liverelay.kernels.spec import KernelSpec

HERE = Path(__file__).parent
CHOSEN = "LIVERELAY_KERNEL_FAMILY"
FAMILIES = sorted({spec.family for spec in KERNELS} | {"model", "other"})


def family(item: Any) -> str:
    spec = getattr(item, "callspec", None) and item.callspec.params.get("spec")
    return spec.family if isinstance(spec, KernelSpec) else getattr(item.module, "FAMILY", "other")


def others(items: Iterable[Any], wanted: str) -> list[Any]:
    """This folder's tests of other families."""
    if wanted not in FAMILIES:
        raise pytest.UsageError(f"{CHOSEN}={wanted}; there is: {', '.join(FAMILIES)}")
    return [item for item in items if item.path.is_relative_to(HERE) and family(item) != wanted]


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    if wanted := os.environ.get(CHOSEN):
        left_out = others(items, wanted)
        config.hook.pytest_deselected(items=left_out)
        kept = set(items).difference(left_out)
        items[:] = [item for item in items if item in kept]


@pytest.fixture
def device() -> torch.device:
    """Where kernels run in this process."""
    return torch.device("cpu" if INTERPRETED else "cuda")
